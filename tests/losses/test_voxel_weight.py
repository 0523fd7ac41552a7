# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of voxels that a loss makes of its labels: those of the transforms, for every kind of target."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from monai.data import MetaTensor
from torch.nn.functional import one_hot

from monai_losses_ext import DeepSupervisionLoss, get_loss
from monai_losses_ext.errors import UserError
from monai_losses_ext.transforms import BoundaryWeightMapd, ClassBalanceMapd

BORDER = {"w0": 10.0, "sigma": 2.0}
BALANCE = {"class_weight": "inverse"}
COMPOUND = {"type": "compound", "components": ["dice", "cross_entropy", "focal"]}


def problem(num_classes=3):
    torch.manual_seed(0)
    labels = torch.randint(0, num_classes, (2, 1, 8, 9)) * (torch.rand(2, 1, 8, 9) < 0.3)
    return torch.randn(2, num_classes, 8, 9), labels


def by_transforms(labels, num_classes, how):
    transform = (
        BoundaryWeightMapd("label", num_classes, **how) if "w0" in how else ClassBalanceMapd("label", num_classes)
    )
    return torch.stack([torch.as_tensor(transform({"label": label})["weight"]) for label in labels])


@pytest.mark.parametrize("how", [BORDER, BALANCE], ids=["border", "balance"])
@pytest.mark.parametrize(
    "config", [COMPOUND, {"type": "dice"}, {"type": "tversky"}, {"type": "unified_focal"}], ids=str
)
def test_softmax_has_the_weights_of_the_transforms(config, how):
    x, labels = problem()
    weighed, plain = get_loss({**config, "voxel_weight": how}), get_loss(config)
    expected = plain(x, {"label": labels, "weight": by_transforms(labels, 3, how)})
    assert not torch.allclose(expected, plain(x, labels))
    dense = one_hot(labels[:, 0], 3).movedim(-1, 1).float()
    for target in (labels, labels[:, 0], dense, {"label": labels}, {"label": dense}):
        torch.testing.assert_close(weighed(x, target), expected)
    torch.testing.assert_close(weighed(input=x, target=labels), expected)
    for twin in (copy.deepcopy(weighed), pickle.loads(pickle.dumps(weighed))):
        torch.testing.assert_close(twin(x, labels), expected)
    assert weighed.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("how", [BORDER, BALANCE], ids=["border", "balance"])
@pytest.mark.parametrize("channels", [1, 2])
def test_regions_of_a_sigmoid(how, channels):
    x, labels = problem(2)
    regions = torch.cat([labels > 0, labels > 0][:channels], 1).float()
    if channels == 2:
        regions[:, 1, 4:] = 0  # the second lies within the first
    x = x[:, :channels]
    weighed, plain = (get_loss({**COMPOUND, **more}, sigmoid=True) for more in ({"voxel_weight": how}, {}))
    expected = plain(x, {"label": regions, "weight": by_transforms(regions, None, how)})
    torch.testing.assert_close(weighed(x, regions), expected)


def test_a_target_that_has_weights_keeps_them():
    x, labels = problem()
    own = torch.rand(2, 1, 8, 9)
    target = {"label": labels, "weight": own}
    torch.testing.assert_close(get_loss({**COMPOUND, "voxel_weight": BORDER})(x, target), get_loss(COMPOUND)(x, target))


def test_labels_to_ignore_millimeters_and_heads():
    x, labels = problem()
    labels[:, :, 0] = 255
    affine = torch.diag(torch.tensor([3.0, 0.5, 1.0, 1.0]))
    meta = MetaTensor(labels, affine=affine)
    how = {"w0": 10.0, "sigma": 1.0}
    weight = by_transforms([MetaTensor(label, affine=affine) for label in labels], 3, how)
    assert not weight[:, :, 0].any()
    weighed, plain = (get_loss({**COMPOUND, **more}, ignore_index=255) for more in ({"voxel_weight": how}, {}))
    expected = plain(x, {"label": meta, "weight": weight})
    torch.testing.assert_close(weighed(x, meta), expected)
    heads = [x, x[..., ::2, :8:2].contiguous()]
    assert DeepSupervisionLoss(weighed)(heads, meta).isfinite()
    torch.testing.assert_close(DeepSupervisionLoss(weighed)([x], meta), expected)


def test_numbers_of_classes_may_be_the_statistics():
    x, labels = problem()
    loss = get_loss({"type": "dice", "voxel_weight": {"class_weight": "balanced"}}, balanced=lambda: [0.5, 1.0, 4.0])
    weight = torch.tensor([0.5, 1.0, 4.0])[labels]
    torch.testing.assert_close(loss(x, labels), get_loss("dice")(x, {"label": labels, "weight": weight}))
    with pytest.raises(UserError, match="^loss: voxel_weight: class_weight: 'balanced' is known where a dataset is"):
        get_loss({"type": "dice", "voxel_weight": {"class_weight": "balanced"}})
    with pytest.raises(UserError, match=r"^class_weight: must hold one number per class, .*\(3\)"):
        get_loss({"type": "dice", "voxel_weight": {"class_weight": [1, 2]}})(x, labels)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_a_batch_without_voxels_costs_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    value = get_loss({**COMPOUND, "voxel_weight": BORDER})(x, torch.zeros(shape[0], 1, *shape[2:], dtype=torch.long))
    value.backward()
    assert value.item() == 0
