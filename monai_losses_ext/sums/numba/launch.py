# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a kernel is handed: the volumes' addresses and strides, what to compute, and the threads that do it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_losses_ext.sums import pool
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.numba import compiled
from monai_losses_ext.sums.numba import kernels as K  # noqa: N812
from monai_losses_ext.sums.target import Target

PIECE, SMALLEST_PIECE, PIECES = 65536, 8192, 16
TILE, TILE_ELEMENTS = 512, 2**15  # a tile is smaller where there are many classes, so that its buffers stay near
ELEMENTS_PER_THREAD = 2**15  # fewer are not worth waking a thread
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14

KINDS = {
    torch.float32: K.FLOAT32, torch.float16: K.FLOAT16, torch.bfloat16: K.BFLOAT16, torch.float64: K.FLOAT64,
    torch.uint8: K.UINT8, torch.bool: K.UINT8, torch.int8: K.INT8, torch.int16: K.INT16, torch.int32: K.INT32,
    torch.int64: K.INT64,
}  # fmt: skip
ACTIVATIONS = {"softmax": K.SOFTMAX, "sigmoid": K.SIGMOID, "none": K.NONE}
CODES = {
    "tp": K.TP, "pred": K.PRED, "pred_sq": K.PRED_SQ, "ref": K.REF, "ref_sq": K.REF_SQ, "abs_diff": K.ABS_DIFF,
    "ce": K.CE, "ce_neg": K.CE_NEG, "logp": K.LOGP, "focal": K.FOCAL, "focal_neg": K.FOCAL_NEG,
    "surface": K.SURFACE, "surface_min": K.SURFACE_MIN, "count": K.COUNT,
}  # fmt: skip
TERMS = frozenset(CODES)
LOGIT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_VOLUME = [0] * 10
NO_SUMS, NO_SLOPES = np.empty((0, 0, 0)), np.empty((0, 0, 0), np.float32)


def supports(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> bool:
    """Tell whether the kernels compute this; what they do not is for ``chunked``."""
    volumes = (target.label, target.weight, target.distance, target.mask)
    return (
        logits.device.type == "cpu"
        and logits.dtype in LOGIT_TYPES
        and 3 <= logits.ndim <= 5
        and activation in ACTIVATIONS
        and target.annotated is None
        and all(volume is None or volume.dtype in KINDS for volume in volumes)
        and all(abs(label) < 2**24 for label in target.ignored)
        and _coded(tuple(terms)) is not None
    )


def forward(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    job, gammas = _job(logits, target, tuple(terms), activation)
    num_samples, num_classes = logits.shape[:2]
    partial = np.zeros((num_samples, int(job[K.NUM_PIECES]), len(gammas), num_classes))
    kernel, flat = compiled.kernel(), partial.reshape(-1, len(gammas), num_classes)
    # The volumes, which the kernel knows by address, live as long as a thread may read them, also after a Ctrl-C.
    pool.spread(lambda _alive=(logits, target): kernel(job, gammas, flat, NO_SLOPES), _threads(logits, job))  # type: ignore[misc]
    if job[K.WRONG]:
        target.check_values(num_classes)
    return torch.from_numpy(np.ascontiguousarray(partial.sum(1).transpose(1, 0, 2), np.float32))


def backward(grad_sums: Tensor, logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the gradient with respect to the logits, in their dtype and layout; ``grad_sums`` is ``[T, B, C]``."""
    gradient = torch.empty_like(logits)
    _advise_huge_pages(gradient)
    job, gammas = _job(logits, target, tuple(terms), activation, gradient)
    slopes = grad_sums.detach().to(torch.float32).contiguous().numpy()
    kernel = compiled.kernel()
    alive = (logits, target, gradient)
    pool.spread(lambda _alive=alive: kernel(job, gammas, NO_SUMS, slopes), _threads(logits, job))  # type: ignore[misc]
    return gradient


def _threads(logits: Tensor, job: NDArray[np.int64]) -> int:
    return min(torch.get_num_threads(), int(job[K.PIECES]), 1 + logits.numel() // ELEMENTS_PER_THREAD)


@functools.lru_cache(64)
def _coded(terms: tuple[str, ...]) -> tuple[list[int], NDArray[np.float32]] | None:
    """Return the terms as the kernels know them: codes and exponents; None where they do not know one."""
    parts = [T.split(term) for term in terms]
    if any(name not in CODES for name, _ in parts):
        return None
    return [CODES[name] for name, _ in parts], np.array([gamma for _, gamma in parts], np.float32)


def _job(
    logits: Tensor, target: Target, terms: tuple[str, ...], activation: str, gradient: Tensor | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the kernels' description of the work, and the terms' exponents."""
    coded = _coded(terms)
    if coded is None:
        raise NotImplementedError(f"the CPU kernels do not know all of {', '.join(terms)}")
    codes, gammas = coded
    num_samples, num_classes = logits.shape[:2]
    num_voxels = logits[0, 0].numel() if num_samples else 0
    piece, tile = _cut(num_voxels, num_classes if activation == "softmax" else 1)
    num_pieces = -(-num_voxels // piece)
    masks_channels = target.mask is not None and target.mask.shape[1] > 1
    header = [0, 0, num_classes, num_voxels, num_pieces, num_samples * num_pieces, piece, tile]
    header += [ACTIVATIONS[activation], target.is_index, masks_channels, len(codes), len(target.ignored), 0, 0, 0]
    needs_map = not T.SURFACE_TERMS.isdisjoint(terms)
    volumes = (logits, target.label, target.weight, target.mask, target.distance if needs_map else None, gradient)
    described = [number for volume in volumes for number in (NO_VOLUME if volume is None else _described(volume))]
    return np.array([*header, *described, *codes, *target.ignored], np.int64), gammas


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
