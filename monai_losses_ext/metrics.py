# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice, surface Dice (NSD) and HD95 of one class in one case, in millimetres.

The surface metrics are MONAI's functions, given the spacing and a tolerance in millimetres, which MONAI's own handlers
do not pass on. What an empty mask means is settled here, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

METRICS = ("dice", "nsd", "hd95")


def class_metrics(
    prediction: torch.Tensor,
    reference: torch.Tensor,
    spacing: Sequence[float],
    tolerance_mm: float = 1.0,
    metrics: Sequence[str] = METRICS,
    use_subvoxels: bool = True,
) -> dict[str, float]:
    """Compare the predicted with the reference mask of one class.

    Args:
        prediction: boolean mask, ``[*S]``, 2-D or 3-D.
        reference: boolean mask of the same shape.
        spacing: size of a voxel along each axis, in mm.
        tolerance_mm: distance up to which a surface element counts as met, for the NSD.
        metrics: which of ``dice`` (0 to 1), ``nsd`` (0 to 1) and ``hd95`` (mm) to compute; Dice alone is fast.
        use_subvoxels: measure the NSD on the surface that runs between the voxels, each element weighted by its area
            in mm^2, as the Medical Segmentation Decathlon did; if False, on the voxels at the border, all alike.

    Edge:
        Both masks empty: NaN, since there is nothing to measure. One of them empty: Dice 0, NSD 0, and for HD95 the
        diagonal of the volume in mm, so that a missed class counts as the worst case and the mean stays finite.
        HD95 is the larger of the two directed 95th percentiles of the distances between border voxels.
    """
    prediction, reference = prediction.cpu(), reference.cpu()
    # count_nonzero is twenty times faster than sum on a boolean volume.
    n_predicted, n_reference = int(torch.count_nonzero(prediction)), int(torch.count_nonzero(reference))
    voxel_mm = [float(mm) for mm in spacing]  # MONAI refuses a mixture of int and float
    if not n_predicted and not n_reference:
        return dict.fromkeys(metrics, math.nan)
    if not n_predicted or not n_reference:
        diagonal = math.hypot(*(n * mm for n, mm in zip(reference.shape, voxel_mm, strict=True)))
        worst = {"dice": 0.0, "nsd": 0.0, "hd95": diagonal}
        return {name: worst[name] for name in metrics}
    values = {"dice": 2 * int(torch.count_nonzero(prediction & reference)) / (n_predicted + n_reference)}
    box = bounding_box(prediction | reference)
    predicted, true = (mask[box][None, None] for mask in (prediction, reference))
    if "nsd" in metrics:
        values["nsd"] = compute_surface_dice(
            predicted, true, [tolerance_mm], include_background=True, spacing=voxel_mm, use_subvoxels=use_subvoxels
        ).item()
    if "hd95" in metrics:
        values["hd95"] = compute_hausdorff_distance(
            predicted, true, include_background=True, percentile=95, spacing=voxel_mm
        ).item()
    return {name: values[name] for name in metrics}


def bounding_box(mask: torch.Tensor) -> tuple[slice, ...]:
    """Return the slices of the smallest box that holds every true voxel of a non-empty ``mask``, ``[*S]``."""
    box = []
    for axis in range(mask.ndim):
        others = [a for a in range(mask.ndim) if a != axis]
        inside = torch.nonzero(mask.any(dim=others) if others else mask)
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def nan_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
