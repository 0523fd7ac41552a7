# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The kernels of the CPU: one reads the volumes and adds up the sums, one reads them again and writes the gradient.

All of them are in this file, since the cache of compiled code knows the time of one file only. One compilation of each
serves every dtype, layout, kind of target and list of terms: volumes come as addresses, what differs is a branch per
tile of some hundred voxels, and a tile's buffers stay in the cache nearest to the core.

Kernels take pieces of the volume from one counter until none is left, so any number of threads may run them at once:
what a piece adds up to depends on the piece alone.

The backward pass works with derivatives with respect to the logarithm of the probabilities, so it never divides by one:
with ``R_c = dL/d(log p_c)``, the gradient with respect to softmax logits is ``R_c - p_c sum_k R_k``.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

# A job is one array of int64: this header, the volumes, the first row of each term that has a code (-1 where it is not
# asked for), the codes of the terms and their first rows, the labels to ignore, and which classes each sample was
# annotated for.
COUNTER, WRONG, NUM_CLASSES, NUM_VOXELS, NUM_PIECES, PIECES, PIECE, TILE = range(8)
ACTIVATION, IS_INDEX, MASKS_CHANNELS, NUM_TERMS, NUM_IGNORED, MERGES, FIRST_REGION, INDEX_SKELETON = range(8, 16)
# A volume: the address, or 0 for none; the kind of number; strides of sample and channel; lengths of the last two
# spatial axes and strides of all three, in elements, with axes merged where they can be.
ADDRESS, KIND, SIZE, SAMPLE, CHANNEL, ROWS, COLUMNS, STRIDE_0, STRIDE_1, STRIDE_2 = range(10)
# As int64: numba compiles a function anew for each Python number that it is handed.
FIRST = np.int64(0)
LOGITS, LABEL, WEIGHT, MASK, DISTANCE, SKELETON, REGIONS, GRADIENT = map(np.int64, range(16, 96, 10))
ROW_OF = 96

SOFTMAX, SIGMOID, NONE = range(3)
FLOAT32, FLOAT16, BFLOAT16, FLOAT64, UINT8, INT8, INT16, INT32, INT64 = range(9)
TP, PRED, PRED_SQ, REF, REF_SQ, ABS_DIFF, CE, CE_NEG = range(8)
LOGP, FOCAL, FOCAL_NEG, SURFACE, SURFACE_MIN, COUNT, SKELETON_SUM, SKELETON_REF = range(8, 16)
REGION_TP, REGION_PRED, REGION_REF, REGION_CE, REGION_COUNT, BINS = map(np.int64, range(16, 22))
NUM_CODES = 22
CODES = ROW_OF + NUM_CODES

# Rows of a tile's buffers: of each voxel the largest logit, 1 / the sum of powers of e and the -log of that, -log p,
# 1 - p and -log of it, the reference, its product with the weight, the weight, the maps, and what slopes add up to.
TOP, SCALE, LOG_SCALE, LOGP_, LOGQ, Q, G, GW, W, PHI, LABELS, COUNTED, BY_P, BY_LOGP, DOT, THIN, IDS, CE_, MERGED = (
    range(19)
)
NUM_BUFFERS = 19

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LARGEST = np.float32(np.finfo(np.float32).max)
MINUS_INFINITY = np.float32(-np.inf)
TINY = np.float32(1e-30)  # instead of 1 - p = 0 under a negative exponent
IGNORED, OUTSIDE = np.float32(-1e30), np.float32(-2e30)  # instead of a label that does not count, or is no class

