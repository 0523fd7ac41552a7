# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundles are what the template and the rows say, byte for byte; a new task is a new row."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles.helpers import REPOSITORY
from monai.bundle import ConfigParser

from monai_losses_ext.bundlekit import check, render
from monai_losses_ext.bundlekit.render import render_task
from monai_losses_ext.data.tasks import TASKS, Task, get_task
from monai_losses_ext.shipped import OF_RUNS

BUNDLES = REPOSITORY / "bundles"
render_module = importlib.import_module("monai_losses_ext.bundlekit.render")  # the package has a function of that name


def test_committed_bundles_are_the_rendering() -> None:
    assert check(BUNDLES) == []


def test_every_task_has_a_bundle_with_the_zoos_files(tmp_path: Path) -> None:
    render(tmp_path / "bundles")
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == sorted(
        task.bundle for task in TASKS.values()
    )
    for folder in (tmp_path / "bundles").iterdir():
        for name in ("configs/metadata.json", "configs/inference.json", "docs/README.md", "LICENSE", "models"):
            assert (folder / name).exists()


def test_check_names_the_file_with_a_changed_byte(tmp_path: Path) -> None:
    render(tmp_path / "bundles")
    assert check(tmp_path / "bundles") == []
    for path in sorted((tmp_path / "bundles" / get_task("Task04_Hippocampus").bundle).rglob("*.*")):
        original = path.read_bytes()
        path.write_bytes(original.replace(b"e", b"f", 1) if original else b"\n")
        assert check(tmp_path / "bundles") == [f"{path}: differs from the template"]
        path.unlink()
        assert check(tmp_path / "bundles") == [f"{path}: absent"]
        path.write_bytes(original)


def test_check_sees_line_endings(tmp_path: Path) -> None:
    path = render(tmp_path / "bundles")[0]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(tmp_path / "bundles") == [f"{path}: differs from the template"]


def test_render_leaves_weights_alone(tmp_path: Path) -> None:
    weights = tmp_path / "bundles" / get_task("Task04_Hippocampus").bundle / "models" / "model.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    render(tmp_path / "bundles")
    assert weights.read_bytes() == b"weights"


def made_up_task() -> Task:
    """Return a CT task with two channels and a name that needs quoting, unlike any of the Decathlon's."""
    base = get_task("Task04_Hippocampus")
    network = {**base.training.network_def, "in_channels": 2, "out_channels": 4}
    training = dataclasses.replace(base.training, network_def=network, flip_axes=(0, 2), epochs=7)
    return dataclasses.replace(
        base,
        name="Task99_Knee",
        bundle="msd_knee_ct_segmentation",
        modality="CT",
        channels=("soft", "hard"),
        labels=("background", "bone", 'the "other"', "fluid"),
        intensity={"rule": "window", "low": -100, "high": 300, "mean": 100, "std": 50},
        training=training,
    )


def test_a_new_task_is_a_new_row() -> None:
    files = render_task(made_up_task())
    assert {name.split("/")[0] for name in files} == {"msd_knee_ct_segmentation"}
    train, inference, metadata = (
        json.loads(files[f"msd_knee_ct_segmentation/configs/{name}.json"])
        for name in ("train", "inference", "metadata")
    )
    assert train["epochs"] == 7
    assert train["labels"] == {"0": "background", "1": "bone", "2": 'the "other"', "3": "fluid"}
    network = {**made_up_task().training.network_def, "out_channels": "$len(@labels)"}  # labels are the one source
    assert train["network_def"] == inference["network_def"] == network
    flips = [step for step in train["train"]["random_transforms"] if step["_target_"] == "RandFlipd"]
    assert [step["spatial_axis"] for step in flips] == [0, 2]
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == train["labels"]
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 2
    assert "ippocampus" not in json.dumps([train, inference])


@pytest.mark.parametrize("config", ["train", "inference"])
def test_ct_window_maps_its_bounds_to_z_scores(config: str) -> None:
    steps = find_steps(json.loads(render_task(made_up_task())[f"msd_knee_ct_segmentation/configs/{config}.json"]))
    windows = [step for step in steps if step["_target_"] == "ScaleIntensityRanged"]
    assert len(windows) == (2 if config == "train" else 1)  # training and validation, or inference
    for step in windows:
        assert (step["a_min"], step["a_max"], step["b_min"], step["b_max"]) == (-100, 300, -4.0, 4.0)
        assert step["clip"] is True


def find_steps(config: Any) -> list[dict[str, Any]]:
    """Return every dictionary with a ``_target_`` inside a config."""
    inside = config.values() if isinstance(config, dict) else config if isinstance(config, list) else []
    found = [config] if isinstance(config, dict) and "_target_" in config else []
    return found + [step for value in inside for step in find_steps(value)]


