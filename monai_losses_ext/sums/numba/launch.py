# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a kernel is handed: the volumes' addresses and strides, what to compute, and the threads that do it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_losses_ext.sums import pool
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.numba import compiled
from monai_losses_ext.sums.numba import kernels as K  # noqa: N812
from monai_losses_ext.sums.target import VOLUMES, Target

PIECE, SMALLEST_PIECE, PIECES = 65536, 8192, 16
TILE, TILE_ELEMENTS = 512, 2**15  # a tile is smaller where there are many classes, so that its buffers stay near
ELEMENTS_PER_THREAD = 2**15  # fewer are not worth waking a thread
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
MOST_SUMS = 2**20  # of a batch; each piece of the volume has them

KINDS = {
    torch.float32: K.FLOAT32, torch.float16: K.FLOAT16, torch.bfloat16: K.BFLOAT16, torch.float64: K.FLOAT64,
    torch.uint8: K.UINT8, torch.bool: K.UINT8, torch.int8: K.INT8, torch.int16: K.INT16, torch.int32: K.INT32,
    torch.int64: K.INT64,
}  # fmt: skip
ACTIVATIONS = {"softmax": K.SOFTMAX, "sigmoid": K.SIGMOID, "none": K.NONE}
CODES: dict[str, Any] = {
    "tp": K.TP, "pred": K.PRED, "pred_sq": K.PRED_SQ, "ref": K.REF, "ref_sq": K.REF_SQ, "abs_diff": K.ABS_DIFF,
    "ce": K.CE, "ce_neg": K.CE_NEG, "logp": K.LOGP, "focal": K.FOCAL, "focal_neg": K.FOCAL_NEG,
    "surface": K.SURFACE, "surface_min": K.SURFACE_MIN, "skeleton": K.SKELETON_SUM, "skeleton_ref": K.SKELETON_REF,
    "count": K.COUNT, "region_tp": K.REGION_TP, "region_pred": K.REGION_PRED, "region_ref": K.REGION_REF,
    "region_ce": K.REGION_CE, "region_count": K.REGION_COUNT, "bins": K.BINS,
}  # fmt: skip
TERMS = frozenset(CODES)
LOGIT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_VOLUME = [0] * 10
NO_SUMS, NO_SLOPES = np.empty((0, 0, 0)), np.empty((0, 0, 0), np.float32)


