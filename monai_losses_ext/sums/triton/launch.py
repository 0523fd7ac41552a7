# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the kernels are started with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import Target
from monai_losses_ext.sums.triton.kernels import gradient_kernel, sums_kernel, total_kernel

# Before 3.4 an item of a tuple of constants cannot be read in a kernel.
OLDEST, VERSION = (3, 4), tuple(map(int, triton.__version__.split(".")[:2]))
# Of the sums' kernel, by size: enough programs to keep a GPU busy, of which each adds up many tiles.
PROGRAMS, MOST_TILES = 1024, 64
# By classes, rounded up to a power of 2: the voxels of a tile, how many of them in a row are one thread's, the warps
# that share it, and how many tiles of the sums' kernel are on their way from memory or worked on. Up to 16 classes, a
# thread has all classes of its voxels, and a softmax needs no other thread. The fastest of those measured on an H200.
SUMS_TILES = {
    4: (256, 4, 2, 3), 8: (512, 4, 4, 3), 16: (128, 4, 1, 2), 32: (128, 4, 2, 2),
    64: (64, 4, 2, 2), 128: (32, 4, 2, 3), 256: (32, 4, 4, 2),
}  # fmt: skip
GRADIENT_TILES = {
    4: (256, 4, 2), 8: (512, 4, 4), 16: (128, 4, 1), 32: (128, 4, 2), 64: (64, 4, 2), 128: (32, 4, 4), 256: (32, 4, 4),
}  # fmt: skip
MANY_TERMS = 6
# What the kernels compute: neither skeletons nor sums by regions or bins, nor cases annotated in part.
TERMS = frozenset({*T.PLAIN_TERMS, *T.FOCAL_TERMS} - T.SKELETON_TERMS)
# Rows and sums that one program of the last kernel adds up at once, and its warps: most often all of its rows.
ROWS, SUMS, TOTAL_WARPS = 512, 8, 8