def commands(readme: Path) -> list[list[str]]:
    """Return the words after ``monai.bundle run`` of each such command in a README's blocks of code."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("monai.bundle run ")[1]) for line in lines if "monai.bundle run " in line]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_commands_of_the_readme_have_files_and_options_that_exist(task: Task) -> None:
    readme = BUNDLES / task.bundle / "docs" / "README.md"
    found = commands(readme)
    seen = set()
    for words in found:
        options = dict(zip(words[::2], words[1::2], strict=True))
        given = options.pop("--config_file")
        files = ast.literal_eval(given) if given.startswith("[") else [given]
        seen |= {Path(file).name for file in files}
        config = ConfigParser.load_config_files([str(REPOSITORY / file) for file in files])
        assert {name.removeprefix("--").split("#")[0] for name in options} <= set(config)
        assert f"bundles/{task.bundle}/configs" in files[0]
    assert seen == {"train.json", "evaluate.json", "inference.json", "multi_gpu_train.json"}
    assert len(found) >= 7
    of_inference = [word for words in found if words[1].endswith("inference.json") for word in words]
    assert {"--labels", "--nan_to_num"} <= set(of_inference)
    overlays = set(re.findall(r"[`'](configs/[\w/]+\.json)", readme.read_text(encoding="utf-8")))
    assert "configs/losses/tversky.json" in overlays
    assert [path for path in overlays if not (REPOSITORY / path).is_file()] == []


def test_readme_says_on_how_many_cases_its_figures_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = get_task("Task04_Hippocampus")
    results = json.loads((render_module.RESULTS / "hippocampus.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(render_module, "RESULTS", tmp_path)
    (tmp_path / "hippocampus.json").write_text(json.dumps({**results, "n_training": 70, "n_validation": 30}))
    sentence = "Trained on 70 cases and measured on 30 held-out cases that training never saw (100 of the 260 labeled"
    assert sentence in render_task(task)[f"{task.bundle}/docs/README.md"]
    del results["n_training"]
    (tmp_path / "hippocampus.json").write_text(json.dumps(results))
    assert f"\nOn {results['n_validation']} held-out cases" in render_task(task)[f"{task.bundle}/docs/README.md"]


def test_check_names_files_that_are_not_of_the_template(tmp_path: Path) -> None:
    render(tmp_path / "bundles")
    bundle = tmp_path / "bundles" / get_task("Task04_Hippocampus").bundle
    of_runs = ["models/model.pt", "models/model.ts", "output/curves.png", "eval/a.csv", "data/Task04/dataset.json"]
    strangers = [
        tmp_path / "bundles" / "msd_old" / "LICENSE",
        bundle / "configs" / "old_train.json",
        bundle / "models" / "a.txt",
    ]
    for path in [*strangers, *(bundle / name for name in of_runs)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(check(tmp_path / "bundles")) == sorted(f"{path}: not of the template" for path in strangers)


def test_rendering_outside_a_checkout_is_refused_in_one_line(tmp_path: Path) -> None:
    """An installed package has no results, so that every README would say that nothing was trained."""
    shutil.copytree(REPOSITORY / "monai_losses_ext", tmp_path / "monai_losses_ext")
    shutil.copytree(BUNDLES, tmp_path / "bundles", ignore=shutil.ignore_patterns(*OF_RUNS))
    for action in ("render", "check"):
        status, error = command(tmp_path, "bundles", action)
        assert status == 1
        assert error.startswith("error: bundles: must be rendered and checked in a checkout of the project")
        assert error.count("\n") == 1


def command(cwd: Path, *words: str) -> tuple[int, str]:
    """Run the command line of the package in a folder; return its exit status and what it wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    line = [sys.executable, "-W", "ignore", "-m", "monai_losses_ext", *words]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


NEW_LOSS = '''
from monai_losses_ext.losses.dice import DiceLoss


class SoftJaccardLoss(DiceLoss):
    """Penalize a small intersection over union.

    Args:
        softmax: take a softmax over the channels of the input.
        sigmoid: take a sigmoid per channel of the input.
    """

    def __init__(self, softmax: bool = False, sigmoid: bool = False) -> None:
        super().__init__(softmax=softmax, sigmoid=sigmoid, jaccard=True)
'''


def test_a_new_loss_is_a_file_an_entry_and_one_render(tmp_path: Path) -> None:
    """In a copy of the tree: its overlay, the schema and README's table follow, and check asks for them before."""
    for name in ("monai_losses_ext", "bundles", "configs", "docs/benchmarks"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", *OF_RUNS[:2]))
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    losses = tmp_path / "monai_losses_ext" / "losses"
    (losses / "soft_jaccard.py").write_text(NEW_LOSS)
    table = (losses / "__init__.py").read_text()
    table = table.replace(
        '"compound": CompoundLoss,', '"soft_jaccard": SoftJaccardLoss,\n    "compound": CompoundLoss,'
    )
    imported = "from monai_losses_ext.losses.soft_jaccard import SoftJaccardLoss\n"
    (losses / "__init__.py").write_text(table.replace("\nLOSSES", f"\n{imported}LOSSES", 1))

    status, problems = command(tmp_path, "bundles", "check")
    assert status == 1
    assert sorted(line.split(": ")[0] for line in problems.splitlines()) == [
        "README.md",
        "configs/loss.schema.json",
        "configs/losses/soft_jaccard.json",
    ]
    assert command(tmp_path, "bundles", "render")[0] == 0
    assert command(tmp_path, "bundles", "check") == (0, "")
    overlay = json.loads((tmp_path / "configs" / "losses" / "soft_jaccard.json").read_text())
    assert overlay["loss_config"] == {"type": "soft_jaccard"}
    assert overlay["_note_"] == "Penalize a small intersection over union."
    schema = json.loads((tmp_path / "configs" / "loss.schema.json").read_text())
    assert {"type", "softmax", "sigmoid"} <= schema["$defs"]["soft_jaccard"]["properties"].keys()
    row = "| `soft_jaccard` | `SoftJaccardLoss` | Penalize a small intersection over union. |\n"
    assert row in (tmp_path / "README.md").read_text()


def test_check_names_an_overlay_of_a_loss_that_is_not_there(tmp_path: Path) -> None:
    render(tmp_path / "bundles")
    stranger = tmp_path / "configs" / "losses" / "dise.json"
    stranger.touch()
    assert check(tmp_path / "bundles") == [f"{stranger}: not of the template"]
