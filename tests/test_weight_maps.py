# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of voxels beside brute-force loops, their defining properties, and their way through a pipeline."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandFlipd, RandSpatialCropd
from scipy import ndimage

from monai_losses_ext import CrossEntropyLoss
from monai_losses_ext.maps import border_weights, inverse_frequency, voxel_weights
from monai_losses_ext.transforms import BoundaryWeightMapd, ClassBalanceMapd


def objects_of(masks):
    """Return the voxels of each component of each mask, by a flood fill."""
    found = []
    for mask in masks:
        left = set(map(tuple, np.argwhere(mask)))
        while left:
            todo, members = [left.pop()], []
            while todo:
                voxel = todo.pop()
                members.append(voxel)
                for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
                    neighbor = tuple(a + b for a, b in zip(voxel, step, strict=True))
                    if neighbor in left:
                        left.remove(neighbor)
                        todo.append(neighbor)
            found.append(members)
    return found


def border_loop(masks, w0, sigma, spacing):
    objects, weights = objects_of(masks), np.zeros(masks.shape[1:])
    for voxel in np.ndindex(weights.shape):
        distances = sorted(
            min(math.dist(*[[s * v for s, v in zip(spacing, place, strict=True)] for place in (voxel, member)])
                for member in members) for members in objects
        )  # fmt: skip
        if len(distances) > 1:
            weights[voxel] = w0 * math.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return weights


@pytest.mark.parametrize(("shape", "spacing"), [((11,), (0.7,)), ((9, 8), (1.0, 2.5)), ((6, 5, 4), (0.5, 1.0, 3.0))])
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_borders_are_those_of_a_loop(shape, spacing, sigma):
    rng = np.random.default_rng(0)
    label = rng.integers(1, 3, shape) * (rng.random(shape) < 0.12)
    masks = np.stack([label == 1, label == 2])
    assert len(objects_of(masks)) > 2 or len(shape) == 1
    expected = border_loop(masks, 10.0, sigma, spacing)
    np.testing.assert_allclose(border_weights(masks, 10.0, sigma, spacing), expected, rtol=1e-5, atol=2e-6)


def two_boxes():
    label = np.zeros((14, 9), int)
    label[2:5, 2:7] = 1
    label[8:11, 2:7] = 1
    return label


@pytest.mark.parametrize("second", [1, 2])
def test_the_gap_between_two_objects_weighs_most(second):
    label = two_boxes()
    label[8:11] *= second
    weights = border_weights(np.stack([label == 1, label == 2]), 10.0, 3.0)
    gap = weights[5:8, 2:7]
    assert (gap == weights.max()).all()
    inside_facing, inside_behind = weights[4, 2:7], weights[2, 2:7]
    assert (inside_facing == gap[0]).all() and (inside_behind < gap.min()).all()
    far = weights.copy()
    far[4:9, 2:7] = 0
    assert far.max() < gap.min()
    nearer = np.roll(label, -1, 0)
    nearer[:7] = label[:7]
    assert border_weights(np.stack([nearer == 1, nearer == 2]), 10.0, 3.0).max() > weights.max()


def test_one_object_has_no_border_and_a_border_ends_at_w0():
    one = np.zeros((1, 6, 6), bool)
    assert not border_weights(one).any()
    one[0, 2:4, 2:4] = True
    assert not border_weights(one).any()
    touching = np.zeros((2, 6, 6), bool)
    touching[0, :3], touching[1, 3:] = True, True
    largest = border_weights(touching, 10.0, 5.0).max()
    assert largest == pytest.approx(10 * math.exp(-1 / 50)) and largest < 10


def test_a_classs_weights_sum_to_the_same():
    label = torch.randint(0, 4, (1, 9, 8, 7), generator=torch.manual_seed(0))
    label[label == 3] = 0
    label[0, 0, 0] = 255
    weight = ClassBalanceMapd("label", num_classes=4)({"label": label})["weight"]
    assert weight.shape == label.shape and weight.dtype == torch.float32
    sums = [weight[label == c].double().sum().item() for c in range(3)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)
    assert weight[label < 4].mean().item() == pytest.approx(1)
    assert not weight[label == 255].any()


def test_a_loop_over_voxels_of_the_inverse_frequency():
    label = np.random.default_rng(1).integers(0, 3, (5, 6))
    counts = [sum(int(v == c) for v in label.flat) for c in range(3)]
    expected = np.array([30 / (3 * counts[v]) for v in label.flat]).reshape(label.shape)
    masks = np.stack([label == c for c in range(3)])
    np.testing.assert_allclose(voxel_weights(masks, "inverse"), expected, rtol=1e-6)
    np.testing.assert_allclose(inverse_frequency(masks), [30 / (3 * n) for n in counts])
    np.testing.assert_allclose(voxel_weights(masks, [0.5, 2.0, 4.0]), np.array([0.5, 2.0, 4.0])[label])


