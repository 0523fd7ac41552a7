# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Each loss against its paper's loop, and the property that sets it apart."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import monai_losses_ext as ours
from monai_losses_ext.losses import base


@pytest.fixture
def problem():
    return torch.randn(2, 3, 12, dtype=torch.float64), torch.randint(0, 3, (2, 12))


def per_class(x, labels, function, ones=None):
    """Mean over samples and classes of ``function(p, g, m)`` on softmax probabilities."""
    p = oracles.probabilities(x.tolist(), "softmax")
    m = [1.0] * labels.shape[1]
    values = [
        function(p[b][c], [float(label == c) for label in labels[b]], m)
        for b in range(len(p))
        for c in range(x.shape[1])
    ]
    return sum(values) / len(values)


def test_dice_and_tversky_equal_their_papers(problem):
    x, labels = problem
    dice = per_class(x, labels, oracles.dice)
    assert ours.DiceLoss(softmax=True)(x, labels).item() == pytest.approx(dice, abs=1e-12)
    tversky = per_class(x, labels, lambda p, g, m: oracles.tversky(p, g, m, 0.3, 0.7))
    assert ours.TverskyLoss(softmax=True, alpha=0.3, beta=0.7)(x, labels).item() == pytest.approx(tversky, abs=1e-12)
    focal = per_class(x, labels, lambda p, g, m: oracles.tversky(p, g, m, 0.3, 0.7) ** 0.75)
    assert ours.FocalTverskyLoss(softmax=True)(x, labels).item() == pytest.approx(focal, abs=1e-12)


def test_cross_entropy_equals_its_formula_and_torch(problem):
    x, labels = problem
    weight = [0.2, 1.0, 3.0]
    p = oracles.probabilities(x[:1].tolist(), "softmax")[0]
    mine = ours.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    assert mine(x[:1], labels[:1]).item() == pytest.approx(
        oracles.cross_entropy(p, labels[0].tolist(), weight, 0.1), abs=1e-12
    )
    theirs = nn.CrossEntropyLoss(weight=torch.tensor(weight, dtype=torch.float64), label_smoothing=0.1)
    assert mine(x, labels).item() == pytest.approx(theirs(x, labels).item(), abs=1e-9)
    dense = F.one_hot(labels, 3).movedim(-1, 1).double()
    assert mine(x, dense).item() == pytest.approx(theirs(x, dense).item(), abs=1e-9)
    binary = ours.CrossEntropyLoss(sigmoid=True, weight=weight)(x, dense)
    pos_weight = torch.tensor(weight, dtype=torch.float64)[:, None]
    assert binary.item() == pytest.approx(F.binary_cross_entropy_with_logits(x, dense, pos_weight=pos_weight).item())


def test_cross_entropy_map_averages_to_the_mean(problem):
    x, labels = problem
    for sigmoid in (False, True):
        voxels = ours.CrossEntropyLoss(sigmoid=sigmoid, reduction="none")(x, labels)
        assert voxels.mean().item() == pytest.approx(ours.CrossEntropyLoss(sigmoid=sigmoid)(x, labels).item())
    ignoring = ours.CrossEntropyLoss(reduction="none", ignore_index=0)(x, labels)
    assert not ignoring[labels == 0].any() and (ignoring[labels != 0] > 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, 2.0, [0.2, 1.0, 3.0]])
def test_cross_entropy_map_is_torchs(problem, smoothing, weight):
    x, labels = problem
    factors = None if weight is None else torch.tensor(weight, dtype=torch.float64).expand(3)
    mine = ours.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, reduction="none")
    theirs = nn.CrossEntropyLoss(weight=factors, label_smoothing=smoothing, reduction="none")
    soft = torch.rand_like(x).softmax(1)
    for target, own in ((labels, labels), (labels, labels[:, None]), (soft, soft)):
        torch.testing.assert_close(mine(x, own), theirs(x, target))
    if not smoothing:
        binary = ours.CrossEntropyLoss(sigmoid=True, weight=weight, reduction="none")(x, soft)
        pos_weight = None if weight is None else factors[:, None]
        torch.testing.assert_close(
            binary, F.binary_cross_entropy_with_logits(x, soft, pos_weight=pos_weight, reduction="none")
        )


def test_a_class_that_is_ruled_out_costs_nothing_where_it_is_not():
    x = torch.tensor([1.0, 0.0, -torch.inf]).view(1, 3, 1).repeat(2, 1, 4).requires_grad_()
    labels = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    dense = F.one_hot(labels, 3).movedim(-1, 1).float()
    for target in (labels, dense):
        voxels = ours.CrossEntropyLoss(reduction="none")(x, target)
        torch.testing.assert_close(voxels, F.cross_entropy(x, labels, reduction="none"))
        (gradient,) = torch.autograd.grad(voxels.sum(), x)
        torch.testing.assert_close(gradient, x.softmax(1) - dense)
        assert voxels.mean().item() == pytest.approx(ours.CrossEntropyLoss()(x, target).item())


