# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The size of a voxel, from an affine: the one place that reads it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

SMALLEST_MM = 1e-6
SMALLEST_SINE = 1e-3  # of the angle between an edge and those before it


def voxel_size(volume: Any, num_axes: int) -> list[float] | list[list[float]] | None:
    """Return the length of a voxel's edge along each axis in mm.

    It is measured in the patient's space, which may have more axes than the volume: a coronal slice of voxels of
    1 x 5 mm has ``[1, 5]``. An edge that cannot be one (not finite, shorter than 1e-6 mm, or in the direction of
    those before it) counts as 1 mm, with one warning.

    Args:
        volume: a MetaTensor, or the affine itself, ``[4, 4]`` or, of a batch, ``[B, 4, 4]``; None, or a plain tensor
            that is no affine (its last row is not 0, 0, 0, 1), has no size.
        num_axes: how many of the axes are the volume's.

    Returns:
        One number per axis; of a batch's affines one list per sample; None where there is no affine.
    """
    if volume is None or (not isinstance(volume, MetaTensor) and not _is_affine(torch.as_tensor(volume))):
        return None
    affine = volume.affine if isinstance(volume, MetaTensor) else volume
    edges = torch.as_tensor(affine, dtype=torch.float64, device="cpu")[..., :-1, :num_axes]
    if edges.ndim == 2:
        return _lengths(edges)
    return [_lengths(sample) for sample in edges]


def _is_affine(values: Tensor) -> bool:
    if values.ndim not in (2, 3) or values.shape[-1] != values.shape[-2] or values.shape[-1] < 2:
        return False
    last = torch.zeros(values.shape[-1], device="cpu")
    last[-1] = 1
    row = values[..., -1, :].to("cpu", torch.float32)
    return bool((row == last).all()) or bool((~row.isfinite()).any())


def _lengths(edges: Tensor) -> list[float]:
    """Return the lengths of edges, the columns of ``[*, A]``."""
    lengths: list[float] = edges.norm(dim=0).tolist()
    directions: list[Tensor] = []
    for axis, length in enumerate(lengths):
        edge = edges[:, axis] / length if SMALLEST_MM <= length < torch.inf else torch.zeros_like(edges[:, axis])
        for direction in directions:
            edge = edge - (edge @ direction) * direction
        rest = edge.norm().item()
        if rest < SMALLEST_SINE:
            lengths[axis] = 1.0
            _warn_about_edges()
        else:
            directions.append(edge / rest)
    return lengths


@functools.cache
def _warn_about_edges() -> None:
    warnings.warn(
        "voxel_size: an affine has an edge of a voxel that is not finite, shorter than 1e-6 mm, or in the direction of "
        "another; it counts as 1 mm. Correct the file's header, or give spacing.",
        stacklevel=4,
    )
