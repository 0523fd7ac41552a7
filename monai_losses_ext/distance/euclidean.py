# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, and exact Euclidean distance transforms of one volume by ``edt`` or by SciPy.

``edt`` (the extra ``fast``; https://github.com/seung-lab/euclidean-distance-transform-3d) is several times faster, and
takes the distances inside of all labels in one pass. SciPy is always there. Both measure from voxel centre to voxel
centre, and neither counts what lies outside of the volume.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from monai_losses_ext import _fallback, errors
from monai_losses_ext.extras import is_installed

BACKENDS = ("auto", "edt", "scipy", "triton")

Array = np.ndarray[Any, Any]


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that does the work: ``auto`` is the fastest that works for labels on this device.

    Raises:
        UserError: for an unknown backend, or one that is not installed.
    """
    errors.one_of("distance backend", backend, BACKENDS)
    if backend == "auto" and device.type == "cuda" and is_installed("triton") and _triton_works():
        return "triton"
    if backend == "auto":
        return "edt" if is_installed("edt") else "scipy"
    if backend == "edt" and not is_installed("edt"):
        raise errors.UserError(
            "distance backend: 'edt' is not installed; pip install \"monai_losses_ext[fast]\", or take scipy."
        )
    if backend == "triton" and not is_installed("triton"):
        raise errors.UserError("distance backend: 'triton' is not installed; pip install triton, or take scipy.")
    return backend


@functools.cache
def _triton_works() -> bool:
    def attempt() -> None:
        from monai_losses_ext.distance import triton  # only where it is installed

        triton.signed_maps(torch.zeros(1, 1, 1, device="cuda"), 1, [[1.0]], [1.0], 0.0, 0)

    return _fallback.works("signed_distance: Triton", attempt, "distances are taken on the CPU, which is slower.")


def distance_to_mask(mask: Array, spacing: Sequence[float], backend: str) -> Array:
    """Return the distance of every voxel to the nearest True voxel, float32 ``[*S]``, 0 on True voxels.

    Args:
        mask: bool ``[*S]``, 1 to 3 axes, with at least one True voxel.
        spacing: voxel size along each axis.
        backend: ``edt`` or ``scipy``.
    """
    if backend == "edt":
        return _edt(~mask, spacing)
    return ndimage.distance_transform_edt(~mask, sampling=spacing).astype(np.float32)


def distance_to_other_labels(labels: Array, spacing: Sequence[float], backend: str) -> Array:
    """Return the distance of every voxel to the nearest voxel with another label, float32 ``[*S]``.

    Args:
        labels: whole numbers ``[*S]``, 1 to 3 axes, at least two different ones.
        spacing: voxel size along each axis.
        backend: ``edt`` or ``scipy``.
    """
    if backend == "edt":
        # edt leaves label 0 out; to it, the labels here start at 1
        return _edt(labels + 1, spacing)
    distances = np.empty(labels.shape, np.float32)
    lowest = int(labels.min())
    for i, box in enumerate(ndimage.find_objects(labels.astype(np.int64) - lowest + 1)):
        if box is None:
            continue
        # The nearest other voxel lies within one voxel of the label's bounding box.
        box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        mask = labels[box] == lowest + i
        inside = ndimage.distance_transform_edt(mask, sampling=spacing).astype(np.float32)
        np.copyto(distances[box], inside, where=mask)
    return distances


def _edt(labels: Array, spacing: Sequence[float]) -> Array:
    import edt  # an extra

    # Along the last axis edt adds up one voxel size after another, in float32: 0.0006 mm off at 200 mm in steps of
    # 0.7 mm, and a hundred times that at a metre. In units of that axis, the sum is of ones, and exact.
    unit = spacing[-1]
    sizes = tuple(size / unit for size in spacing)
    values: Array = edt.edt(
        np.ascontiguousarray(labels),
        anisotropy=sizes[0] if labels.ndim == 1 else sizes,
        black_border=False,
        parallel=torch.get_num_threads(),
    )
    values *= unit
    return values
