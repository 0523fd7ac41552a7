# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from monai_losses_ext.cli import _parser
from monai_losses_ext.extras import EXTRAS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"^```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_snippet_runs_and_its_two_losses_are_the_same(capsys):
    (snippet,) = SNIPPETS
    names = {}
    exec(snippet, names)
    assert capsys.readouterr().out == "{'dice': 0.7, 'focal': 0.3}\n"
    logits, labels = names["logits"], names["labels"]
    assert logits.grad.abs().sum() > 0
    assert names["same"](logits, labels).item() == pytest.approx(names["loss"](logits, labels).item(), rel=1e-6)
    assert names["same"](logits, labels[:, 0]).item() == pytest.approx(names["same"](logits, labels).item(), rel=1e-6)


def test_marks_are_read_by_something():
    """Each pair of marks is a place that the benchmark's report fills, or the command that CI runs."""
    readers = [
        ROOT / path
        for path in (".ci/run", "monai_losses_ext/benchmark/report.py", "monai_losses_ext/bundlekit/overlays.py")
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in readers)
    marks = set(re.findall(r"<!-- (/?[\w-]+) -->", README))
    assert marks and {f"/{mark}" for mark in marks if not mark.startswith("/")} <= marks
    assert all(re.search(rf"\b{mark.lstrip('/')}\b", text) for mark in marks)


def test_the_first_block_makes_the_environment_that_the_others_run_in():
    assert BLOCKS[0] == [
        "python3 -m venv .venv",
        "source .venv/bin/activate",
        '.venv/bin/pip install -e ".[bundles,fast]" -c constraints.txt',
        ".venv/bin/python -m monai_losses_ext quickstart",
    ]
    assert set(re.findall(r"^\| `(\w+)` \| [^`]", README, re.MULTILINE)) - {"dev"} <= EXTRAS.keys()


def test_the_test_command_is_found_where_ci_looks_for_it():
    (marked,) = re.findall(r"<!-- test-command -->\n```bash\n(.*?)```\n<!-- /test-command -->", README, re.DOTALL)
    assert marked.splitlines() in BLOCKS
    assert '.venv/bin/pip install -q -e ".[dev]" -c constraints.txt' in marked
    assert marked.splitlines()[-1].startswith(".venv/bin/python -m pytest ")


OTHERS = [line for block in BLOCKS[1:] for line in block if not line.startswith((".venv/", "python3 -m venv"))]


@pytest.mark.parametrize("line", [*OTHERS, BLOCKS[0][-1].removeprefix(".venv/bin/")])
def test_every_command_can_be_pasted(line):
    """It is one whole command with nothing to fill in, and its files and options are there."""
    assert not re.search(r"\bDIR\b|\.\.\.|<|\\$", line)
    python, dash_m, module, *words = shlex.split(line)
    assert (python, dash_m) == ("python", "-m") and module in ("monai.bundle", "monai_losses_ext")
    if module == "monai_losses_ext":
        assert _parser().parse_args(words).command
        return
    run, *words = words
    options = dict(zip(words[::2], words[1::2], strict=True))
    given = options.pop("--config_file")
    files = re.findall(r"'([^']+)'", given) or [given]
    config = ConfigParser.load_config_files([str(ROOT / file) for file in files])
    assert run == "run" and {name.removeprefix("--").split("#")[0] for name in options} <= set(config)
    assert options["--dataset_dir"].startswith("data/")


def test_the_data_come_before_the_training_that_reads_them():
    lines = [line for block in BLOCKS for line in block]
    made = [i for i, line in enumerate(lines) if "data download --task Task04_Hippocampus --out data" in line]
    reads = [i for i, line in enumerate(lines) if "--dataset_dir data/Task04_Hippocampus" in line]
    assert len(made) == 1 and reads and made[0] < min(reads)
    (phantoms,) = [i for i, line in enumerate(lines) if "data phantoms" in line]
    assert lines[phantoms].endswith("--out data/Task04_Hippocampus")
    # phantoms come without imagesTs
    assert not [line for line in lines if re.search(r"data/Task04_Hippocampus/(?!imagesTr$|labelsTr$)", line)]


def test_paths_that_the_text_names_are_there():
    paths = re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"\b((?:bundles|configs)/[\w/]+\.json)", README)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
