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
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


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
    p = p * _float(np.int32((_bits(shifted) << 23) + (127 << 23)))
    return ZERO if x < low else p


@njit(**EXACT)
def log(x):
    """Return the logarithm of a normal x > 0, NaN for NaN."""
    whole = np.int32((_bits(x) - 0x3F3504F3) >> 23)
    f = _float(np.int32(_bits(x) - (whole << 23))) - ONE
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
    """Return the factor (1 - p_t)^gamma and the cross-entropy of a sigmoid's focal loss, and the sigmoid of x (2g - 1)."""
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
        if kind == FLOAT32 and step == 1:
            x = carray(_pointer(address), m, np.float32)
            for i in range(m):
                x[i] = values[done + i]
        elif kind == FLOAT32:
            y = carray(_pointer(address), (m - 1) * step + 1, np.float32)
            for i in range(m):
                y[i * step] = values[done + i]
        else:
            z = carray(_pointer(address), (m - 1) * step + 1, np.uint16)
            for i in range(m):
                z[i * step] = halves[done + i]
        done += m


@njit(**LOOPS)
def read_labels(job, b, v, n, labels, raw):
    """Read n index labels from v on: IGNORED where they do not count, OUTSIDE where they are no class."""
    read(job, LABEL, b, FIRST, v, n, labels, raw)
    for k in range(job[NUM_IGNORED]):
        ignored = np.float32(job[CODES + job[NUM_TERMS] + k])
        for i in range(n):
            labels[i] = IGNORED if labels[i] == ignored else labels[i]
    last, wrong = np.float32(job[NUM_CLASSES] - 1), 0
    for i in range(n):
        label = labels[i]
        is_class = label >= ZERO and label <= last and is_whole(label)
        wrong += not (is_class or label == IGNORED)
        labels[i] = label if is_class or label == IGNORED else OUTSIDE
    if wrong > 0:
        job[WRONG] = 1


@njit(**LOOPS)
def read_multiplier(job, b, c, v, n, labels, w, other, raw):
    """Fill w with what the voxels' values are multiplied by; tell whether some do not count."""
    if job[MASK + ADDRESS]:
        read(job, MASK, b, c, v, n, w, raw)
    else:
        masked = job[IS_INDEX] and job[NUM_IGNORED] > 0
        for i in range(n):
            w[i] = ZERO if masked and labels[i] == IGNORED else ONE
    if job[WEIGHT + ADDRESS]:
        read(job, WEIGHT, b, FIRST, v, n, other, raw)
        wrong = 0
        for i in range(n):
            wrong += not other[i] >= ZERO
            w[i] = ZERO if w[i] == ZERO else other[i]
        if wrong > 0:
            job[WRONG] = 1
    dropped = 0
    for i in range(n):
        dropped += w[i] == ZERO
    return dropped > 0


@njit(**LOOPS)
def clear(values, w, n):
    """Set what does not count to 0, whatever stands there."""
    for i in range(n):
        values[i] = ZERO if w[i] == ZERO else values[i]


@njit(**LOOPS)
def read_dense(job, b, c, v, n, w, g, other, raw):
    """Fill g with the reference of a class; labels are checked where the mask, whatever the weight, counts them."""
    read(job, LABEL, b, c, v, n, g, raw)
    if job[MASK + ADDRESS]:
        read(job, MASK, b, c if job[MASKS_CHANNELS] else FIRST, v, n, other, raw)
        clear(g, other, n)
    wrong = 0
    for i in range(n):
        wrong += not (g[i] >= -HALF and g[i] <= ONE + HALF)
    if wrong > 0:
        job[WRONG] = 1
    clear(g, w, n)


@njit(**LOOPS)
def softmax_tile(job, b, v, n, w, dropped, d, e, top, s, raw):
    """Fill d with the logits less the largest of their voxel, e with e^d, s with the sum of e over the classes."""
    num_classes = job[NUM_CLASSES]
    for c in range(num_classes):
        x = d[c]
        read(job, LOGITS, b, c, v, n, x, raw)
        if dropped:
            clear(x, w, n)
        if c == 0:
            for i in range(n):
                top[i] = x[i]
                s[i] = ZERO
        else:
            for i in range(n):
                top[i] = x[i] if x[i] > top[i] else top[i]
    for c in range(num_classes):
        x, y = d[c], e[c]
        for i in range(n):
            below = x[i] - top[i]
            power = exp(below)
            x[i] = below
            y[i] = power
            s[i] += power


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
def add_softmax_slopes(tp, pred, ce, logp, n, x, gw, w, a, r):
    """Fill a and r with the derivatives by p and log p; the logarithm of what -inf ruled out is a constant."""
    for i in range(n):
        a[i] = tp * gw[i] + pred * w[i]
        r[i] = -(ce * gw[i] + logp * w[i]) if x[i] >= -LARGEST else ZERO


@njit(**LOOPS)
def add_sigmoid_slopes(tp, pred, ce, ce_neg, logp, n, p, q, gw, w, a, r):
    """Fill a and r with the derivatives by p and by the logit."""
    for i in range(n):
        a[i] = tp * gw[i] + pred * w[i]
        r[i] = ce_neg * (w[i] - gw[i]) * p[i] - (ce * gw[i] + logp * w[i]) * q[i]


