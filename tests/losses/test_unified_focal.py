# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The unified focal loss beside loops written from its paper, its special cases, and MONAI's parts of it."""

from __future__ import annotations

import math

import monai.losses as theirs
import pytest
import torch
from torch.nn.functional import one_hot

from monai_losses_ext import FocalLoss, TverskyLoss, get_loss
from monai_losses_ext.losses import UnifiedFocalLoss

VARIANTS = ["asymmetric", "symmetric"]
SHAPE = (4, 5)
UNSMOOTHED = {"smooth_nr": 0.0, "smooth_dr": 0.0}


def problem(num_classes=3, batch=2):
    x = 2 * torch.randn(batch, num_classes, *SHAPE, dtype=torch.float64)
    return x, torch.randint(0, num_classes, (batch, *SHAPE))


def tversky(p, g, delta):
    tp = fp = fn = 0.0
    for pv, gv in zip(p, g, strict=True):
        tp, fp, fn = tp + pv * gv, fp + pv * (1 - gv), fn + (1 - pv) * gv
    return 1 - tp / (tp + delta * fn + (1 - delta) * fp)


def parts(classes, variant, delta, gamma):
    """Return the summed focal part of a sample, and the region part of each class, the common one first.

    ``classes`` holds probabilities and references of the voxels of each class.
    """
    focal, regional = 0.0, []
    for c, (p, g) in enumerate(classes):
        focused = variant == "symmetric" or c == 0
        for pv, gv in zip(p, g, strict=True):
            weight = 1 - delta if c == 0 else delta
            focal -= weight * ((1 - pv) ** gamma if focused else 1) * gv * math.log(pv)
        enhanced = variant == "symmetric" or c > 0
        regional.append(tversky(p, g, delta) ** (1 - gamma if enhanced else 1))
    return focal, regional


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("share", "delta", "gamma"), [(0.5, 0.6, 0.5), (0.2, 0.7, 0.1), (0.9, 0.3, 0.9)])
def test_softmax_is_the_papers_loop(variant, share, delta, gamma):
    x, labels = problem()
    focal, regional = 0.0, []
    for b in range(2):
        classes = [
            (x.softmax(1)[b, c].flatten().tolist(), (labels[b] == c).double().flatten().tolist()) for c in range(3)
        ]
        of_sample = parts(classes, variant, delta, gamma)
        focal, regional = focal + of_sample[0], regional + of_sample[1]
    expected = share * focal / labels.numel() + (1 - share) * sum(regional) / len(regional)
    loss = UnifiedFocalLoss(variant=variant, focal_share=share, delta=delta, gamma=gamma, **UNSMOOTHED)
    assert loss(x, labels).item() == pytest.approx(expected, rel=1e-12)
    assert loss(x.float(), labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_channel_of_a_sigmoid_is_a_problem_of_two_classes(variant):
    x, _ = problem()
    masks = torch.randint(0, 2, x.shape)
    focal, regional = 0.0, []
    for b in range(2):
        for c in range(3):
            p, g = x.sigmoid()[b, c].flatten().tolist(), masks[b, c].flatten().tolist()
            negative = [1 - v for v in p], [1 - v for v in g]
            of_channel = parts([negative, (p, g)], variant, 0.6, 0.4)
            focal, regional = focal + of_channel[0], regional + of_channel[1]
    expected = (focal / masks.numel() + sum(regional) / len(regional)) / 2
    loss = UnifiedFocalLoss(sigmoid=True, variant=variant, gamma=0.4, **UNSMOOTHED)
    assert loss(x, masks).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_channel_is_two_with_a_logit_of_zero(variant):
    x, labels = problem(2)
    difference = x[:, 1:] - x[:, :1]
    one, two = UnifiedFocalLoss(sigmoid=True, variant=variant), UnifiedFocalLoss(variant=variant)
    torch.testing.assert_close(one(difference, labels[:, None]), two(x, labels))


def test_special_cases_are_its_parts():
    x, labels = problem()
    region = UnifiedFocalLoss(focal_share=0, gamma=0, delta=0.7)(x, labels)
    torch.testing.assert_close(region, TverskyLoss(softmax=True, alpha=0.3, beta=0.7)(x, labels))
    focal = UnifiedFocalLoss(variant="symmetric", focal_share=1, gamma=0.8, delta=0.5)(x, labels)
    torch.testing.assert_close(focal, 3 / 2 * FocalLoss(use_softmax=True, gamma=0.8)(x, labels))


def test_gamma_takes_from_easy_background_and_leaves_rare_voxels():
    labels = torch.tensor([[0, 0, 0, 1]])
    for right, is_less in ((0, True), (1, False)):  # the voxels of one class are nearly right
        x = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            x[0, right] = torch.where(labels[0] == right, 3.0, 0.0)
        gradients = []
        for gamma in (0.0, 0.6):
            value = UnifiedFocalLoss(focal_share=1, gamma=gamma)(x, labels)
            gradients.append(torch.autograd.grad(value, x)[0][0, right, labels[0] == right].abs())
        plain, focused = gradients
        assert (focused < 0.5 * plain).all() if is_less else torch.equal(focused, plain)


def test_a_rare_class_nearly_found_pulls_harder():
    labels = torch.tensor([[0, 0, 0, 1, 1, 1]])
    x = 4.0 * one_hot(labels, 2).movedim(-1, 1).double()
    slopes = []
    for gamma in (0.0, 0.5):
        leaf = x.clone().requires_grad_()
        UnifiedFocalLoss(focal_share=0, gamma=gamma)(leaf, labels).backward()
        slopes.append(leaf.grad[:, 1, 3:].abs().sum())
    assert slopes[1] > 2 * slopes[0]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_class_weights_and_cases_annotated_in_part(sigmoid):
    x, labels = problem()
    target = torch.stack([labels == c for c in range(3)], 1).double() if sigmoid else labels
    loss = UnifiedFocalLoss(sigmoid=sigmoid, weight=[1.0, 0.0, 3.0])
    leaf = x.clone().requires_grad_()
    loss(leaf, target).backward()
    assert (leaf.grad[:, 1] == 0).all() == sigmoid
    doubled = UnifiedFocalLoss(sigmoid=sigmoid, weight=2.0)(x, target)
    torch.testing.assert_close(doubled, 2 * UnifiedFocalLoss(sigmoid=sigmoid)(x, target))
    partial = UnifiedFocalLoss(sigmoid=sigmoid)(x, {"label": target, "annotated": torch.tensor([[1, 0, 1]] * 2)})
    kept = x[:, [0, 2]] if sigmoid else torch.stack([x[:, :2].logsumexp(1), x[:, 2]], 1)
    rest = target[:, [0, 2]] if sigmoid else (labels == 2).long()
    torch.testing.assert_close(partial, UnifiedFocalLoss(sigmoid=sigmoid)(kept, rest))


def test_the_parts_are_monais_on_probabilities():
    x, labels = problem(2)
    p, dense = x.softmax(1), one_hot(labels, 2).movedim(-1, 1)
    focal = theirs.unified_focal_loss.AsymmetricFocalLoss(delta=0.6, gamma=0.5)(p, dense)
    ours = UnifiedFocalLoss(focal_share=1)(x, labels)
    torch.testing.assert_close(ours, 2 * focal, rtol=1e-6, atol=0)  # its mean is over the two classes too
    region = theirs.unified_focal_loss.AsymmetricFocalTverskyLoss(delta=0.6, gamma=0.5)(p, dense)
    torch.testing.assert_close(UnifiedFocalLoss(focal_share=0)(x, labels), region, rtol=1e-5, atol=0)


def test_monais_takes_no_sigmoid_and_reads_two_classes():
    """Its docstring promises a sigmoid of the logits."""
    x, labels = problem(2)
    loss = theirs.AsymmetricUnifiedFocalLoss(to_onehot_y=True)
    leaf = x.clone().requires_grad_()
    loss(leaf, labels[:, None]).backward()
    outside = (x < 0) | (x > 1)
    assert outside.any() and not leaf.grad[outside].any()
    leaf = x.clone().requires_grad_()
    UnifiedFocalLoss()(leaf, labels).backward()
    assert (leaf.grad != 0).all()

    x, labels = problem(3)
    dense = one_hot(labels, 3).movedim(-1, 1).double()
    dense[:, :, 0, 0] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    p = x.softmax(1).requires_grad_()
    theirs.AsymmetricUnifiedFocalLoss()(p, dense).backward()
    assert not p.grad[:, 2].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_absent_and_full_classes_are_finite_and_a_perfect_prediction_costs_nothing(variant, activation):
    x = 3 * torch.randn(2, 3, *SHAPE)
    loss = get_loss({"type": "unified_focal", "variant": variant}, **{activation: True})
    for labels in (torch.zeros(2, *SHAPE).long(), torch.ones(2, *SHAPE).long()):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and gradient.isfinite().all()
        perfect = 200.0 * one_hot(labels, 3).movedim(-1, 1) - 100
        assert abs(loss(perfect, labels).item()) < 1e-5


def test_exponents_at_their_ends():
    x, labels = problem()
    for gamma in (0.0, 1.0):
        leaf = x.clone().requires_grad_()
        UnifiedFocalLoss(gamma=gamma)(leaf, labels).backward()
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    with pytest.raises(ValueError, match=r"^gamma: must be a number between 0 and 1; got 1.5\.$"):
        UnifiedFocalLoss(gamma=1.5)
