# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The kernels: sums over tiles of voxels, the total of these, and the gradient of a tile.

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
    x_c,
    x_v,
    t_c,
    t_v,
    classes,
    voxels,
    num_voxels,
    NUM_CLASSES: tl.constexpr,
    TARGET: tl.constexpr,
    IGNORE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
):
    """Return a tile's logits and dense target, 0 where a voxel does not count, which ones count, and which exist."""
    kept = voxels < num_voxels
    inside = (classes < NUM_CLASSES)[:, None] & kept[None, :]
    x = tl.load(logits + classes.to(tl.int64)[:, None] * x_c + voxels[None, :] * x_v, mask=inside, other=0)
    x = x.to(tl.float32)
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
    if IGNORE != "none":
        x = tl.where(kept[None, :], x, 0.0)  # whatever stood there, a NaN too
    return x, g, kept, inside


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
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
    num_rows,
    num_steps,
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
    VEC: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write the sums over ``num_steps`` tiles to a row of ``rows``, ``[B, num_rows, NUM_TERMS, NUM_CLASSES]``.

    Each thread adds up its own voxels, ``FOLD`` in a row, of all the tiles before threads add up among each other.
    """
    program = tl.program_id(0)
    b = (program // num_rows).to(tl.int64)
    first = (program % num_rows).to(tl.int64) * num_steps * BLOCK
    classes = tl.arange(0, C_PAD)
    sums = ()
    for _ in tl.static_range(NUM_TERMS):
        sums = sums + (tl.zeros([C_PAD, BLOCK // FOLD], dtype=tl.float32),)
    for step in range(tl.minimum(num_steps, tl.cdiv(num_voxels - first, BLOCK)).to(tl.int32)):
        voxels = tl.max_contiguous(first + step * BLOCK + tl.arange(0, BLOCK), VEC)
        x, g, kept, inside = load(
            logits + b * x_b, target + b * t_b, x_c, x_v, t_c, t_v, classes, voxels, num_voxels,
            NUM_CLASSES, TARGET, IGNORE, IGNORE_INDEX,
        )  # fmt: skip
        phi = x
        if HAS_DISTANCE:
            offsets = b * d_b + classes.to(tl.int64)[:, None] * d_c + voxels[None, :] * d_v
            phi = tl.load(distance + offsets, mask=inside, other=0).to(tl.float32)
        p = x
        if ACTIVATION == "softmax":
            p, shifted, log_total, one = softmax(x, kept, classes, NUM_CLASSES, C_PAD)
            logp = logp_of_target(shifted, log_total, g, TARGET)
            if TARGET != "dense":
                # What comes from the labels alone would be spread over the threads in another way than what comes from
                # the logits, and its sum would have them exchange every value.
                g = tl.where(g > 0, one[None, :], 0.0)
        elif ACTIVATION == "sigmoid":
            p = tl.where(kept[None, :], sigmoid(x)[0], 0.0)
        else:
            p = tl.where(kept[None, :], x, 0.0)
        longer = ()
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
            longer = longer + (sums[i] + tl.sum(tl.reshape(values, [C_PAD, BLOCK // FOLD, FOLD]), 2),)
        sums = longer
    for i in tl.static_range(NUM_TERMS):
        row = (program.to(tl.int64) * NUM_TERMS + i) * NUM_CLASSES
        tl.store(rows + row + classes, tl.sum(sums[i], 1), mask=classes < NUM_CLASSES)


@triton.jit(do_not_specialize=["num_samples", "num_rows", "num_terms", "num_classes"])
def total_kernel(
    rows,
    sums,
    num_samples,
    num_rows,
    num_terms,
    num_classes,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Add up the rows of a sample, in float64, for some of its terms and classes; ``sums`` is ``[T, B, C]``."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * SUMS + tl.arange(0, SUMS)  # in a row
    is_sum = place < num_terms * num_classes
    total = tl.zeros([ROWS, SUMS], dtype=tl.float64)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        offsets = (b * num_rows + row)[:, None] * (num_terms * num_classes) + place[None, :]
        total += tl.load(rows + offsets, mask=(row < num_rows)[:, None] & is_sum[None, :], other=0).to(tl.float64)
    out = (place // num_classes * num_samples + b) * num_classes + place % num_classes
    tl.store(sums + out, tl.sum(total, 0).to(tl.float32), mask=is_sum)


@triton.jit(do_not_specialize=["num_samples", "num_blocks"])
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
    VEC: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write dL/dlogits of a block of voxels; ``grad_sums`` is ``[NUM_TERMS, B, NUM_CLASSES]``."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    classes = tl.arange(0, C_PAD)
    voxels = tl.max_contiguous((program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), VEC)
    x, g, kept, inside = load(
        logits + b * x_b, target + b * t_b, x_c, x_v, t_c, t_v, classes, voxels, num_voxels,
        NUM_CLASSES, TARGET, IGNORE, IGNORE_INDEX,
    )  # fmt: skip
    phi = x
    if HAS_DISTANCE:
        offsets = b * d_b + classes.to(tl.int64)[:, None] * d_c + voxels[None, :] * d_v
        phi = tl.load(distance + offsets, mask=inside, other=0).to(tl.float32)
    p = x
    if ACTIVATION == "softmax":
        p, shifted, log_total, _ = softmax(x, kept, classes, NUM_CLASSES, C_PAD)
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
    if IGNORE != "none":
        gradient = tl.where(kept[None, :], gradient, 0.0)
    offsets = b * o_b + classes.to(tl.int64)[:, None] * o_c + voxels[None, :] * o_v
    tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=inside)