def supports(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> bool:
    """Tell whether the kernels compute this; what they do not is for ``chunked``."""
    plan = _plan(tuple(terms), target.num_regions)
    volumes = (getattr(target, name) for name in VOLUMES)
    return (
        plan is not None
        and logits.device.type == "cpu"
        and logits.dtype in LOGIT_TYPES
        and 3 <= logits.ndim <= 5
        and activation in ACTIVATIONS
        and (target.annotated is None or activation != "none")
        and all(volume is None or volume.dtype in KINDS for volume in volumes)
        and all(abs(label) < 2**24 for label in target.ignored)
        and plan.num_rows * logits.shape[0] * logits.shape[1] <= MOST_SUMS
    )


def forward(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    job, plan = _job(logits, target, terms, activation)
    num_samples, num_classes = logits.shape[:2]
    partial = np.zeros((num_samples, int(job[K.NUM_PIECES]), num_classes, plan.num_rows))
    kernel, flat = compiled.kernel(), partial.reshape(-1, num_classes, plan.num_rows)
    # The volumes, which the kernel knows by address, live as long as a thread may read them, also after a Ctrl-C.
    alive = (logits, target)
    pool.spread(lambda _alive=alive: kernel(job, plan.gammas, flat, NO_SLOPES, *_buffers(job)), _threads(logits, job))  # type: ignore[misc]
    if job[K.WRONG]:
        target.check_values(num_classes)
    sums = torch.from_numpy(np.ascontiguousarray(partial.sum(1).transpose(2, 0, 1), np.float32))
    return sums if target.annotated is None else torch.where(target.annotated, sums, 0.0)


def backward(grad_sums: Tensor, logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the gradient with respect to the logits, in their dtype and layout; ``grad_sums`` is ``[rows, B, C]``."""
    gradient = torch.empty_like(logits)
    _advise_huge_pages(gradient)
    job, plan = _job(logits, target, terms, activation, gradient)
    known = grad_sums.detach() if target.annotated is None else torch.where(target.annotated, grad_sums.detach(), 0.0)
    slopes = known.permute(1, 2, 0).to(torch.float32).contiguous().numpy()
    kernel = compiled.kernel()
    alive = (logits, target, gradient)
    pool.spread(lambda _alive=alive: kernel(job, plan.gammas, NO_SUMS, slopes, *_buffers(job)), _threads(logits, job))  # type: ignore[misc]
    return gradient


def _buffers(job: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the memory in which a thread works on a tile."""
    tile, is_softmax = int(job[K.TILE]), job[K.ACTIVATION] == K.SOFTMAX
    return K.start_buffers(int(job[K.NUM_CLASSES]) if is_softmax else 0, tile), np.empty(tile, np.int64)


def _threads(logits: Tensor, job: NDArray[np.int64]) -> int:
    return min(torch.get_num_threads(), int(job[K.PIECES]), 1 + logits.numel() // ELEMENTS_PER_THREAD)


class _Plan(NamedTuple):
    """Terms as the kernels know them."""

    gammas: NDArray[np.float32]  # exponents, and numbers of bins
    num_terms: int
    num_rows: int
    numbers: list[int]  # of the job: the row of each code, the terms' codes and first rows


@functools.lru_cache(64)
def _plan(terms: tuple[str, ...], num_regions: int) -> _Plan | None:
    """Return what the kernels need to know of the terms; None where they do not know one."""
    parts = [T.split(term) for term in terms]
    if any(name not in CODES for name, _ in parts):
        return None
    codes = [int(CODES[name]) for name, _ in parts]
    *firsts, num_rows = accumulate([T.rows(term, num_regions) for term in terms], initial=0)
    row_of = [-1] * K.NUM_CODES
    for code, first in zip(codes, firsts, strict=True):
        row_of[code] = first
    gammas = np.array([number for _, number in parts], np.float32)
    return _Plan(gammas, len(terms), num_rows, [*row_of, *codes, *firsts])


def _job(
    logits: Tensor, target: Target, terms: Sequence[str], activation: str, gradient: Tensor | None = None
) -> tuple[NDArray[np.int64], _Plan]:
    """Return the kernels' description of the work."""
    plan = _plan(tuple(terms), target.num_regions)
    if plan is None:
        raise NotImplementedError(f"the CPU kernels do not know all of {', '.join(terms)}")
    num_samples, num_classes = logits.shape[:2]
    num_voxels = logits[0, 0].numel() if num_samples else 0
    piece, tile = _cut(num_voxels, num_classes if activation == "softmax" else 1)
    num_pieces = -(-num_voxels // piece)
    masks_channels = target.mask is not None and target.mask.shape[1] > 1
    merged = target.annotated if activation == "softmax" else None
    skeleton, regions = target.skeleton, target.regions
    header = [0, 0, num_classes, num_voxels, num_pieces, num_samples * num_pieces, piece, tile]
    header += [ACTIVATIONS[activation], target.is_index, masks_channels, plan.num_terms, len(target.ignored)]
    header += [merged is not None, 0 if regions is None else num_classes - regions.shape[1]]
    header += [skeleton is not None and skeleton.shape[1] < num_classes]
    distance = None if T.SURFACE_TERMS.isdisjoint(terms) else target.distance
    volumes = (logits, target.label, target.weight, target.mask, distance, skeleton, regions, gradient)
    for volume in volumes:
        header += NO_VOLUME if volume is None else _described(volume)
    flags = [] if merged is None else merged.flatten().tolist()
    return np.array([*header, *plan.numbers, *target.ignored, *flags], np.int64), plan


def _cut(num_voxels: int, rows: int) -> tuple[int, int]:
    """Return how many voxels a piece and a tile have; on the shape alone depends how sums are rounded."""
    tile = max(128, min(TILE, TILE_ELEMENTS // rows // 128 * 128))
    piece = max(SMALLEST_PIECE, min(PIECE, -(-num_voxels // PIECES)))
    return -(-piece // tile) * tile, tile


def _described(volume: Tensor) -> list[int]:
    """Return a volume as the kernels read it, its spatial axes merged where they lie as one."""
    strides = volume.stride()
    head = [volume.data_ptr(), KINDS[volume.dtype], volume.element_size(), strides[0], strides[1]]
    if volume.is_contiguous():
        return [*head, 1, max(1, volume.numel() // max(1, volume.shape[0] * volume.shape[1])), 0, 0, 1]
    axes: list[tuple[int, int]] = []
    for length, stride in zip(volume.shape[2:], strides[2:], strict=True):
        if axes and axes[-1][1] == length * stride:
            axes[-1] = (axes[-1][0] * length, stride)
        elif length > 1 or not axes:
            axes.append((length, stride))
    axes = [(1, 0)] * (3 - len(axes)) + axes
    return [*head, axes[1][0], max(1, axes[2][0]), axes[0][1], axes[1][1], axes[2][1]]


def _advise_huge_pages(fresh: Tensor) -> None:
    """Ask for large pages under fresh memory: half of the backward pass is the kernel handing out small ones.

    Advice for whole pages inside of the tensor; nothing changes where the system has none, or does not listen.
    """
    start, end = fresh.data_ptr(), fresh.data_ptr() + fresh.numel() * fresh.element_size()
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    advise = _madvise()
    if advise is not None and last - first >= 2 * HUGE_PAGE:
        advise(first, last - first, MADV_HUGEPAGE)


@functools.cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # no Linux
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