def test_focal_without_gamma_is_cross_entropy(problem):
    x, labels = problem
    focal = ours.FocalLoss(gamma=0.0, use_softmax=True)(x, labels)
    assert 3 * focal.item() == pytest.approx(ours.CrossEntropyLoss()(x, labels).item())  # its mean counts classes too
    binary = ours.FocalLoss(gamma=0.0)(x, labels)
    assert binary.item() == pytest.approx(ours.CrossEntropyLoss(sigmoid=True)(x, labels).item())


def test_focal_balances_foreground_and_background(problem):
    x, labels = problem
    voxels = ours.FocalLoss(use_softmax=True, reduction="none")(x, labels)
    weighted = ours.FocalLoss(use_softmax=True, reduction="none", alpha=0.25)(x, labels)
    torch.testing.assert_close(weighted[:, 0], 0.75 * voxels[:, 0])
    torch.testing.assert_close(weighted[:, 1:], 0.25 * voxels[:, 1:])
    alphas = torch.tensor([0.1, 0.5, 2.0])
    listed = ours.FocalLoss(use_softmax=True, reduction="none", alpha=alphas.tolist())(x, labels)
    torch.testing.assert_close(listed, alphas[:, None].double() * voxels)


@pytest.mark.parametrize("form", [np.array, lambda values: np.array(values, np.float32), torch.tensor, tuple])
@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda values: ours.DiceLoss(softmax=True, weight=values), "weight"),
        (lambda values: ours.CrossEntropyLoss(weight=values), "weight"),
        (lambda values: ours.FocalLoss(alpha=values), "alpha"),
        (lambda values: ours.TverskyLoss(softmax=True, alpha=values), "alpha"),
        (lambda values: ours.DiceFocalLoss(softmax=True, alpha=values, weight=values), "weight"),
        (lambda values: ours.BoundaryLoss(softmax=True, spacing=1.0, weight=values), "weight"),
    ],
)
def test_values_per_class_come_in_any_list(problem, build, argument, form):
    x, labels = problem
    values = [0.25, 0.5, 0.75]
    expected = build(values)(x, labels)
    assert torch.equal(build(form(values))(x, labels), expected)
    if form is np.array:
        assert torch.equal(build(np.array(values[::-1])[::-1])(x, labels), expected)
        with pytest.raises(ValueError, match=rf"^{argument}: must be .*; got array") as caught:
            build(np.array([0.25, -0.5, 0.75]))
        assert "\n" not in str(caught.value)


def test_tversky_tells_misses_from_false_alarms():
    truth, miss, alarm = torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), None
    alarm = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])
    light, heavy = ours.TverskyLoss(alpha=0.3, beta=0.3), ours.TverskyLoss(alpha=0.3, beta=0.7)
    assert heavy(miss, truth) > light(miss, truth)
    assert heavy(alarm, truth).item() == pytest.approx(light(alarm, truth).item())
    swapped = ours.TverskyLoss(alpha=0.7, beta=0.3)
    assert swapped(alarm, truth) > heavy(alarm, truth) and swapped(miss, truth) < heavy(miss, truth)


def test_tversky_special_cases(problem):
    x, labels = problem
    half = ours.TverskyLoss(softmax=True, smooth_nr=0.5e-5, smooth_dr=0.5e-5)(x, labels)
    assert half.item() == pytest.approx(ours.DiceLoss(softmax=True)(x, labels).item(), abs=1e-12)
    jaccard = ours.DiceLoss(softmax=True, jaccard=True, smooth_nr=2e-5, smooth_dr=2e-5)(x, labels)
    assert ours.TverskyLoss(softmax=True, alpha=1.0, beta=1.0)(x, labels).item() == pytest.approx(jaccard.item())
    plain = ours.TverskyLoss(softmax=True, alpha=0.3, beta=0.7)(x, labels)
    assert ours.FocalTverskyLoss(softmax=True, gamma=1.0)(x, labels).item() == pytest.approx(plain.item())
    listed = ours.TverskyLoss(softmax=True, alpha=[0.3] * 3, beta=[0.7] * 3)(x, labels)
    assert listed.item() == pytest.approx(plain.item())


def test_a_perfect_class_costs_nothing_whatever_the_exponent(problem):
    _, labels = problem
    logits = (60 * F.one_hot(labels, 3).movedim(-1, 1).float() - 30).requires_grad_()
    value = ours.FocalTverskyLoss(softmax=True, gamma=3.0)(logits, labels)
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


def test_a_soft_reference_can_be_met():
    soft = torch.rand(2, 3, 20, dtype=torch.float64)
    for loss in (ours.DiceLoss(soft_label=True), ours.TverskyLoss(soft_label=True)):
        assert loss(soft, soft).item() == pytest.approx(0, abs=1e-9)
    assert ours.DiceLoss()(soft, soft).item() > 0.1


