# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Which entries a mean is over: cases annotated in part, absent classes, and batches of several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ranks_dice
import torch
from torch.nn import functional as F

from monai_losses_ext import CompoundLoss, CrossEntropyLoss, DiceLoss, FocalLoss, get_loss

FORMULAS = ["dice", "cross_entropy", "focal", "tversky", "focal_tversky", "boundary", "dice_ce", "dice_focal",
            "unified_focal"]  # fmt: skip
REGIONS = [name for name in FORMULAS if name != "dice_ce"]  # whose cross-entropy has a softmax, as MONAI's does
SHAPE = (5, 6)


def problem(num_classes=4, batch=1):
    x = 2 * torch.randn(batch, num_classes, *SHAPE, dtype=torch.float64)
    return x, torch.randint(0, num_classes, (batch, *SHAPE))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_class_without_annotation_is_as_if_it_had_never_been_one(name):
    """With classes 1 and 3 merged into the background, the loss is that of a network of two classes."""
    x, labels = problem()
    loss = get_loss({"type": name, **({"spacing": 1.0} if name == "boundary" else {})})
    merged = torch.stack([x[:, [0, 1, 3]].logsumexp(1), x[:, 2]], 1).requires_grad_()
    leaf = x.clone().requires_grad_()
    value = loss(leaf, {"label": labels, "annotated": torch.tensor([[1, 0, 1, 0]])})
    expected = loss(merged, (labels == 2).long())
    torch.testing.assert_close(value, expected)
    (mine,) = torch.autograd.grad(value, leaf)
    (right,) = torch.autograd.grad(expected, merged)
    torch.testing.assert_close(mine[:, 2], right[:, 1])
    torch.testing.assert_close(mine[:, [0, 1, 3]].sum(1), right[:, 0])


@pytest.mark.parametrize("name", REGIONS)
def test_regions_without_annotation_do_not_count(name):
    x, _ = problem()
    masks = torch.randint(0, 2, x.shape)
    loss = get_loss({"type": name, "sigmoid": True, **({"spacing": 1.0} if name == "boundary" else {})})
    partial = loss(x, {"label": masks, "annotated": torch.tensor([[0, 1, 1, 0]])})
    torch.testing.assert_close(partial, loss(x[:, 1:3], masks[:, 1:3]))


@pytest.mark.parametrize("name", REGIONS)
def test_a_batch_may_mix_cases_and_one_without_any_annotation_costs_nothing(name):
    x, _ = problem(batch=3)
    config = {"type": name, "sigmoid": True, **({"spacing": 1.0} if name == "boundary" else {})}
    masks = torch.randint(0, 2, x.shape)
    annotated = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
    leaf = x.clone().requires_grad_()
    loss = get_loss(config)
    value = loss(leaf, {"label": masks, "annotated": annotated})
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite() and not gradient[annotated == 0].any() and gradient[2, 2].any()
    nothing = loss(x, {"label": masks, "annotated": torch.zeros(3, 4)})
    assert nothing == 0


def test_smoothed_labels_are_spread_over_annotated_classes():
    x, labels = problem()
    merged = torch.stack([x[:, [0, 1, 3]].logsumexp(1), x[:, 2]], 1)
    loss = CrossEntropyLoss(label_smoothing=0.2)
    value = loss(x, {"label": labels, "annotated": torch.tensor([[1, 0, 1, 0]])})
    torch.testing.assert_close(value, F.cross_entropy(merged, (labels == 2).long(), label_smoothing=0.2))


@pytest.mark.parametrize("loss", [CrossEntropyLoss(reduction="none"), FocalLoss(use_softmax=True, reduction="none")])
def test_maps_of_voxels_know_annotations(loss):
    x, labels = problem()
    merged = torch.stack([x[:, [0, 1, 3]].logsumexp(1), x[:, 2]], 1)
    value = loss(x, {"label": labels, "annotated": torch.tensor([[1, 0, 1, 0]])})
    expected = loss(merged, (labels == 2).long())
    torch.testing.assert_close(value.sum(), expected.sum())


@pytest.mark.parametrize("config", [{"type": "dice"}, {"type": "tversky"}, {"type": "focal", "sigmoid": True},
                                    {"type": "cross_entropy", "sigmoid": True},
                                    {"type": "boundary", "spacing": 1.0, "sigmoid": True}], ids=str)  # fmt: skip
def test_an_absent_class_may_be_left_out(config):
    x, _ = problem(3, batch=2)
    masks = torch.randint(0, 2, x.shape)
    masks[0, 1] = 0
    config = {**config, "sigmoid": True}
    value = get_loss({**config, "absent": "skip"})(x, masks)
    kept = torch.tensor([[1, 0, 1], [1, 1, 1]])
    assert torch.allclose(value, get_loss(config)(x, {"label": masks, "annotated": kept}))
    assert not torch.allclose(value, get_loss(config)(x, masks))


def test_absent_is_of_the_batch_where_its_samples_are_one():
    x, labels = problem(3, batch=2)
    labels[0] = 0
    loss = DiceLoss(softmax=True, batch=True, absent="skip")
    torch.testing.assert_close(loss(x, labels), DiceLoss(softmax=True, batch=True)(x, labels))


def test_a_loss_that_is_not_ours_refuses_cases_annotated_in_part():
    x, labels = problem()
    loss = CompoundLoss([DiceLoss(softmax=True), torch.nn.CrossEntropyLoss()])
    with pytest.raises(ValueError, match="^annotated: is known to the losses of this package alone"):
        loss(x, {"label": labels, "annotated": torch.tensor([[1, 0, 1, 0]])})
    assert loss(x, {"label": labels, "annotated": torch.ones(1, 4)}).isfinite()


def test_dice_over_all_ranks_is_that_of_one_process_with_the_whole_batch(tmp_path):
    script = Path(ranks_dice.__file__)
    commands = [[sys.executable, str(script), str(rank), "2", str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        _, errors = rank.communicate(timeout=180)
        assert rank.returncode == 0, errors
    expected = ranks_dice.gradients(ranks_dice.network(), slice(0, 3), True)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)
