# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The losses as their papers write them: float64 loops over single voxels, which import nothing of the package.

Probabilities ``p``, references ``g`` and masks ``m`` are lists over voxels, for one sample and class.
"""

from __future__ import annotations

import math


def softmax(logits: list[float]) -> list[float]:
    """Softmax of one voxel's logits."""
    highest = max(logits)
    exps = [math.exp(x - highest) for x in logits]
    return [e / sum(exps) for e in exps]


def sigmoid(x: float) -> float:
    """Sigmoid of one logit."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def probabilities(logits, activation: str):
    """``[B][C][V]`` logits to probabilities."""
    out = []
    for sample in logits:
        num_classes, num_voxels = len(sample), len(sample[0])
        if activation == "softmax":
            columns = [softmax([sample[c][v] for c in range(num_classes)]) for v in range(num_voxels)]
            out.append([[columns[v][c] for v in range(num_voxels)] for c in range(num_classes)])
        else:
            change = sigmoid if activation == "sigmoid" else float
            out.append([[change(x) for x in row] for row in sample])
    return out


def overlap(p, g, m) -> tuple[float, float, float]:
    """True positives, false positives and false negatives of one sample and class."""
    tp = sum(k * a * b for a, b, k in zip(p, g, m, strict=True))
    fp = sum(k * a * (1 - b) for a, b, k in zip(p, g, m, strict=True))
    fn = sum(k * (1 - a) * b for a, b, k in zip(p, g, m, strict=True))
    return tp, fp, fn


def dice(p, g, m, smooth: float = 1e-5) -> float:
    """Dice loss of one sample and class, Milletari et al. 2016 with first powers."""
    tp, fp, fn = overlap(p, g, m)
    return 1 - (2 * tp + smooth) / (2 * tp + fp + fn + smooth)


def tversky(p, g, m, alpha: float, beta: float, smooth: float = 1e-5) -> float:
    """Tversky loss of one sample and class, Salehi et al. 2017; alpha weighs false positives."""
    tp, fp, fn = overlap(p, g, m)
    return 1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)


def focal_softmax(p, g, m, gamma: float) -> float:
    """Sum of the focal loss over one sample and class with softmax, Lin et al. 2017."""
    return sum(-k * b * (1 - a) ** gamma * math.log(a) for a, b, k in zip(p, g, m, strict=True))


def focal_sigmoid(p, g, m, gamma: float, alpha: float | None = None) -> float:
    """Sum of the focal loss over one sample and class with sigmoid and hard labels, Lin et al. 2017."""
    total = 0.0
    for a, b, k in zip(p, g, m, strict=True):
        truth = a if b == 1 else 1 - a
        balance = 1.0 if alpha is None else alpha if b == 1 else 1 - alpha
        total += -k * balance * (1 - truth) ** gamma * math.log(truth)
    return total


def cross_entropy(p, labels, weight=None, smoothing: float = 0.0) -> float:
    """Mean cross-entropy of one sample with index labels: ``p`` is ``[C][V]``; divided by the voxels' weights."""
    num_classes = len(p)
    weight = [1.0] * num_classes if weight is None else weight
    total = norm = 0.0
    for v, label in enumerate(labels):
        total -= (1 - smoothing) * weight[label] * math.log(p[label][v])
        total -= smoothing / num_classes * sum(weight[c] * math.log(p[c][v]) for c in range(num_classes))
        norm += weight[label]
    return total / norm


def signed_distance(mask, spacing) -> list[float]:
    """Signed distance of every voxel of a mask, by comparing it with every other voxel.

    Args:
        mask: nested lists of bools, any number of axes.
        spacing: voxel size along each axis.

    Returns:
        The distances in the order of the voxels; inf where there is no other kind of voxel.
    """

    def voxels(part, place=()):
        if not isinstance(part, list):
            yield place, part
            return
        for i, inner in enumerate(part):
            yield from voxels(inner, (*place, i * spacing[len(place)]))

    places = list(voxels(mask))
    return [
        (-1 if inside else 1) * min((math.dist(a, b) for b, other in places if other != inside), default=math.inf)
        for a, inside in places
    ]
