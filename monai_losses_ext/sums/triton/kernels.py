# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The two kernels: sums of a block of voxels, and its gradient.

Strides are in elements; ``x`` stands for the logits, ``t`` for the target, ``d`` for the distance map and ``o`` for the
output, ``b``, ``c`` and ``v`` for sample, class and voxel. Offsets are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monai_losses_ext.sums.triton.arithmetic import (
    cross_entropy,
    focal,
    focal_slope,
    logp_of_target,
    plain_slope,
    plain_value,
    sigmoid,
    sigmoid_focal,
    sigmoid_focal_slope,
    softmax,
)


@triton.jit
def load(
    logits,
    target,
    x_b,
    x_c,
    x_v,
    t_b,
    t_c,
    t_v,
    num_voxels,
    num_blocks,
    NUM_CLASSES: tl.constexpr,
    TARGET: tl.constexpr,
    IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a tile's logits and dense target, 0 where a voxel does not count, which ones count, and where it lies."""
    program = tl.program_id(0).to(tl.int64)
    b = program // num_blocks
    classes = tl.arange(0, C_PAD)
    voxels = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = (classes < NUM_CLASSES)[:, None] & (voxels < num_voxels)[None, :]
    kept = voxels < num_voxels
    x_offsets = b * x_b + classes.to(tl.int64)[:, None] * x_c + voxels[None, :] * x_v
    x = tl.load(logits + x_offsets, mask=inside, other=0).to(tl.float32)
    target += b * t_b
    if TARGET == "dense":
        g = tl.load(target + classes.to(tl.int64)[:, None] * t_c + voxels[None, :] * t_v, mask=inside, other=0)
        g = g.to(tl.float32)
        if IGNORE == "label":  # one channel
            row = tl.load(target + voxels * t_v, mask=kept, other=0).to(tl.float32)
            kept = kept & (row != IGNORE_INDEX)
        if IGNORE == "channel":
            channel = target + tl.full([], IGNORE_INDEX, tl.int64) * t_c
            row = tl.load(channel + voxels * t_v, mask=kept, other=0).to(tl.float32)
            kept = kept & (row <= 0.5)
        if IGNORE == "value" or IGNORE == "value_or_empty":
            kept = kept & (tl.sum(((g == IGNORE_INDEX) & inside).to(tl.int32), 0) == 0)
        if IGNORE == "value_or_empty":
            kept = kept & (tl.sum((g != 0).to(tl.int32), 0) > 0)
        g = tl.where(kept[None, :], g, 0.0)
    else:
        label = tl.load(target + voxels * t_v, mask=kept, other=0)
        if TARGET == "real":
            label = label.to(tl.float32)
            is_class = (label >= 0) & (label < NUM_CLASSES) & (label == tl.floor(label))
        else:
            label = label.to(tl.int64)
            is_class = (label >= 0) & (label < NUM_CLASSES)
        if IGNORE == "label":
            kept = kept & (label != IGNORE_INDEX)
        label = tl.where(is_class & kept, label, -1).to(tl.int32)
        g = tl.where(label[None, :] == classes[:, None], 1.0, 0.0)
    x = tl.where(kept[None, :], x, 0.0)
    return x, g, kept, inside, b, classes, voxels


@triton.jit
def sums_kernel(
    logits,
    target,
    distance,
    rows,
    x_b,
    x_c,
    x_v,
    t_b,
    t_c,
    t_v,
    d_b,
    d_c,
    d_v,
    num_voxels,
    num_blocks,
    NUM_CLASSES: tl.constexpr,
    TERMS: tl.constexpr,
    GAMMAS: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums over a block of voxels to a row of ``rows``, ``[B * num_blocks, NUM_TERMS, NUM_CLASSES]``."""
    x, g, kept, inside, b, classes, voxels = load(
        logits, target, x_b, x_c, x_v, t_b, t_c, t_v, num_voxels, num_blocks,
        NUM_CLASSES, TARGET, IGNORE, IGNORE_INDEX, C_PAD, BLOCK,
    )  # fmt: skip
    phi = x
    if HAS_DISTANCE:
        offsets = b * d_b + classes.to(tl.int64)[:, None] * d_c + voxels[None, :] * d_v
        phi = tl.load(distance + offsets, mask=inside, other=0).to(tl.float32)
    p = x
    if ACTIVATION == "softmax":
        p, shifted, log_total = softmax(x, classes, NUM_CLASSES)
        logp = logp_of_target(shifted, log_total, g, TARGET)
    if ACTIVATION == "sigmoid":
        p = sigmoid(x)[0]
    p = tl.where(kept[None, :], p, 0.0)
    for i in tl.static_range(NUM_TERMS):
        if ACTIVATION == "softmax" and TERMS[i] == "ce":
            values = g * (log_total[None, :] - shifted)
        elif ACTIVATION == "softmax" and TERMS[i] == "logp":
            values = tl.where(kept[None, :], log_total[None, :] - shifted, 0.0)
        elif ACTIVATION == "softmax" and TERMS[i] == "focal":
            values = g * focal(logp, GAMMAS, i)
        elif TERMS[i] == "ce":
            values = g * cross_entropy(x, 1.0)
        elif TERMS[i] == "ce_neg":
            values = tl.where(kept[None, :], (1.0 - g) * cross_entropy(x, 0.0), 0.0)
        elif TERMS[i] == "logp":
            values = tl.where(kept[None, :], cross_entropy(x, 1.0), 0.0)
        elif TERMS[i] == "focal":
            values = g * sigmoid_focal(x, g, GAMMAS, i)
        elif TERMS[i] == "focal_neg":
            values = tl.where(kept[None, :], (1.0 - g) * sigmoid_focal(x, g, GAMMAS, i), 0.0)
        else:
            values = plain_value(p, g, phi, kept, TERMS, i)
        row = (tl.program_id(0).to(tl.int64) * NUM_TERMS + i) * NUM_CLASSES
        tl.store(rows + row + classes, tl.sum(values, 1), mask=classes < NUM_CLASSES)


@triton.jit
def gradient_kernel(
    logits,
    target,
    distance,
    grad_sums,
    out,
    x_b,
    x_c,
    x_v,
    t_b,
    t_c,
    t_v,
    d_b,
    d_c,
    d_v,
    o_b,
    o_c,
    o_v,
    num_samples,
    num_voxels,
    num_blocks,
    NUM_CLASSES: tl.constexpr,
    TERMS: tl.constexpr,
    GAMMAS: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write dL/dlogits of a block of voxels; ``grad_sums`` is ``[NUM_TERMS, B, NUM_CLASSES]``."""
    x, g, kept, inside, b, classes, voxels = load(
        logits, target, x_b, x_c, x_v, t_b, t_c, t_v, num_voxels, num_blocks,
        NUM_CLASSES, TARGET, IGNORE, IGNORE_INDEX, C_PAD, BLOCK,
    )  # fmt: skip
    phi = x
    if HAS_DISTANCE:
        offsets = b * d_b + classes.to(tl.int64)[:, None] * d_c + voxels[None, :] * d_v
        phi = tl.load(distance + offsets, mask=inside, other=0).to(tl.float32)
    p = x
    if ACTIVATION == "softmax":
        p, shifted, log_total = softmax(x, classes, NUM_CLASSES)
        logp = logp_of_target(shifted, log_total, g, TARGET)
    if ACTIVATION == "sigmoid":
        p, q = sigmoid(x)
    slope = tl.zeros([C_PAD, BLOCK], dtype=tl.float32)  # dL/dp of the terms without logarithms
    rest = tl.zeros([C_PAD, BLOCK], dtype=tl.float32)  # of the others: dL/dlog p with softmax, dL/dlogits with sigmoid
    for i in tl.static_range(NUM_TERMS):
        row = (i * num_samples + b) * NUM_CLASSES
        grad = tl.load(grad_sums + row + classes, mask=classes < NUM_CLASSES, other=0)[:, None]
        if ACTIVATION == "softmax" and TERMS[i] == "ce":
            rest -= grad * g
        elif ACTIVATION == "softmax" and TERMS[i] == "logp":
            rest -= grad
        elif ACTIVATION == "softmax" and TERMS[i] == "focal":
            rest += grad * g * focal_slope(logp, GAMMAS, i)
        elif TERMS[i] == "ce":
            rest -= grad * g * q
        elif TERMS[i] == "ce_neg":
            rest += grad * (1.0 - g) * p
        elif TERMS[i] == "logp":
            rest -= grad * q
        elif TERMS[i] == "focal":
            rest += grad * g * sigmoid_focal_slope(x, g, GAMMAS, i)
        elif TERMS[i] == "focal_neg":
            rest += grad * (1.0 - g) * sigmoid_focal_slope(x, g, GAMMAS, i)
        else:
            slope += plain_slope(p, g, phi, grad, TERMS, i)
    if ACTIVATION == "softmax":
        rest += p * slope
        gradient = rest - p * tl.sum(rest, 0)[None, :]
    elif ACTIVATION == "sigmoid":
        gradient = rest + slope * p * q
    else:
        gradient = slope
    gradient = tl.where(kept[None, :], gradient, 0.0)
    offsets = b * o_b + classes.to(tl.int64)[:, None] * o_c + voxels[None, :] * o_v
    tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=inside)
