# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses that are formulas on sums, beside loops over voxels written from their papers, and MONAI where it has them."""

from __future__ import annotations

import math

import monai.losses as theirs
import pytest
import torch

from monai_losses_ext import CompoundLoss, CrossEntropyLoss, DiceLoss, get_loss
from monai_losses_ext.losses import (
    GeneralizedDiceLoss,
    JaccardLoss,
    L1ACELoss,
    LogCoshDiceLoss,
    MCCLoss,
    Poly1Loss,
)

SHAPE = (4, 5)


def problem(num_classes=3, batch=2):
    x = 2 * torch.randn(batch, num_classes, *SHAPE, dtype=torch.float64)
    return x, torch.randint(0, num_classes, (batch, 1, *SHAPE))


def voxels(x, labels, b, c):
    """Return probability and reference of each voxel of a sample and class, as numbers."""
    return x.softmax(1)[b, c].flatten().tolist(), (labels[b, 0] == c).double().flatten().tolist()


def confusion(p, g):
    """Return true positives, false positives, false negatives and true negatives by a loop over voxels."""
    tp = fp = fn = tn = 0.0
    for pv, gv in zip(p, g, strict=True):
        tp += pv * gv
        fp += pv * (1 - gv)
        fn += (1 - pv) * gv
        tn += (1 - pv) * (1 - gv)
    return tp, fp, fn, tn


def mean_over_classes(x, labels, value):
    values = [value(*voxels(x, labels, b, c)) for b in range(x.shape[0]) for c in range(x.shape[1])]
    return sum(values) / len(values)


def jaccard(p, g):
    tp, fp, fn, _ = confusion(p, g)
    return 1 - tp / (tp + fp + fn)


def log_cosh(p, g):
    tp, fp, fn, _ = confusion(p, g)
    return math.log(math.cosh(1 - 2 * tp / (2 * tp + fp + fn)))


