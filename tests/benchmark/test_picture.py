# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The picture of the speed results: read from the figure, since its bytes depend on Matplotlib's version."""

from __future__ import annotations

import json
from pathlib import Path

from monai_losses_ext.benchmark import picture

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def bars(figure):
    """Return the widths of all bars and the places of all floors of each panel, by its title."""
    found = {}
    for axes in figure.axes:
        floors = [float(line.get_segments()[0][0, 0]) for line in axes.collections]
        found[axes.get_title(loc="left")] = ([float(bar.get_width()) for bar in axes.patches], floors)
    return found


def test_a_bar_for_each_time_and_a_floor_for_each_loss():
    rows = json.loads((RESULTS / "speed--cpu.json").read_text())["speed"]
    found = bars(picture.draw_speed({"speed": rows}))
    floors = {row["shape"]: row["ours_ms"]["both"]["median"] for row in rows if row["loss"] == "floor"}
    assert found.keys() == floors.keys()
    for shape, floor in floors.items():
        of_shape = [row for row in rows if row["shape"] == shape and row["loss"] != "floor"]
        sides = ("ours_ms", "baseline_ms", "compiled_ms")
        times = [row[side]["both"]["median"] for row in of_shape for side in sides if side in row]
        assert found[shape] == (times, [floor] * len(of_shape))


def test_a_gpus_picture_says_what_did_not_fit():
    def took(ms):
        return {"ms": {"both": {"median": ms}}}

    sides = {"ours": took(2.0), "MONAI DiceLoss": {"error": "out of memory"}, "MONAI DiceLoss, compiled": took(3.0)}
    boundary = {"ours": took(2.5), "ours, Dice alone": took(2.0)}
    rows = [
        {"shape": "1x118x128^3", "loss": loss, "floor_ms": floor, "sides": each}
        for loss, floor, each in (("dice", 1.5, sides), ("dice_focal_boundary", 1.8, boundary))
    ]
    figure = picture.draw_speed({"speed": rows})
    assert bars(figure) == {"1x118x128^3": ([2.0, 3.0, 2.5, 2.0], [1.5, 1.8])}
    assert " did not fit" in [text.get_text() for text in figure.axes[0].texts]
    entries = {text.get_text() for text in figure.legends[0].get_texts()}
    assert entries == {"floor", "ours", "the same, compiled", "ours, Dice alone"}


def test_committed_pictures_are_small():
    paths = sorted(RESULTS.glob("*.png"))
    drawn = {path.stem for suite in ("speed", "purpose") for path in RESULTS.glob(f"{suite}--*.json")}
    assert {path.stem for path in paths} == drawn
    assert max(path.stat().st_size for path in paths) < 100_000
