# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a tile ``[C, V]``, compiled into the kernels.

An argument in capitals is known when a kernel is compiled; a branch on it that is not taken does not exist. A name or
an exponent comes as a tuple and a place in it: before Triton 3.7, an item of a tuple is not handed on as known.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax(x, kept, classes, NUM_CLASSES: tl.constexpr, C_PAD: tl.constexpr):
    """Return p, and what log p is the difference of: the shifted logits and the logarithm of the total; and a 1.

    p is 0 where a voxel does not count. The 1, of each voxel, is for what must be known by way of the logits.
    """
    if NUM_CLASSES < C_PAD:
        x = tl.where((classes < NUM_CLASSES)[:, None], x, float("-inf"))
    shifted = x - tl.max(x, 0)[None, :]
    # Finite, since 0 times -inf, of a class that a logit of -inf has ruled out, is not 0. A NaN stays one.
    shifted = tl.maximum(shifted, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp(shifted)
    total = tl.sum(p, 0)
    share = tl.where(kept, 1.0 / total, 0.0)  # a division for each voxel, not for each of its classes
    return p * share[None, :], shifted, tl.log(total), tl.minimum(total, 1.0)


@triton.jit
def log1p(z):
    """Return log(1 + z) for z in [0, 1], with the digits that 1 + z loses."""
    u = 1.0 + z
    return tl.log(u) + (z - (u - 1.0)) / u


@triton.jit
def one_minus_exp(y):
    """Return 1 - exp(y) for y <= 0, with the digits that a subtraction would lose, and never zero."""
    series = 1.0 + y / 7.0 * (1.0 + y / 8.0 * (1.0 + y / 9.0))
    series = 1.0 + y / 4.0 * (1.0 + y / 5.0 * (1.0 + y / 6.0 * series))
    series = -y * (1.0 + y / 2.0 * (1.0 + y / 3.0 * series))
    value = tl.where(y > -0.5, series, 1.0 - tl.exp(y))
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
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z), tl.where(x >= 0, z, 1.0) / (1.0 + z)


@triton.jit
def cross_entropy(x, g):
    """Return -g log sigmoid(x) - (1 - g) log sigmoid(-x)."""
    return tl.where(x >= 0, x, 0.0) - x * g + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logp_of_target(shifted, log_total, g, TARGET: tl.constexpr):
    """Return the log-probabilities that a term ``g f(log p)`` needs: with index labels one per voxel, ``[1, V]``."""
    if TARGET == "dense":
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
def plain_value(p, g, phi, kept, TERMS: tl.constexpr, PLACE: tl.constexpr):
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
        return tl.where(kept[None, :], p * phi, 0.0)
    elif NAME == "surface_min":
        return tl.where(kept[None, :], tl.where(phi > 0, 0.0, phi), 0.0)
    else:
        return tl.where(kept[None, :], 1.0, 0.0) + p * 0.0


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
