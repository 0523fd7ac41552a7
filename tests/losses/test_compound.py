# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A compound adds up what belongs together, and refuses the rest: values of other axes, what is no list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import monai_losses_ext as ours
from monai_losses_ext import CompoundLoss

NONE = {"reduction": "none"}
# As many samples as classes as voxels per axis: lengths alone do not tell one axis from another.
LENGTHS = pytest.mark.parametrize("shape", [(2, 2, 2, 2), (2, 2, 8, 8), (3, 3, 3)])


def problem(shape):
    return torch.randn(shape, dtype=torch.float64), torch.randint(0, shape[1], (shape[0], *shape[2:]))


@LENGTHS
def test_values_per_sample_class_and_voxel_are_added_up_where_they_belong(shape):
    x, labels = problem(shape)
    dice, of_batch = (ours.DiceLoss(softmax=True, batch=batch, **NONE) for batch in (False, True))
    focal, binary = ours.FocalLoss(use_softmax=True, **NONE), ours.CrossEntropyLoss(sigmoid=True, **NONE)
    number = ours.TverskyLoss(softmax=True)
    parts, weights = [dice, of_batch, focal, binary, number], [0.1, 0.2, 0.3, 0.4, 0.5]
    for order in (list(range(5)), [4, 3, 2, 1, 0], [1, 4, 0, 3, 2]):
        compound = CompoundLoss([parts[i] for i in order], [weights[i] for i in order], mixed_activations=True)
        total = compound(x, labels)
        assert total.shape == x.shape
        for b in range(shape[0]):
            for c in range(shape[1]):
                expected = 0.1 * dice(x, labels)[b, c] + 0.2 * of_batch(x, labels)[c]
                expected = expected + 0.3 * focal(x, labels)[b, c] + 0.4 * binary(x, labels)[b, c]
                torch.testing.assert_close(total[b, c], expected + 0.5 * number(x, labels))


@LENGTHS
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ours.CrossEntropyLoss(**NONE), nn.CrossEntropyLoss(**NONE)),
        (ours.BoundaryLoss(softmax=True, spacing=1.0, **NONE), ours.TverskyLoss(softmax=True, **NONE)),
    ],
    ids=["voxels", "samples and classes"],
)
def test_values_of_one_shape_are_added_up(shape, one, other):
    x, labels = problem(shape)
    total = CompoundLoss([one, other], [0.3, 0.7])(x, labels)
    torch.testing.assert_close(total, 0.3 * one(x, labels) + 0.7 * other(x, labels))


@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (2, 2, 8, 8)])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ours.CrossEntropyLoss(**NONE), ours.FocalLoss(use_softmax=True, **NONE)),
        (nn.CrossEntropyLoss(**NONE), ours.FocalLoss(use_softmax=True, **NONE)),
        (ours.CrossEntropyLoss(**NONE), ours.DiceLoss(softmax=True, **NONE)),
        (ours.CrossEntropyLoss(**NONE), ours.DiceLoss(softmax=True, batch=True, **NONE)),
        (ours.CrossEntropyLoss(**NONE), ours.TverskyLoss(softmax=True, **NONE)),
        (ours.BoundaryLoss(softmax=True, spacing=1.0, **NONE), ours.DiceLoss(softmax=True, **NONE)),
        (ours.TverskyLoss(softmax=True, batch=True, **NONE), ours.FocalLoss(use_softmax=True, **NONE)),
        (ours.DiceLoss(softmax=True, include_background=False, **NONE), ours.FocalLoss(use_softmax=True, **NONE)),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_values_of_other_axes_are_refused_whatever_their_lengths(shape, one, other):
    x, labels = problem(shape)
    for parts in ([one, other], [other, one]):
        with pytest.raises(ValueError, match=r"^losses: values of reduction='none' must have the same axes") as caught:
            CompoundLoss(parts, names=["a", "b"])(x, labels)
        shapes = dict(zip("ab", [list(part(x, labels).shape) for part in parts], strict=True))
        assert str(caught.value).endswith(f"; got {shapes}.")


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor, lambda w: np.array(w[::-1])[::-1]])
def test_weights_come_in_any_list(form):
    loss = CompoundLoss([ours.DiceLoss(sigmoid=True), ours.FocalLoss()], weights=form([0.75, 0.25]))
    assert loss.get_weights() == {"dice": 0.75, "focal": 0.25}
    with pytest.raises(ValueError, match=r"^weights: focal: must be a number of at least 0; got -0.25\.$"):
        CompoundLoss([ours.DiceLoss(sigmoid=True), ours.FocalLoss()], weights=form([0.75, -0.25]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ours.DiceLoss(),), r"losses: must be a list of losses; got DiceLoss\(\)"),
        (([ours.DiceLoss()], 1.0), r"weights: must hold one entry per loss \(1\); got 1.0"),
        (([ours.DiceLoss()], torch.tensor(1.0)), r"weights: must hold one entry per loss \(1\); got tensor\(1.\)"),
        (([ours.DiceLoss()], {"dice": 1.0}), r"weights: must hold one entry per loss \(1\); got {'dice': 1.0}"),
        (([ours.DiceLoss()] * 4, None, "dice"), r"names: must hold one entry per loss \(4\); got 'dice'"),
    ],
)
def test_what_is_no_list_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        CompoundLoss(*arguments)


@pytest.mark.parametrize(("weight", "expected"), [(70000.0, 35000.0), (2e-8, 0.0), (0.3, 0.15)])
def test_a_fixed_weight_is_not_rounded_to_half_precision(weight, expected):
    class Half(nn.Module):
        def forward(self, input, target):
            return torch.tensor(0.5, dtype=torch.float16)

    total = CompoundLoss([Half(), Half()], [weight, 0.0])(torch.zeros(1, 2, 4), torch.zeros(1, 4))
    assert total.dtype == torch.float16 and total == torch.tensor(expected, dtype=torch.float16)


def test_the_total_has_the_dtype_that_holds_all_terms():
    class Double(nn.Module):
        def forward(self, input, target):
            return torch.tensor(1.0, dtype=torch.float64)

    per_class = ours.DiceLoss(softmax=True, reduction="none")
    total = CompoundLoss([per_class, Double()])(torch.zeros(1, 2, 4), torch.zeros(1, 4))
    assert total.dtype == torch.float64 and total.shape == (1, 2, 1)
