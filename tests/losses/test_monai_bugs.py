# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What docs/training/migration.md says of MONAI 1.6.1 is true: its number, and ours against the paper's loop."""

from __future__ import annotations

import monai.losses as theirs
import oracles
import pytest
import torch
from torch.nn.functional import one_hot

import monai_losses_ext as ours


@pytest.fixture
def problem():
    return torch.randn(1, 3, 20, dtype=torch.float64), torch.randint(0, 3, (1, 20))


def focal_oracle(x, labels, gamma, alphas):
    """Mean over voxels and the classes of ``alphas`` of the softmax focal loss."""
    p = oracles.probabilities(x.tolist(), "softmax")[0]
    ones = [1.0] * labels.shape[1]
    sums = [
        alpha * oracles.focal_softmax(p[c], [float(label == c) for label in labels[0]], ones, gamma)
        for c, alpha in alphas.items()
    ]
    return sum(sums) / (len(alphas) * labels.shape[1])


def test_background_is_dropped_before_the_softmax(problem):
    x, labels = problem
    flags = {"use_softmax": True, "include_background": False, "to_onehot_y": True}
    expected = focal_oracle(x, labels, 2.0, {1: 1.0, 2: 1.0})
    assert ours.FocalLoss(**flags)(x, labels[:, None]).item() == pytest.approx(expected, abs=1e-12)
    assert theirs.FocalLoss(**flags)(x, labels[:, None]).item() != pytest.approx(expected, rel=0.05)
    two = theirs.FocalLoss(**flags)(x[:, :2], labels[:, None] % 2)
    assert two.item() == 0.0  # for two classes nothing is left
    assert ours.FocalLoss(**flags)(x[:, :2], labels[:, None] % 2).item() > 0.01


def test_scalar_alpha_is_dropped_without_background(problem):
    x, labels = problem
    flags = {"use_softmax": True, "include_background": False, "alpha": 0.25}
    expected = focal_oracle(x, labels, 2.0, {1: 0.25, 2: 0.25})
    assert ours.FocalLoss(**flags)(x, labels).item() == pytest.approx(expected, abs=1e-12)
    with pytest.warns(UserWarning, match="alpha"):
        without = theirs.FocalLoss(**flags, to_onehot_y=True)(x, labels[:, None])
    assert without.item() == theirs.FocalLoss(**{**flags, "alpha": None}, to_onehot_y=True)(x, labels[:, None]).item()


def test_dice_focal_takes_a_sigmoid_under_softmax(problem):
    x, labels = problem
    p = oracles.probabilities(x.tolist(), "softmax")[0]
    ones = [1.0] * 20
    dice = sum(oracles.dice(p[c], [float(k == c) for k in labels[0]], ones) for c in range(3)) / 3
    expected = dice + focal_oracle(x, labels, 2.0, {0: 1.0, 1: 1.0, 2: 1.0})
    flags = {"softmax": True, "to_onehot_y": True}
    assert ours.DiceFocalLoss(**flags)(x, labels[:, None]).item() == pytest.approx(expected, abs=1e-9)
    assert theirs.DiceFocalLoss(**flags)(x, labels[:, None]).item() != pytest.approx(expected, rel=0.02)


def test_alpha_per_class_leaves_sigmoid_negatives_alone(problem):
    x, labels = problem
    alphas = [0.2, 0.5, 0.9]
    dense = one_hot(labels, 3).movedim(-1, 1).double()
    p = oracles.probabilities(x.tolist(), "sigmoid")[0]
    ones = [1.0] * 20
    sums = [oracles.focal_sigmoid(p[c], dense[0, c].tolist(), ones, 2.0, alphas[c]) for c in range(3)]
    expected = sum(sums) / (3 * 20)
    assert ours.FocalLoss(alpha=alphas)(x, dense).item() == pytest.approx(expected, abs=1e-12)
    assert theirs.FocalLoss(alpha=alphas)(x, dense).item() != pytest.approx(expected, rel=0.05)


