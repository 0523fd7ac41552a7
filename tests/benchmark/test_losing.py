# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The list of what ours loses names every losing row of the tables, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monai_losses_ext.benchmark.losing import losing_list

DOCS = Path(__file__).parents[2] / "docs"


def committed(name):
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text())


def test_the_page_names_every_losing_row_of_the_speed_table():
    page = (DOCS / "training" / "performance.md").read_text().partition("## Where we do not win")[2]
    rows = [row for row in committed("speed--cpu")["speed"] if row["loss"] != "floor"]
    named = [row for row in rows if f"- CPU, {row['loss']}, {row['shape']}: " in page]
    assert named == [
        row for row in rows if max(row[kind]["median"] for kind in ("ratio", "compiled_ratio") if kind in row) > 1
    ]


@pytest.mark.parametrize("index", [0, 9, 30])
def test_a_row_that_loses_is_named_and_one_that_wins_is_not(index):
    result = committed("speed--cpu")
    for row in result["speed"]:
        row["ratio"]["median"] = 0.9
        row.pop("compiled_ratio", None)  # as where there is no compiler
    assert losing_list({"speed--cpu": result}) == "- nowhere in what was measured\n"
    row = result["speed"][index]
    row["ratio"]["median"] = 1.25
    expected = f"- CPU, {row['loss']}, {row['shape']}: 1.25 times the time of {row['baseline']}\n"
    assert losing_list({"speed--cpu": result}) == expected
    row["compiled_ratio"] = {"median": 1.5}
    expected += f"- CPU, {row['loss']}, {row['shape']}: 1.50 times the time of {row['baseline']}, compiled\n"
    assert losing_list({"speed--cpu": result}) == expected


def test_distance_maps_against_monais_and_steps_and_memory():
    distance, step, memory = (committed(f"{suite}--cpu") for suite in ("distance", "step", "memory"))
    for row in distance["distance"]:
        row["ratio"]["median"] = 1.5 if row["what"] == "maps" and row["backend"] == "edt" else 0.5
        if row["baseline"].startswith("ours"):
            row["ratio"]["median"] = 2.0  # what a further term costs is no contest
    step["step"] = step["step"][:1]
    ours, theirs = step["step"][0]["sides"].values()
    ours["loss_ms"]["median"], theirs["loss_ms"]["median"] = 3.0, 2.0
    row = memory["memory"][1]
    row["ours_copies"] = 2 * row["baseline_copies"]
    lines = losing_list({"distance--cpu": distance, "step--cpu": step, "memory--cpu": memory}).splitlines()
    assert lines == [
        "- CPU, signed maps by edt, 2x3x96^3: 1.50 times the time of MONAI compute_distance_map",
        "- CPU, dice_ce in a step of msd_hippocampus_mri_segmentation: 1.50 times the time of MONAI DiceCELoss",
        f"- CPU, {row['loss']}, {row['shape']}: 2.00 times the memory of the baseline",
    ]


def test_a_gpus_sides_and_maps():
    def side(ms, copies):
        return {"ms": {"both": {"median": ms}}, "copies": copies}

    unfit = {"error": "out of memory"}
    sides = [
        {"ours": side(2.0, 1.0), "MONAI DiceLoss": side(1.0, 4.0), "MONAI DiceLoss, compiled": unfit},
        {"ours": unfit, "MONAI DiceLoss": side(1.0, 4.0), "MONAI DiceLoss, compiled": unfit},
        {"ours": side(2.0, 1.5), "ours, Dice alone": side(1.0, 1.0)},
        {"ours": side(1.0, 2.0), "MONAI DiceLoss": side(2.0, 1.0)},
    ]
    rows = [{"loss": f"loss{i}", "shape": "2x3x96^3", "sides": each} for i, each in enumerate(sides)]
    maps = [{"shape": "2x3x128^3", "ours": {"median": 3.0}, "MONAI compute_distance_map": {"median": 2.0}}]
    assert losing_list({"speed--cuda": {"speed": rows, "maps": maps}}).splitlines() == [
        "- GPU, loss0, 2x3x96^3: 2.00 times the time of MONAI DiceLoss",
        "- GPU, loss1, 2x3x96^3: does not fit, unlike MONAI DiceLoss",
        "- GPU, loss3, 2x3x96^3: 2.00 times the memory of MONAI DiceLoss",
        "- GPU, signed maps, 2x3x128^3: 1.50 times the time of MONAI compute_distance_map",
    ]
