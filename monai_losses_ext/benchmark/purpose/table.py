# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainings for each purpose as Markdown tables and as one picture, losing rows included."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from monai_losses_ext.benchmark.purpose.measures import METRICS
from monai_losses_ext.benchmark.purpose.purposes import PURPOSES

Part = dict[str, Any]


def values_of(parts: Sequence[Part], purpose: str, row: str, metric: str) -> list[float]:
    """Return a metric of each seed."""
    return [part["metrics"][metric] for part in parts if (part["purpose"], part["row"]) == (purpose, row)]


def verdict(parts: Sequence[Part], purpose: str, row: str, metric: str) -> str:
    """Say whether a row's metric is better than the baseline's: by every seed, by none, or neither.

    Both trainings of a seed start from the same weights and see the same cases in the same order, so they are compared
    in pairs. Three seeds show a direction; they prove nothing.
    """
    baseline = next(iter(PURPOSES[purpose].rows))
    ours, theirs = (values_of(parts, purpose, name, metric) for name in (row, baseline))
    sign = 1 if METRICS[metric].higher_is_better else -1
    gains = [sign * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if any(map(math.isnan, gains)):
        return "not reached"
    if all(gain > 0 for gain in gains):
        return "better"
    return "worse" if all(gain < 0 for gain in gains) else "no clear difference"


def purpose_tables(parts: Sequence[Part]) -> str:
    """Return a Markdown table per purpose: the mean over the seeds, from the lowest to the highest."""
    return "\n".join(line for name in PURPOSES for line in _lines(parts, name))


def _lines(parts: Sequence[Part], name: str) -> Iterator[str]:
    purpose = PURPOSES[name]
    titles = [METRICS[metric].title + ("" if METRICS[metric].higher_is_better else " (lower is better)")
              for metric in purpose.metrics]  # fmt: skip
    yield f"**{purpose.title}** (`{name}`, {purpose.steps} steps)"
    if any(metric.endswith("_at_precision") for metric in purpose.metrics):
        yield ""
        yield f"Equal precision: the best threshold of the probability among those with {purpose.level} or more."
    yield ""
    yield "| loss | " + " | ".join(titles) + " | by the first metric |"
    yield "|---|" + "---|" * (len(titles) + 1)
    for i, row in enumerate(purpose.rows):
        numbers = [_spread(values_of(parts, name, row, metric)) for metric in purpose.metrics]
        word = "baseline" if i == 0 else verdict(parts, name, row, purpose.metrics[0])
        yield f"| {row} | " + " | ".join(numbers) + f" | {word} |"
    yield ""


def _spread(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "not reached"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def save_purposes(parts: Sequence[Part], path: Path) -> None:
    """Draw the metric that decides of every training, a panel per purpose, a point per seed, and save it as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = 2
    rows = math.ceil(len(PURPOSES) / columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 2.1 * rows), layout="constrained")
        panels = figure.subplots(rows, columns).ravel()
        for panel, (name, purpose) in zip(panels, PURPOSES.items(), strict=False):
            metric = purpose.metrics[0]
            for height, row in enumerate(purpose.rows):
                values = values_of(parts, name, row, metric)
                color = "#555555" if height == 0 else "#1f6fb4"
                panel.plot(values, [height] * len(values), "o", color=color, alpha=0.6)
                panel.plot([mean(values)], [height], "|", color=color, markersize=18, markeredgewidth=2)
            panel.set_yticks(range(len(purpose.rows)), list(purpose.rows))
            panel.set_ylim(len(purpose.rows) - 0.5, -0.5)
            panel.set_title(purpose.title, fontsize=10, loc="left")
            arrow = "higher is better" if METRICS[metric].higher_is_better else "lower is better"
            panel.set_xlabel(f"{METRICS[metric].title} ({arrow})")
            panel.grid(axis="x", alpha=0.3)
        for panel in panels[len(PURPOSES) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=80, metadata={"Software": None})
