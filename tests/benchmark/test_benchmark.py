# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The committed results, the tables made of them, and a small real measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_losses_ext.benchmark import __main__ as command
from monai_losses_ext.benchmark import cases, report

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results():
    for path, text in report.tables(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python -m monai_losses_ext.benchmark report"


def test_committed_results_say_how_they_came_about():
    result = json.loads((ROOT / "docs" / "benchmarks" / "speed--cpu.json").read_text())
    assert {"date", "commit", "command", "cpu", "threads", "seed", "versions"} <= result["about"].keys()
    names = {(row["loss"], row["shape"]) for row in result["speed"]}
    assert {("dice_ce", "2x3x128^3"), ("dice_ce", "2x14x96^3")} <= names
    for row in result["speed"]:
        assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]


@pytest.mark.filterwarnings("ignore")
def test_a_small_measurement(tmp_path):
    out = tmp_path / "speed.json"
    arguments = ["speed", "--shapes", "2x3x96^3", "--losses", "dice", "dice_focal_ce", "--repeats", "2", "--no-memory"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["speed"]
    assert [row["loss"] for row in rows] == ["dice", "dice_focal_ce"]
    assert all(row["ours_ms"]["both"]["median"] > 0 for row in rows)


def test_a_case_that_disagrees_is_not_timed(monkeypatch):
    from monai_losses_ext.benchmark import speed

    wrong = cases.Pair(lambda x, y: 2 * x.sum(), lambda x, y: x.sum(), "the truth")
    monkeypatch.setattr(speed, "loss_pairs", lambda: {"dice": wrong})
    monkeypatch.setitem(cases.SHAPES, "2x3x96^3", (1, 3, 16, 16, 16))
    with pytest.raises(RuntimeError, match="must agree before they are timed"):
        speed.measure_speed("dice", "2x3x96^3", 1, 0)
