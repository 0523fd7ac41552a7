# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice, normalized surface Dice (NSD), HD95 and clDice of one class in one case, in millimeters.

NSD and HD95 are computed by MONAI's functions. MONAI's own handlers call them without the voxel size and without a
tolerance in millimeters; here both are given. This file alone decides what the value for an empty mask is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.errors import fail, one_of
from monai_losses_ext.extras import need
from monai_losses_ext.maps.skeleton import skeleton_line
from monai_losses_ext.metrics.names import MASK_METRICS, METRICS, numbers


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
        metrics: which of ``dice`` (0 to 1), ``nsd`` (0 to 1), ``hd95`` (mm) and ``cldice`` (0 to 1) to compute; Dice
            alone is fast.
        use_subvoxels: measure the NSD on the surface that runs between the voxels, each element weighted by its area
            in mm^2, as the Medical Segmentation Decathlon did; if False, on the voxels at the border, all alike.

    Edge:
        Both masks empty: NaN, since there is nothing to measure. One of them empty: Dice, NSD and clDice 0, and for
        HD95 the diagonal of the volume in mm: a missed class counts as the worst case, and the mean stays finite.
        HD95 is the larger of the two directed 95th percentiles of the distances between border voxels.

    Raises:
        ValueError: one line, for masks that are not boolean or differ in shape, a spacing that has not one value per
            axis, a negative tolerance, an unknown metric, or clDice without the extra ``maps``.
    """
    metrics = [one_of("metrics", name, MASK_METRICS) for name in metrics]
    check_extras(metrics)
    tolerance_mm = number("tolerance_mm", tolerance_mm, Limits(minimum=0))
    voxel_mm = check_masks(prediction, reference, spacing)
    prediction, reference = prediction.cpu(), reference.cpu()
    # count_nonzero is twenty times faster than sum on a boolean volume.
    n_predicted, n_reference = int(torch.count_nonzero(prediction)), int(torch.count_nonzero(reference))
    if not n_predicted and not n_reference:
        return dict.fromkeys(metrics, math.nan)
    if not n_predicted or not n_reference:
        diagonal = math.hypot(*(n * mm for n, mm in zip(reference.shape, voxel_mm, strict=True)))
        worst = {"dice": 0.0, "nsd": 0.0, "hd95": diagonal, "cldice": 0.0}
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
    if "cldice" in metrics:
        values["cldice"] = cldice(prediction[box], reference[box])
    return {name: values[name] for name in metrics}


def cldice(prediction: torch.Tensor, reference: torch.Tensor) -> float:
    """Return how well two tubular masks agree in their middle lines, from 0 to 1.

    The harmonic mean of the share of the prediction's skeleton that lies in the reference, and of the share of the
    reference's skeleton that lies in the prediction: a gap costs as much as its length, however thin the tube.

    Args:
        prediction: boolean mask, ``[*S]``, 2-D or 3-D, not empty.
        reference: boolean mask of the same shape, not empty.

    Source:
        Shit et al. 2021, https://arxiv.org/abs/2003.07311. Differs in that each component keeps at least one voxel of
        skeleton, where thinning deletes some as a whole.

    Example:
        >>> tube = torch.zeros(5, 9, dtype=torch.bool)
        >>> tube[1:4, 1:8] = True
        >>> cldice(tube, tube)
        1.0
    """
    shares = []
    for one, other in ((prediction, reference), (reference, prediction)):
        line = torch.from_numpy(skeleton_line(one.numpy()))
        shares.append(int(torch.count_nonzero(line & other)) / int(torch.count_nonzero(line)))
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def check_extras(metrics: Sequence[str]) -> None:
    """Raise an error of one line where a metric needs packages of an extra that are not installed."""
    if "cldice" in metrics:
        need("cldice", "maps")


def check_masks(prediction: torch.Tensor, reference: torch.Tensor, spacing: Sequence[float]) -> list[float]:
    """Return the voxel size as floats, since MONAI refuses a mixture with whole numbers.

    Raises:
        ValueError: one line, for masks that are not boolean or differ in shape, or a spacing of other axes.
    """
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != torch.bool:  # the overlap of integers would be taken bit by bit
            raise fail(name, "must be a tensor of booleans", mask.dtype)
    if prediction.shape != reference.shape:
        raise fail("prediction", f"must have the reference's shape {tuple(reference.shape)}", tuple(prediction.shape))
    voxel_mm = numbers("spacing", spacing, Limits(above=0))
    if len(voxel_mm) != reference.ndim:
        raise fail("spacing", f"must have one value for each of {reference.ndim} axes", voxel_mm)
    return voxel_mm


def bounding_box(mask: torch.Tensor) -> tuple[slice, ...]:
    """Return the slices of the smallest box that holds every true voxel of a non-empty ``mask``, ``[*S]``."""
    box = []
    for axis in range(mask.ndim):
        others = [a for a in range(mask.ndim) if a != axis]
        inside = torch.nonzero(mask.any(dim=others) if others else mask)
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)
