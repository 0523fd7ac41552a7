# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Every component counts: losses on regions beside loops over components, their maps beside brute force."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from monai_losses_ext import CompoundLoss, CrossEntropyLoss, DiceLoss, get_loss
from monai_losses_ext.losses import BlobLoss, CCDiceLoss, SkeletonRecallLoss
from monai_losses_ext.maps import regions_of, skeleton_of
from monai_losses_ext.transforms import RegionMapd, SkeletonMapd, prepare_batch, prepare_batch_with_distance

needs_skimage = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")
SHAPE, SMOOTH = (9, 8, 10), 1e-5


def problem(num_classes=4, batch=3, density=0.12):
    rng = np.random.default_rng(0)
    labels = (rng.random((batch, 1, *SHAPE)) < density) * rng.integers(1, num_classes, (batch, 1, *SHAPE))
    labels[0][labels[0] == 2] = 0
    labels[1:2] = 0
    x = 2 * torch.randn(batch, num_classes, *SHAPE, dtype=torch.float64)
    return x, torch.from_numpy(labels).long()


def regions(labels, num_classes, spacing=(1, 1, 3)):
    masks = np.stack([labels[:, 0].numpy() == c for c in range(1, num_classes)], 1)
    return torch.from_numpy(np.stack([regions_of(sample, spacing) for sample in masks]).astype(np.int32))


def loop(x, labels, ids, is_blob, lambda_ce):
    """Return the mean over components, classes and samples, one component at a time, on volumes."""
    p, logp, samples = x.softmax(1), x.log_softmax(1), []
    for b in range(x.shape[0]):
        classes = []
        for c in range(1, x.shape[1]):
            g, values = labels[b, 0] == c, []
            components, number = ndimage.label(g.numpy(), np.ones((3, 3, 3)))
            for r in range(1, number + 1):
                own = torch.from_numpy(components == r)
                cell = ~g | own if is_blob else ids[b, c - 1] == int(ids[b, c - 1][own][0])
                dice = 1 - (2 * p[b, c][own].sum() + SMOOTH) / (p[b, c][cell].sum() + own.sum() + SMOOTH)
                ce = -logp[b].gather(0, labels[b])[0][cell].mean()
                values.append(dice + lambda_ce * ce)
            if values:
                classes.append(torch.stack(values).mean())
        if classes:
            samples.append(torch.stack(classes).mean())
    return torch.stack(samples).mean()


@pytest.mark.parametrize(("loss", "is_blob"), [
    (CCDiceLoss(softmax=True, lambda_ce=0.7), False), (CCDiceLoss(softmax=True, lambda_ce=0.0), False),
    (BlobLoss(softmax=True), True)])  # fmt: skip
def test_a_pass_over_the_volume_is_a_loop_over_its_components(loss, is_blob):
    x, labels = problem()
    ids = regions(labels, 4)
    results = []
    for function in (
        lambda x: loss(x, {"label": labels, "regions": ids}),
        lambda x: loop(x, labels, ids, is_blob, getattr(loss, "lambda_ce", 0.0)),
    ):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    mine = loss(x.float(), {"label": labels, "regions": ids})
    torch.testing.assert_close(mine.double(), results[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [CCDiceLoss(sigmoid=True, lambda_ce=0.0), BlobLoss(sigmoid=True)])
@pytest.mark.parametrize("missed", [1, 2, 3])
def test_missing_any_one_of_n_components_costs_one_nth(loss, missed):
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 0, 0], mask[..., 4:9, 4:9], mask[..., 11, 0:6] = 1, 2, 3
    found = 80 * (((mask > 0) & (mask != missed)).float() - 0.5)
    assert loss(found, (mask > 0).float()).item() == pytest.approx(1 / 3, abs=1e-4)


def test_maps_that_did_not_come_along_are_made_of_the_label_in_millimeters():
    x, labels = problem(batch=2)
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0]))
    loss = CCDiceLoss(softmax=True)
    given = loss(x, {"label": labels, "regions": regions(labels, 4)})
    torch.testing.assert_close(loss(x, MetaTensor(labels, affine=affine)), given)
    torch.testing.assert_close(CCDiceLoss(softmax=True, spacing=(1, 1, 3))(x, labels), given)
    assert not torch.allclose(CCDiceLoss(softmax=True, spacing=1.0)(x, labels), given)


def test_a_region_without_its_component_does_not_count():
    x, labels = problem(2, 1)
    labels[..., :5] = torch.rand(1, 1, 9, 8, 5) < 0.1
    ids = torch.ones(1, 1, *SHAPE, dtype=torch.int32)
    more = ids.clone()
    more[..., 5:] = 2
    labels[..., 5:] = 0
    loss = CCDiceLoss(softmax=True, lambda_ce=0.0)
    whole = loss(x[..., :5], {"label": labels[..., :5], "regions": ids[..., :5]})
    torch.testing.assert_close(loss(x, {"label": labels, "regions": more}), whole)


def test_a_batch_without_any_component_costs_nothing():
    x, labels = problem(2, 2)
    leaf = x.clone().requires_grad_()
    value = get_loss("cc_dice")(leaf, torch.zeros_like(labels))
    assert value == 0 and not torch.autograd.grad(value, leaf)[0].any()