def run(job, gammas, partial, slopes):
    """Work on pieces until none is left.

    Forward, each piece's sums are added to ``partial``, ``[pieces, terms, classes]`` float64. Backward, where the job
    has a gradient, that is written, from ``slopes``, ``[terms, samples, classes]`` float32.
    """
    num_classes, num_voxels, tile = job[NUM_CLASSES], job[NUM_VOXELS], job[TILE]
    is_softmax, is_sigmoid = job[ACTIVATION] == SOFTMAX, job[ACTIVATION] == SIGMOID
    is_backward, has_phi = job[GRADIENT + ADDRESS] != 0, job[DISTANCE + ADDRESS] != 0
    logs = False
    for t in range(job[NUM_TERMS]):
        code = job[CODES + t]
        logs |= code == FOCAL or code == FOCAL_NEG
        logs |= not is_backward and (code == CE or code == CE_NEG or code == LOGP)
    rows = num_classes if is_softmax else FIRST + 1
    d, e, raw = np.empty((rows, tile), np.float32), np.empty((rows, tile), np.float32), np.empty(tile, np.int64)
    m = np.empty((15, tile), np.float32)
    top, s, ls, lp, lq, q, g, gw = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    w, phi, labels, other, a, r, dot = m[8], m[9], m[10], m[11], m[12], m[13], m[14]
    while True:
        piece = _take(job)
        if piece >= job[PIECES]:
            break
        b, first = piece // job[NUM_PIECES], piece % job[NUM_PIECES] * job[PIECE]
        for v in range(first, min(first + job[PIECE], num_voxels), tile):
            n = min(tile, num_voxels - v)
            if job[IS_INDEX]:
                read_labels(job, b, v, n, labels, raw)
            dropped = read_multiplier(job, b, FIRST, v, n, labels, w, other, raw)
            if is_softmax:
                softmax_tile(job, b, v, n, w, dropped, d, e, top, s, raw)
                if logs:
                    for i in range(n):
                        ls[i] = log(s[i])
                for i in range(n):
                    s[i] = ONE / s[i]
                    dot[i] = ZERO
            for c in range(num_classes):
                x, p = (d[c], e[c]) if is_softmax else (d[0], e[0])
                if job[MASKS_CHANNELS] and c > 0:
                    dropped = read_multiplier(job, b, c, v, n, labels, w, other, raw)
                if is_softmax:
                    for i in range(n):
                        p[i] *= s[i]
                    if logs:
                        for i in range(n):
                            y = ls[i] - x[i]
                            lp[i] = LARGEST if y > LARGEST else y
                else:
                    read(job, LOGITS, b, c, v, n, x, raw)
                    if dropped:
                        clear(x, w, n)
                    if is_sigmoid:
                        sigmoid_tile(n, x, logs, p, q, lp, lq)
                    else:
                        for i in range(n):
                            p[i] = x[i]
                if job[IS_INDEX]:
                    k = np.float32(c)
                    for i in range(n):
                        g[i] = ONE if labels[i] == k else ZERO
                        gw[i] = w[i] if labels[i] == k else ZERO
                else:
                    read_dense(job, b, c, v, n, w, g, other, raw)
                    for i in range(n):
                        gw[i] = g[i] * w[i]
                if has_phi:
                    read(job, DISTANCE, b, c, v, n, phi, raw)
                    if dropped:
                        clear(phi, w, n)
                if not is_backward:
                    for t in range(job[NUM_TERMS]):
                        code = job[CODES + t]
                        partial[piece, t, c] += sum_term(code, gammas[t], is_softmax, n, x, p, lp, lq, g, gw, w, phi)
                    continue
                tp, pred, ce, ce_neg, logp = ZERO, ZERO, ZERO, ZERO, ZERO
                for t in range(job[NUM_TERMS]):
                    code, slope = job[CODES + t], slopes[t, b, c]
                    tp += slope if code == TP else ZERO
                    pred += slope if code == PRED else ZERO
                    ce += slope if code == CE else ZERO
                    ce_neg += slope if code == CE_NEG else ZERO
                    logp += slope if code == LOGP else ZERO
                if is_softmax:
                    add_softmax_slopes(tp, pred, ce, logp, n, x, gw, w, a, r)
                elif is_sigmoid:
                    add_sigmoid_slopes(tp, pred, ce, ce_neg, logp, n, p, q, gw, w, a, r)
                else:
                    add_softmax_slopes(tp, pred, ZERO, ZERO, n, x, gw, w, a, r)
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
                        y = p[i] * a[i] + r[i]
                        x[i] = y
                        dot[i] += y
                else:
                    for i in range(n):
                        r[i] += a[i] * (p[i] * q[i]) if is_sigmoid else a[i]
                    if dropped:
                        clear(r, w, n)
                    write(job, b, c, v, n, r, raw)
            if is_backward and is_softmax:
                for c in range(num_classes):
                    x, p = d[c], e[c]
                    for i in range(n):
                        x[i] -= p[i] * dot[i]
                    if dropped:
                        clear(x, w, n)
                    write(job, b, c, v, n, x, raw)
