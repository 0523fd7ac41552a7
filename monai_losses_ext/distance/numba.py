# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact Euclidean distance transforms on a CPU, by kernels that numba compiles (extra ``fast``).

The squared distance separates: along each axis in turn, ``out[i] = min_k (in[i + k] + (k mm)^2)``. ``k`` grows until
``(k mm)^2`` alone is more than the best of all the 64 columns that are searched side by side, with the machine's vector
instructions: what is near costs little, and an envelope of parabolas, one column at a time, takes longer up to
distances of a hundred voxels. One pass takes the distances inside of all labels: a voxel of another label is no
distance away, whatever stands there.

Accuracy: that of float32's rounding of the squared distance, as with SciPy's result in float32.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import from_dtype, njit, types
from numpy.typing import NDArray

from monai_losses_ext.sums import pool
from monai_losses_ext.sums.numba.cache import compiled

Array = np.ndarray[Any, Any]
Kernel = Callable[..., None]
LANES = 64
CHECKED = 4  # steps after which the best distances are looked at again
FAR = np.int32(2**22)  # voxels; float32 has all whole numbers up to four times that
FARTHEST = np.float32(1e37)
PIECES = 8  # of the work, for each thread: one that is slow takes fewer
NEAR = 20  # voxels: where columns have to be searched farther on average, an envelope of parabolas is faster
SMALLEST = 2**15  # voxels; less is not worth waking a thread
# No value is NaN or infinite.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
INNER = {**OPTIONS, "no_cpython_wrapper": True}
_LOCK = threading.Lock()


def distances(labels: Array, spacing: Sequence[float], has_background: bool) -> NDArray[np.float32]:
    """Return the distance of every voxel to the nearest one with another label, float32 ``[*S]``.

    Args:
        labels: uint8 or int32 ``[*S]``, 1 to 3 axes, at least two different ones.
        spacing: voxel size along each axis.
        has_background: whether label 0 is background, whose distances are 0 and not measured.
    """
    rows, columns = _kernels(labels.dtype)
    labels = np.ascontiguousarray(labels)
    out = np.empty(labels.shape, np.float32)
    length = labels.shape[-1]
    mm = min(spacing)  # the unit of what is computed, so that no square is too large or too small for float32
    mm2 = [np.float32((float(size) / mm) ** 2) for size in spacing]
    lines, values = labels.reshape(-1, length), out.reshape(-1, length)
    unit = np.float32(mm if labels.ndim == 1 else 0)
    _spread(lambda a, b: rows(lines, values, mm2[-1], has_background, unit, a, b), len(lines), out.size)
    for axis in range(labels.ndim - 2, -1, -1):
        shape = (int(np.prod(labels.shape[:axis])), labels.shape[axis], int(np.prod(labels.shape[axis + 1 :])))
        unit = np.float32(0 if axis else mm)
        _columns(columns, labels.reshape(shape), out.reshape(shape), mm2[axis], has_background, unit)
    return out