def test_one_pass_serves_a_compound_of_them_all():
    x, labels = problem(3, 2)
    skeleton = labels * (torch.rand(labels.shape) < 0.4)
    target = {"label": labels, "regions": regions(labels, 3), "skeleton": skeleton, "distance": torch.randn(x.shape)}
    parts = [DiceLoss(softmax=True), CrossEntropyLoss(), BlobLoss(softmax=True), CCDiceLoss(softmax=True),
             SkeletonRecallLoss(softmax=True)]  # fmt: skip
    compound = CompoundLoss(parts, [1.0] * 5)
    torch.testing.assert_close(compound(x, target), sum(part(x, target) for part in parts))


@pytest.mark.parametrize("spacing", [None, (1.0, 2.5, 0.7)])
def test_regions_are_the_nearest_components(spacing):
    mask = np.random.default_rng(1).random((1, 7, 8, 6)) < 0.05
    components, number = ndimage.label(mask[0], np.ones((3, 3, 3)))
    assert number > 3
    size = np.array(spacing or (1, 1, 1))
    found = regions_of(mask, spacing)[0]
    assert found.dtype == np.uint8
    for voxel in np.ndindex(mask.shape[1:]):
        distances = {r: min(np.linalg.norm((np.array(voxel) - other) * size) for other in np.argwhere(components == r))
                     for r in range(1, number + 1)}  # fmt: skip
        assert distances[found[voxel]] == pytest.approx(min(distances.values()))


@pytest.mark.parametrize(("shape", "name"), [((5, 5), "2-D"), ((4, 5, 6), "3-D")], ids=lambda value: str(value))
def test_skeleton_recall_is_the_share_of_the_tube_that_is_missed(shape, name):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, *shape))
    skeleton = labels * (torch.rand(labels.shape) < 0.5)
    values = []
    for b in range(2):
        for c in (1, 2):
            tube = (skeleton[b, 0] == c).flatten().tolist()
            p = x.softmax(1)[b, c].flatten().tolist()
            missed = sum(v for v, s in zip(p, tube, strict=True) if s)
            values.append(1 - (missed + 1e-5) / (sum(tube) + 1e-5))
    loss = SkeletonRecallLoss(softmax=True)
    assert loss(x, {"label": labels, "skeleton": skeleton}).item() == pytest.approx(sum(values) / 4, rel=1e-9)


@needs_skimage
def test_every_component_keeps_a_voxel_of_its_skeleton_and_the_tube_stays_inside():
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = ndimage.gaussian_filter(rng.standard_normal((14, 13, 12)), 1.5) > 0.05
        mask[0:2, 0:2, 0:10] = True  # of even width: thinning alone deletes it
        (tube,) = skeleton_of(mask[None])
        assert not (tube & ~mask).any()
        components, number = ndimage.label(mask, np.ones((3, 3, 3)))
        assert set(np.unique(components[tube])) == set(range(1, number + 1))


@needs_skimage
def test_a_tube_has_a_radius_in_millimeters():
    mask = np.ones((1, 21, 21, 21), bool)
    (thin,), (thick,) = (skeleton_of(mask, (2.0, 1.0, 1.0), radius) for radius in (0.5, 3.0))
    distance = ndimage.distance_transform_edt(~thin, sampling=(2.0, 1.0, 1.0))
    assert np.array_equal(thick, distance <= 3.0)


def test_a_case_carries_its_maps_to_the_loss():
    label = MetaTensor(problem()[1][0], affine=torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0])))
    case = RegionMapd("label", num_classes=4)({"label": label})
    assert torch.equal(torch.as_tensor(case["regions"]), regions(label[None], 4)[0])
    masks = torch.stack([torch.as_tensor(label[0]) == c for c in range(1, 4)])
    of_masks = RegionMapd("label", spacing=(1, 1, 3))({"label": masks})
    assert torch.equal(of_masks["regions"], torch.as_tensor(case["regions"]))
    _, target = prepare_batch({"image": torch.zeros(1), "label": label[None], "regions": case["regions"][None]})
    x = torch.randn(1, 4, *SHAPE)
    torch.testing.assert_close(CCDiceLoss(softmax=True)(x, target), CCDiceLoss(softmax=True)(x, label[None]))


@needs_skimage
def test_a_skeleton_of_classes_is_that_of_their_masks():
    label = problem(density=0.6)[1][0]
    (classes,) = SkeletonMapd("label", num_classes=4)({"label": label})["skeleton"]
    masks = torch.stack([label[0] == c for c in range(1, 4)])
    tubes = SkeletonMapd("label")({"label": masks})["skeleton"]
    assert all(torch.equal(classes == c, tubes[c - 1] > 0) for c in range(1, 4))
    x = torch.randn(1, 4, *SHAPE)
    made = SkeletonRecallLoss(softmax=True)(x, label[None])
    given = SkeletonRecallLoss(softmax=True)(x, {"label": label[None], "skeleton": classes[None, None]})
    torch.testing.assert_close(made, given)


def test_a_batch_with_distances_keeps_what_else_belongs_to_its_labels():
    batch = {"image": torch.zeros(1), "label": torch.ones(1), "distance": torch.zeros(1), "annotated": torch.ones(1, 2)}
    assert prepare_batch_with_distance(batch)[1].keys() == {"label", "distance", "annotated"}
