# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What counts: ignored labels, weights of voxels, and what a target may not be."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_losses_ext import get_loss
from monai_losses_ext.errors import ShapeError, UserError
from monai_losses_ext.losses import LOSSES
from monai_losses_ext.sums import Target, voxel_sums

TERMS = ["tp", "pred", "ref", "ce", "focal:2.0", "count"]
LOGITS = torch.zeros(1, 3, 4)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("ignored", [5, [5], [5, 1], (5, -1)])
def test_ignored_labels_are_as_if_they_were_cut_out(backend, ignored):
    x = torch.randn(1, 3, 40, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 1, 40))
    labels[0, 0, ::5] = 5
    labels[0, 0, ::7] = -1 if -1 in (ignored if isinstance(ignored, tuple) else ()) else labels[0, 0, ::7]
    kept = torch.ones(40, dtype=torch.bool)
    for label in [ignored] if isinstance(ignored, int) else ignored:
        kept &= labels[0, 0] != label
    found = voxel_sums(x, labels, TERMS, ignore_index=ignored, backend=backend)
    expected = voxel_sums(x[..., kept], labels[..., kept], TERMS, backend="reference")
    for term in TERMS:
        torch.testing.assert_close(found[term], expected[term], msg=term)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_a_marked_channel_of_a_sigmoid_silences_that_channel_alone(backend):
    x = torch.randn(1, 2, 6, requires_grad=True)
    dense = torch.tensor([[[1.0, 0, 1, 0, 255, 255], [0.0, 1, 255, 0, 1, 0]]])
    sums = voxel_sums(x, dense, ["pred", "ref", "count"], "sigmoid", ignore_index=255, backend=backend)
    assert sums["count"].tolist() == [[4, 5]]
    assert sums["ref"].tolist() == [[2, 2]]
    (gradient,) = torch.autograd.grad(sums["pred"].sum(), x)
    assert (gradient != 0).tolist() == (dense != 255).tolist()


def test_a_marked_voxel_of_a_softmax_is_silenced_whole():
    dense = torch.tensor([[[1.0, 0, 255], [0.0, 1, 0]]])
    assert voxel_sums(LOGITS[:, :2, :3], dense, ["count"], ignore_index=255)["count"].tolist() == [[2, 2]]


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"compound"}))
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_weights_of_zero_and_one_are_a_mask_and_a_voxel_of_weight_two_counts_twice(name, activation):
    if (name, activation) == ("dice_ce", "sigmoid"):
        pytest.skip("its cross-entropy has a softmax")
    loss = get_loss({"type": name, activation: True})
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, 30))
    maps = {
        "label": labels,
        "distance": torch.randn(2, 3, 30, dtype=torch.float64),
        "regions": torch.randint(0, 4, (2, 3, 30)),
        "skeleton": labels * torch.randint(0, 2, labels.shape),
    }
    weight = torch.randint(0, 3, (2, 1, 30)).double()
    weight[1] = weight[0]  # as many voxels in each sample
    places = torch.repeat_interleave(torch.arange(30), weight[0, 0].long())
    found = loss(x, {**maps, "weight": weight})
    repeated = {key: volume[..., places] for key, volume in maps.items()}
    torch.testing.assert_close(found, loss(x[..., places], repeated))
    x[:, :, weight[0, 0] == 0] = torch.nan
    torch.testing.assert_close(found, loss(x, {**maps, "weight": weight}))


def test_a_label_beyond_32_bits_does_not_wrap():
    labels = torch.tensor([[0, 1, 2**32 + 1, 2]])
    with pytest.raises(UserError, match=r"^target: index labels must lie in 0..2 .*4294967297"):
        voxel_sums(LOGITS, labels, ["tp"])
    assert voxel_sums(LOGITS, labels, ["count"], ignore_index=2**32 + 1)["count"].tolist() == [[3, 3, 3]]


def test_a_label_is_parsed_once_for_a_compound(monkeypatch):
    calls = []
    parse = Target.parse
    monkeypatch.setattr(Target, "parse", staticmethod(lambda *args: calls.append(1) or parse(*args)))
    loss = get_loss({"type": "compound", "components": ["dice", "focal", "cross_entropy", "tversky"]})
    loss(torch.randn(1, 3, 5), torch.zeros(1, 5, dtype=torch.long))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"label": LOGITS[:, :1], "distanse": LOGITS}, r"^target: may hold .*'distanse'\. Did you mean 'distance'\?$"),
        ({"distance": LOGITS}, r"^target: must be a tensor, or a dictionary with 'label'"),
        ("label", "^target: must be a tensor"),
        ({"label": LOGITS[:, :1], "weight": -LOGITS[:, :1] - 1}, "^weight: must be at least 0 at every voxel; got -1"),
        ({"label": LOGITS[:, :1], "weight": 1.0}, "^weight: must be a tensor on .*; got 'float'"),
        ({"label": LOGITS[:, :1], "distance": [1]}, "^distance: must be a tensor on .*; got 'list'"),
    ],
)
def test_what_a_target_may_not_be_is_one_line(target, message):
    with pytest.raises(UserError, match=message) as error:
        voxel_sums(LOGITS, target, ["tp"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "shape"), [("weight", (1, 3, 4)), ("weight", (1, 1, 5)), ("distance", (1, 1, 4)), ("label", (1, 2, 4))]
)
def test_volumes_of_another_shape_are_refused(key, shape):
    target = {"label": torch.zeros(1, 1, 4), key: torch.zeros(shape)}
    with pytest.raises(ShapeError, match=rf"^{'target' if key == 'label' else key}: must "):
        voxel_sums(LOGITS, target, ["tp"])


def test_what_came_with_the_label_is_kept():
    label = MetaTensor(torch.zeros(1, 1, 4), affine=torch.diag(torch.tensor([3.0, 1, 1, 1])))
    target = Target.parse({"label": label}, LOGITS)
    assert type(target.label) is torch.Tensor
    assert target.affine[0, 0] == 3
    assert target.is_index and Target.parse(target, LOGITS) is target