def _columns(
    kernel: Kernel, labels: Array, values: Array, mm2: np.float32, has_background: bool, unit: np.float32
) -> None:
    tiles = values.shape[0] * -(-values.shape[2] // LANES)
    _spread(lambda a, b: kernel(labels, values, mm2, has_background, unit, a, b), tiles, values.size)


def along_rows(labels, out, mm2, has_background, unit, first, stop):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Write the squared distances along the last axis, of rows ``[R, N]``; distances where ``unit`` is not 0."""
    length = labels.shape[1]
    for r in range(first, stop):
        row, values = labels[r], out[r]
        changes = 0
        for i in range(length - 1):
            changes += row[i] != row[i + 1]
        if changes == 0:  # most rows: nothing is known, or nothing is to be measured
            values[:] = 0 if has_background and row[0] == 0 else FARTHEST
            continue
        steps = FAR
        values[0] = steps
        for i in range(1, length):
            steps = np.int32(1) if row[i] != row[i - 1] else steps + np.int32(1)
            values[i] = steps
        steps = FAR
        for i in range(length - 1, -1, -1):
            if i < length - 1:
                steps = np.int32(1) if row[i] != row[i + 1] else steps + np.int32(1)
            nearest = min(values[i], np.float32(steps))
            squared = nearest * nearest * mm2 if nearest < FAR else FARTHEST
            if has_background and row[i] == 0:
                squared = np.float32(0)
            values[i] = np.sqrt(squared) * unit if unit > 0 else squared


def along_columns(labels, out, mm2, has_background, unit, first, stop):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Take the minimum along the middle axis of ``[A, N, I]``, 64 columns at a time; ``unit`` as above."""
    length, width = out.shape[1], out.shape[2]
    blocks = (width + LANES - 1) // LANES
    values, names = np.zeros((length, LANES), np.float32), np.zeros((length, LANES), np.int32)
    result, numbers = np.empty((length, LANES), np.float32), np.empty((2, length + 2), np.float32)
    places, heights = np.empty(length + 2, np.int32), np.empty((2, length + 2))
    for tile in range(first, stop):
        a, start = tile // blocks, tile % blocks * LANES
        size = min(LANES, width - start)
        reach = np.float32(0)
        for i in range(length):
            values[i, :size] = out[a, i, start : start + size]
            largest = np.float32(0)
            for j in range(size):
                largest = max(largest, values[i, j])
            reach += min(np.sqrt(largest / mm2), np.float32(length))
            if not has_background:
                names[i, :size] = labels[a, i, start : start + size]
        if reach == 0:
            continue  # only background
        if reach < NEAR * length:
            search(values, names, result, mm2, has_background)
        else:
            for j in range(size):
                envelope(values[:, j], names[:, j], result[:, j], mm2, has_background, places, heights, numbers)
        for i in range(length):
            target, found = out[a, i, start : start + size], result[i]
            for j in range(size):
                target[j] = np.sqrt(found[j]) * unit if unit > 0 else found[j]


@njit(**INNER)
def search(values, names, result, mm2, has_background):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Look at neighbors of ``[N, LANES]`` that are farther and farther away, in all columns at once."""
    length = values.shape[0]
    best = np.empty(LANES, np.float32)
    for i in range(length):
        own, names_here = values[i], names[i]
        largest = np.float32(0)
        for j in range(LANES):
            best[j] = own[j]
            largest = max(largest, own[j])
        k = 1
        end = max(i, length - 1 - i) + 1
        while k < end and np.float32(k * k) * mm2 < largest:
            for n in range(k, min(k + CHECKED, end)):
                added = np.float32(n * n) * mm2
                for other in (i - n, i + n):
                    if other < 0 or other >= length:
                        continue
                    there = values[other]
                    if has_background:
                        for j in range(LANES):
                            best[j] = min(best[j], there[j] + added)
                    else:
                        names_there = names[other]
                        for j in range(LANES):
                            known = there[j] if names_there[j] == names_here[j] else np.float32(0)
                            best[j] = min(best[j], known + added)
            k += CHECKED
            largest = np.float32(0)
            for j in range(LANES):
                largest = max(largest, best[j])
        result[i] = best


@njit(**INNER)
def envelope(values, names, result, mm2, has_background, places, heights, numbers):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Take the lower envelope of the parabolas of a column, anew for each run of a label (Felzenszwalb and others)."""
    length = values.shape[0]
    tops, cuts, known = heights[0], heights[1], numbers[0]
    inverse = 1.0 / mm2
    start = 0
    while start < length:
        stop = length if has_background else start + 1
        while stop < length and names[stop] == names[start]:
            stop += 1
        n = -1
        # The voxels before and after the run have another label.
        for q in range(start if has_background or start == 0 else start - 1, min(length, stop + 1)):
            value = values[q] if start <= q < stop else np.float32(0)
            if value >= FARTHEST:
                continue
            top = value * inverse + q * q
            cut = 0.0
            while n >= 0:
                cut = (top - tops[n]) / (2.0 * (q - places[n]))
                if n == 0 or cut > cuts[n]:
                    break
                n -= 1
            n += 1
            places[n], tops[n], cuts[n], known[n] = q, top, cut, value
        if n < 0:
            result[start:stop] = FARTHEST
        else:
            k = 0
            for q in range(start, stop):
                while k < n and cuts[k + 1] < q:
                    k += 1
                away = np.float32(q - places[k])
                result[q] = away * away * mm2 + known[k]
        start = stop


def _spread(work: Callable[[int, int], None], number: int, voxels: int) -> None:
    """Run ``work(first, stop)`` for all of ``number``, in as many threads as torch may use."""
    threads = min(torch.get_num_threads(), max(1, voxels // SMALLEST))
    if threads == 1:
        work(0, number)
        return
    pieces = min(number, PIECES * threads)
    counter = itertools.count()  # the next number is handed out to one thread at a time

    def take() -> None:
        while (i := next(counter)) < pieces:
            work(number * i // pieces, number * (i + 1) // pieces)

    pool.spread(take, threads)


def _kernels(dtype: np.dtype[Any]) -> tuple[Kernel, Kernel]:
    with _LOCK:  # functools.cache alone would let two threads compile at once
        return _compiled(dtype)


@functools.cache
def _compiled(dtype: np.dtype[Any]) -> tuple[Kernel, Kernel]:
    return compiled("distance", lambda cache: _build(dtype, cache))


def _build(dtype: np.dtype[Any], cache: bool) -> tuple[Kernel, Kernel]:
    rest = (types.float32, types.boolean, types.float32, types.int64, types.int64)

    def build(kernel: Kernel, axes: int) -> Kernel:
        volumes = (types.Array(kind, axes, "C") for kind in (from_dtype(dtype), types.float32))
        compiled_kernel: Kernel = njit([types.void(*volumes, *rest)], cache=cache, **OPTIONS)(kernel)
        return compiled_kernel

    return build(along_rows, 2), build(along_columns, 3)
