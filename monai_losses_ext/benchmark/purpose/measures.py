# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trained network reaches on cases that it never saw, by the package's own metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from monai_losses_ext.metrics import (
    bin_sums,
    calibration_errors,
    class_metrics,
    cldice,
    instance_scores,
    match_components,
    median_volume,
    nan_mean,
    pooled,
)

SPACING = (1.0, 1.0, 1.0)
IOU = 0.1  # above which a component is found: small ones differ by a rim of voxels
THRESHOLDS = tuple(np.round([*np.arange(0.02, 0.1, 0.02), *np.arange(0.1, 0.91, 0.05), *np.arange(0.92, 1, 0.02)], 2))
AT_PRECISION = "_at_precision"


@dataclass(frozen=True)
class Metric:
    """A metric's name in a table, its unit, and which way is better."""

    title: str
    higher_is_better: bool = True


METRICS = {
    "dice": Metric("Dice"),
    "dice_of_last": Metric("Dice of the class that cases lack"),
    "small_recall": Metric("recall of small lesions"),
    "instance_precision": Metric("precision of lesions"),
    "small_recall_at_precision": Metric("recall of small lesions at equal precision"),
    "cldice": Metric("clDice"),
    "components_off": Metric("components too many or too few, per case", higher_is_better=False),
    "cldice_at_precision": Metric("clDice at equal precision of voxels"),
    "voxel_recall": Metric("recall of voxels"),
    "voxel_precision": Metric("precision of voxels"),
    "voxel_recall_at_precision": Metric("recall of voxels at equal precision"),
    "hd95": Metric("HD95, mm", higher_is_better=False),
    "ace": Metric("average calibration error", higher_is_better=False),
    "ece": Metric("expected calibration error", higher_is_better=False),
}


@dataclass(frozen=True)
class Outcome:
    """A network's answer to one held-out case.

    Attributes:
        probability: of each class, ``[C, *S]``.
        label: ``[*S]``.
    """

    probability: torch.Tensor
    label: torch.Tensor

    def predicted(self, value: int, threshold: float | None = None) -> torch.Tensor:
        """Return the mask of a class: of the most probable one, or of a probability above a threshold."""
        if threshold is None:
            return self.probability.argmax(0) == value
        return self.probability[value] > threshold

    def reference(self, value: int) -> torch.Tensor:
        """Return the mask of a class in the label."""
        return self.label == value


def measure(outcomes: Sequence[Outcome], metrics: Sequence[str], level: float) -> dict[str, float]:
    """Return the metrics over the held-out cases.

    Args:
        outcomes: one per case.
        metrics: names in ``METRICS``. Those of voxels, components and probabilities are of all cases together; Dice,
            clDice and HD95 are means over the cases; all are means over the classes beside the background.
        level: the precision for those that end in ``_at_precision``: of the thresholds of the probability at which the
            precision (of components for lesions, of voxels otherwise) is at least that, the best value; NaN if none is.
    """
    classes = range(1, len(outcomes[0].probability))
    values = {}
    for name in metrics:
        if name.endswith(AT_PRECISION):
            values[name] = _at_precision(outcomes, name.removesuffix(AT_PRECISION), level)
        elif name == "dice_of_last":
            values[name] = _dice(outcomes, classes[-1], None)
        else:
            values[name] = nan_mean(_OF_CLASS[name](outcomes, value, None) for value in classes)
    return values


def _at_precision(outcomes: Sequence[Outcome], name: str, level: float) -> float:
    """Return the best value of a metric of class 1 among the thresholds with enough precision."""
    precision = _instance_precision if name == "small_recall" else _voxel_precision
    good = (t for t in THRESHOLDS if precision(outcomes, 1, t) >= level)
    return max((_OF_CLASS[name](outcomes, 1, t) for t in good), default=math.nan)


def _masks(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(outcome.predicted(value, threshold), outcome.reference(value)) for outcome in outcomes]


def _dice(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return _of_masks("dice", outcomes, value, threshold)


def _hd95(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return _of_masks("hd95", outcomes, value, threshold)


def _of_masks(name: str, outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return nan_mean(class_metrics(p, r, SPACING, metrics=(name,))[name] for p, r in _masks(outcomes, value, threshold))


def _cldice(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return nan_mean(cldice(p, r) if p.any() else 0.0 for p, r in _masks(outcomes, value, threshold))


def _scores(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> dict[str, float]:
    components = pooled(match_components(p, r, SPACING, IOU) for p, r in _masks(outcomes, value, threshold))
    return instance_scores(components, median_volume(components))


def _small_recall(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return _scores(outcomes, value, threshold)["small_recall"]


def _instance_precision(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    return _scores(outcomes, value, threshold)["precision"]


def _components_off(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    both = [match_components(p, r, SPACING) for p, r in _masks(outcomes, value, threshold)]
    return sum(abs(case.n_predicted - case.n_reference) for case in both) / len(both)


def _counts(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> tuple[int, int, int]:
    """Return the numbers of voxels that are predicted rightly, predicted, and in the reference."""
    masks = _masks(outcomes, value, threshold)
    return (
        sum(int((p & r).sum()) for p, r in masks),
        sum(int(p.sum()) for p, _ in masks),
        sum(int(r.sum()) for _, r in masks),
    )


def _voxel_recall(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    right, _, in_reference = _counts(outcomes, value, threshold)
    return right / in_reference


def _voxel_precision(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
    right, predicted, _ = _counts(outcomes, value, threshold)
    return right / predicted if predicted else math.nan


def _calibration(name: str) -> Callable[[Sequence[Outcome], int, float | None], float]:
    def error(outcomes: Sequence[Outcome], value: int, threshold: float | None) -> float:
        sums = torch.stack([bin_sums(o.probability[value], o.reference(value)) for o in outcomes]).sum(0)
        return calibration_errors(sums)[name]

    return error


_OF_CLASS: dict[str, Callable[[Sequence[Outcome], int, float | None], float]] = {
    "dice": _dice,
    "hd95": _hd95,
    "cldice": _cldice,
    "small_recall": _small_recall,
    "instance_precision": _instance_precision,
    "components_off": _components_off,
    "voxel_recall": _voxel_recall,
    "voxel_precision": _voxel_precision,
    "ace": _calibration("ace"),
    "ece": _calibration("ece"),
}