def supports(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> bool:
    """Tell whether the kernels compute this; what they do not is for ``chunked``."""
    return target.annotated is None and all(T.split(term)[0] in TERMS for term in terms)


def forward(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`. No value of the target is checked."""
    x, num_samples, num_classes = logits.flatten(2), *logits.shape[:2]
    distance = _distance(target, terms)
    dense = [x, *(volume for volume in (None if target.is_index else target.label, distance) if volume is not None)]
    size = sum(volume.element_size() for volume in dense)
    *tile, stages = sums_tile(triton.next_power_of_2(num_classes), size, distance is not None, len(terms))
    volumes, options, num_blocks = _launch(x, target, terms, activation, tile)
    num_steps = max(1, min(MOST_TILES, num_samples * num_blocks // PROGRAMS))
    num_rows = triton.cdiv(num_blocks, num_steps)
    rows = x.new_empty((num_samples, num_rows, len(terms), num_classes), dtype=torch.float32)
    sums = x.new_empty((len(terms), num_samples, num_classes), dtype=torch.float32)
    if rows.numel() == 0:
        return sums.zero_()
    with torch.cuda.device_of(x):
        sums_kernel[(num_samples * num_rows,)](
            *volumes, rows, num_rows=num_rows, num_steps=num_steps, STAGES=stages, **options
        )
        total_kernel[(num_samples, triton.cdiv(len(terms) * num_classes, SUMS))](
            rows, sums, num_samples, num_rows, len(terms), num_classes, ROWS, SUMS, num_warps=TOTAL_WARPS
        )
    return sums


def backward(grad_sums: Tensor, logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the gradient with respect to the logits; arguments and result as in :func:`chunked.backward`."""
    grad = torch.empty_like(logits)
    x, out = logits.flatten(2), grad.flatten(2)
    tile = GRADIENT_TILES[max(4, triton.next_power_of_2(x.shape[1]))]
    volumes, options, num_blocks = _launch(x, target, terms, activation, tile)
    del options["FOLD"]
    grad_sums = grad_sums.to(torch.float32).contiguous()
    if out.numel():
        strides = dict(zip(("o_b", "o_c", "o_v"), out.stride(), strict=True))
        with torch.cuda.device_of(x):
            gradient_kernel[(x.shape[0] * num_blocks,)](
                *volumes, grad_sums, out, num_samples=x.shape[0], num_blocks=num_blocks, **strides, **options
            )
    # Where the axes of the volume lie in another order in memory, the flat view is a copy.
    return grad if out.data_ptr() == grad.data_ptr() else grad.copy_(out.view(grad.shape))


def sums_tile(c_pad: int, bytes_per_voxel: int, has_distance: bool, num_terms: int) -> tuple[int, int, int, int]:
    """Return an entry of :data:`SUMS_TILES`, or what is faster or fits in its place.

    Args:
        c_pad: number of classes, rounded up to a power of 2.
        bytes_per_voxel: that are read for each class of a voxel.
        has_distance: whether maps are read.
        num_terms: that are summed.
    """
    block, vec, num_warps, stages = SUMS_TILES[max(4, c_pad)]
    if has_distance and c_pad == 16:
        block, vec, num_warps, stages = 256, 4, 2, 2
    elif bytes_per_voxel == 2:
        stages = 3
    if num_terms > MANY_TERMS and c_pad > 16:
        num_warps *= 2  # or the sums that a thread keeps are too many for its registers
    # Tiles on their way lie in shared memory, of which small GPUs have 64 KiB a program.
    return block, vec, num_warps, stages if c_pad * block * bytes_per_voxel * stages <= 2**16 else 1


def _launch(
    x: Tensor, target: Target, terms: Sequence[str], activation: str, tile: Sequence[int]
) -> tuple[list[Tensor], dict[str, Any], int]:
    """Return what both kernels are started with: the volumes, the named arguments and the blocks of a sample.

    A volume is seen as ``[B, C, V]`` with whatever strides that takes, so channels-last logits are not copied.
    """
    if not x.is_cuda and isinstance(sums_kernel, triton.JITFunction):
        rule = "'triton' needs a CUDA device (on a CPU, TRITON_INTERPRET=1 in the environment, for tests)"
        raise errors.fail("backend", rule, str(x.device), " Take 'chunked'.")
    if VERSION < OLDEST:
        raise errors.fail("backend", "'triton' needs Triton 3.4 or newer", triton.__version__, " Take 'chunked'.")
    names, gammas = zip(*map(T.split, terms), strict=True)
    _, num_classes, num_voxels = x.shape
    distance = _distance(target, terms)
    parts = [x, *map(_flat, (target.label, distance, target.weight, target.mask))]
    c_pad = triton.next_power_of_2(num_classes)
    block, vec, num_warps = tile
    # A thread's voxels lie in a row where it can read them at once, which Triton takes for granted only where every
    # class starts at a multiple of 16 elements. Otherwise a tile is shorter, so that a thread has as many sums to keep.
    is_row = x.stride(2) == 1
    fold = vec if is_row and x.stride(1) % 16 == 0 else 1
    block = block * fold // vec
    options = {
        "num_voxels": num_voxels,
        "NUM_CLASSES": num_classes,
        "TERMS": names,
        "GAMMAS": gammas,
        "NUM_TERMS": len(names),
        "ACTIVATION": activation,
        "LABEL": _kind(target),
        "IGNORED": target.ignored or (0,),
        "NUM_IGNORED": len(target.ignored),
        "HAS_DISTANCE": distance is not None,
        "HAS_WEIGHT": target.weight is not None,
        "MASK": "none" if target.mask is None else "voxel" if target.mask.shape[1] == 1 else "channel",
        "C_PAD": c_pad,
        "BLOCK": block,
        "VEC": vec if is_row else 1,
        "FOLD": fold,
        "num_warps": num_warps,
    }
    for name, part in zip("xtdwm", parts, strict=True):
        for axis, stride in zip("bcv", (0, 0, 0) if part is None else part.stride(), strict=True):
            options[f"{name}_{axis}"] = stride
    return [x if part is None else part for part in parts], options, triton.cdiv(num_voxels, block)


def _distance(target: Target, terms: Sequence[str]) -> Tensor | None:
    return None if T.SURFACE_TERMS.isdisjoint(terms) else target.distance


def _flat(volume: Tensor | None) -> Tensor | None:
    """Return a volume as ``[B, C, V]`` of a type that Triton has."""
    if volume is None:
        return None
    return (volume.view(torch.uint8) if volume.dtype == torch.bool else volume).flatten(2)


def _kind(target: Target) -> str:
    """Return how a label is read: ``dense``, or index labels that are ``real``, of 64 bits (``wide``) or ``narrow``."""
    if not target.is_index:
        return "dense"
    if target.label.is_floating_point():
        return "real"
    return "wide" if target.label.dtype == torch.int64 else "narrow"