def test_weights_are_the_sum_of_class_and_border_and_0_where_no_class_is():
    label = torch.from_numpy(two_boxes())[None]
    label[0, 0] = 9
    weight = BoundaryWeightMapd("label", num_classes=2, sigma=3.0, class_weight=[0.5, 2.0])({"label": label})["weight"]
    border = border_weights((label == 1).numpy(), 10.0, 3.0)
    expected = torch.tensor([0.5, 2.0])[(label == 1).long()] + border
    torch.testing.assert_close(weight, torch.where(label == 9, 0.0, expected))


def test_masks_that_lie_within_each_other_have_borders_of_their_own():
    masks = torch.zeros(2, 12, 12)
    masks[0, 1:11, 1:11] = 1
    masks[1, 3:5, 3:5] = 1
    weight = BoundaryWeightMapd("label", sigma=2.0)({"label": masks})["weight"]
    assert weight.shape == (1, 12, 12) and (weight == 1).all()  # one object in each
    masks[1, 7:9, 7:9] = 1
    weight = BoundaryWeightMapd("label", sigma=2.0)({"label": masks})["weight"]
    expected = 1 + border_weights(masks[1:].numpy(), 10.0, 2.0)
    np.testing.assert_allclose(weight[0], expected)
    balanced = ClassBalanceMapd("label", class_weight=[1.0, 2.0, 3.0])({"label": masks})["weight"]
    assert torch.equal(balanced[0], 1 + masks.sum(0))


def test_millimeters_come_from_the_affine():
    label = two_boxes()[None]
    affine = torch.diag(torch.tensor([2.0, 0.5, 1.0, 1.0]))
    case = {"label": MetaTensor(torch.from_numpy(label), affine=affine)}
    weight = BoundaryWeightMapd("label", num_classes=2)(case)["weight"]
    assert isinstance(weight, MetaTensor) and torch.equal(weight.affine, case["label"].affine)
    np.testing.assert_allclose(weight[0], 1 + border_weights(label == 1, 10.0, 5.0, (2.0, 0.5)))
    given = BoundaryWeightMapd("label", num_classes=2, spacing=1.0)(case)["weight"]
    np.testing.assert_allclose(given[0], 1 + border_weights(label == 1, 10.0, 5.0))


def test_a_weight_that_the_case_has_is_a_factor():
    own = MetaTensor(torch.rand(1, 14, 9))
    case = {"label": MetaTensor(torch.from_numpy(two_boxes())[None]), "weight": own}
    alone = ClassBalanceMapd("label", num_classes=2)({"label": case["label"]})["weight"]
    torch.testing.assert_close(ClassBalanceMapd("label", num_classes=2)(case)["weight"], own * alone)
    both = BoundaryWeightMapd("label", num_classes=2)(ClassBalanceMapd("label", num_classes=2)(case))["weight"]
    border = BoundaryWeightMapd("label", num_classes=2)({"label": case["label"]})["weight"]
    torch.testing.assert_close(both, own * alone * border)
    assert torch.equal(case["weight"], own)


def test_weights_of_a_function_and_names_of_several_labels():
    label = torch.tensor([[0, 1, 1]])
    several = ClassBalanceMapd(["a", "b"], num_classes=2, class_weight=lambda: [0.5, 3.0])({"a": label, "b": label})
    assert several["a_weight"].tolist() == several["b_weight"].tolist() == [[0.5, 3.0, 3.0]]
    with pytest.raises(ValueError, match=r"^class_weight: must hold one number per class, .*\(2\); got \[1.0\]\.$"):
        ClassBalanceMapd("a", num_classes=2, class_weight=[1.0])({"a": label})
    with pytest.raises(ValueError, match=r"^sigma: must be a number above 0; got 0\.$"):
        BoundaryWeightMapd("a", sigma=0)
    with pytest.raises(ValueError, match="^class_weight: must be .*inverse"):
        ClassBalanceMapd("a", class_weight="invers")


def test_a_crop_keeps_the_weights_of_the_volume_and_a_loss_takes_them():
    label = MetaTensor(torch.from_numpy(two_boxes())[None])
    case = BoundaryWeightMapd("label", num_classes=2, sigma=3.0)({"label": label})
    whole = case["weight"].clone()
    keys = ["label", "weight"]
    case = RandFlipd(keys, prob=1.0, spatial_axis=0)(RandSpatialCropd(keys, (4, 9), random_size=False)(case))
    start = next(i for i in range(11) if torch.equal(whole[:, i : i + 4].flip(1), case["weight"]))
    assert torch.equal(label[:, start : start + 4].flip(1), case["label"])
    x = torch.randn(1, 2, 4, 9)
    target = {"label": case["label"][None], "weight": case["weight"][None]}
    voxels = CrossEntropyLoss(reduction="none")(x, case["label"][None])
    expected = (voxels * case["weight"]).sum() / case["weight"].sum()
    assert CrossEntropyLoss()(x, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_many_objects_cost_what_lies_around_them(monkeypatch):
    """The distance of an object is computed near it, not in the whole volume."""
    seen = []
    edt = ndimage.distance_transform_edt
    monkeypatch.setattr(ndimage, "distance_transform_edt", lambda x, **k: seen.append(x.size) or edt(x, **k))
    mask = np.zeros((1, 400, 50), bool)
    mask[0, 20::60, 25] = True
    border_weights(mask, 10.0, 1.0)
    assert max(seen) == 13 * 13
