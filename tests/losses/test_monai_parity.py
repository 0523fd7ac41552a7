# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Drop-in: the same value and gradient as MONAI's class, over shapes, classes, flags and types, where MONAI is right.

Where it is not, ``test_monai_bugs.py`` shows both numbers.
"""

from __future__ import annotations

import warnings

import monai.losses as theirs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.losses.focal_loss import sigmoid_focal_loss, softmax_focal_loss

import monai_losses_ext as ours

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
SHAPES = st.sampled_from([(1, 9), (2, 5, 4), (3, 3, 4, 5), (2, 4, 3, 2)])  # B *S
ACTIVATIONS = st.sampled_from(["softmax", "sigmoid", "none", "other_act"])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def batch(shape, num_classes, kind, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[0], num_classes, *shape[1:], generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(2, num_classes), (shape[0], 1, *shape[1:]), generator=generator)
    if kind == "soft":
        target = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    elif num_classes == 1 or kind == "index":
        target = labels if num_classes > 1 else labels.double()
    else:
        target = torch.cat([labels == c for c in range(num_classes)], 1).double()
    return x.to(dtype), target if kind == "index" and num_classes > 1 else target.to(dtype)


def with_unlabeled(target, num_classes, label):
    """Give every third voxel no label: ``label`` in an index target, no class in a one-hot one."""
    unlabeled = (torch.arange(target[:, :1].numel()) % 3 == 0).view(target[:, :1].shape)
    one_hot = target.shape[1] == num_classes > 1
    return target.masked_fill(unlabeled, 0 if one_hot else label)


def assert_same(mine, other, x, target, tolerance=0.0):
    tolerance = max(tolerance, TOLERANCE[x.dtype])
    results = []
    for loss in (mine, other):
        leaf = x.detach().clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(leaf, target)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        results.append((value.detach().double(), gradient.double()))
    (value, gradient), (expected, expected_gradient) = results
    assert value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    assert (gradient - expected_gradient).norm() <= tolerance * max(1.0, expected_gradient.norm().item())


def flags_of(activation):
    return (
        {"other_act": torch.tanh} if activation == "other_act" else {} if activation == "none" else {activation: True}
    )


@st.composite
def overlap_cases(draw, ignoring=False):
    num_classes = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["index", "one_hot", "soft"]))
    flags = flags_of(draw(ACTIVATIONS))
    flags |= {name: draw(st.booleans()) for name in ("include_background", "batch")}
    flags |= {"reduction": draw(REDUCTIONS), "to_onehot_y": kind == "index" and num_classes > 1}
    flags |= {"smooth_nr": draw(st.sampled_from([0.0, 1e-5, 1.0])), "smooth_dr": draw(st.sampled_from([1e-5, 1.0]))}
    # MONAI takes norms, which agree with sums for probabilities only
    gives_probabilities = "sigmoid" in flags or ("softmax" in flags and num_classes > 1)
    flags["soft_label"] = draw(st.booleans()) and gives_probabilities
    # Values that are no probabilities may sum up to almost nothing, where float32 has no digits left.
    dtype = draw(st.sampled_from([*TOLERANCE] if gives_probabilities else [torch.float64]))
    x, target = batch(draw(SHAPES), num_classes, kind, draw(st.integers(0, 99)), dtype)
    if ignoring and kind != "soft":
        # With a sigmoid a one-hot voxel without a class is background, which MONAI leaves out.
        is_background = kind == "one_hot" and num_classes > 1 and "sigmoid" in flags
        flags["ignore_index"] = draw(st.sampled_from([None, 1] if is_background else [None, 1, 255]))
        target = with_unlabeled(target, num_classes, 255) if flags["ignore_index"] == 255 else target
    return (x, target), flags


@QUICK
@given(overlap_cases(ignoring=True), st.booleans(), st.booleans(), st.booleans())
def test_dice(case, squared, jaccard, weighted):
    (x, target), flags = case
    flags |= {"squared_pred": squared, "jaccard": jaccard}
    counted = x.shape[1] if flags["include_background"] or x.shape[1] == 1 else x.shape[1] - 1
    flags["weight"] = [0.5 + c for c in range(counted)] if weighted else None
    # The root of a sum of squares, and its square again, which MONAI takes of its float32 one-hot encoding.
    tolerance = 1e-7 if squared and target.dtype == torch.int64 else 0.0
    assert_same(ours.DiceLoss(**flags), theirs.DiceLoss(**flags), x, target, tolerance)


@QUICK
@given(overlap_cases(ignoring=True), st.floats(0, 2), st.floats(0.1, 2))
def test_tversky(case, alpha, beta):
    (x, target), flags = case
    flags |= {"alpha": alpha, "beta": beta}
    assert_same(ours.TverskyLoss(**flags), theirs.TverskyLoss(**flags), x, target)


@QUICK
@given(
    shape=SHAPES,
    num_classes=st.integers(2, 4),
    kind=st.sampled_from(["index", "one_hot", "soft"]),
    use_softmax=st.booleans(),
    background=st.booleans(),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
    alpha=st.sampled_from([None, 0.25, 0.8]),
    weighted=st.booleans(),
    reduction=REDUCTIONS,
    seed=st.integers(0, 99),
)
def test_focal(shape, num_classes, kind, use_softmax, background, gamma, alpha, weighted, reduction, seed):
    background = background or use_softmax  # without it MONAI's softmax is wrong
    x, target = batch(shape, num_classes, kind, seed)
    counted = num_classes if background else num_classes - 1
    flags = {"include_background": background, "gamma": gamma, "alpha": alpha, "reduction": reduction}
    flags |= {"use_softmax": use_softmax, "to_onehot_y": kind == "index"}
    flags["weight"] = [0.5 + c for c in range(counted)] if weighted and counted > 1 else None
    # MONAI computes its focal loss in float32 whatever the input.
    assert_same(ours.FocalLoss(**flags), theirs.FocalLoss(**flags), x, target, tolerance=3e-6)


@QUICK
@given(
    gamma=st.floats(0, 4), alpha=st.sampled_from([None, 0.0, 0.25, 1.0]), soft=st.booleans(), seed=st.integers(0, 99)
)
def test_focal_in_float64(gamma, alpha, soft, seed):
    x, target = batch((2, 4, 5), 3, "soft" if soft else "one_hot", seed)
    for use_softmax, function in ((True, softmax_focal_loss), (False, sigmoid_focal_loss)):
        mine = ours.FocalLoss(gamma=gamma, alpha=alpha, use_softmax=use_softmax)
        assert_same(mine, lambda x, t, f=function: f(x, t, gamma, alpha).mean(), x, target)


@QUICK
@given(overlap_cases(), st.booleans(), st.sampled_from([0.0, 0.1]), st.floats(0, 2), st.floats(0, 2))
def test_dice_ce(case, weighted, smoothing, lambda_dice, lambda_ce):
    (x, target), flags = case
    flags = {key: value for key, value in flags.items() if key != "soft_label"}
    flags["reduction"] = "mean" if flags["reduction"] == "none" else flags["reduction"]
    flags |= {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce, "label_smoothing": smoothing}
    weight = torch.tensor([0.5 + c for c in range(x.shape[1])], dtype=torch.float64) if weighted else None
    if x.shape[1] == 1:
        flags["include_background"] = True  # MONAI cuts the only weight off here
    assert_same(ours.DiceCELoss(weight=weight, **flags), theirs.DiceCELoss(weight=weight, **flags), x, target)


@QUICK
@given(overlap_cases(), st.sampled_from([None, 0.3]), st.sampled_from([0.0, 2.0]))
def test_dice_focal(case, alpha, gamma):
    (x, target), flags = case
    if flags.pop("softmax", False) or (x.shape[1] == 1 and target.dtype == torch.int64):
        flags["sigmoid"] = True  # with softmax MONAI's focal part is wrong
    flags = {key: value for key, value in flags.items() if key != "soft_label"}
    flags |= {"alpha": alpha, "gamma": gamma}
    assert_same(ours.DiceFocalLoss(**flags), theirs.DiceFocalLoss(**flags), x, target, tolerance=3e-6)


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "DiceCELoss"])
def test_float32(name):
    x, target = batch((2, 12, 11, 10), 3, "index", 0, torch.float32)
    flags = {"softmax": True, "to_onehot_y": True}
    assert_same(getattr(ours, name)(**flags), getattr(theirs, name)(**flags), x, target, tolerance=1e-5)


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "FocalLoss", "DiceCELoss", "DiceFocalLoss"])
def test_the_same_positional_arguments(name):
    import inspect

    mine, other = (list(inspect.signature(getattr(module, name)).parameters) for module in (ours, theirs))
    assert mine[: len(other)] == other


@pytest.mark.parametrize(
    ("name", "flag", "value"),
    [
        ("DiceLoss", "softmax", True),
        ("DiceLoss", "to_onehot_y", True),
        ("DiceLoss", "include_background", False),
        ("FocalLoss", "include_background", False),
    ],
)
def test_warns_where_monai_warns(name, flag, value):
    for module in (ours, theirs):
        with pytest.warns(UserWarning, match=f"{flag}={value}` ignored"):
            getattr(module, name)(**{flag: value})(torch.rand(1, 1, 4), torch.ones(1, 1, 4))


def test_errors_that_monai_users_catch():
    for loss in (ours.DiceLoss(), ours.TverskyLoss(), ours.FocalLoss(), ours.DiceCELoss(), ours.DiceFocalLoss()):
        with pytest.raises(AssertionError):
            loss(torch.ones(1, 2, 3), torch.ones(4, 5, 6))
        with pytest.raises(ValueError, match="target"):
            loss(torch.ones(1, 2, 3), torch.ones(4, 5, 6))
    with pytest.raises(TypeError):
        ours.DiceLoss(other_act="tanh")
    with pytest.raises(ValueError, match="at most one"):
        ours.DiceLoss(sigmoid=True, softmax=True)
    for reduction in ("unknown", None):
        with pytest.raises(ValueError, match="reduction"):
            ours.DiceLoss(reduction=reduction)
