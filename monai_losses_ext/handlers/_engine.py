# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What several handlers need to read the output of a MONAI engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.utils import is_scalar

from monai_losses_ext.distance import voxel_size
from monai_losses_ext.errors import UserError, fail
from monai_losses_ext.sums.target import ANNOTATED


def decollated(engine: Engine) -> list[dict[str, Any]]:
    """Return the evaluator's output as a list with one dictionary per case.

    Raises:
        UserError: for an evaluator that gives out whole batches.
    """
    output: Any = engine.state.output
    if not isinstance(output, list):
        raise fail("evaluator", "must give its output case by case (decollate=True)", type(output).__name__)
    return output


def annotated_classes(engine: Engine, number: int) -> list[Any]:
    """Return what each case of a batch was annotated for, ``[C]`` of true and false; None where it does not say."""
    batch: Any = getattr(engine.state, "batch", None)
    if isinstance(batch, list) and len(batch) == number:  # taken apart, as the output is
        return [case.get(ANNOTATED) if isinstance(case, dict) else None for case in batch]
    annotated = batch.get(ANNOTATED) if isinstance(batch, dict) else None
    return [None] * number if annotated is None else list(annotated)


def case_file(reference: torch.Tensor) -> str | None:
    """Return the path of a label's file; None for a label that was not read from one."""
    path = reference.meta.get("filename_or_obj") if isinstance(reference, MetaTensor) else None
    return str(path) if path else None


def numbered(index: int) -> str:
    """Return the name of a case that has no file, from its place in the data set, the first being 0."""
    return f"case_{index:04d}"


def label_spacing(reference: torch.Tensor) -> list[float] | None:
    """Return the voxel size of a label ``[1, *S]`` in mm; None for a plain tensor, which has no affine."""
    if not isinstance(reference, MetaTensor):
        return None
    sizes: Any = voxel_size(reference, reference.ndim - 1)
    return sizes


def check_shapes(case: str, prediction: torch.Tensor, reference: torch.Tensor, key: str = "pred") -> None:
    """Raise a UserError where prediction ``[C, *S]`` and label ``[1, *S]`` do not have the same ``S``."""
    if prediction.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"{key}: must have the label's spatial shape {tuple(reference.shape[1:])}; got "
            f"{tuple(prediction.shape[1:])} for case {case!r}. Bring it back to the image's space with Invertd."
        )


def class_mask(volume: Any, value: int) -> Any:
    """Return the boolean mask ``[*S]`` of one class.

    Args:
        volume: a label map ``[1, *S]`` or a one-hot volume ``[C, *S]``; a tensor or an array, as is the mask.
        value: the class's value in the label map, and its channel in the one-hot volume.

    Raises:
        UserError: for a value that is no channel of a one-hot volume.
    """
    plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    if len(plain) == 1:
        return plain[0] == value
    if value >= len(plain):
        raise fail("labels", f"must be channels of the one-hot volume, which has {len(plain)}", value)
    return plain[value] > 0.5


def numeric(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those of an engine's metrics that are single numbers, as Python's own."""
    return {name: float(value) for name, value in metrics.items() if is_scalar(value) and not isinstance(value, str)}


def is_last_iteration(engine: Engine) -> bool:
    """Tell whether the running iteration is its epoch's last; False where the epoch's length is not known."""
    length = engine.state.epoch_length
    return length is not None and engine.state.iteration % length == 0
