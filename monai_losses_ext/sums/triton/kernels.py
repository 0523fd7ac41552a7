# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The kernels: sums over tiles of voxels, the total of these, and the gradient of a tile.

Strides are in elements; ``x`` stands for the logits, ``t`` for the label, ``d`` for the distance map, ``w`` for the
weight, ``m`` for the mask and ``o`` for the output, ``b``, ``c`` and ``v`` for sample, class and voxel. Offsets are 64
bits wide. What a target does not have is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monai_losses_ext.sums.triton.arithmetic import (
    cross_entropy,
    focal,
    focal_slope,
    logp_of_target,
    one_like,
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
    label,
    weight,
    mask,
    x_c,
    x_v,
    t_c,
    t_v,
    w_v,
    m_c,
    m_v,
    classes,
    num_voxels,
    NUM_CLASSES: tl.constexpr,
    LABEL: tl.constexpr,
    IGNORED: tl.constexpr,
    NUM_IGNORED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Return the first tile of up to ``num_voxels`` voxels: logits and dense label, 0 where they do not count.

    And the weights ``[V]``, the voxels that count ``[V]``, what of them counts, ``[1, V]`` or where channels differ in
    that ``[C, V]``, and what exists.
    """
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VEC)
    rows, columns = classes.to(tl.int64)[:, None], lanes.to(tl.int64)
    counts = lanes < num_voxels  # [V]: so Triton moves it among the threads, and not the tile [C, V]
    exists = counts
    inside = (classes < NUM_CLASSES)[:, None] & exists[None, :]
    x = tl.load(logits + (rows * x_c + columns[None, :] * x_v), mask=inside, other=0).to(tl.float32)
    w = x
    if HAS_WEIGHT:
        w = tl.load(weight + columns * w_v, mask=exists, other=0).to(tl.float32)
        counts = counts & (w != 0)
    if MASK == "voxel":
        counts = counts & (tl.load(mask + columns * m_v, mask=exists, other=0) != 0)
    if LABEL == "dense":
        g = tl.load(label + (rows * t_c + columns[None, :] * t_v), mask=inside, other=0).to(tl.float32)
    else:
        index = tl.load(label + columns * t_v, mask=exists, other=0)
        if LABEL == "real":
            index = index.to(tl.float32)
            is_class = (index >= 0) & (index < NUM_CLASSES) & (index == tl.floor(index))
        elif LABEL == "wide":
            is_class = index.to(tl.uint64, bitcast=True) < NUM_CLASSES
        else:
            index = index.to(tl.int32)
            is_class = index.to(tl.uint32, bitcast=True) < NUM_CLASSES
        for i in tl.static_range(NUM_IGNORED):
            counts = counts & (index != IGNORED[i])
        index = tl.where(is_class & counts, index, -1).to(tl.int32)
        g = tl.where(index[None, :] == classes[:, None], 1.0, 0.0)
    kept = counts[None, :]
    if MASK == "channel":
        kept = kept & (tl.load(mask + (rows * m_c + columns[None, :] * m_v), mask=inside, other=0) != 0)
    if HAS_WEIGHT or MASK != "none" or NUM_IGNORED > 0:
        x = tl.where(kept, x, 0.0)  # whatever stood there, a NaN too
        if LABEL == "dense" or MASK == "channel":
            g = tl.where(kept, g, 0.0)
    if HAS_WEIGHT:
        w = tl.where(counts, w, 0.0)
    return x, g, w, counts, kept, inside


@triton.jit(do_not_specialize=["num_rows", "num_steps"])
def sums_kernel(
    logits,
    label,
    distance,
    weight,
    mask,
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
    w_b,
    w_c,
    w_v,
    m_b,
    m_c,
    m_v,
    num_voxels,
    num_rows,
    num_steps,
    NUM_CLASSES: tl.constexpr,
    TERMS: tl.constexpr,
    GAMMAS: tl.constexpr,
    NUM_TERMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LABEL: tl.constexpr,
    IGNORED: tl.constexpr,
    NUM_IGNORED: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    FOLD: tl.constexpr,
    STAGES: tl.constexpr,
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
    steps = tl.minimum(num_steps, tl.cdiv(num_voxels - first, BLOCK)).to(tl.int32)
    for step in tl.range(0, steps, num_stages=STAGES):
        start = first + step * BLOCK
        x, g, w, counts, kept, inside = load(
            logits + b * x_b + start * x_v, label + b * t_b + start * t_v, weight + b * w_b + start * w_v,
            mask + b * m_b + start * m_v, x_c, x_v, t_c, t_v, w_v, m_c, m_v, classes,
            tl.minimum(num_voxels - start, BLOCK).to(tl.int32),
            NUM_CLASSES, LABEL, IGNORED, NUM_IGNORED, HAS_WEIGHT, MASK, BLOCK, VEC,
        )  # fmt: skip
        phi = x
        if HAS_DISTANCE:
            lanes = tl.max_contiguous(tl.arange(0, BLOCK), VEC).to(tl.int64)[None, :]
            offsets = classes.to(tl.int64)[:, None] * d_c + lanes * d_v
            phi = tl.load(distance + b * d_b + start * d_v + offsets, mask=inside, other=0).to(tl.float32)
        p = x
        if ACTIVATION == "softmax":
            p, shifted, log_total = softmax(x, counts, classes, NUM_CLASSES, C_PAD)
            logp = logp_of_target(shifted, log_total, g, LABEL)
            one = one_like(log_total)[None, :]
            if LABEL != "dense":
                g = tl.where(g > 0, one, 0.0)
            if MASK == "channel":
                p = tl.where(kept, p, 0.0)
        else:
            one = one_like(x)
            p = tl.where(kept, sigmoid(x)[0] if ACTIVATION == "sigmoid" else x, 0.0)
        longer = ()
        for i in tl.static_range(NUM_TERMS):
            if ACTIVATION == "softmax" and TERMS[i] == "ce":
                values = g * (log_total[None, :] - shifted)
            elif ACTIVATION == "softmax" and TERMS[i] == "logp":
                values = tl.where(kept, log_total[None, :] - shifted, 0.0)
            elif ACTIVATION == "softmax" and TERMS[i] == "focal":
                values = g * focal(logp, GAMMAS, i)
            elif TERMS[i] == "ce":
                values = g * cross_entropy(x, 1.0)
            elif TERMS[i] == "ce_neg":
                values = tl.where(kept, (1.0 - g) * cross_entropy(x, 0.0), 0.0)
            elif TERMS[i] == "logp":
                values = tl.where(kept, cross_entropy(x, 1.0), 0.0)
            elif TERMS[i] == "focal":
                values = g * sigmoid_focal(x, g, GAMMAS, i)
            elif TERMS[i] == "focal_neg":
                values = tl.where(kept, (1.0 - g) * sigmoid_focal(x, g, GAMMAS, i), 0.0)
            else:
                values = plain_value(p, g, phi, kept, one, TERMS, i)
            if HAS_WEIGHT:
                values = values * w[None, :]
                if MASK == "channel":
                    values = tl.where(kept, values, 0.0)
            values = tl.broadcast_to(values, [C_PAD, BLOCK])
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
    label,
    distance,
    weight,
    mask,
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
    w_b,
    w_c,
    w_v,
    m_b,
    m_c,
    m_v,
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
    LABEL: tl.constexpr,
    IGNORED: tl.constexpr,
    NUM_IGNORED: tl.constexpr,
    HAS_DISTANCE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Write dL/dlogits of a block of voxels; ``grad_sums`` is ``[NUM_TERMS, B, NUM_CLASSES]``."""
    program = tl.program_id(0)
    b = (program // num_blocks).to(tl.int64)
    classes = tl.arange(0, C_PAD)
    start = (program % num_blocks).to(tl.int64) * BLOCK
    x, g, w, counts, kept, inside = load(
        logits + b * x_b + start * x_v, label + b * t_b + start * t_v, weight + b * w_b + start * w_v,
        mask + b * m_b + start * m_v, x_c, x_v, t_c, t_v, w_v, m_c, m_v, classes,
        tl.minimum(num_voxels - start, BLOCK).to(tl.int32),
        NUM_CLASSES, LABEL, IGNORED, NUM_IGNORED, HAS_WEIGHT, MASK, BLOCK, VEC,
    )  # fmt: skip
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), VEC).to(tl.int64)[None, :]
    phi = x
    if HAS_DISTANCE:
        offsets = classes.to(tl.int64)[:, None] * d_c + lanes * d_v
        phi = tl.load(distance + b * d_b + start * d_v + offsets, mask=inside, other=0).to(tl.float32)
    p = x
    if ACTIVATION == "softmax":
        p, shifted, log_total = softmax(x, counts, classes, NUM_CLASSES, C_PAD)
        logp = logp_of_target(shifted, log_total, g, LABEL)
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
        if MASK == "channel":
            p, rest = tl.where(kept, p, 0.0), tl.where(kept, rest, 0.0)
        gradient = rest - p * tl.sum(rest, 0)[None, :]
    elif ACTIVATION == "sigmoid":
        gradient = rest + slope * p * q
    else:
        gradient = slope
    if HAS_WEIGHT:
        gradient = gradient * w[None, :]
    if HAS_WEIGHT or MASK != "none" or NUM_IGNORED > 0:
        gradient = tl.where(kept, gradient, 0.0)
    offsets = classes.to(tl.int64)[:, None] * o_c + lanes * o_v
    tl.store(out + b * o_b + start * o_v + offsets, gradient.to(out.dtype.element_ty), mask=inside)