def test_leaving_out_the_background_keeps_the_probabilities(problem):
    x, labels = problem
    values = ours.DiceLoss(softmax=True, reduction="none")(x, labels)
    without = ours.DiceLoss(softmax=True, reduction="none", include_background=False)(x, labels)
    torch.testing.assert_close(without, values[:, 1:])


def test_a_compound_is_the_weighted_sum_in_one_pass(problem, monkeypatch):
    x, labels = problem
    parts = [
        ours.DiceLoss(softmax=True),
        ours.FocalLoss(use_softmax=True),
        ours.CrossEntropyLoss(),
        ours.TverskyLoss(softmax=True),
    ]
    weights = [0.4, 0.3, 0.2, 0.0]
    calls = []
    monkeypatch.setattr(base, "compute", lambda *a, f=base.compute, **k: calls.append(a[2]) or f(*a, **k))
    compound = ours.CompoundLoss(parts, weights)
    total = compound(x, labels)
    assert len(calls) == 1
    expected = [part(x, labels).item() for part in parts]
    assert total.item() == pytest.approx(sum(w * value for w, value in zip(weights, expected, strict=True)))
    assert {name: value.item() for name, value in compound.last_terms.items()} == pytest.approx(
        dict(zip(["dice", "focal", "cross_entropy", "tversky"], expected, strict=True))
    )
    assert compound.get_weights() == {"dice": 0.4, "focal": 0.3, "cross_entropy": 0.2, "tversky": 0.0}


def test_a_compound_of_other_modules_and_activations(problem):
    x, labels = problem
    parts = [ours.DiceLoss(softmax=True), ours.DiceLoss(sigmoid=True), nn.CrossEntropyLoss()]
    compound = ours.CompoundLoss(parts, mixed_activations=True)
    expected = sum(part(x, labels).item() for part in parts) / 3
    assert compound(x, labels).item() == pytest.approx(expected)
    assert list(compound.get_weights()) == ["dice", "dice_2", "cross_entropy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one loss"),
        (([ours.DiceLoss()], [-1.0]), "weights: dice: must be a number of at least 0; got -1.0"),
        (([ours.DiceLoss()], [1.0, 2.0]), "one entry per loss"),
        (([ours.DiceCELoss()],), "do not nest"),
        (([ours.DiceLoss(), ours.FocalLoss()], None, ["a", "a"]), "must differ"),
    ],
)
def test_a_wrong_compound_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ours.CompoundLoss(*arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ours.FocalLoss(gamma=-1), "gamma: must be a number of at least 0; got -1"),
        (lambda: ours.FocalLoss(alpha=1.5), "alpha: must be a number between 0 and 1"),
        (lambda: ours.FocalLoss(alpha=[0.5, 1.5]), "between 0 and 1 for sigmoid"),
        (lambda: ours.FocalLoss(alpha=torch.tensor(3.0)), r"alpha: must lie between 0 and 1 .*; got tensor\(3.\)"),
        (
            lambda: ours.FocalLoss(use_softmax=True, alpha=torch.tensor(3.0)),
            r"alpha: must lie between 0 and 1 where it is one number; got tensor\(3.\)",
        ),
        (lambda: ours.DiceLoss(weight=[1, -1]), "weight"),
        (lambda: ours.DiceLoss(reduction="men"), "Did you mean 'mean'"),
        (lambda: ours.FocalTverskyLoss(gamma=0), "gamma: must be a number above 0"),
        (lambda: ours.CrossEntropyLoss(sigmoid=True, label_smoothing=0.1), "label_smoothing: must be 0 with sigmoid"),
        (lambda: ours.DiceLoss()([torch.zeros(1, 2, 4)], torch.zeros(1, 4)), "input: must be a tensor; got 'list'"),
        (lambda: ours.DiceLoss()(torch.zeros(4), torch.zeros(4)), r"input: must be \[B, C, \*S\]"),
        (lambda: ours.FocalLoss(reduction="none")(torch.zeros(4), torch.zeros(4)), r"input: must be \[B, C, \*S\]"),
        (lambda: ours.DiceLoss(softmax=True, weight=[1.0] * 5)(torch.zeros(1, 3, 4), torch.zeros(1, 4)), "3 for this"),
        (lambda: ours.FocalLoss(use_softmax=True)(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)), "no gradient"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_snippets_that_users_type():
    logits = torch.randn(2, 3, 128, 128, 128, requires_grad=True)
    target = torch.randint(0, 3, (2, 128, 128, 128))
    focal = ours.FocalLoss(alpha=0.25, gamma=2.0)
    focal(logits, target).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.any()
    probabilities, regions = torch.sigmoid(torch.randn(2, 3, 16, 16)), (torch.rand(2, 3, 16, 16) > 0.5).float()
    assert 0 < ours.TverskyLoss(alpha=0.3, beta=0.7)(probabilities, regions) < 1
    assert ours.CompoundLoss([ours.DiceLoss(sigmoid=True), focal]).get_weights() == {"dice": 0.5, "focal": 0.5}