# Never a promise that there is no NaN and no infinity: both must come out as they went in.
ENTRY = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
LOOPS = {**ENTRY, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Each function is optimized anew with whatever calls it, so the outer ones are one with their caller.
OUTER = {**LOOPS, "inline": "always"}
EXACT = {**LOOPS, "fastmath": {"contract"}, "forceinline": True}


@intrinsic
def _pointer(typing_context, address):
    """Return an address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _take(typing_context, job):
    """Return the next piece: the counter as it was before one was added to it, by one thread at a time."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(job), generate


@intrinsic
def _bits(typing_context, value):
    """Return the bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float(typing_context, bits):
    """Return the float32 of these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _power_of_two(typing_context, shifted):
    """Return 2^k, given k + 1.5 * 2^23; numba's own integers would grow to 64 bits, which are half as fast."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        bits = builder.shl(builder.bitcast(arguments[0], i32), ir.Constant(i32, 23))
        return builder.bitcast(builder.add(bits, ir.Constant(i32, 127 << 23)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _exponent(typing_context, x):
    """Return the whole k for which x / 2^k lies between the square roots of 1/2 and 2."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        bits = builder.sub(builder.bitcast(arguments[0], i32), ir.Constant(i32, 0x3F3504F3))
        return builder.ashr(bits, ir.Constant(i32, 23))

    return types.int32(types.float32), generate


@intrinsic
def _scaled_down(typing_context, x, k):
    """Return x / 2^k."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        bits = builder.sub(builder.bitcast(arguments[0], i32), builder.shl(arguments[1], ir.Constant(i32, 23)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32, types.int32), generate


@njit(**EXACT)
def exp(x):
    """Return e^x for x below 88: 0 below -87.3, NaN for NaN. Twice the error of correct rounding."""
    low = np.float32(-87.3)
    a = low if x < low else x
    shifted = a * np.float32(1.4426950216293335) + np.float32(12582912)  # the whole part, in the lowest bits
    whole = shifted - np.float32(12582912)
    f = a * np.float32(1.4426950216293335) - whole
    f = f + a * np.float32(1.925963033500e-8)
    p = np.float32(1.3276472454890609e-3)
    p = p * f + np.float32(9.675541892647743e-3)
    p = p * f + np.float32(5.550713092088699e-2)
    p = p * f + np.float32(2.4022120237350464e-1)
    p = p * f + np.float32(6.931469440460205e-1)
    p = p * f + ONE
    p = p * _power_of_two(shifted)
    return ZERO if x < low else p


@njit(**EXACT)
def log(x):
    """Return the logarithm of a normal x > 0, NaN for NaN."""
    whole = _exponent(x)
    f = _scaled_down(x, whole) - ONE
    k = np.float32(whole)
    p = np.float32(-7.865452021360397e-2)
    p = p * f + np.float32(1.2879206240177155e-1)
    p = p * f + np.float32(-1.312529742717743e-1)
    p = p * f + np.float32(1.41814187169075e-1)
    p = p * f + np.float32(-1.6624969244003296e-1)
    p = p * f + np.float32(2.000228315591812e-1)
    p = p * f + np.float32(-2.500079572200775e-1)
    p = p * f + np.float32(3.3333316445350647e-1)
    y = f * f * (p * f - HALF) + k * np.float32(-2.12194440e-4)
    y = (f + y) + k * np.float32(0.693359375)
    return x if x != x else y


@njit(**EXACT)
def log1p(x):
    """Return log(1 + x) for 0 <= x <= 1 with all digits, NaN for NaN."""
    p = np.float32(-3.2440247014164925e-3)
    p = p * x + np.float32(1.985146291553974e-2)
    p = p * x + np.float32(-5.695953965187073e-2)
    p = p * x + np.float32(1.0603655874729156e-1)
    p = p * x + np.float32(-1.5305593609809875e-1)
    p = p * x + np.float32(1.967594027519226e-1)
    p = p * x + np.float32(-2.4954134225845337e-1)
    p = p * x + np.float32(3.332996368408203e-1)
    p = p * x + np.float32(-4.999990165233612e-1)
    p = p * x + ONE
    return p * x


@njit(**EXACT)
def rest(p, lp):
    """Return 1 - p, at least TINY, from p and -log p: near p = 1 the digits are in the logarithm alone."""
    near = lp * (ONE - lp * (HALF - lp * (np.float32(1 / 6) - lp * (np.float32(1 / 24) - lp * np.float32(1 / 120)))))
    q = near if lp < np.float32(0.1) else ONE - p
    return TINY if q < TINY else q


@njit(**EXACT)
def powers(q, gamma):
    """Return q^gamma and q^(gamma - 1) for TINY <= q <= 1."""
    if gamma == np.float32(2):
        return q * q, q
    if gamma == ONE:
        return q, ONE
    less = exp((gamma - ONE) * log(q))
    return less * q, less


@njit(**EXACT)
def softplus(x, e):
    """Return log(1 + e^x), given e^-|x|."""
    return log1p(e) + (x if x > ZERO else ZERO * e)


@njit(**EXACT)
def sigmoid(x, e):
    """Return 1 / (1 + e^-x), given e^-|x|."""
    r = ONE / (ONE + e)
    return e * r if x < ZERO else r


@njit(**EXACT)
def sigmoid_focal(x, g, lp, gamma):
    """Return (1 - p_t)^gamma and the cross-entropy of a sigmoid's focal loss, and the sigmoid of x (2g - 1)."""
    y = x * (g + g - ONE)
    e = exp(-abs(y))
    return exp(-gamma * softplus(y, e)), lp + (ONE - g) * x, sigmoid(y, e)


@njit(**EXACT)
def from_half(bits):
    """Return a float16, given as its 16 bits, as float32."""
    h = np.int32(bits)
    y = _float(np.int32((h & 0x7FFF) << 13)) * np.float32(5.192296858534828e33)  # 2^112 moves the exponent
    special = (h & 0x7C00) == 0x7C00
    y = _float(np.int32(((h & 0x3FF) << 13) | 0x7F800000)) if special else y
    return -y if h & 0x8000 else y


@njit(**EXACT)
def to_half(x):
    """Return the 16 bits of the float16 nearest to x."""
    u = np.int64(_bits(x)) & 0xFFFFFFFF
    sign, a = (u >> 16) & 0x8000, u & 0x7FFFFFFF
    small = (np.int64(_bits(_float(np.int32(a)) + HALF))) - 0x3F000000
    usual = (a - 0x38000000 + 0xFFF + ((a >> 13) & 1)) >> 13
    large = 0x7E00 if a > 0x7F800000 else 0x7C00
    h = small if a < 0x38800000 else usual
    return np.uint16(sign | (large if a >= 0x47800000 else h))


@njit(**EXACT)
def to_bfloat16(x):
    """Return the 16 bits of the bfloat16 nearest to x."""
    u = np.int64(_bits(x)) & 0xFFFFFFFF
    nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return np.uint16(0x7FC0 if (u & 0x7FFFFFFF) > 0x7F800000 else nearest)


@njit(**EXACT)
def is_whole(x):
    """Tell whether 0 <= x < 2^22 has no fraction."""
    return (x + np.float32(8388608)) - np.float32(8388608) == x


@njit(**LOOPS)
def gather(address, size, step, n, raw):
    """Copy n numbers of ``size`` bytes, ``step`` of them apart, to the start of raw."""
    span = (n - 1) * step + 1
    if size == 4:
        a, to_a = carray(_pointer(address), span, np.int32), raw.view(np.int32)
        for i in range(n):
            to_a[i] = a[i * step]
    elif size == 2:
        b, to_b = carray(_pointer(address), span, np.int16), raw.view(np.int16)
        for i in range(n):
            to_b[i] = b[i * step]
    elif size == 8:
        c = carray(_pointer(address), span, np.int64)
        for i in range(n):
            raw[i] = c[i * step]
    else:
        d, to_d = carray(_pointer(address), span, np.int8), raw.view(np.int8)
        for i in range(n):
            to_d[i] = d[i * step]


@njit(**LOOPS)
def convert(address, kind, n, out):
    """Read n numbers as float32."""
    if kind == FLOAT32:
        a = carray(_pointer(address), n, np.float32)
        for i in range(n):
            out[i] = a[i]
    elif kind == FLOAT16:
        b = carray(_pointer(address), n, np.uint16)
        for i in range(n):
            out[i] = from_half(b[i])
    elif kind == BFLOAT16:
        c = carray(_pointer(address), n, np.uint16)
        for i in range(n):
            out[i] = _float(np.int32(np.int32(c[i]) << 16))
    elif kind == FLOAT64:
        d = carray(_pointer(address), n, np.float64)
        for i in range(n):
            out[i] = np.float32(d[i])
    elif kind == UINT8:
        e = carray(_pointer(address), n, np.uint8)
        for i in range(n):
            out[i] = np.float32(e[i])
    elif kind == INT8:
        f = carray(_pointer(address), n, np.int8)
        for i in range(n):
            out[i] = np.float32(f[i])
    elif kind == INT16:
        g = carray(_pointer(address), n, np.int16)
        for i in range(n):
            out[i] = np.float32(g[i])
    elif kind == INT32:
        h = carray(_pointer(address), n, np.int32)
        for i in range(n):
            out[i] = np.float32(h[i])
    else:  # no label is beyond int32, so that nothing is lost, and int32 is converted eight at a time
        k = carray(_pointer(address), n, np.int64)
        for i in range(n):
            whole = np.int32(k[i])
            out[i] = np.float32(whole) if np.int64(whole) == k[i] else LARGEST


@njit(**LOOPS)
def place(job, volume, b, c, v):
    """Return the offset of voxel v in elements, and how many voxels follow it on its row, itself included."""
    columns = job[volume + COLUMNS]
    row, column = v // columns, v % columns
    offset = b * job[volume + SAMPLE] + c * job[volume + CHANNEL] + column * job[volume + STRIDE_2]
    if row > 0:
        rows = job[volume + ROWS]
        offset += (row // rows) * job[volume + STRIDE_0] + (row % rows) * job[volume + STRIDE_1]
    return offset, columns - column


@njit(**LOOPS)
def read(job, volume, b, c, v, n, out, raw):
    """Read the n voxels from v on as float32, whatever they are and however they lie."""
    kind, size, step = job[volume + KIND], job[volume + SIZE], job[volume + STRIDE_2]
    done = 0
    while done < n:
        offset, follow = place(job, volume, b, c, v + done)
        m = follow if follow < n - done else n - done
        address = job[volume + ADDRESS] + offset * size
        if step != 1:
            gather(address, size, step, m, raw)
            address = raw.ctypes.data
        convert(address, kind, m, out[done : done + m])
        done += m


@njit(**LOOPS)
def write(job, b, c, v, n, values, raw):
    """Write the n voxels from v on of the gradient."""
    kind, step = job[GRADIENT + KIND], job[GRADIENT + STRIDE_2]
    halves = raw.view(np.uint16)
    if kind == FLOAT16:
        for i in range(n):
            halves[i] = to_half(values[i])
    elif kind == BFLOAT16:
        for i in range(n):
            halves[i] = to_bfloat16(values[i])
    done = 0
    while done < n:
        offset, follow = place(job, GRADIENT, b, c, v + done)
        m = follow if follow < n - done else n - done
        address = job[GRADIENT + ADDRESS] + offset * job[GRADIENT + SIZE]
        span, floats = (m - 1) * step + 1, values[done : done + m]
        if kind == FLOAT32 and step == 1:
            x = carray(_pointer(address), m, np.float32)
            for i in range(m):
                x[i] = floats[i]
        elif kind == FLOAT32:
            y = carray(_pointer(address), span, np.float32)
            for i in range(m):
                y[i * step] = floats[i]
        else:
            z, part = carray(_pointer(address), span, np.uint16), halves[done : done + m]
            for i in range(m):
                z[i * step] = part[i]
        done += m


@njit(**LOOPS)
def mark_labels(job, n, labels):
    """Put IGNORED where labels do not count and OUTSIDE where they are no class; tell whether there are such."""
    for k in range(job[NUM_IGNORED]):
        ignored = np.float32(job[CODES + 2 * job[NUM_TERMS] + k])
        for i in range(n):
            labels[i] = IGNORED if labels[i] == ignored else labels[i]
    last, wrong = np.float32(job[NUM_CLASSES] - 1), ZERO
    for i in range(n):  # numbers in float32 are counted eight at a time
        label = labels[i]
        fits = (label == IGNORED) | ((label >= ZERO) & (label <= last) & is_whole(label))
        labels[i] = label if fits else OUTSIDE
        wrong += ZERO if fits else ONE
    return wrong > ZERO


@njit(**LOOPS)
def mark_ignored(n, labels, counted):
    """Fill counted with 0 where labels are IGNORED, with 1 elsewhere."""
    for i in range(n):
        counted[i] = ZERO if labels[i] == IGNORED else ONE


@njit(**LOOPS)
def multiply(n, has_weight, counted, w):
    """Set w, or 1, to 0 where voxels are not counted; tell whether a weight is wrong, and whether some do not count."""
    wrong, dropped = ZERO, ZERO
    for i in range(n):
        weight = w[i] if has_weight else ONE
        wrong += ZERO if weight >= ZERO else ONE
        weight = ZERO if counted[i] == ZERO else weight
        dropped += ONE if weight == ZERO else ZERO
        w[i] = weight
    return wrong > ZERO, dropped > ZERO


@njit(**LOOPS)
def clear(values, w, n):
    """Set what does not count to 0, whatever stands there."""
    for i in range(n):
        values[i] = ZERO if w[i] == ZERO else values[i]


@njit(**LOOPS)
def mark_dense(n, g, counted, w, gw):
    """Set g to 0 where it does not count, fill gw with g times w; tell whether a label that is counted is wrong."""
    wrong = ZERO
    for i in range(n):
        fits = (counted[i] == ZERO) | ((g[i] >= -HALF) & (g[i] <= ONE + HALF))
        wrong += ZERO if fits else ONE
        g[i] = ZERO if w[i] == ZERO else g[i]
        gw[i] = g[i] * w[i]
    return wrong > ZERO


@njit(**LOOPS)
def mark_index(k, n, labels, w, g, gw):
    """Fill g with the reference of class k, and gw with the same times w."""
    for i in range(n):
        g[i] = ONE if labels[i] == k else ZERO
        gw[i] = w[i] if labels[i] == k else ZERO


@njit(**LOOPS)
def counts(job, b, c):
    """Tell whether a class has sums of its own: whether the sample was annotated for it."""
    if job[MERGES] == 0:
        return True
    return job[CODES + 2 * job[NUM_TERMS] + job[NUM_IGNORED] + b * job[NUM_CLASSES] + c] != 0


@njit(**LOOPS)
def merge(job, b, n, d, merged):
    """Put the logarithm of the background's and all unannotated classes' sum of powers of e in place of its logit.

    The logit itself goes to the last row of d.
    """
    own, first, num_classes = d[job[NUM_CLASSES]], d[0], job[NUM_CLASSES]
    for i in range(n):
        own[i] = first[i]
    for c in range(1, num_classes):
        if not counts(job, b, c):
            x = d[c]
            for i in range(n):
                first[i] = x[i] if x[i] > first[i] else first[i]
    for i in range(n):
        first[i] = -LARGEST if first[i] < -LARGEST else first[i]
        merged[i] = exp(own[i] - first[i])
    for c in range(1, num_classes):
        if not counts(job, b, c):
            x = d[c]
            for i in range(n):
                merged[i] += exp(x[i] - first[i])
    for i in range(n):
        first[i] = MINUS_INFINITY if merged[i] == ZERO else first[i] + log(merged[i])
        merged[i] = first[i]


@njit(**LOOPS)
def share(n, x, merged, of, out):
    """Fill out with a class's share of the background that it is part of: its gradient, from that of the whole."""
    for i in range(n):
        part = exp(x[i] - merged[i]) if merged[i] >= -LARGEST else ZERO
        out[i] = part * of[i]


@njit(**LOOPS)
def softmax_tile(job, b, n, logs, d, e, m):
    """Make logits in d less by the largest of their voxel, fill e with e^d, and scale and log_scale from their sum."""
    top, s, ls, dot = m[TOP], m[SCALE], m[LOG_SCALE], m[DOT]
    for i in range(n):
        top[i], s[i], dot[i] = d[0, i], ZERO, ZERO
    for c in range(1, job[NUM_CLASSES]):
        if counts(job, b, c):
            x = d[c]
            for i in range(n):
                top[i] = x[i] if x[i] > top[i] else top[i]
    for c in range(job[NUM_CLASSES]):
        if counts(job, b, c):
            x, y = d[c], e[c]
            for i in range(n):
                below = x[i] - top[i]
                power = exp(below)
                x[i] = below
                y[i] = power
                s[i] += power
    if logs:
        for i in range(n):
            ls[i] = log(s[i])
    for i in range(n):
        s[i] = ONE / s[i]


@njit(**LOOPS)
def softmax_class(n, s, ls, x, p, lp):
    """Fill p with the probabilities of a class, lp with their -log; that of 0 is finite, so that 0 times it is 0."""
    for i in range(n):
        p[i] *= s[i]
        y = ls[i] - x[i]
        lp[i] = LARGEST if y > LARGEST else y


@njit(**LOOPS)
def sigmoid_tile(n, x, logs, p, q, lp, lq):
    """Fill p with the probabilities, q with 1 - p, lp and lq with -log of both."""
    for i in range(n):
        e = exp(-abs(x[i]))
        p[i] = sigmoid(x[i], e)
        q[i] = sigmoid(-x[i], e)
        if logs:
            lp[i] = softplus(-x[i], e)
            lq[i] = softplus(x[i], e)


@njit(**EXACT)
def slope_of(job, slopes, code):
    """Return the slope of the term with a code, from the rows of a sample and class; 0 where it is not asked for."""
    row = job[ROW_OF + code]
    return slopes[row] if row >= 0 else ZERO


@njit(**LOOPS)
def run_length(ids, first, n):
    """Return how many voxels from the first on lie in the same region."""
    last, differ = first + 1, ZERO
    while last + 32 <= n:  # most are long: eight at a time
        for i in range(last, last + 32):
            differ += ZERO if ids[i] == ids[first] else ONE
        if differ > ZERO:
            break
        last += 32
    while last < n and ids[last] == ids[first]:
        last += 1
    return last - first


@njit(**LOOPS)
def add_region_sums(job, n, p, m, totals):
    """Add to the rows of a class its sums over each region, but for the cross-entropy."""
    ids, gw, w = m[IDS], m[GW], m[W]
    tp_row, pred_row = job[ROW_OF + REGION_TP], job[ROW_OF + REGION_PRED]
    ref_row, count_row = job[ROW_OF + REGION_REF], job[ROW_OF + REGION_COUNT]
    first = 0
    while first < n:
        length, r = run_length(ids, first, n), np.int64(ids[first])
        tp, pred, ref, count = ZERO, ZERO, ZERO, ZERO
        for i in range(first, first + length):
            tp += p[i] * gw[i]
            pred += p[i] * w[i]
            ref += gw[i]
            count += w[i]
        if tp_row >= 0:
            totals[tp_row + r] += tp
        if pred_row >= 0:
            totals[pred_row + r] += pred
        if ref_row >= 0:
            totals[ref_row + r] += ref
        if count_row >= 0:
            totals[count_row + r] += count
        first += length


@njit(**LOOPS)
def add_region_entropy(job, n, entropy, ids, totals):
    """Add to the rows of a class the cross-entropy over each region."""
    row, first = job[ROW_OF + REGION_CE], 0
    while first < n:
        length, total = run_length(ids, first, n), ZERO
        for i in range(first, first + length):
            total += entropy[i]
        totals[row + np.int64(ids[first])] += total
        first += length


@njit(**LOOPS)
def add_region_slopes(job, n, slopes, p, m):
    """Add the derivatives of a class's sums over regions, but for the cross-entropy of a softmax."""
    ids, gw, w, q, a, by_logit = m[IDS], m[GW], m[W], m[Q], m[BY_P], m[BY_LOGP]
    tp_row, pred_row, ce_row = job[ROW_OF + REGION_TP], job[ROW_OF + REGION_PRED], job[ROW_OF + REGION_CE]
    is_sigmoid, first = job[ACTIVATION] == SIGMOID, 0
    while first < n:
        length, r = run_length(ids, first, n), np.int64(ids[first])
        tp = slopes[tp_row + r] if tp_row >= 0 else ZERO
        pred = slopes[pred_row + r] if pred_row >= 0 else ZERO
        for i in range(first, first + length):
            a[i] += tp * gw[i] + pred * w[i]
        if is_sigmoid and ce_row >= 0:
            ce = slopes[ce_row + r]
            for i in range(first, first + length):
                by_logit[i] += ce * ((w[i] - gw[i]) * p[i] - gw[i] * q[i])
        first += length


@njit(**LOOPS)
def add_entropy_slopes(row, n, slopes, ids, out):
    """Add to out the slope of the cross-entropy over the region of each voxel."""
    first = 0
    while first < n:
        length = run_length(ids, first, n)
        slope = slopes[row + np.int64(ids[first])]
        for i in range(first, first + length):
            out[i] += slope
        first += length


@njit(**LOOPS)
def bin_of(p, number):
    """Return the bin that a probability lies in, each closed above; the first for NaN, the last beyond 1."""
    scaled = p * number
    place = np.int64(scaled) if (scaled > ZERO) & (scaled <= number) else np.int64(0)
    place -= 1 if (place > 0) & (np.float32(place) == scaled) else 0
    return np.int64(number) - 1 if scaled > number else place


@njit(**LOOPS)
def add_bin_sums(number, n, p, m, totals):
    """Add to three rows for each bin the count, the probability and the reference of the voxels in it."""
    gw, w, bins = m[GW], m[W], np.int64(number)
    for i in range(n):
        k = bin_of(p[i], number)
        totals[k] += w[i]
        totals[bins + k] += p[i] * w[i]
        totals[2 * bins + k] += gw[i]


@njit(**LOOPS)
def add_bin_slopes(number, n, p, m, slopes):
    """Add the derivative of the probabilities' sum in each bin."""
    w, a, bins = m[W], m[BY_P], np.int64(number)
    for i in range(n):
        a[i] += slopes[bins + bin_of(p[i], number)] * w[i]


@njit(**LOOPS)
def add_usual_sums(job, n, p, m, totals):
    """Add to the rows of a class the sums that most losses have, and those with one map: all in one loop."""
    gw, w, lp, phi, thin = m[GW], m[W], m[LOGP_], m[PHI], m[THIN]
    tp, pred, ref, ce, surface, least, skeleton = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(n):
        weighted = p[i] * w[i]
        tp += p[i] * gw[i]
        pred += weighted
        ref += gw[i]
        ce += lp[i] * gw[i]
        surface += weighted * phi[i]  # rounded as its least value is, so that their difference is 0 at the truth
        least += w[i] * (ZERO if phi[i] > ZERO else phi[i])
        skeleton += weighted * thin[i]
    regional, of_maps = ((TP, tp), (PRED, pred), (REF, ref), (CE, ce)), ((SURFACE, surface), (SURFACE_MIN, least))
    for code, total in (*regional, *of_maps, (SKELETON_SUM, skeleton)):
        row = job[ROW_OF + code]
        if row >= 0:
            totals[row] += total


@njit(**LOOPS)
def is_usual(code):
    """Tell whether :func:`add_usual_sums` has a term."""
    is_regional = code == TP or code == PRED or code == REF or code == CE
    return is_regional or code == SURFACE or code == SURFACE_MIN or code == SKELETON_SUM


@njit(**LOOPS)
def sum_term(code, gamma, is_softmax, n, x, p, m):
    """Return the sum of one term over a tile of one class."""
    lp, lq, g, gw, w, thin = m[LOGP_], m[LOGQ], m[G], m[GW], m[W], m[THIN]
    a = ZERO
    if code == PRED_SQ:
        for i in range(n):
            a += p[i] * p[i] * w[i]
    elif code == REF_SQ:
        for i in range(n):
            a += gw[i] * g[i]
    elif code == ABS_DIFF:
        for i in range(n):
            a += abs(p[i] - g[i]) * w[i]
    elif code == CE_NEG:
        for i in range(n):
            a += lq[i] * (w[i] - gw[i])
    elif code == LOGP:
        for i in range(n):
            a += lp[i] * w[i]
    elif code == FOCAL and is_softmax:
        if gamma == np.float32(2):
            for i in range(n):
                q = rest(p[i], lp[i])
                a += q * q * lp[i] * gw[i]
        else:
            for i in range(n):
                power, _ = powers(rest(p[i], lp[i]), gamma)
                a += power * lp[i] * gw[i]
    elif code == FOCAL or code == FOCAL_NEG:
        for i in range(n):
            scale, entropy, _ = sigmoid_focal(x[i], g[i], lp[i], gamma)
            a += scale * entropy * (gw[i] if code == FOCAL else w[i] - gw[i])
    elif code == SKELETON_REF:
        for i in range(n):
            a += thin[i] * w[i]
    else:
        for i in range(n):
            a += w[i]
    return a


@njit(**LOOPS)
def add_plain_slope(code, slope, n, p, m):
    """Add the derivative of a term with respect to the probability."""
    g, w, a = m[G], m[W], m[BY_P]
    if code == PRED_SQ:
        for i in range(n):
            a[i] += slope * (p[i] + p[i]) * w[i]
    elif code == ABS_DIFF:
        for i in range(n):
            sign = ONE if p[i] > g[i] else (-ONE if p[i] < g[i] else (p[i] - g[i]) * ZERO)
            a[i] += slope * sign * w[i]


@njit(**LOOPS)
def add_softmax_focal_slope(slope, gamma, n, p, m):
    """Add the derivative of the focal term with respect to log p."""
    lp, gw, r = m[LOGP_], m[GW], m[BY_LOGP]
    if gamma == ZERO:
        for i in range(n):
            r[i] -= slope * gw[i]
    else:
        for i in range(n):
            power, less = powers(rest(p[i], lp[i]), gamma)
            r[i] -= slope * gw[i] * (power + gamma * less * p[i] * lp[i])


@njit(**LOOPS)
def add_sigmoid_focal_slope(code, slope, gamma, n, x, p, m):
    """Add the derivative of a focal term with respect to the logit."""
    lp, g, gw, w, r = m[LOGP_], m[G], m[GW], m[W], m[BY_LOGP]
    for i in range(n):
        scale, entropy, other = sigmoid_focal(x[i], g[i], lp[i], gamma)
        weight = gw[i] if code == FOCAL else w[i] - gw[i]
        r[i] += slope * weight * scale * ((p[i] - g[i]) - gamma * (g[i] + g[i] - ONE) * other * entropy)


@njit(**LOOPS)
def start_slopes(job, slopes, n, x, p, m):
    """Start the derivatives by p, and by log p (softmax) or the logit (sigmoid), with the terms that most losses have.

    ``slopes`` are the rows of a sample and class.
    """
    tp, pred, ce = slope_of(job, slopes, TP), slope_of(job, slopes, PRED), slope_of(job, slopes, CE)
    ce_neg, logp = slope_of(job, slopes, CE_NEG), slope_of(job, slopes, LOGP)
    surface, skeleton = slope_of(job, slopes, SURFACE), slope_of(job, slopes, SKELETON_SUM)
    is_softmax, is_sigmoid = job[ACTIVATION] == SOFTMAX, job[ACTIVATION] == SIGMOID
    q, gw, w, a, r, in_regions = m[Q], m[GW], m[W], m[BY_P], m[BY_LOGP], m[CE_]
    phi, thin = map_or_weight(job, DISTANCE, m, PHI), map_or_weight(job, SKELETON, m, THIN)
    for i in range(n):
        a[i] = tp * gw[i] + (pred + surface * phi[i] + skeleton * thin[i]) * w[i]
        r[i] = ZERO
    if is_softmax:  # the logarithm of what -inf ruled out is a constant
        for i in range(n):
            r[i] = -((ce + in_regions[i]) * gw[i] + logp * w[i]) if x[i] >= -LARGEST else ZERO
    elif is_sigmoid:
        for i in range(n):
            r[i] = ce_neg * (w[i] - gw[i]) * p[i] - (ce * gw[i] + logp * w[i]) * q[i]


@njit(**LOOPS)
def map_or_weight(job, volume, m, row):
    """Return the buffer of a map, or the weights where there is none: 0 times what is left of another may be NaN."""
    return m[row] if job[volume + ADDRESS] else m[W]


@njit(**LOOPS)
def index_sums(job, k, n, x, p, m, totals):
    """Add to the rows of a class tp, pred, ref, ce and count in one loop: softmax and index labels.

    ``x`` are the logits less their voxel's largest, p their powers of e, the scale what makes probabilities of these.
    """
    labels, w, s, ls = m[LABELS], m[W], m[SCALE], m[LOG_SCALE]
    tp, pred, ref, ce, count = ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(n):
        value, y = p[i] * s[i], ls[i] - x[i]
        weight = w[i] if labels[i] == k else ZERO
        tp += value * weight
        pred += value * w[i]
        ref += weight
        ce += (LARGEST if y > LARGEST else y) * weight
        count += w[i]
    for t in range(job[NUM_TERMS]):
        code = job[CODES + t]
        total = tp if code == TP else pred if code == PRED else ref if code == REF else ce if code == CE else count
        totals[job[CODES + job[NUM_TERMS] + t]] += total


@njit(**LOOPS)
def index_slopes(job, slopes, k, n, x, p, m):
    """Fill p with the probabilities, x with the derivatives by log p, and add these to dot: the usual terms alone."""
    tp, pred, ce = slope_of(job, slopes, TP), slope_of(job, slopes, PRED), slope_of(job, slopes, CE)
    labels, w, s, dot = m[LABELS], m[W], m[SCALE], m[DOT]
    for i in range(n):
        weight = w[i] if labels[i] == k else ZERO
        value = p[i] * s[i]
        y = value * (tp * weight + pred * w[i]) - (ce * weight if x[i] >= -LARGEST else ZERO)
        p[i], x[i] = value, y
        dot[i] += y


@njit(**LOOPS)
def read_counted(job, b, c, v, n, m, raw):
    """Fill counted and w for a class; tell whether a weight is wrong, and whether some voxels do not count."""
    has_mask, has_weight = job[MASK + ADDRESS] != 0, job[WEIGHT + ADDRESS] != 0
    ignores = job[IS_INDEX] != 0 and job[NUM_IGNORED] > 0
    if has_mask:
        read(job, MASK, b, c if job[MASKS_CHANNELS] else FIRST, v, n, m[COUNTED], raw)
    elif ignores:
        mark_ignored(n, m[LABELS], m[COUNTED])
    if has_weight:
        read(job, WEIGHT, b, FIRST, v, n, m[W], raw)
    if has_mask or ignores or has_weight:
        return multiply(n, has_weight, m[COUNTED], m[W])
    return False, False


@njit(**LOOPS)
def read_logits(job, b, c, v, n, x, m, raw, dropped):
    """Read the logits of a class, 0 where they do not count."""
    read(job, LOGITS, b, c, v, n, x, raw)
    if dropped:
        clear(x, m[W], n)


@njit(**LOOPS)
def read_softmax(job, b, v, n, logs, d, e, m, raw, dropped):
    """Read the logits of all classes, and make of them what a softmax needs."""
    for c in range(job[NUM_CLASSES]):
        read_logits(job, b, c, v, n, d[c], m, raw, dropped)
    if job[MERGES]:
        merge(job, b, n, d, m[MERGED])
    softmax_tile(job, b, n, logs, d, e, m)


@njit(**LOOPS)
def read_maps(job, b, c, v, n, m, raw, dropped):
    """Read what there is of a class's distance map, skeleton and regions."""
    if job[DISTANCE + ADDRESS]:
        read(job, DISTANCE, b, c, v, n, m[PHI], raw)
        if dropped:
            clear(m[PHI], m[W], n)
    if job[SKELETON + ADDRESS]:
        thin, is_index = m[THIN], job[INDEX_SKELETON] != 0
        read(job, SKELETON, b, FIRST if is_index else c, v, n, thin, raw)
        if dropped:
            clear(thin, m[W], n)
        if is_index:
            for i in range(n):
                thin[i] = ONE if thin[i] == np.float32(c) else ZERO
    if job[REGIONS + ADDRESS] and c >= job[FIRST_REGION]:
        read(job, REGIONS, b, c - job[FIRST_REGION], v, n, m[IDS], raw)


@njit(**LOOPS)
def read_reference(job, b, c, v, n, m, raw):
    """Fill the reference of a class; tell whether a label that counts is wrong."""
    if job[IS_INDEX]:
        mark_index(np.float32(c), n, m[LABELS], m[W], m[G], m[GW])
        return False
    read(job, LABEL, b, c, v, n, m[G], raw)
    return mark_dense(n, m[G], m[COUNTED], m[W], m[GW])


@njit(**LOOPS)
def fill_probabilities(job, n, logs, x, p, m):
    """Fill p with the probabilities of a class, and their logarithms where those are needed."""
    if job[ACTIVATION] == SOFTMAX:
        softmax_class(n, m[SCALE], m[LOG_SCALE], x, p, m[LOGP_])
    elif job[ACTIVATION] == SIGMOID:
        sigmoid_tile(n, x, logs, p, m[Q], m[LOGP_], m[LOGQ])
    else:
        for i in range(n):
            p[i] = x[i]


@njit(**OUTER)
def add_class_sums(job, gammas, c, n, x, p, m, totals):
    """Add to the rows of a class the sums of all terms."""
    is_softmax = job[ACTIVATION] == SOFTMAX
    for t in range(job[NUM_TERMS]):
        code, row = job[CODES + t], job[CODES + job[NUM_TERMS] + t]
        if code == BINS:
            add_bin_sums(gammas[t], n, p, m, totals[row:])
        elif code < REGION_TP and not is_usual(code):
            totals[row] += sum_term(code, gammas[t], is_softmax, n, x, p, m)
    if job[REGIONS + ADDRESS]:
        lp, lq, gw, w, entropy = m[LOGP_], m[LOGQ], m[GW], m[W], m[CE_]
        if is_softmax and job[ROW_OF + REGION_CE] >= 0:  # of all classes, before it goes to the regions of any
            for i in range(n):
                entropy[i] = lp[i] * gw[i] + (entropy[i] if c > 0 else ZERO)
        elif job[ROW_OF + REGION_CE] >= 0:
            for i in range(n):
                entropy[i] = lp[i] * gw[i] + lq[i] * (w[i] - gw[i])
        if c >= job[FIRST_REGION]:
            add_region_sums(job, n, p, m, totals)
            if not is_softmax and job[ROW_OF + REGION_CE] >= 0:
                add_region_entropy(job, n, entropy, m[IDS], totals)


@njit(**OUTER)
def add_class_slopes(job, gammas, c, n, x, p, m, slopes):
    """Fill x with the derivatives of a class by log p, and add these to dot (softmax); else, by the logit."""
    is_softmax, is_sigmoid = job[ACTIVATION] == SOFTMAX, job[ACTIVATION] == SIGMOID
    for t in range(job[NUM_TERMS]):
        code, row = job[CODES + t], job[CODES + job[NUM_TERMS] + t]
        if code == FOCAL and is_softmax:
            add_softmax_focal_slope(slopes[row], gammas[t], n, p, m)
        elif code == FOCAL or code == FOCAL_NEG:
            add_sigmoid_focal_slope(code, slopes[row], gammas[t], n, x, p, m)
        elif code == BINS:
            add_bin_slopes(gammas[t], n, p, m, slopes[row:])
        elif code < REGION_TP:
            add_plain_slope(code, slopes[row], n, p, m)
    if job[REGIONS + ADDRESS] and c >= job[FIRST_REGION]:
        add_region_slopes(job, n, slopes, p, m)
    a, r, q, dot = m[BY_P], m[BY_LOGP], m[Q], m[DOT]
    if is_softmax:
        for i in range(n):
            slope = p[i] * a[i] + r[i]
            x[i] = slope
            dot[i] += slope
    else:
        for i in range(n):
            x[i] = r[i] + (a[i] * (p[i] * q[i]) if is_sigmoid else a[i])


@njit(**LOOPS)
def write_softmax(job, b, v, n, d, e, m, raw, dropped):
    """Write the gradient of all classes, from their derivatives by log p."""
    num_classes, dot = job[NUM_CLASSES], m[DOT]
    for c in range(num_classes):
        x, p = d[c], e[c]
        if counts(job, b, c):
            for i in range(n):
                x[i] -= p[i] * dot[i]
            if job[MERGES] and c == 0:
                share(n, d[num_classes], m[MERGED], x, p)
                x = p
        else:
            share(n, x, m[MERGED], d[0], p)
            x = p
        if dropped:
            clear(x, m[W], n)
        write(job, b, c, v, n, x, raw)


@njit(**OUTER)
def sum_tile(job, gammas, logs, others, b, v, n, d, e, m, raw, totals):
    """Add the sums of a tile to the rows of all classes; tell whether the target is wrong."""
    wrong, dropped = job[COUNTER] < 0, job[COUNTER] < 0  # False
    is_softmax, is_index = job[ACTIVATION] == SOFTMAX, job[IS_INDEX] != 0
    if is_index:
        read(job, LABEL, b, FIRST, v, n, m[LABELS], raw)
        wrong |= mark_labels(job, n, m[LABELS])
    for c in range(job[NUM_CLASSES]):
        x, p = (d[c], e[c]) if is_softmax else (d[0], e[0])
        if c == 0 or job[MASKS_CHANNELS]:
            is_wrong, dropped = read_counted(job, b, c, v, n, m, raw)
            wrong |= is_wrong
        if is_softmax and c == 0:
            read_softmax(job, b, v, n, logs, d, e, m, raw, dropped)
        elif not is_softmax:
            read_logits(job, b, c, v, n, x, m, raw, dropped)
        if not counts(job, b, c):
            continue
        if is_softmax and is_index and not others:
            index_sums(job, np.float32(c), n, x, p, m, totals[c])
            continue
        read_maps(job, b, c, v, n, m, raw, dropped)
        fill_probabilities(job, n, logs, x, p, m)
        wrong |= read_reference(job, b, c, v, n, m, raw)
        add_usual_sums(job, n, p, m, totals[c])
        add_class_sums(job, gammas, c, n, x, p, m, totals[c])
    if is_softmax and job[ROW_OF + REGION_CE] >= 0:
        for c in range(job[FIRST_REGION], job[NUM_CLASSES]):
            if counts(job, b, c):
                read(job, REGIONS, b, c - job[FIRST_REGION], v, n, m[IDS], raw)
                add_region_entropy(job, n, m[CE_], m[IDS], totals[c])
    return wrong


@njit(**OUTER)
def gradient_tile(job, gammas, logs, others, b, v, n, d, e, m, raw, slopes):
    """Write the gradient of a tile."""
    dropped = job[COUNTER] < 0  # False
    is_softmax, is_index = job[ACTIVATION] == SOFTMAX, job[IS_INDEX] != 0
    if is_index:
        read(job, LABEL, b, FIRST, v, n, m[LABELS], raw)
        mark_labels(job, n, m[LABELS])
    if is_softmax and job[ROW_OF + REGION_CE] >= 0:
        in_regions = m[CE_]
        for i in range(n):
            in_regions[i] = ZERO
        for c in range(job[FIRST_REGION], job[NUM_CLASSES]):
            if counts(job, b, c):
                read(job, REGIONS, b, c - job[FIRST_REGION], v, n, m[IDS], raw)
                add_entropy_slopes(job[ROW_OF + REGION_CE], n, slopes[c], m[IDS], m[CE_])
    for c in range(job[NUM_CLASSES]):
        x, p = (d[c], e[c]) if is_softmax else (d[0], e[0])
        if c == 0 or job[MASKS_CHANNELS]:
            _, dropped = read_counted(job, b, c, v, n, m, raw)
        if is_softmax and c == 0:
            read_softmax(job, b, v, n, logs, d, e, m, raw, dropped)
        elif not is_softmax:
            read_logits(job, b, c, v, n, x, m, raw, dropped)
        if not counts(job, b, c):
            continue
        if is_softmax and is_index and not others:
            index_slopes(job, slopes[c], np.float32(c), n, x, p, m)
            continue
        read_maps(job, b, c, v, n, m, raw, dropped)
        fill_probabilities(job, n, logs, x, p, m)
        read_reference(job, b, c, v, n, m, raw)
        start_slopes(job, slopes[c], n, x, p, m)
        add_class_slopes(job, gammas, c, n, x, p, m, slopes[c])
        if not is_softmax:
            if dropped:
                clear(x, m[W], n)
            write(job, b, c, v, n, x, raw)
    if is_softmax:
        write_softmax(job, b, v, n, d, e, m, raw, dropped)


def run(job, gammas, partial, slopes, buffers, raw):
    """Work on pieces until none is left.

    Forward, each piece's sums are added to ``partial``, ``[pieces, classes, rows]`` float64. Backward, where the job
    has a gradient, that is written, from ``slopes``, ``[samples, classes, rows]`` float32.

    ``buffers`` are the thread's own, as :func:`start_buffers` leaves them; ``raw`` is as long as a tile.
    """
    tile, is_backward = job[TILE], job[GRADIENT + ADDRESS] != 0
    rows = job[NUM_CLASSES] + 1 if job[ACTIVATION] == SOFTMAX else FIRST + 1
    m, d, e = buffers[:NUM_BUFFERS], buffers[NUM_BUFFERS : NUM_BUFFERS + rows], buffers[NUM_BUFFERS + rows :]
    others, logs = job[COUNTER] < 0, job[COUNTER] < 0  # False
    for t in range(job[NUM_TERMS]):
        code = job[CODES + t]
        # Beside the usual ones; what the input does not change has no part in the gradient.
        is_constant = (code == REF_SQ) | (code == COUNT) | (code == SURFACE_MIN) | (code == SKELETON_REF)
        is_constant |= (code == REGION_REF) | (code == REGION_COUNT)
        is_plain = (code == TP) | (code == PRED) | (code == REF) | (code == CE)
        others |= not (is_plain | (code == COUNT) | (is_backward & is_constant))
        logs |= (code == FOCAL) | (code == FOCAL_NEG)
        logs |= (not is_backward) & ((code == CE) | (code == CE_NEG) | (code == LOGP) | (code == REGION_CE))
    while True:
        piece = _take(job)
        if piece >= job[PIECES]:
            break
        b, first = piece // job[NUM_PIECES], piece % job[NUM_PIECES] * job[PIECE]
        last = job[NUM_VOXELS] if first + job[PIECE] > job[NUM_VOXELS] else first + job[PIECE]
        for v in range(first, last, tile):
            n = last - v if last - v < tile else tile
            if is_backward:
                gradient_tile(job, gammas, logs, others, b, v, n, d, e, m, raw, slopes[b])
            elif sum_tile(job, gammas, logs, others, b, v, n, d, e, m, raw, partial[piece]):
                job[WRONG] = 1


def start_buffers(num_classes, tile):
    """Return the buffers of a thread: weights are 1 and voxels count until a job says otherwise."""
    buffers = np.empty((NUM_BUFFERS + 2 * (num_classes + 1), tile), np.float32)
    buffers[:NUM_BUFFERS] = 1
    buffers[CE_] = 0
    return buffers
