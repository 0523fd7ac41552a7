# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact signed distance maps on CUDA, for all classes and samples at once.

The squared Euclidean distance separates: along each axis in turn, ``out[i] = min_j (in[j] + (mm (i - j))^2)``. One
field holds both sides of a boundary: a voxel inside has minus the squared distance to what is not the mask, one outside
the squared distance to the mask, and the other of the two is 0. Every line is searched in full: that is 3e9 candidates
for 4 maps of 128^3, little for a GPU.

Deterministic, and exact but for float32's rounding of the squared distance. Besides the maps it takes one buffer of
their size (two axes or more).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from monai_losses_ext import errors

# Voxels of a line, and lines, that one program has: 2048 minima in registers, 16 a thread. Of twelve pairs the fastest
# on an H200, 0.86 ms for the maps of 2x3x128^3; the slowest took 1.13 ms.
BLOCK, LINES = 128, 16


@triton.jit
def _field(value, c, SOURCE: tl.constexpr):
    """Return the field at voxels, by their label or their value in a mask: so far, the other side is nowhere."""
    if SOURCE == "labels":
        return tl.where(value == c, float("-inf"), float("inf"))
    elif SOURCE == "masks":
        return tl.where(value > 0.5, float("-inf"), float("inf"))
    else:
        return value


@triton.jit
def axis_kernel(
    source,
    out,
    num_lines,
    length,
    before,
    after,
    volume,
    num_classes,
    num_maps,
    first_class,
    squared_mm,
    far,
    inner_offset,
    SOURCE: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
):
    """Take the minimum along one axis.

    ``out`` is ``[B, num_classes, before, length, after]`` float32, of which the last ``num_maps`` classes are written.
    ``source`` is labels or masks, or, of the shape of ``out``, the field that the axis before has left.
    """
    num_blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    i = (program % num_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    line = (program // num_blocks) * LINES + tl.arange(0, LINES)
    is_line = line < num_lines
    row = line // after
    image = row // before // num_maps
    c = row // before % num_maps + first_class
    start = (row % before) * length * after + line % after
    place = (image * num_classes + c) * volume + start
    if SOURCE == "labels":
        first = source + (image * volume + start)
    else:
        first = source + place
    offsets = i.to(tl.int64)[:, None] * after
    inside = is_line[None, :] & (i < length)[:, None]
    own = _field(tl.load(first[None, :] + offsets, mask=inside, other=0), c[None, :], SOURCE)
    own_in = own < 0
    own_sign = own.to(tl.int32, bitcast=True) & -2147483648  # its highest bit
    nearest = tl.full([BLOCK, LINES], float("inf"), dtype=tl.float32)
    steps = i.to(tl.float32)  # to the voxel that is looked at
    for _ in range(length):
        value = _field(tl.load(first, mask=is_line, other=0), c, SOURCE)
        # A voxel outside looks for the mask, which is no distance away from one inside, and the other way round:
        # that is the field times the voxel's own sign, where above 0. (A product is compiled to a slower choice.)
        known = (value[None, :].to(tl.int32, bitcast=True) ^ own_sign).to(tl.float32, bitcast=True)
        known = tl.maximum(known, 0.0)
        nearest = tl.minimum(nearest, known + (steps * steps)[:, None] * squared_mm)
        steps -= 1.0
        first += after
    result = tl.where(own_in, -nearest, nearest)
    if IS_LAST:
        distance = tl.sqrt_rn(nearest)
        is_absent = nearest == float("inf")
        result = tl.where(own_in, inner_offset - distance, distance)
        result = tl.where(is_absent, tl.where(own_in, -far, far), result)
    tl.store(out + (place[None, :] + offsets), result, mask=inside)


def signed_maps(
    target: Tensor,
    num_classes: int | None,
    spacings: Sequence[Sequence[float]],
    far: Sequence[float],
    inner_offset: float,
    first_class: int,
) -> Tensor:
    """Return the signed distance of every voxel to the boundary of every class; no value is checked.

    Args:
        target: index labels ``[B, 1, *S]``, or with ``num_classes`` None masks ``[B, C, *S]``.
        num_classes: C, for index labels.
        spacings: voxel size of each sample along each axis.
        far: value of a class without voxels, for each sample.
        inner_offset: added to the map inside.
        first_class: the classes before get a map of 0.

    Returns:
        ``[B, C, *S]``, float32.

    Raises:
        ValueError: on a CPU, unless Triton interprets its kernels.
    """
    if not target.is_cuda and isinstance(axis_kernel, triton.JITFunction):
        rule = "'triton' needs labels on a CUDA device (on a CPU, TRITON_INTERPRET=1 in the environment, for tests)"
        raise errors.fail("distance backend", rule, str(target.device), " Take 'auto'.")
    source = "masks" if num_classes is None else "labels"
    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    target = (target.float() if target.is_floating_point() else target).contiguous()
    channels = target.shape[1] if num_classes is None else num_classes
    maps = torch.zeros((target.shape[0], channels, *target.shape[2:]), dtype=torch.float32, device=target.device)
    groups = [(key, len(list(same))) for key, same in groupby(zip(map(tuple, spacings), far, strict=True))]
    sizes = [size for _, size in groups]
    if maps.numel():
        with torch.cuda.device_of(maps):
            for ((mm, far_value), _), labels, out in zip(groups, target.split(sizes), maps.split(sizes), strict=True):
                _measure(labels, out, source, first_class, mm, far_value, inner_offset)
    return maps


def _measure(
    source: Tensor,
    maps: Tensor,
    kind: str,
    first_class: int,
    mm: Sequence[float],
    far: float,
    inner_offset: float,
) -> None:
    """Fill the maps of samples with the same voxel size, one axis after another."""
    sizes = maps.shape[2:]
    num_maps = maps.shape[1] - first_class
    fields = [maps, torch.empty_like(maps) if len(sizes) > 1 else maps]
    for axis in reversed(range(len(sizes))):
        out = fields[axis % 2]  # the last axis taken, 0, writes the maps
        before, length, after = math.prod(sizes[:axis]), sizes[axis], math.prod(sizes[axis + 1 :])
        num_lines = maps.shape[0] * num_maps * before * after
        axis_kernel[(triton.cdiv(length, BLOCK) * triton.cdiv(num_lines, LINES),)](
            source,
            out,
            num_lines=num_lines,
            length=length,
            before=before,
            after=after,
            volume=math.prod(sizes),
            num_classes=maps.shape[1],
            num_maps=num_maps,
            first_class=first_class,
            squared_mm=float(mm[axis]) ** 2,
            far=far,
            inner_offset=inner_offset,
            SOURCE=kind,
            IS_LAST=axis == 0,
            BLOCK=BLOCK,
            LINES=LINES,
            num_warps=4,
        )
        source, kind = out, "field"
