# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, and exact Euclidean distance transforms of one volume by numba or by SciPy.

``numba`` (the extra ``fast``) is several times faster, and takes the distances inside of all labels in one pass. SciPy
is always there. Both measure from voxel center to voxel center, and neither counts what lies outside of the volume.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import ndimage

from monai_losses_ext import _fallback, errors
from monai_losses_ext.extras import is_installed

BACKENDS = ("auto", "numba", "scipy", "triton")

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that does the work: ``auto`` is the fastest that works for labels on this device.

    Raises:
        UserError: for an unknown backend, or one that is not installed.
    """
    errors.one_of("distance backend", backend, BACKENDS)
    if backend == "auto" and device.type == "cuda" and is_installed("triton") and _triton_works():
        return "triton"
    if backend == "auto":
        return "numba" if is_installed("numba") and _numba_works() else "scipy"
    if backend in ("numba", "triton") and not is_installed(backend):
        what = "monai_losses_ext[fast]" if backend == "numba" else backend
        raise errors.fail("distance backend", "must be installed", backend, f" pip install {what}, or take 'scipy'.")
    return backend


@functools.cache
def _triton_works() -> bool:
    def attempt() -> None:
        from monai_losses_ext.distance import triton  # only where it is installed

        triton.signed_maps(torch.zeros(1, 1, 1, device="cuda"), 1, [[1.0]], [1.0], 0.0, 0)

    return _fallback.works("signed_distance: Triton", attempt, "distances are taken on the CPU, which is slower.")


@functools.cache
def _numba_works() -> bool:
    def attempt() -> None:
        found = distance_to_mask(np.arange(8).reshape(2, 2, 2) == 0, (1.0, 2.0, 2.0), "numba")
        if abs(float(found[1, 1, 1]) - 3) > 1e-5:
            raise RuntimeError("other numbers than the definition")

    return _fallback.works("signed_distance: numba", attempt, "SciPy takes the distances, which is slower.")


def distance_to_mask(mask: Array, spacing: Sequence[float], backend: str) -> Array:
    """Return the distance of every voxel to the nearest True voxel, float32 ``[*S]``, 0 on True voxels.

    Args:
        mask: bool ``[*S]``, 1 to 3 axes, with at least one True voxel.
        spacing: voxel size along each axis.
        backend: ``numba`` or ``scipy``.
    """
    if backend == "numba":
        from monai_losses_ext.distance import numba  # an extra

        return numba.distances((~mask).view(np.uint8), spacing, has_background=True)
    return ndimage.distance_transform_edt(~mask, sampling=spacing).astype(np.float32)


def distance_to_other_labels(
    labels: Array, spacing: Sequence[float], backend: str, wanted: Sequence[int] | None = None
) -> Array:
    """Return the distance of every voxel to the nearest voxel with another label, float32 ``[*S]``.

    Args:
        labels: uint8 or int32 of at least 0 ``[*S]``, 1 to 3 axes, at least two different ones.
        spacing: voxel size along each axis.
        backend: ``numba`` or ``scipy``.
        wanted: the labels at whose voxels it is needed; None: all.
    """
    if backend == "numba":
        from monai_losses_ext.distance import numba  # an extra

        return numba.distances(labels, spacing, has_background=False)
    distances = np.zeros(labels.shape, np.float32)
    boxes = ndimage.find_objects(labels.astype(np.int64) + 1)

    def measure(label: int) -> None:
        box = boxes[label] if label < len(boxes) else None
        if box is None:
            return
        # The nearest other voxel lies within one voxel of the label's bounding box.
        box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        mask = labels[box] == label
        inside = ndimage.distance_transform_edt(mask, sampling=spacing)
        np.copyto(distances[box], inside, where=mask, casting="same_kind")

    in_threads(measure, range(len(boxes)) if wanted is None else wanted)
    return distances


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return what a function gives for each item, computed by as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(function, items))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