def test_focal_softmax_over_one_channel_is_a_constant(problem):
    x, labels = problem
    one, foreground = x[:, :1], (labels > 0)[:, None].double()
    assert theirs.FocalLoss(use_softmax=True)(one, foreground).item() == 0.0
    with pytest.raises(ValueError, match="softmax over one channel is constant"):
        ours.FocalLoss(use_softmax=True)(one, foreground)


def test_focal_computes_in_float32(problem):
    x, labels = problem
    dense = one_hot(labels, 3).movedim(-1, 1).double()
    mine, other = (module.FocalLoss()(x, dense) for module in (ours, theirs))
    assert (mine.dtype, other.dtype) == (torch.float64, torch.float32)
    p = oracles.probabilities(x.tolist(), "sigmoid")[0]
    expected = sum(oracles.focal_sigmoid(p[c], dense[0, c].tolist(), [1.0] * 20, 2.0) for c in range(3)) / (3 * 20)
    assert mine.item() == pytest.approx(expected, abs=1e-12)
    assert other.item() != pytest.approx(expected, abs=1e-12)


def test_ignoring_nothing_changes_the_focal_loss(problem):
    x, labels = problem
    flags = {"use_softmax": True, "to_onehot_y": True}
    mine = [ours.FocalLoss(**flags, ignore_index=index)(x, labels[:, None]).item() for index in (None, 255)]
    assert mine[0] == mine[1]
    other = [theirs.FocalLoss(**flags, ignore_index=index)(x, labels[:, None]).item() for index in (None, 255)]
    assert other[1] == pytest.approx(3 * other[0], rel=1e-5)  # divided by the voxels, no longer by the classes too


def test_half_precision_dice():
    labels = torch.ones(1, 1, 64, 64, 64, dtype=torch.long)
    logits = torch.zeros(1, 2, 64, 64, 64)
    logits[:, 1] = 10.0
    flags = {"softmax": True, "to_onehot_y": True, "include_background": False}
    mine = ours.DiceLoss(**flags)(logits.half(), labels)
    assert mine.dtype == torch.float32
    assert mine.item() == pytest.approx(ours.DiceLoss(**flags)(logits.double(), labels).item(), abs=1e-6)
    other = theirs.DiceLoss(**flags)(logits.half(), labels).item()
    assert other != pytest.approx(mine.item(), abs=0.1)  # NaN or 1 for a near-perfect prediction


def test_class_weights_mean_the_same_in_both_parts(problem):
    x, labels = problem
    weight = [9.0, 1.0, 2.0]  # the background's entry is there whether a part counts it or not
    loss = ours.DiceCELoss(softmax=True, include_background=False, weight=weight)
    shorter = ours.DiceLoss(softmax=True, include_background=False, weight=weight[1:])
    ce = ours.CrossEntropyLoss(weight=weight)
    assert loss(x, labels).item() == pytest.approx((shorter(x, labels) + ce(x, labels)).item())
    flags = {"softmax": True, "to_onehot_y": True, "include_background": False}
    assert theirs.DiceCELoss(**flags, weight=torch.tensor(weight, dtype=torch.float64))(x, labels[:, None]) > 0
    with pytest.raises(ValueError, match="number of classes"):
        theirs.DiceFocalLoss(**flags, weight=weight)(x, labels[:, None])
    both = ours.DiceFocalLoss(softmax=True, include_background=False, weight=weight)
    assert both(x, labels).item() == pytest.approx(
        ours.DiceFocalLoss(softmax=True, include_background=False, weight=weight[1:])(x, labels).item()
    )


def test_state_dict_survives_a_forward(problem):
    x, labels = problem
    flags = {"softmax": True, "to_onehot_y": True, "weight": 2.0}
    mine, other = ours.DiceLoss(**flags), theirs.DiceLoss(**flags)
    for loss in (mine, other):
        loss(x, labels[:, None])
    ours.DiceLoss(**flags).load_state_dict(mine.state_dict())
    with pytest.raises(RuntimeError):
        theirs.DiceLoss(**flags).load_state_dict(other.state_dict())
