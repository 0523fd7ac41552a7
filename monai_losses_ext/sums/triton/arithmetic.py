# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a tile ``[C, V]``, compiled into the kernels.

An argument in capitals is known when a kernel is compiled; a branch on it that is not taken does not exist. A name or
an exponent comes as a tuple and a place in it: before Triton 3.7, an item of a tuple is not handed on as known.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def one_like(x):
    """Return 1 wherever, a NaN too, in the layout of ``x``.

    What comes from labels or masks alone would be spread over the threads in another way than what comes from the
    logits, and its sum would have them exchange every value.
    """
    return tl.minimum(tl.where(x > 1.0, x, 1.0), 1.0)


@triton.jit
def exp(x):
    """Return the exponential, and 0 where float32 has no normal number for it."""
    if PTX:
        return _exp2(x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def _exp2(x):
    # Four instructions of tl.exp2 are for numbers below 1e-38, which no sum can tell from 0.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log_and_inverse(x):
    """Return log(x) and 1 / x, for x from 1 to 256."""
    if PTX:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453, inverse
    else:
        return tl.log(x), 1.0 / x


@triton.jit
def softmax(x, counts, classes, NUM_CLASSES: tl.constexpr, C_PAD: tl.constexpr):
    """Return p, 0 at voxels that do not count, and what log p is the difference of.

    That is the shifted logits and the logarithm of the total, ``[V]``.
    """
    if NUM_CLASSES < C_PAD:
        x = tl.where((classes < NUM_CLASSES)[:, None], x, float("-inf"))
    shifted = x - tl.max(x, 0)[None, :]
    # Finite, since 0 times -inf, of a class that a logit of -inf has ruled out, is not 0. A NaN stays one.
    shifted = tl.maximum(shifted, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    p = exp(shifted)
    log_total, inverse = _log_and_inverse(tl.sum(p, 0))
    share = tl.where(counts, inverse, 0.0)  # a division for each voxel, not for each of its classes
    return p * share[None, :], shifted, log_total


@triton.jit
def log1p(z):
    """Return log(1 + z) for z in [0, 1], with the digits that 1 + z loses."""
    u = 1.0 + z
    return tl.log(u) + (z - (u - 1.0)) / u


# Whether the compiler's words for one machine can be used: not in the interpreter, nor for AMD's GPUs.
PTX = tl.constexpr(isinstance(log1p, triton.JITFunction) and torch.version.hip is None)


@triton.jit
def one_minus_exp(y):
    """Return 1 - exp(y) for y <= 0, with the digits that a subtraction would lose, and never zero."""
    series = 1.0 + y / 7.0 * (1.0 + y / 8.0 * (1.0 + y / 9.0))
    series = 1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0 * series))
    series = -y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * series))
    value = tl.where(y > -0.5, series, 1.0 - exp(y))
    return tl.where(value < 1.1754943508222875e-38, 1.1754943508222875e-38, value)


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """Raise a base of at least 0 to a power, one above 0 where the exponent is negative."""
    if EXPONENT == 0:
        return base * 0.0 + 1.0
    elif EXPONENT == 1:
        return base
    elif EXPONENT == 2:
        return base * base
    elif EXPONENT == 3:
        return base * base * base
    else:
        return tl.exp2(EXPONENT * tl.log2(base))


@triton.jit
def sigmoid(x):
    """Return the sigmoids of x and of -x, neither of them by a subtraction."""
    z = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z), tl.where(x >= 0, z, 1.0) / (1.0 + z)


@triton.jit
def cross_entropy(x, g):
    """Return -g log sigmoid(x) - (1 - g) log sigmoid(-x)."""
    return tl.where(x >= 0, x, 0.0) - x * g + log1p(exp(-tl.abs(x)))


@triton.jit
def logp_of_target(shifted, log_total, g, LABEL: tl.constexpr):
    """Return the log-probabilities that a term ``g f(log p)`` needs: with index labels one per voxel, ``[1, V]``."""
    if LABEL == "dense":
        return shifted - log_total[None, :]
    else:
        return (tl.sum(shifted * g, 0) - log_total)[None, :]


@triton.jit
def focal(logp, GAMMAS: tl.constexpr, PLACE: tl.constexpr):
    """Return -(1 - p)^GAMMA log p."""
    GAMMA: tl.constexpr = GAMMAS[PLACE]
    return -power(one_minus_exp(logp), GAMMA) * logp


@triton.jit
def focal_slope(logp, GAMMAS: tl.constexpr, PLACE: tl.constexpr):
    """Return its derivative with respect to log p."""
    GAMMA: tl.constexpr = GAMMAS[PLACE]
    if GAMMA == 0:
        return logp * 0.0 - 1.0
    else:
        miss = one_minus_exp(logp)
        return power(miss, GAMMA - 1) * (GAMMA * (1.0 - miss) * logp - miss)


@triton.jit
def sigmoid_focal(x, g, GAMMAS: tl.constexpr, PLACE: tl.constexpr):
    """Return the focal loss of a sigmoid, as :func:`terms.sigmoid_focal` defines it."""
    GAMMA: tl.constexpr = GAMMAS[PLACE]
    miss = sigmoid(x * (1.0 - 2.0 * g))[0]
    return power(miss, GAMMA) * cross_entropy(x, g)


@triton.jit
def sigmoid_focal_slope(x, g, GAMMAS: tl.constexpr, PLACE: tl.constexpr):
    """Return its derivative with respect to the logits."""
    GAMMA: tl.constexpr = GAMMAS[PLACE]
    u = 2.0 * g - 1.0
    hit, miss = sigmoid(x * u)
    p, q = sigmoid(x)
    return power(miss, GAMMA) * ((1.0 - g) * p - g * q - GAMMA * u * hit * cross_entropy(x, g))


@triton.jit
def plain_value(p, g, phi, kept, one, TERMS: tl.constexpr, PLACE: tl.constexpr):
    """Return the values of a term without logarithms; ``p`` and ``g`` are 0 where a voxel does not count."""
    NAME: tl.constexpr = TERMS[PLACE]
    if NAME == "tp":
        return p * g
    elif NAME == "pred":
        return p
    elif NAME == "pred_sq":
        return p * p
    elif NAME == "ref":
        return g
    elif NAME == "ref_sq":
        return g * g
    elif NAME == "abs_diff":
        return tl.abs(p - g)
    elif NAME == "surface":
        return tl.where(kept, p * phi, 0.0)
    elif NAME == "surface_min":
        return tl.where(kept, tl.where(phi > 0, 0.0, phi), 0.0)
    else:
        return tl.where(kept, one, 0.0)


@triton.jit
def plain_slope(p, g, phi, grad, TERMS: tl.constexpr, PLACE: tl.constexpr):
    """Return ``grad`` times the derivative of a term without logarithms with respect to p."""
    NAME: tl.constexpr = TERMS[PLACE]
    if NAME == "tp":
        return grad * g
    elif NAME == "pred":
        return grad + p * 0.0
    elif NAME == "pred_sq":
        return 2.0 * grad * p
    elif NAME == "abs_diff":
        return grad * (tl.where(p > g, 1.0, 0.0) - tl.where(p < g, 1.0, 0.0))
    elif NAME == "surface":
        return grad * phi
    else:
        return p * 0.0
