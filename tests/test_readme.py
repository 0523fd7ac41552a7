# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
    readers = [Path(__file__).parents[1] / path for path in (".ci/run", "monai_losses_ext/benchmark/report.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in readers)
    marks = set(re.findall(r"<!-- (/?[\w-]+) -->", README))
    assert marks and {f"/{mark}" for mark in marks if not mark.startswith("/")} <= marks
    assert all(re.search(rf"\b{mark.lstrip('/')}\b", text) for mark in marks)
