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

# A job is one array of int64: this header, the volumes, the codes of the terms, the labels to ignore.
COUNTER, WRONG, NUM_CLASSES, NUM_VOXELS, NUM_PIECES, PIECES, PIECE, TILE = range(8)
ACTIVATION, IS_INDEX, MASKS_CHANNELS, NUM_TERMS, NUM_IGNORED = range(8, 13)
# A volume: the address, or 0 for none; the kind of number; strides of sample and channel; lengths of the last two
# spatial axes and strides of all three, in elements, with axes merged where they can be.
ADDRESS, KIND, SIZE, SAMPLE, CHANNEL, ROWS, COLUMNS, STRIDE_0, STRIDE_1, STRIDE_2 = range(10)
# As int64: numba compiles a function anew for each Python number that it is handed.
FIRST, LOGITS, LABEL, WEIGHT, MASK, DISTANCE, GRADIENT = map(np.int64, (0, *range(16, 76, 10)))
CODES = 76

SOFTMAX, SIGMOID, NONE = range(3)
FLOAT32, FLOAT16, BFLOAT16, FLOAT64, UINT8, INT8, INT16, INT32, INT64 = range(9)
TP, PRED, PRED_SQ, REF, REF_SQ, ABS_DIFF, CE, CE_NEG = range(8)
LOGP, FOCAL, FOCAL_NEG, SURFACE, SURFACE_MIN, COUNT = range(8, 14)

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
LARGEST = np.float32(np.finfo(np.float32).max)
TINY = np.float32(1e-30)  # instead of 1 - p = 0 under a negative exponent
IGNORED, OUTSIDE = np.float32(-1e30), np.float32(-2e30)  # instead of a label that does not count, or is no class

