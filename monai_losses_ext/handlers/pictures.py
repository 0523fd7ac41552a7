# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of predictions beside references, for cases from the worst to the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.dataset import case_names
from monai_losses_ext.handlers._engine import case_file, check_shapes, class_mask, decollated, numbered
from monai_losses_ext.handlers._planes import Plane, cut_planes
from monai_losses_ext.metrics import class_metrics, foreground_labels, ignored_labels, known_voxels, nan_mean

# Okabe and Ito's palette, which color-blind readers can tell apart too, in the order that shows best on gray.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
# Of more classes: saturation and brightness of three rings of hues.
SHADES = ((0.95, 0.95), (0.5, 1.0), (0.9, 0.6))


@dataclass(frozen=True)
class ShownCase:
    """What is kept of a case: three planes, not the volume.

    Args:
        file: path of its label, or a name.
        scores: Dice of each class, NaN where neither reference nor prediction has it.
        planes: what is drawn.
    """

    file: str
    scores: list[float]
    planes: list[Plane]

    @property
    def dice(self) -> float:
        """The mean Dice of its classes."""
        return nan_mean(self.scores)


class PredictionPicture:
    """Draw predictions beside references, in three planes, for a few cases from the worst to the best.

    Cases come from the last evaluation. In a training, attach it to the trainer and name the validator; the picture is
    drawn when the training is completed. In an evaluation, attach it to the evaluator itself.

    In the list of handlers it belongs BEFORE the MLflow handler. When the engine is completed, handlers run in the
    order of the list, and the MLflow handler then logs the files that its ``artifacts`` name.

    Reads ``image``, ``label`` and ``pred`` of the evaluator's output, as :class:`SegmentationReport` does. The image
    may lie on another grid, since only the prediction is brought back to native space: the affines say where. Planes
    are those with the most of the reference, each class counting alike. Anatomical directions come from the label's
    affine; the patient's right is on the left.

    Args:
        path: the PNG.
        labels: value in the label map -> name, as for :class:`SegmentationReport`.
        validator: the evaluator that the trainer's ValidationHandler runs; None where this is attached to an evaluator.
        n_cases: number of cases, spread evenly over the ranking by mean Dice: the worst, the best, and between. With 3
            it is the worst, the median and the best.
        with_scores: draw on top the Dice of every case and class, one point each.
        ignore_label: label value, or a list of them, of voxels whose class is not known; nothing is drawn there.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.PredictionPicture", "path": "$@run_dir + '/predictions.png'",
        "labels": "@labels", "validator": "@validate#evaluator"}``
    """

    def __init__(
        self,
        path: str | Path,
        labels: Mapping[int | str, str],
        validator: Engine | None = None,
        n_cases: int = 4,
        with_scores: bool = False,
        ignore_label: int | Sequence[int] | None = None,
    ) -> None:
        self.path = Path(path)
        self.ignored = ignored_labels(ignore_label)
        self.labels = {v: name for v, name in foreground_labels(labels).items() if v not in self.ignored}
        self.with_scores = with_scores
        self.validator = validator
        self.n_cases = int(number("n_cases", n_cases, Limits(minimum=1)))
        self.cases: list[ShownCase] = []

    def attach(self, engine: Engine) -> None:
        """Register on a trainer and its validator, or on an evaluator."""
        evaluator = engine if self.validator is None else self.validator
        evaluator.add_event_handler(Events.EPOCH_STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def _start(self, engine: Engine) -> None:
        self.cases = []

    def _collect(self, engine: Engine) -> None:
        for output in decollated(engine):
            self.cases.append(self._case(output, default_name=numbered(len(self.cases))))

    def _case(self, output: dict[str, Any], default_name: str) -> ShownCase:
        label, prediction = output["label"], output["pred"]
        file = case_file(label) or default_name
        check_shapes(file, prediction, label)
        if self.ignored:
            prediction = prediction * known_voxels(label, self.ignored).to(prediction.device)
        spacing = [1.0] * (label.ndim - 1)  # the Dice has no unit
        scores = [
            class_metrics(class_mask(prediction, value), class_mask(label, value), spacing, 1.0, ["dice"])["dice"]
            for value in self.labels
        ]
        return ShownCase(file, scores, cut_planes({**output, "pred": prediction}, list(self.labels)))

    def _draw(self, engine: Engine) -> None:
        if self.cases:
            draw_cases(self.cases, list(self.labels.values()), self.n_cases, self.path, self.with_scores)


@rc_context({"text.parse_math": False})  # a dollar in a name is a dollar
def draw_cases(
    cases: list[ShownCase], class_names: list[str], n_cases: int, path: Path, with_scores: bool = False
) -> None:
    """Draw a row per chosen case and, for each plane, the reference and beside it the prediction."""
    ranked = sorted(cases, key=lambda case: (np.nan_to_num(case.dice, nan=2.0), case.file))
    ranks = np.unique(np.linspace(0, len(ranked) - 1, min(n_cases, len(ranked))).round().astype(int))
    colors = class_colors(len(class_names))
    n_columns = 2 * max(len(ranked[rank].planes) for rank in ranks)
    n_legend = min(len(class_names) + 1, 6 if len(class_names) < 20 else 8)
    legend_rows = -(-(len(class_names) + 1) // n_legend)
    heights = [3.0 * with_scores, 2.1 * len(ranks) + 0.6, 0.2 * legend_rows + 0.3]
    figure = Figure(figsize=(2.1 * n_columns + 1.2, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[max(height, 0.01) for height in heights])
    if with_scores:
        draw_scores(parts[0].subplots(), ranked, class_names, colors)
    names = case_names(case.file for case in cases)
    grid = parts[1].subplots(len(ranks), n_columns, squeeze=False)
    for axes_of_case, rank in zip(grid, ranks, strict=True):
        case = ranked[rank]
        axes_of_case[0].set_ylabel(
            f"{names[case.file]}\nDice {case.dice:.3f}\n({place_of(rank, len(ranked))})", fontsize=9
        )
        draw_case(axes_of_case, case, colors, with_titles=rank == ranks[0])
    handles: list[Any] = [Patch(color=color, label=name) for color, name in zip(colors, class_names, strict=True)]
    handles.append(Line2D([], [], color="gray", linestyle="dashed", label="outline of the reference (white)"))
    size = 9 if len(class_names) < 20 else 7
    parts[2].legend(handles=handles, loc="center", ncols=n_legend, frameon=False, fontsize=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def place_of(rank: int, count: int) -> str:
    """Return the place of a case in the ranking in words."""
    if count % 2 and rank == count // 2 and count > 1:
        return f"median of {count}"
    return f"{({0: 'lowest', count - 1: 'highest'}).get(rank, f'rank {rank + 1}')} of {count}"


def draw_scores(axes: Axes, cases: list[ShownCase], class_names: list[str], colors: list[str]) -> None:
    """Draw the Dice of every case as a point, a column for each class, and the median of each as a line."""
    for i, color in enumerate(colors):
        scores = [case.scores[i] for case in cases if not math.isnan(case.scores[i])]
        if scores:
            aside = np.linspace(-0.2, 0.2, len(scores)) if len(scores) > 1 else [0.0]
            axes.scatter(np.add(i, aside), scores, s=18, color=color, edgecolor="black", linewidth=0.4, zorder=3)
            axes.hlines(np.median(scores), i - 0.35, i + 0.35, color="black", linewidth=1.2, zorder=2)
    many = len(class_names) > 8
    axes.set_xticks(
        range(len(class_names)), class_names, rotation=90 * many, fontsize=6 if len(class_names) > 40 else 8
    )
    axes.set(ylim=(-0.03, 1.03), xlim=(-0.6, len(class_names) - 0.4), ylabel="Dice (0 to 1)")
    axes.set_title(f"Dice of {len(cases)} cases, lowest mean to the left; line: median", fontsize=10, loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_case(row: Any, case: ShownCase, colors: list[str], with_titles: bool) -> None:
    """Draw the planes of a case into a row of axes."""
    for axes in row[2 * len(case.planes) :]:
        axes.set_visible(False)
    for plane, left, right in zip(case.planes, row[::2], row[1::2], strict=False):
        draw_plane(left, plane, plane.reference, colors)
        draw_plane(right, plane, plane.prediction, colors)
        if with_titles:
            left.set_title(f"{plane.title}: reference", fontsize=10)
            right.set_title(f"{plane.title}: prediction", fontsize=10)
        outline(right, plane, np.asarray(plane.reference.any(axis=0)), "white", width=0.8, style="dashed")


def draw_plane(axes: Axes, plane: Plane, masks: np.ndarray, colors: list[str]) -> None:
    """Draw one plane in gray, with the masks ``[K, X, Y]`` of the classes laid over it."""
    height, width = plane.image.shape[1] * plane.spacing[1], plane.image.shape[0] * plane.spacing[0]
    low, high = np.percentile(plane.image, (1, 99))
    axes.imshow(plane.image.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, width, 0, height))
    if len(colors) > len(COLORS):  # contours of a hundred classes take a minute
        layer = np.zeros((*plane.image.shape, 4))
        for mask, color in zip(masks, colors, strict=True):
            layer[mask] = (*to_rgb(color), 0.6)
        axes.imshow(layer.swapaxes(0, 1), origin="lower", extent=(0, width, 0, height), interpolation="nearest")
        masks = masks[:0]
    for mask, color in zip(masks, colors, strict=False):
        outline(axes, plane, mask, color, width=1.2)
        if mask.any():
            axes.contourf(*plane.centers(), mask.T, levels=[0.5, 1.5], colors=[color], alpha=0.35)
    axes.set(xticks=[], yticks=[])


def outline(axes: Axes, plane: Plane, mask: np.ndarray, line_color: str, width: float, style: str = "solid") -> None:
    """Draw the border of a mask ``[X, Y]``."""
    if mask.any() and not mask.all():
        axes.contour(*plane.centers(), mask.T, [0.5], colors=[line_color], linewidths=width, linestyles=style)


def class_colors(count: int) -> list[str]:
    """Return a color for each class, no two alike."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    n_hues = -(-count // len(SHADES))
    # A stride through the circle of hues that meets each of them once, so that neighbors in the list are far apart.
    stride = next(n for n in range(round(0.38 * n_hues), n_hues + 1) if math.gcd(n, n_hues) == 1)
    places = [(i // len(SHADES) * stride % n_hues / n_hues, SHADES[i % len(SHADES)]) for i in range(count)]
    return [to_hex(hsv_to_rgb((hue, *shade))) for hue, shade in places]
