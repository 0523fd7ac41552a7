# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of predictions beside references, for cases from the worst to the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.dataset import case_names
from monai_losses_ext.handlers._engine import case_file, check_shapes, class_mask, decollated
from monai_losses_ext.handlers._planes import Plane, cut_planes
from monai_losses_ext.metrics import class_metrics, foreground_labels, nan_mean

# Okabe and Ito's palette, which colour-blind readers can tell apart too, in the order that shows best on grey.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")


@dataclass(frozen=True)
class Case:
    """What is kept of a case: three planes, not the volume."""

    file: str  # of its label
    dice: float
    planes: list[Plane]


class PredictionPicture:
    """Draw predictions beside references, in three planes, for a few cases from the worst to the best.

    Cases come from the last evaluation. In a training, attach it to the trainer and name the validator; the picture is
    drawn when the training is completed. In an evaluation, attach it to the evaluator itself.

    List it BEFORE MONAI's MLFlowHandler: handlers run in that order when the engine is completed, and MLFlowHandler
    then logs the files that its ``artifacts`` name.

    Reads ``image``, ``label`` and ``pred`` of the evaluator's output, as :class:`SegmentationReport` does. The image
    may lie on another grid, since only the prediction is brought back to native space: the affines say where. Planes
    are those with the most of the reference, each class counting alike. Anatomical directions come from the label's
    affine; the patient's right is on the left.

    Args:
        path: the PNG.
        labels: value in the label map -> name, as for :class:`SegmentationReport`.
        validator: the evaluator that the trainer's ValidationHandler runs; None where this is attached to an evaluator.
        n_cases: number of cases, spread evenly over the ranking by mean Dice: the worst, the best, and between.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.PredictionPicture", "path": "$@output_dir + '/predictions.png'",
        "labels": "@labels", "validator": "@validate#evaluator"}``
    """

    def __init__(
        self, path: str | Path, labels: Mapping[int | str, str], validator: Engine | None = None, n_cases: int = 4
    ) -> None:
        self.path = Path(path)
        self.labels = foreground_labels(labels)
        self.validator = validator
        self.n_cases = int(number("n_cases", n_cases, Limits(minimum=1)))
        self.cases: list[Case] = []

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
            self.cases.append(self._case(output, default_name=f"case_{len(self.cases):04d}"))

    def _case(self, output: dict[str, Any], default_name: str) -> Case:
        file = case_file(output["label"], default_name)
        check_shapes(file, output["pred"], output["label"])
        spacing = [1.0] * (output["label"].ndim - 1)  # the Dice has no unit
        dice = nan_mean(
            class_metrics(
                class_mask(output["pred"], value), class_mask(output["label"], value), spacing, 1.0, ["dice"]
            )["dice"]
            for value in self.labels
        )
        return Case(file, dice, cut_planes(output, list(self.labels)))

    def _draw(self, engine: Engine) -> None:
        if self.cases:
            draw_cases(self.cases, list(self.labels.values()), self.n_cases, self.path)


@rc_context({"text.parse_math": False})  # a dollar in a name is a dollar
def draw_cases(cases: list[Case], class_names: list[str], n_cases: int, path: Path) -> None:
    """Draw a row per chosen case and, for each plane, the reference and beside it the prediction."""
    ranked = sorted(cases, key=lambda case: (np.nan_to_num(case.dice, nan=2.0), case.file))
    names = case_names(case.file for case in cases)
    ranks = np.unique(np.linspace(0, len(ranked) - 1, min(n_cases, len(ranked))).round().astype(int))
    n_columns = 2 * max(len(ranked[rank].planes) for rank in ranks)
    figure = Figure(figsize=(2.1 * n_columns + 1.2, 2.1 * len(ranks) + 1.2), layout="constrained")
    grid = figure.subplots(len(ranks), n_columns, squeeze=False)
    for axes_of_case, rank in zip(grid, ranks, strict=True):
        case = ranked[rank]
        place = {0: "lowest", len(ranked) - 1: "highest"}.get(rank, f"rank {rank + 1}")
        axes_of_case[0].set_ylabel(f"{names[case.file]}\nDice {case.dice:.3f}\n({place} of {len(ranked)})", fontsize=9)
        for axes in axes_of_case[2 * len(case.planes) :]:
            axes.set_visible(False)
        for plane, left, right in zip(case.planes, axes_of_case[::2], axes_of_case[1::2], strict=False):
            draw_plane(left, plane, plane.reference)
            draw_plane(right, plane, plane.prediction)
            if rank == ranks[0]:
                left.set_title(f"{plane.title}: reference", fontsize=10)
                right.set_title(f"{plane.title}: prediction", fontsize=10)
            outline(right, plane, plane.reference.any(axis=0), "white", width=0.8, style="dashed")
    handles: list[Any] = [Patch(color=colour(i), label=name) for i, name in enumerate(class_names)]
    handles.append(Line2D([], [], color="grey", linestyle="dashed", label="outline of the reference (white)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_plane(axes: Axes, plane: Plane, masks: np.ndarray) -> None:
    """Draw one plane in grey, with the masks ``[K, X, Y]`` of the classes laid over it."""
    height, width = plane.image.shape[1] * plane.spacing[1], plane.image.shape[0] * plane.spacing[0]
    low, high = np.percentile(plane.image, (1, 99))
    axes.imshow(plane.image.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=(0, width, 0, height))
    for i, mask in enumerate(masks):
        outline(axes, plane, mask, colour(i), width=1.2)
        axes.contourf(*plane.centres(), mask.T, levels=[0.5, 1.5], colors=[colour(i)], alpha=0.35)
    axes.set(xticks=[], yticks=[])


def outline(axes: Axes, plane: Plane, mask: np.ndarray, line_colour: str, width: float, style: str = "solid") -> None:
    """Draw the border of a mask ``[X, Y]``."""
    if mask.any() and not mask.all():
        axes.contour(*plane.centres(), mask.T, [0.5], colors=[line_colour], linewidths=width, linestyles=style)


def colour(i: int) -> str:
    """Return the colour of the i-th class; colours repeat after the last."""
    return COLOURS[i % len(COLOURS)]
