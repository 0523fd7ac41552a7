# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of a training: loss, terms, weights, learning rate and validation metrics over the epochs."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monai_losses_ext.handlers._engine import numeric

# Title, name of the y axis, and a pattern; a metric belongs to the first panel whose pattern its name has.
PANELS = (
    ("Training loss", "loss", r"^loss($|_)"),
    ("Validation: Dice", "Dice (0 to 1)", r"^(?!weight_).*dice"),
    ("Validation: normalized surface Dice (NSD)", "NSD (0 to 1)", r"nsd"),
    ("Validation: 95th percentile of the surface distance (HD95)", "HD95 (mm)", r"hd95"),
    ("Weights of the loss terms", "weight", r"^weight_"),
    ("Learning rate", "learning rate", r"^lr($|_)"),
    ("Other metrics", "value", r""),
)
MAX_NAMED = 10  # curves of a panel that can be told apart; of more, means, the lowest and the highest are named
OTHERS = "0.75"  # their gray
# Curves that lie on each other stay visible: a thin broken one on a thick whole one.
MARKERS = "os^Dv"
STYLES: tuple[tuple[Any, float], ...] = (("-", 2.6), ("--", 2.0), (":", 2.0), ("-.", 1.4), ((0, (6, 2)), 1.2))

History = dict[int, dict[str, float]]  # epoch -> name -> value


class CurvePicture:
    """Keep every epoch's metrics in a CSV file and draw them as a PNG when the training is completed.

    Reads ``trainer.state.metrics`` (what :class:`LossTracker` writes) and, after each of its runs, the validator's
    metrics, which get the prefix ``val_`` where they do not have it.

    In the trainer's list of handlers it belongs BEFORE the MLflow handler. When the training is completed, handlers run
    in the order of the list, and the MLflow handler then logs the files that its ``artifacts`` name.

    Args:
        path: the PNG; the table is written next to it, with the ending ``.csv``, after every epoch.
        validator: the evaluator that the trainer's ValidationHandler runs.
        save: whether to write; False on every rank but the first.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.CurvePicture", "path": "$@run_dir + '/curves.png'",
        "validator": "@validate#evaluator"}``
    """

    def __init__(self, path: str | Path, validator: Engine | None = None, save: bool = True) -> None:
        self.path = Path(path)
        self.save = save
        self.validator = validator
        self.history: History = {}

    def attach(self, engine: Engine) -> None:
        """Register on a trainer, and on the validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._record, prefix="")
        engine.add_event_handler(Events.COMPLETED, self._draw)
        if self.validator is not None:
            self.validator.add_event_handler(Events.COMPLETED, self._record, prefix="val_")

    def state_dict(self) -> dict[str, History]:
        """Return the epochs so far, for a training that is resumed."""
        return {"history": self.history}

    def load_state_dict(self, state: Mapping[str, History]) -> None:
        """Go on after the epochs of an earlier training."""
        self.history = {epoch: dict(row) for epoch, row in state["history"].items()}

    def _record(self, engine: Engine, prefix: str) -> None:
        row = self.history.setdefault(engine.state.epoch, {})
        for name, value in numeric(engine.state.metrics).items():
            row[name if name.startswith(prefix) else prefix + name] = value
        if self.save:
            write_table(self.history, self.path.with_suffix(".csv"))

    def _draw(self, engine: Engine) -> None:
        if self.save:
            draw_curves(self.history, self.path)


def write_table(history: History, path: Path) -> None:
    """Write a row per epoch and a column per name; a crash while writing leaves the former file whole."""
    names = list(dict.fromkeys(name for row in history.values() for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *names])
        writer.writeheader()
        writer.writerows({"epoch": epoch, **history[epoch]} for epoch in sorted(history))
    unfinished.replace(path)


@rc_context({"text.parse_math": False})  # a dollar in a name is a dollar
def draw_curves(history: History, path: Path) -> None:
    """Draw a panel for each kind of value that the history has, see ``PANELS``."""
    panels = group_names(name for row in history.values() for name in row)
    units = {title: unit for title, unit, _ in PANELS}
    n_columns = 2 if len(panels) > 1 else 1
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(7.4 * n_columns, 3.6 * max(n_rows, 1)), layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        draw_panel(axes, names, history)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set(xlabel="epoch", ylabel=units[title], xlim=(0.5, max(history) + 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort the names of metrics into panels, title -> names; panels without names are left out."""
    panels: dict[str, list[str]] = {title: [] for title, *_ in PANELS}
    for name in dict.fromkeys(names):
        panels[next(title for title, _, pattern in PANELS if re.search(pattern, name))].append(name)
    return {title: found for title, found in panels.items() if found}


def draw_panel(axes: Axes, names: list[str], history: History) -> None:
    """Draw the curves of ``names``. The legend stands beside them, with the last value of each."""
    curves = {name: [(epoch, row[name]) for epoch, row in sorted(history.items()) if name in row] for name in names}
    named = named_curves({name: points[-1][1] for name, points in curves.items()})
    for name in (name for name in names if name not in named):
        axes.plot(*zip(*curves[name], strict=True), color=OTHERS, linewidth=0.8, zorder=1)
    for i, name in enumerate(named):
        points = curves[name]
        style, width = STYLES[i % len(STYLES)]
        axes.plot(
            *zip(*points, strict=True),
            label=f"{name}  {points[-1][1]:.3g}",
            linestyle=style,
            linewidth=width,
            color=f"C{i % 10}",
            # A point alone is no line; among many, markers hide it. Hollow ones show what lies beneath.
            marker=MARKERS[i % len(MARKERS)] if len(points) <= 25 else None,
            markersize=9 if len(points) <= 3 else 4,
            markerfacecolor="none" if len(points) <= 3 else None,
            zorder=30 if len(named) < len(names) and name in totals(names) else 2 + i,
        )
    if len(named) < len(names):
        axes.plot([], [], color=OTHERS, linewidth=0.8, label=f"{len(names) - len(named)} others (see the table)")
    axes.set_ylim(*value_range([value for points in curves.values() for _, value in points], names[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3.5)


def named_curves(last: dict[str, float]) -> list[str]:
    """Choose the curves that get a color and a place in the legend, from the last value of each.

    All of them up to ``MAX_NAMED``; else the means and totals, and as many of the lowest as of the highest.
    """
    if len(last) <= MAX_NAMED:
        return list(last)
    first = totals(last)
    rest = sorted((name for name in last if name not in first), key=lambda name: np.nan_to_num(last[name], nan=-1))
    half = (MAX_NAMED - len(first)) // 2
    chosen = {*rest[:half], *rest[-half:]}
    return [*first, *(name for name in last if name in chosen)]


def totals(names: Iterable[str]) -> list[str]:
    """Return those of the names that stand for all others of their panel."""
    return [name for name in names if name in ("loss", "lr") or "mean_" in name]


def value_range(values: list[float], name: str) -> tuple[float, float]:
    """Return the limits of a y axis that does not blow up small differences: from 0, and to 1 for shares of one."""
    finite = [value for value in values if np.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if re.search("dice|nsd|^weight_", name) and not name.startswith("loss") and low >= 0 and high <= 1:
        return -0.03, 1.03
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.05 * (high - low or 1.0)
    return (low - margin if low < 0 else 0.0), high + margin
