# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The picture of the speed results: a panel for each shape, a bar for each loss and side, a line where the floor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

DICE_ALONE = "ours, Dice alone"  # what a compound with a boundary term is measured beside
COLORS = {
    "ours": "tab:blue",
    "MONAI (cross_entropy: torch)": "tab:orange",
    "the same, compiled": "tab:green",
    DICE_ALONE: "tab:cyan",
}
OURS, BASELINE, COMPILED = list(COLORS)[:3]
CPU_SIDES = {OURS: "ours_ms", BASELINE: "baseline_ms", COMPILED: "compiled_ms"}


@dataclass(frozen=True)
class Case:
    """One loss on one shape: milliseconds of each side, None where it did not fit, and of the floor."""

    shape: str
    loss: str
    sides: Mapping[str, float | None]
    floor: float


def cases_of(result: Mapping[str, Any]) -> list[Case]:
    """Return what is drawn of ``speed--cpu.json`` or ``speed--cuda.json``."""
    rows = result["speed"]
    if "sides" in rows[0]:
        return [Case(row["shape"], row["loss"], _sides(row["sides"]), row["floor_ms"]) for row in rows]
    floors = {row["shape"]: row["ours_ms"]["both"]["median"] for row in rows if row["loss"] == "floor"}
    return [
        Case(
            row["shape"],
            row["loss"],
            {name: row[side]["both"]["median"] for name, side in CPU_SIDES.items() if side in row},
            floors[row["shape"]],
        )
        for row in rows
        if row["loss"] != "floor"
    ]


def _sides(sides: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the median of each side, by the name that the legend has for it."""
    medians = {}
    for name, side in sides.items():
        known = name if name in COLORS else COMPILED if name.endswith(", compiled") else BASELINE
        medians[known] = None if "error" in side else side["ms"]["both"]["median"]
    return medians


def draw_speed(result: Mapping[str, Any]) -> Figure:
    """Return the picture of a speed result."""
    cases = cases_of(result)
    shapes = list(dict.fromkeys(case.shape for case in cases))
    n_rows = -(-len(shapes) // 2)
    n_losses = max(sum(case.shape == shape for case in cases) for shape in shapes)
    figure = Figure(figsize=(10, n_rows * (0.9 + 0.34 * n_losses) + 0.4), layout="constrained")
    panels = figure.subplots(n_rows, 2, squeeze=False).ravel()
    for axes, shape in zip(panels, shapes, strict=False):
        _draw_panel(axes, shape, [case for case in cases if case.shape == shape])
    for axes in panels[len(shapes) :]:
        axes.remove()
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=len(entries), frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, shape: str, cases: list[Case]) -> None:
    for j, case in enumerate(cases):
        height = 0.8 / len(case.sides)
        for i, (side, ms) in enumerate(case.sides.items()):
            place = j - 0.4 + (i + 0.5) * height
            text = " did not fit" if ms is None else f" {ms:.{0 if ms >= 10 else 2}f}"
            if ms is not None:
                axes.barh(place, ms, height=height, color=COLORS[side], label=side)
            axes.annotate(text, (case.floor if ms is None else ms, place), va="center", fontsize=7)
        axes.vlines(case.floor, j - 0.5, j + 0.5, colors="black", linewidth=1.2, label="floor")
    ends = [case.floor for case in cases] + [ms for case in cases for ms in case.sides.values() if ms is not None]
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())  # within one decade its labels overlap
    axes.set_xlim(0.5 * min(ends), 1.7 * max(ends))
    axes.set_yticks(range(len(cases)), [case.loss for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_title(shape, fontsize=11, loc="left")
    axes.set_xlabel("forward + backward, ms", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def save_speed(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the same result and the same Matplotlib give the same bytes."""
    draw_speed(result).savefig(path, dpi=72, metadata={"Software": None})
