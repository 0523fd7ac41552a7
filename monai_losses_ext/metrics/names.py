# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The classes that are measured, the voxels that count, and the names of the metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from monai.data import MetaTensor

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.errors import fail

# What a report may be asked for, by what it is measured on: two masks, their components, probabilities and a mask.
MASK_METRICS = ("dice", "nsd", "hd95", "cldice")
INSTANCE_METRICS = ("recall", "precision", "f1", "small_recall")
CALIBRATION_METRICS = ("ece", "ace")
ALL_METRICS = MASK_METRICS + INSTANCE_METRICS + CALIBRATION_METRICS
METRICS = ("dice", "nsd", "hd95")  # unless others are asked for
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


def numbers(argument: str, values: Any, limits: Limits) -> list[float]:
    """Return a list of numbers within the limits as floats.

    Raises:
        ValueError: naming the argument, the limits and what was received.
    """
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise fail(argument, f"must be a list of numbers{limits.words()}", values)
    return [number(argument, value, limits) for value in values]


def nan_mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