def mcc(p, g):
    tp, fp, fn, tn = confusion(p, g)
    return 1 - (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def average_calibration_error(p, g, bins=6):
    gaps = []
    for i in range(bins):
        inside = [k for k, v in enumerate(p) if (i / bins < v <= (i + 1) / bins) or (i == 0 and v == 0)]
        if inside:
            gaps.append(abs(sum(p[k] for k in inside) - sum(g[k] for k in inside)) / len(inside))
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize(("loss", "oracle"), [
    (JaccardLoss(softmax=True, smooth_nr=0, smooth_dr=0), jaccard),
    (LogCoshDiceLoss(softmax=True, smooth_nr=0, smooth_dr=0), log_cosh),
    (MCCLoss(softmax=True, smooth_dr=0), mcc),
    (L1ACELoss(softmax=True, bins=6), average_calibration_error),
], ids=["jaccard", "log_cosh_dice", "mcc", "l1_ace"])  # fmt: skip
def test_a_mean_over_classes_of_a_formula(loss, oracle):
    x, labels = problem()
    assert loss(x, labels).item() == pytest.approx(mean_over_classes(x, labels, oracle), rel=1e-9)
    assert loss(x.float(), labels).item() == pytest.approx(mean_over_classes(x, labels, oracle), rel=1e-5)


@pytest.mark.parametrize("w_type", ["square", "simple", "uniform"])
def test_generalized_dice_has_one_quotient_for_all_classes(w_type):
    x, labels = problem()
    power = {"square": 2, "simple": 1, "uniform": 0}[w_type]
    values = []
    for b in range(2):
        above = below = 0.0
        for c in range(3):
            p, g = voxels(x, labels, b, c)
            tp, fp, fn, _ = confusion(p, g)
            above += 2 * tp / sum(g) ** power
            below += (2 * tp + fp + fn) / sum(g) ** power
        values.append(1 - above / below)
    loss = GeneralizedDiceLoss(softmax=True, w_type=w_type, smooth_nr=0, smooth_dr=0)
    assert loss(x, labels).item() == pytest.approx(sum(values) / 2, rel=1e-9)


@pytest.mark.parametrize("epsilon", [-0.5, 0.0, 2.0])
def test_poly1_adds_to_the_cross_entropy_what_the_labeled_class_lacks(epsilon):
    x, labels = problem()
    weights = [0.5, 1.0, 2.0]
    total = count = 0.0
    for b in range(2):
        for c in range(3):
            for p, g in zip(*voxels(x, labels, b, c), strict=True):
                total += weights[c] * g * (-math.log(p) + epsilon * (1 - p))
                count += weights[c] * g
    loss = Poly1Loss(epsilon=epsilon, weight=weights)
    assert loss(x, labels).item() == pytest.approx(total / count, rel=1e-9)
    assert Poly1Loss(epsilon=0)(x, labels).item() == pytest.approx(CrossEntropyLoss()(x, labels).item())


def test_poly1_of_regions_that_overlap():
    x, _ = problem()
    g = torch.randint(0, 2, x.shape)
    total = 0.0
    for p, right in zip(x.sigmoid().flatten().tolist(), g.flatten().tolist(), strict=True):
        certainty = p if right else 1 - p
        total += -math.log(certainty) + 2 * (1 - certainty)
    assert Poly1Loss(sigmoid=True, epsilon=2.0)(x, g).item() == pytest.approx(total / g.numel(), rel=1e-9)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_top_k_is_the_mean_of_the_hardest_voxels(sigmoid):
    x, labels = problem()
    dense = torch.cat([labels == c for c in range(3)], 1).double()
    target = dense if sigmoid else labels
    whole = CrossEntropyLoss(sigmoid=sigmoid, reduction="none")(x, target).flatten()
    hardest = sorted(whole.tolist())[-round(0.1 * len(whole)) :]
    loss = CrossEntropyLoss(sigmoid=sigmoid, top_k=0.1)
    assert loss(x, target).item() == pytest.approx(sum(hardest) / len(hardest), rel=1e-9)
    every = CrossEntropyLoss(sigmoid=sigmoid, top_k=1.0)(x, target)
    torch.testing.assert_close(every, CrossEntropyLoss(sigmoid=sigmoid)(x, target))


def test_top_k_counts_voxels_that_count_and_joins_a_compound():
    x, labels = problem()
    labels[:, :, :2] = 2
    loss = CrossEntropyLoss(top_k=0.5, ignore_index=2)
    kept = CrossEntropyLoss(reduction="none", ignore_index=2)(x, labels)[labels[:, 0] != 2]
    expected = kept.sort(descending=True).values[: round(0.5 * len(kept))].mean()
    torch.testing.assert_close(loss(x, labels), expected)
    compound = CompoundLoss([DiceLoss(softmax=True), loss], [1.0, 1.0])
    torch.testing.assert_close(compound(x, labels), DiceLoss(softmax=True)(x, labels) + expected)


FLAGS = {"softmax": True, "to_onehot_y": True}


@pytest.mark.parametrize(("ours", "monai"), [
    *((GeneralizedDiceLoss(w_type=w, **FLAGS), theirs.GeneralizedDiceLoss(w_type=w, **FLAGS))
      for w in ("square", "simple", "uniform")),
    (GeneralizedDiceLoss(batch=True, include_background=False, **FLAGS),
     theirs.GeneralizedDiceLoss(batch=True, include_background=False, **FLAGS)),
    (JaccardLoss(**FLAGS), theirs.DiceLoss(jaccard=True, **FLAGS)),
    *([(MCCLoss(**FLAGS), theirs.MCCLoss(**FLAGS)), (MCCLoss(batch=True, include_background=False, **FLAGS),
        theirs.MCCLoss(batch=True, include_background=False, **FLAGS))] if hasattr(theirs, "MCCLoss") else []),
], ids=lambda loss: type(loss).__module__.split(".")[0] + type(loss).__name__)  # fmt: skip
def test_value_and_gradient_are_those_of_monai(ours, monai):
    x, labels = problem()
    results = []
    for loss in (ours, monai):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, labels)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["jaccard", "generalized_dice", "log_cosh_dice", "mcc", "poly1", "l1_ace"])
def test_absent_and_full_classes_are_finite(name):
    x = 3 * torch.randn(2, 3, *SHAPE)
    for labels in (torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)):
        leaf = x.clone().requires_grad_()
        value = get_loss(name)(leaf, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and gradient.isfinite().all()


def test_a_perfect_prediction_costs_nothing():
    labels = torch.randint(0, 3, (2, *SHAPE))
    x = 200.0 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    for name in ("jaccard", "generalized_dice", "log_cosh_dice", "mcc", "poly1", "l1_ace"):
        assert abs(get_loss(name)(x, labels).item()) < 1e-5, name


def test_mcc_is_the_same_with_foreground_and_background_exchanged():
    x, labels = problem(2)
    loss = MCCLoss(softmax=True, reduction="none")
    values = loss(x, labels)
    torch.testing.assert_close(values[:, 0], values[:, 1])
