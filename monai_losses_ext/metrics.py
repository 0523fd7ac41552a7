# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice, normalized surface Dice (NSD) and HD95 of one class in one case, in millimeters, and the names they go by.

NSD and HD95 are computed by MONAI's functions. MONAI's own handlers call them without the voxel size and without a
tolerance in millimeters; here both are given. This file alone decides what the value for an empty mask is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.errors import fail, one_of

METRICS = ("dice", "nsd", "hd95")
ALL = "all"  # the name of the mean over all classes, where a class has its own name


def foreground_labels(labels: Mapping[int | str, str]) -> dict[int, str]:
    """Return ``labels`` with integer keys and without the background, 0.

    Raises:
        ValueError: if a key is not a whole number of at least 0, no class is left, or the names of two classes, or of
            one and the mean of all, would be the same in the metrics.
    """
    try:
        named = {int(value): str(name) for value, name in labels.items()}
    except (AttributeError, TypeError, ValueError):
        raise fail("labels", "must map label values to names, as in {'1': 'liver'}", labels) from None
    if len(named) < len(labels) or min(named, default=0) < 0:
        raise fail("labels", "must have every label value once, from 0 on", labels)
    foreground = {value: name for value, name in named.items() if value != 0}
    if not foreground:
        raise fail("labels", "must name at least one class beside the background", labels)
    taken = {ALL: "the mean of all classes"}
    for name in foreground.values():
        key = metric_name(name)
        if key in taken:
            raise fail(
                "labels", f"must each have a name of its own in the metrics, where {key!r} is {taken[key]}", name
            )
        taken[key] = repr(name)
    return foreground


def ignored_labels(ignore_label: int | Sequence[int] | None) -> list[int]:
    """Return the label values that mark voxels whose class is not known, as a list.

    Raises:
        UserError: for anything but None, a whole number or a list of them.
    """
    if ignore_label is None:
        return []
    values: Any = ignore_label.tolist() if hasattr(ignore_label, "tolist") else ignore_label
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    if any(isinstance(value, bool) or not isinstance(value, Integral) for value in values):
        raise fail("ignore_label", "must be a label value, a list of them, or none", ignore_label)
    return [int(value) for value in values]


def known_voxels(label: torch.Tensor, ignored: Sequence[int]) -> torch.Tensor:
    """Return the boolean mask ``[*S]`` of the voxels whose class is known.

    Args:
        label: a label map ``[1, *S]``, or a one-hot volume ``[C, *S]``, in which every voxel is known.
        ignored: label values that mark the other voxels.
    """
    values = label.as_tensor() if isinstance(label, MetaTensor) else label
    known = torch.ones_like(values[0], dtype=torch.bool)
    for value in ignored if len(values) == 1 else []:
        known &= values[0] != value
    return known


def metric_name(name: str) -> str:
    """Return ``name`` as a part of a metric's key, in the characters that every tracker accepts."""
    return re.sub(r"\W+", "_", name.strip())


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

    Raises:
        ValueError: one line, for masks that are not boolean or differ in shape, a spacing that has not one value per
            axis, a negative tolerance or an unknown metric.
    """
    for name, mask in (("prediction", prediction), ("reference", reference)):
        if mask.dtype != torch.bool:  # the overlap of integers would be taken bit by bit
            raise fail(name, "must be a tensor of booleans", mask.dtype)
    if prediction.shape != reference.shape:
        raise fail("prediction", f"must have the reference's shape {tuple(reference.shape)}", tuple(prediction.shape))
    metrics = [one_of("metrics", name, METRICS) for name in metrics]
    tolerance_mm = number("tolerance_mm", tolerance_mm, Limits(minimum=0))
    prediction, reference = prediction.cpu(), reference.cpu()
    # count_nonzero is twenty times faster than sum on a boolean volume.
    n_predicted, n_reference = int(torch.count_nonzero(prediction)), int(torch.count_nonzero(reference))
    voxel_mm = numbers("spacing", spacing, Limits(above=0))  # floats: MONAI refuses a mixture with int
    if len(voxel_mm) != reference.ndim:
        raise fail("spacing", f"must have one value for each of {reference.ndim} axes", voxel_mm)
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


def numbers(argument: str, values: Any, limits: Limits) -> list[float]:
    """Return a list of numbers within the limits as floats.

    Raises:
        ValueError: naming the argument, the limits and what was received.
    """
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise fail(argument, f"must be a list of numbers{limits.words()}", values)
    return [number(argument, value, limits) for value in values]


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
