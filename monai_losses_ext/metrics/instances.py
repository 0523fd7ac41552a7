# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How many instances of a class, such as lesions, are found: recall, precision and F1 of connected components."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.metrics.masks import bounding_box, check_masks
from monai_losses_ext.metrics.names import INSTANCE_METRICS


@dataclass(frozen=True)
class Components:
    """The components of one class, in one case or in many.

    Attributes:
        volumes_mm3: volume of each component of the reference; in two dimensions, its area in mm^2.
        found: whether each of them was found.
        n_predicted: number of components of the prediction.
    """

    volumes_mm3: list[float]
    found: list[bool]
    n_predicted: int

    @property
    def n_reference(self) -> int:
        """Return the number of components of the reference."""
        return len(self.found)

    @property
    def n_found(self) -> int:
        """Return how many of them were found, which is how many predicted ones found one."""
        return sum(self.found)


def match_components(
    prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float], iou_threshold: float = 0.5
) -> Components:
    """Match the components of two masks one to one, and return those of the reference with which were found.

    A component is what hangs together by faces, edges or corners (in three dimensions, 26 neighbors). Pairs whose IoU,
    intersection over union, is above the threshold are taken from the highest down, each component once. So of two
    pieces that a lesion was split into at most one finds it, and two lesions that were merged into one component are at
    most one that is found.

    Args:
        prediction: boolean mask, ``[*S]``, 2-D or 3-D.
        reference: boolean mask of the same shape.
        spacing: size of a voxel along each axis, in mm.
        iou_threshold: 0 to 1. At 0.5 and above no component has two partners to choose from. 0.1 is usual where lesions
            are small or their extent is vague, and 0 takes any overlap.

    Raises:
        ValueError: one line, for masks that are not boolean or differ in shape, a spacing of other axes, or a threshold
            out of range.

    Source:
        Kirillov et al. 2019, Panoptic Segmentation, https://arxiv.org/abs/1801.00868, whose threshold of 0.5 and
        matching from the highest IoU down are also what panoptica and MetricsReloaded do unless told otherwise.

    Example:
        >>> reference = torch.tensor([[1, 1, 0, 0, 1, 0, 1]], dtype=torch.bool)
        >>> prediction = torch.tensor([[1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
        >>> match_components(prediction, reference, (1.0, 2.0))
        Components(volumes_mm3=[4.0, 2.0, 2.0], found=[True, False, True], n_predicted=2)
    """
    iou_threshold = number("iou_threshold", iou_threshold, Limits(minimum=0, maximum=1))
    voxel = math.prod(check_masks(prediction, reference, spacing))
    prediction, reference = prediction.cpu(), reference.cpu()
    either = prediction | reference
    if not either.any():
        return Components([], [], 0)
    box = bounding_box(either)
    predicted, n_predicted = _labeled(prediction[box].numpy())
    true, n_reference = _labeled(reference[box].numpy())
    sizes = [np.bincount(ids.ravel(), minlength=n + 1) for ids, n in ((predicted, n_predicted), (true, n_reference))]
    both = (predicted > 0) & (true > 0)
    pairs, shared = np.unique(true[both].astype(np.int64) * (n_predicted + 1) + predicted[both], return_counts=True)
    of_true, of_predicted = np.divmod(pairs, n_predicted + 1)
    iou = shared / (sizes[0][of_predicted] + sizes[1][of_true] - shared)
    found, taken = np.zeros(n_reference + 1, bool), np.zeros(n_predicted + 1, bool)
    for i in np.argsort(-iou, kind="stable"):
        if iou[i] > iou_threshold and not found[of_true[i]] and not taken[of_predicted[i]]:
            found[of_true[i]] = taken[of_predicted[i]] = True
    return Components((sizes[1][1:] * voxel).tolist(), found[1:].tolist(), n_predicted)


def _labeled(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], int]:
    """Return the number of each voxel's component, from 1 on, and how many there are."""
    components, n = ndimage.label(mask, np.ones((3,) * mask.ndim, bool))
    return components, int(n)


def pooled(cases: Iterable[Components]) -> Components:
    """Return the components of several cases as those of one, so that each counts alike, whichever case it is in."""
    volumes, found, n_predicted = [], [], 0
    for case in cases:
        volumes += case.volumes_mm3
        found += case.found
        n_predicted += case.n_predicted
    return Components(volumes, found, n_predicted)


def median_volume(components: Components) -> float:
    """Return the median volume of the reference's components in mm^3; NaN where it has none."""
    return median(components.volumes_mm3) if components.volumes_mm3 else math.nan


def instance_scores(components: Components, small_mm3: float) -> dict[str, float]:
    """Return what counts of components say.

    Args:
        components: of a case, or of several, pooled.
        small_mm3: the volume below which a component of the reference is small.

    Returns:
        ``recall``: the share of the reference's components that were found; ``precision``: the share of the predicted
        ones that found one; ``f1``: their harmonic mean, 2 tp / (2 tp + fn + fp); ``small_recall``: the recall among
        small components. NaN where there is nothing to be a share of.

    Example:
        >>> instance_scores(Components([5.0, 90.0], [False, True], n_predicted=2), small_mm3=47.5)
        {'recall': 0.5, 'precision': 0.5, 'f1': 0.5, 'small_recall': 0.0}
    """
    n_found = components.n_found
    small = [f for f, mm3 in zip(components.found, components.volumes_mm3, strict=True) if mm3 < small_mm3]
    shares = (
        (n_found, components.n_reference),
        (n_found, components.n_predicted),
        (2 * n_found, components.n_reference + components.n_predicted),
        (sum(small), len(small)),
    )
    return {name: n / of if of else math.nan for name, (n, of) in zip(INSTANCE_METRICS, shares, strict=True)}
