# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of a training: loss, terms, weights, learning rate and validation metrics over the epochs."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from monai.utils import is_scalar

# Title -> which names belong there; the first that fits.
PANELS = (
    ("Training loss", r"^loss($|_)"),
    ("Dice", r"^(?!weight_).*dice"),
    ("Surface Dice (NSD)", r"nsd"),
    ("95th percentile of the surface distance (HD95, mm)", r"hd95"),
    ("Weights of the loss terms", r"^weight_"),
    ("Learning rate", r"^lr($|_)"),
    ("Other metrics", r""),
)

History = dict[int, dict[str, float]]  # epoch -> name -> value


class CurvePicture:
    """Keep every epoch's metrics in a CSV file and draw them as a PNG when the training is completed.

    Reads ``trainer.state.metrics`` (what :class:`LossTracker` writes) and, after each of its runs, the validator's
    metrics, which get the prefix ``val_`` where they do not have it.

    List it BEFORE MONAI's MLFlowHandler in the trainer's handlers: handlers run in that order when the training is
    completed, and MLFlowHandler then logs the files that its ``artifacts`` name.

    Args:
        path: the PNG; the table is written next to it, with the ending ``.csv``, after every epoch.
        validator: the evaluator that the trainer's ValidationHandler runs.
        save: whether to write; False on every rank but the first.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.CurvePicture", "path": "$@output_dir + '/curves.png'",
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
        for name, value in engine.state.metrics.items():
            if is_scalar(value):
                row[name if name.startswith(prefix) else prefix + name] = float(value)
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
    n_columns = 2 if len(panels) > 1 else 1
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(6.2 * n_columns, 3.6 * max(n_rows, 1)), layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        draw_panel(figure.add_subplot(n_rows, n_columns, i + 1), title, names, history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Sort the names of metrics into panels, title -> names; panels without names are left out."""
    panels: dict[str, list[str]] = {title: [] for title, _ in PANELS}
    for name in dict.fromkeys(names):
        panels[next(title for title, pattern in PANELS if re.search(pattern, name))].append(name)
    return {title: found for title, found in panels.items() if found}


def draw_panel(axes: Axes, title: str, names: list[str], history: History) -> None:
    """Draw the curves of ``names``; each one's last value stands in the legend. Means and totals are drawn bold."""
    for name in names:
        points = [(epoch, history[epoch][name]) for epoch in sorted(history) if name in history[epoch]]
        epochs, values = zip(*points, strict=True)
        bold = name in ("loss", "lr") or "mean_" in name
        axes.plot(
            epochs,
            values,
            label=f"{name}  {values[-1]:.3g}",
            linewidth=2.2 if bold else 1.1,
            marker="o" if len(points) <= 25 else None,
            markersize=3,
            zorder=3 if bold else 2,
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.8)
