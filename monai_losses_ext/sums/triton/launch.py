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
from monai_losses_ext.sums.triton.kernels import gradient_kernel, sums_kernel, total_kernel

# Before 3.4 an item of a tuple of constants cannot be read in a kernel.
OLDEST, VERSION = (3, 4), tuple(map(int, triton.__version__.split(".")[:2]))
# Of the sums' kernel, by size: enough programs to keep a GPU busy, of which each adds up many tiles.
PROGRAMS, MOST_TILES = 1024, 64
ROWS, SUMS = 64, 32  # that one program of the last kernel adds up at once


def forward(
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    x, num_samples, num_classes = logits.flatten(2), *logits.shape[:2]
    volumes, options, num_blocks = _launch(x, target, distance, terms, activation, ignore_index)
    num_steps = max(1, min(MOST_TILES, num_samples * num_blocks // PROGRAMS))
    num_rows = triton.cdiv(num_blocks, num_steps)
    rows = x.new_empty((num_samples, num_rows, len(terms), num_classes), dtype=torch.float32)
    sums = x.new_empty((len(terms), num_samples, num_classes), dtype=torch.float32)
    if rows.numel() == 0:
        return sums.zero_()
    with torch.cuda.device_of(x):
        sums_kernel[(num_samples * num_rows,)](*volumes, rows, num_rows=num_rows, num_steps=num_steps, **options)
        total_kernel[(num_samples, triton.cdiv(len(terms) * num_classes, SUMS))](
            rows, sums, num_samples, num_rows, len(terms), num_classes, ROWS, SUMS
        )
    return sums


def backward(
    grad_sums: Tensor,
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """Compute the gradient with respect to the logits; arguments and result as in :func:`chunked.backward`."""
    grad = torch.empty_like(logits)
    x, out = logits.flatten(2), grad.flatten(2)
    volumes, options, num_blocks = _launch(x, target, distance, terms, activation, ignore_index)
    grad_sums = grad_sums.to(torch.float32).contiguous()
    if out.numel():
        strides = dict(zip(("o_b", "o_c", "o_v"), out.stride(), strict=True))
        with torch.cuda.device_of(x):
            gradient_kernel[(x.shape[0] * num_blocks,)](
                *volumes, grad_sums, out, num_samples=x.shape[0], num_blocks=num_blocks, **strides, **options
            )
    # Where the axes of the volume lie in another order in memory, the flat view is a copy.
    return grad if out.data_ptr() == grad.data_ptr() else grad.copy_(out.view(grad.shape))


def tile(c_pad: int) -> tuple[int, int, int]:
    """Return the voxels of a tile, how many of them in a row are one thread's, and the warps that share it.

    Up to 16 classes, a thread has all classes of its voxels, and a softmax needs no other thread. With more, a thread
    has up to 32 logits. Chosen by the machine code for sm_90, its instructions for a logit and its registers, and not
    by time: no GPU was at hand. ``tests/compile_kernels.py`` prints both.
    """
    if c_pad <= 16:
        vec = 4 if c_pad <= 4 else 2
        return 128 * vec, vec, 4
    num_warps = 4 if c_pad <= 64 else 8
    return 1024 * num_warps // c_pad, 4, num_warps


def _launch(
    x: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
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
    has_distance = distance is not None and not T.SURFACE_TERMS.isdisjoint(names)
    g = target.flatten(2)
    g = g.view(torch.uint8) if g.dtype == torch.bool else g
    phi = distance.flatten(2) if has_distance and distance is not None else x
    c_pad = triton.next_power_of_2(num_classes)
    block, vec, num_warps = tile(c_pad)
    # A thread's voxels lie in a row where it can read them at once, which Triton takes for granted only where every
    # class starts at a multiple of 16 elements. Otherwise a tile is shorter, so that a thread has as many sums to keep.
    is_row = x.stride(2) == 1
    fold = vec if is_row and x.stride(1) % 16 == 0 else 1
    block = block * fold // vec
    strides = {
        f"{name}_{axis}": n
        for name, v in zip("xtd", (x, g, phi), strict=True)
        for axis, n in zip("bcv", v.stride(), strict=True)
    }
    options = {
        **strides,
        "num_voxels": num_voxels,
        "NUM_CLASSES": num_classes,
        "TERMS": names,
        "GAMMAS": gammas,
        "NUM_TERMS": len(names),
        "ACTIVATION": activation,
        "TARGET": _kind(g, num_classes),
        "HAS_DISTANCE": has_distance,
        "IGNORE": _ignore_rule(target, activation, ignore_index),
        "IGNORE_INDEX": ignore_index or 0,
        "C_PAD": c_pad,
        "BLOCK": block,
        "VEC": vec if is_row else 1,
        "FOLD": fold,
        "num_warps": num_warps,
    }
    return [x, g, phi], options, triton.cdiv(num_voxels, block)


def _kind(target: Tensor, num_classes: int) -> str:
    if target.shape[1] == num_classes:
        return "dense"
    return "real" if target.is_floating_point() else "integer"


def _ignore_rule(target: Tensor, activation: str, ignore_index: int | None) -> str:
    """Return which of the rules of :func:`terms.kept_voxels` says what voxels count."""
    if ignore_index is None or not T.can_hold(target.dtype, ignore_index):
        return "none"
    if target.shape[1] == 1:
        return "label"
    if 0 <= ignore_index < target.shape[1]:
        return "channel"
    return "value" if activation == "sigmoid" else "value_or_empty"