# Never a promise that there is no NaN and no infinity: both must come out as they went in.
ENTRY = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
LOOPS = {**ENTRY, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
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
        m = min(n - done, follow)
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
        m = min(n - done, follow)
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
        ignored = np.float32(job[CODES + job[NUM_TERMS] + k])
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
def raise_top(c, n, x, top, s):
    """Keep the largest logit of each voxel in top, and set s to 0."""
    if c == 0:
        for i in range(n):
            top[i] = x[i]
            s[i] = ZERO
    else:
        for i in range(n):
            top[i] = x[i] if x[i] > top[i] else top[i]


@njit(**LOOPS)
def softmax_tile(num_classes, n, logs, d, e, top, s, ls, dot):
    """Make logits in d less by the largest of their voxel, fill e with e^d, s with 1 / sum of e, ls with its -log."""
    for c in range(num_classes):
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
        dot[i] = ZERO


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


@njit(**LOOPS)
def sum_term(code, gamma, is_softmax, n, x, p, lp, lq, g, gw, w, phi):
    """Return the sum of one term over a tile of one class."""
    a = ZERO
    if code == TP:
        for i in range(n):
            a += p[i] * gw[i]
    elif code == PRED:
        for i in range(n):
            a += p[i] * w[i]
    elif code == PRED_SQ:
        for i in range(n):
            a += p[i] * p[i] * w[i]
    elif code == REF:
        for i in range(n):
            a += gw[i]
    elif code == REF_SQ:
        for i in range(n):
            a += gw[i] * g[i]
    elif code == ABS_DIFF:
        for i in range(n):
            a += abs(p[i] - g[i]) * w[i]
    elif code == CE:
        for i in range(n):
            a += lp[i] * gw[i]
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
    elif code == SURFACE:
        for i in range(n):
            a += p[i] * phi[i] * w[i]
    elif code == SURFACE_MIN:
        for i in range(n):
            a += (ZERO if phi[i] > ZERO else phi[i]) * w[i]
    else:
        for i in range(n):
            a += w[i]
    return a


@njit(**LOOPS)
def add_plain_slope(code, slope, n, p, g, w, phi, a):
    """Add to a the derivative of a term with respect to the probability."""
    if code == PRED_SQ:
        for i in range(n):
            a[i] += slope * (p[i] + p[i]) * w[i]
    elif code == ABS_DIFF:
        for i in range(n):
            sign = ONE if p[i] > g[i] else (-ONE if p[i] < g[i] else (p[i] - g[i]) * ZERO)
            a[i] += slope * sign * w[i]
    elif code == SURFACE:
        for i in range(n):
            a[i] += slope * phi[i] * w[i]


@njit(**LOOPS)
def add_softmax_focal_slope(slope, gamma, n, p, lp, gw, r):
    """Add to r the derivative of the focal term with respect to log p."""
    if gamma == ZERO:
        for i in range(n):
            r[i] -= slope * gw[i]
    else:
        for i in range(n):
            power, less = powers(rest(p[i], lp[i]), gamma)
            r[i] -= slope * gw[i] * (power + gamma * less * p[i] * lp[i])


@njit(**LOOPS)
def add_sigmoid_focal_slope(code, slope, gamma, n, x, p, lp, g, gw, w, r):
    """Add to r the derivative of a focal term with respect to the logit."""
    for i in range(n):
        scale, entropy, other = sigmoid_focal(x[i], g[i], lp[i], gamma)
        weight = gw[i] if code == FOCAL else w[i] - gw[i]
        r[i] += slope * weight * scale * ((p[i] - g[i]) - gamma * (g[i] + g[i] - ONE) * other * entropy)


@njit(**LOOPS)
def start_slopes(is_softmax, is_sigmoid, tp, pred, ce, ce_neg, logp, n, x, p, q, gw, w, a, r):
    """Fill a with the derivatives by p, r with those by log p (softmax) or the logit (sigmoid)."""
    for i in range(n):
        a[i] = tp * gw[i] + pred * w[i]
        r[i] = ZERO
    if is_softmax:  # the logarithm of what -inf ruled out is a constant
        for i in range(n):
            r[i] = -(ce * gw[i] + logp * w[i]) if x[i] >= -LARGEST else ZERO
    elif is_sigmoid:
        for i in range(n):
            r[i] = ce_neg * (w[i] - gw[i]) * p[i] - (ce * gw[i] + logp * w[i]) * q[i]


@njit(**LOOPS)
def index_sums(k, n, labels, w, s, ls, x, p, others, lp, g, gw):
    """Return the sums of tp, pred, ref and ce of a class in one loop: softmax and index labels.

    ``x`` are the logits less their voxel's largest, p their powers of e, ``s`` what makes probabilities of these.
    Where these sums are not all that is asked for, p, lp, g and gw are filled.
    """
    tp, pred, ref, ce = ZERO, ZERO, ZERO, ZERO
    if not others:
        for i in range(n):
            value, y = p[i] * s[i], ls[i] - x[i]
            weight = w[i] if labels[i] == k else ZERO
            tp += value * weight
            pred += value * w[i]
            ref += weight
            ce += (LARGEST if y > LARGEST else y) * weight
    else:
        for i in range(n):
            value, y = p[i] * s[i], ls[i] - x[i]
            y = LARGEST if y > LARGEST else y
            weight = w[i] if labels[i] == k else ZERO
            p[i], lp[i], gw[i] = value, y, weight
            g[i] = ONE if labels[i] == k else ZERO
            tp += value * weight
            pred += value * w[i]
            ref += weight
            ce += y * weight
    return tp, pred, ref, ce


@njit(**LOOPS)
def index_slopes(k, n, labels, w, s, x, p, tp, pred, ce, dot):
    """Fill p with the probabilities, x with the derivatives by log p, and add these to dot: no other slopes."""
    for i in range(n):
        weight = w[i] if labels[i] == k else ZERO
        value = p[i] * s[i]
        y = value * (tp * weight + pred * w[i]) - (ce * weight if x[i] >= -LARGEST else ZERO)
        p[i], x[i] = value, y
        dot[i] += y


@njit(**LOOPS)
def slope_of(job, slopes, wanted, b, c):
    """Return the sum of the slopes of the terms with a code."""
    slope = ZERO
    for t in range(job[NUM_TERMS]):
        slope += slopes[t, b, c] if job[CODES + t] == wanted else ZERO
    return slope


def run(job, gammas, partial, slopes):
    """Work on pieces until none is left.

    Forward, each piece's sums are added to ``partial``, ``[pieces, terms, classes]`` float64. Backward, where the job
    has a gradient, that is written, from ``slopes``, ``[terms, samples, classes]`` float32.
    """
    num_classes, num_voxels, tile = job[NUM_CLASSES], job[NUM_VOXELS], job[TILE]
    is_softmax, is_sigmoid = job[ACTIVATION] == SOFTMAX, job[ACTIVATION] == SIGMOID
    is_backward, is_index = job[GRADIENT + ADDRESS] != 0, job[IS_INDEX] != 0
    has_mask, has_weight, has_map = job[MASK + ADDRESS] != 0, job[WEIGHT + ADDRESS] != 0, job[DISTANCE + ADDRESS] != 0
    ignores = is_index and job[NUM_IGNORED] > 0
    others, logs = job[COUNTER] < 0, job[COUNTER] < 0  # False
    for t in range(job[NUM_TERMS]):
        code = job[CODES + t]
        others |= (code != TP) & (code != PRED) & (code != REF) & (code != CE)
        logs |= (code == FOCAL) | (code == FOCAL_NEG)
        logs |= (not is_backward) & ((code == CE) | (code == CE_NEG) | (code == LOGP))
    # The usual terms of index labels have loops of their own.
    is_usual = is_softmax and is_index and (not is_backward or not others)
    rows = num_classes if is_softmax else FIRST + 1
    d, e, raw = np.empty((rows, tile), np.float32), np.empty((rows, tile), np.float32), np.empty(tile, np.int64)
    m = np.ones((15, tile), np.float32)
    top, s, ls, lp, lq, q, g, gw = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    w, phi, labels, counted, a, r, dot = m[8], m[9], m[10], m[11], m[12], m[13], m[14]
    while True:
        piece = _take(job)
        if piece >= job[PIECES]:
            break
        b, first = piece // job[NUM_PIECES], piece % job[NUM_PIECES] * job[PIECE]
        for v in range(first, min(first + job[PIECE], num_voxels), tile):
            n, wrong, dropped = min(tile, num_voxels - v), False, False
            if is_index:
                read(job, LABEL, b, FIRST, v, n, labels, raw)
                wrong |= mark_labels(job, n, labels)
            for c in range(num_classes):
                x, p = (d[c], e[c]) if is_softmax else (d[0], e[0])
                if c == 0 or job[MASKS_CHANNELS]:
                    if has_mask:
                        read(job, MASK, b, c if job[MASKS_CHANNELS] else FIRST, v, n, counted, raw)
                    elif ignores:
                        mark_ignored(n, labels, counted)
                    if has_weight:
                        read(job, WEIGHT, b, FIRST, v, n, w, raw)
                    if has_mask or ignores or has_weight:
                        is_wrong, dropped = multiply(n, has_weight, counted, w)
                        wrong |= is_wrong
                for k in range(num_classes if is_softmax and c == 0 else 0 if is_softmax else 1):
                    y = d[k]
                    read(job, LOGITS, b, k if is_softmax else c, v, n, y, raw)
                    if dropped:
                        clear(y, w, n)
                    raise_top(k, n, y, top, s)
                if is_softmax and c == 0:
                    softmax_tile(num_classes, n, logs, d, e, top, s, ls, dot)
                tp, pred, ref, ce = ZERO, ZERO, ZERO, ZERO
                if is_backward:
                    tp, pred = slope_of(job, slopes, TP, b, c), slope_of(job, slopes, PRED, b, c)
                    ce = slope_of(job, slopes, CE, b, c)
                if is_usual and is_backward:
                    index_slopes(np.float32(c), n, labels, w, s, x, p, tp, pred, ce, dot)
                    continue
                if is_usual:
                    tp, pred, ref, ce = index_sums(np.float32(c), n, labels, w, s, ls, x, p, others, lp, g, gw)
                elif is_softmax:
                    softmax_class(n, s, ls, x, p, lp)
                elif is_sigmoid:
                    sigmoid_tile(n, x, logs, p, q, lp, lq)
                else:
                    for i in range(n):
                        p[i] = x[i]
                if not is_index:
                    read(job, LABEL, b, c, v, n, g, raw)
                    wrong |= mark_dense(n, g, counted, w, gw)
                elif not is_usual:
                    mark_index(np.float32(c), n, labels, w, g, gw)
                if has_map:
                    read(job, DISTANCE, b, c, v, n, phi, raw)
                    if dropped:
                        clear(phi, w, n)
                if not is_backward:
                    for t in range(job[NUM_TERMS]):
                        code = job[CODES + t]
                        if is_usual and (code == TP or code == PRED or code == REF or code == CE):
                            total = tp if code == TP else pred if code == PRED else ref if code == REF else ce
                        else:
                            total = sum_term(code, gammas[t], is_softmax, n, x, p, lp, lq, g, gw, w, phi)
                        partial[piece, t, c] += total
                    continue
                ce_neg, logp = slope_of(job, slopes, CE_NEG, b, c), slope_of(job, slopes, LOGP, b, c)
                start_slopes(is_softmax, is_sigmoid, tp, pred, ce, ce_neg, logp, n, x, p, q, gw, w, a, r)
                for t in range(job[NUM_TERMS]):
                    code, slope = job[CODES + t], slopes[t, b, c]
                    if code == FOCAL and is_softmax:
                        add_softmax_focal_slope(slope, gammas[t], n, p, lp, gw, r)
                    elif code == FOCAL or code == FOCAL_NEG:
                        add_sigmoid_focal_slope(code, slope, gammas[t], n, x, p, lp, g, gw, w, r)
                    else:
                        add_plain_slope(code, slope, n, p, g, w, phi, a)
                if is_softmax:
                    for i in range(n):
                        slope_ = p[i] * a[i] + r[i]
                        x[i] = slope_
                        dot[i] += slope_
                else:
                    for i in range(n):
                        x[i] = r[i] + (a[i] * (p[i] * q[i]) if is_sigmoid else a[i])
                    if dropped:
                        clear(x, w, n)
                    write(job, b, c, v, n, x, raw)
            for c in range(num_classes if is_backward and is_softmax else 0):
                x, p = d[c], e[c]
                for i in range(n):
                    x[i] -= p[i] * dot[i]
                if dropped:
                    clear(x, w, n)
                write(job, b, c, v, n, x, raw)
            if wrong:
                job[WRONG] = 1
