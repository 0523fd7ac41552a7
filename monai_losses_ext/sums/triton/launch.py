# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the kernels are started with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from monai_losses_ext import _checks
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.triton.kernels import gradient_kernel, sums_kernel

# Before 3.4 an item of a tuple of constants cannot be read in a kernel.
OLDEST, VERSION = (3, 4), tuple(map(int, triton.__version__.split(".")[:2]))
# Elements (classes times voxels) of a tile, reasoned rather than measured, since no GPU was at hand: 16 a thread, which
# for sm_90 compiles to 40 to 90 registers, so that several tiles share a multiprocessor and one computes while another
# is read. With many classes the tile doubles, to read at least 64 bytes in a row and to keep the partial sums, one
# number for each class and term of a tile, below a tenth of the logits.
TILE_ELEMENTS = {"few_classes": 4096, "many_classes": 8192}
MANY_CLASSES = 128
ELEMENTS_PER_WARP = 512


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
    volumes, options, grid = _launch(x, target, distance, terms, activation, ignore_index)
    rows = x.new_empty((num_samples, options["num_blocks"], len(terms), num_classes), dtype=torch.float32)
    if rows.numel():
        with torch.cuda.device_of(x):
            sums_kernel[grid](*volumes, rows, **options)
    sums = rows.sum(1, dtype=torch.float64).transpose(0, 1)
    return sums.to(torch.float32, memory_format=torch.contiguous_format)


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
    volumes, options, grid = _launch(x, target, distance, terms, activation, ignore_index)
    grad_sums = grad_sums.to(torch.float32, memory_format=torch.contiguous_format)
    if out.numel():
        strides = dict(zip(("o_b", "o_c", "o_v"), out.stride(), strict=True))
        with torch.cuda.device_of(x):
            gradient_kernel[grid](*volumes, grad_sums, out, num_samples=x.shape[0], **strides, **options)
    # Where the axes of the volume lie in another order in memory, the flat view is a copy.
    return grad if out.data_ptr() == grad.data_ptr() else grad.copy_(out.view(grad.shape))


def _launch(
    x: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> tuple[list[Tensor], dict[str, Any], tuple[int]]:
    """Return what both kernels are started with: the volumes, the named arguments and the grid.

    A volume is seen as ``[B, C, V]`` with whatever strides that takes, so channels-last logits are not copied.
    """
    if not x.is_cuda and isinstance(sums_kernel, triton.JITFunction):
        rule = "'triton' needs a CUDA device (on a CPU, TRITON_INTERPRET=1 in the environment, for tests)"
        raise _checks.fail("backend", rule, str(x.device), " Take 'chunked'.")
    if VERSION < OLDEST:
        raise _checks.fail("backend", "'triton' needs Triton 3.4 or newer", triton.__version__, " Take 'chunked'.")
    names, gammas = zip(*map(T.split, terms), strict=True)
    num_samples, num_classes, num_voxels = x.shape
    has_distance = distance is not None and not T.SURFACE_TERMS.isdisjoint(names)
    g = target.flatten(2)
    g = g.view(torch.uint8) if g.dtype == torch.bool else g
    phi = distance.flatten(2) if has_distance and distance is not None else x
    c_pad = triton.next_power_of_2(num_classes)
    elements = TILE_ELEMENTS["many_classes" if c_pad >= MANY_CLASSES else "few_classes"]
    block = max(1, elements // c_pad)
    num_blocks = triton.cdiv(num_voxels, block)
    strides = {
        f"{name}_{axis}": n
        for name, v in zip("xtd", (x, g, phi), strict=True)
        for axis, n in zip("bcv", v.stride(), strict=True)
    }
    options = {
        **strides,
        "num_voxels": num_voxels,
        "num_blocks": num_blocks,
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
        "num_warps": max(1, elements // ELEMENTS_PER_WARP),
    }
    return [x, g, phi], options, (num_samples * num_blocks,)


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
