# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Deep supervision against a loop over the heads, for every form of target that the losses take."""

from __future__ import annotations

import copy

import monai.losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.networks.nets import DynUNet
from torch import nn

import monai_losses_ext as ours
from monai_losses_ext import DeepSupervisionLoss
from monai_losses_ext.distance import signed_distance
from monai_losses_ext.errors import ShapeError
from monai_losses_ext.losses import deep_supervision
from monai_losses_ext.losses.deep_supervision import resample_label
from monai_losses_ext.sums import Target

SIZES = [(12, 9, 8), (6, 5, 4), (3, 2, 2)]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def heads(sizes=tuple(SIZES), dtype=torch.float64):
    return [torch.randn(2, 3, *size, dtype=dtype, requires_grad=True) for size in sizes]


def labels(size=SIZES[0]):
    """Blobs, so that classes survive a coarser grid."""
    noise = F.interpolate(torch.randn(2, 1, *[max(2, n // 4) for n in size]), size=size, mode=MODES[len(size)])
    return (noise > -0.3).long() + (noise > 0.3).long()


def resampled(label, size):
    """Return what torch makes of a label ``[B, C, *S]``, by way of float64."""
    return F.interpolate(label.double(), size=tuple(size), mode="nearest-exact")


def looped(loss, inputs, targets, weights=(1.0, 0.5, 0.25)):
    return sum(w * loss(x, target).item() for w, x, target in zip(weights, inputs, targets, strict=False))


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize(
    "form",
    [
        lambda y: y,
        lambda y: y[:, 0],
        lambda y: y.to(torch.uint8),
        lambda y: y.float(),
        lambda y: torch.cat([y == c for c in range(3)], 1),
    ],
    ids=["index", "without channel", "bytes", "floats", "one-hot"],
)
def test_every_form_of_label_equals_the_loop(num_axes, form):
    sizes = [size[:num_axes] for size in SIZES]
    inputs, label = heads(sizes), labels(sizes[0])
    loss = ours.DiceCELoss(softmax=True)
    expected = looped(loss, inputs, [resampled(label, size) for size in sizes])
    total = DeepSupervisionLoss(loss)(inputs, form(label))
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    assert all(x.grad.any() for x in inputs)


def test_labels_are_resampled_as_torch_does():
    for old in range(1, 24):
        label = torch.randint(0, 9, (1, 1, old))
        for new in range(1, 24):
            assert torch.equal(resample_label(label, [new]).double(), resampled(label, [new])), (old, new)
    mask = torch.rand(1, 2, 7, 6) > 0.5
    assert torch.equal(resample_label(mask, (3, 4)).double(), resampled(mask, (3, 4)))


def test_where_monai_works_the_value_is_monais():
    inputs, label = heads(dtype=torch.float32), labels().float()
    for mode, weights in (("same", None), ("exp", None), ("two", None), ("exp", [0.7, 0.2, 0.1])):
        theirs = monai.losses.DeepSupervisionLoss(ours.DiceLoss(softmax=True), mode, weights)(inputs, label)
        mine = DeepSupervisionLoss(ours.DiceLoss(softmax=True), mode, weights)(inputs, label)
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    with pytest.raises(NotImplementedError):  # why there is a class of ours
        monai.losses.DeepSupervisionLoss(ours.DiceLoss(softmax=True))(inputs, label.long())


def affine(spacings, num_axes):
    """Return the affine of each sample, turned about an axis."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    sizes = [torch.tensor([*spacing, *[1.0] * (4 - num_axes)], dtype=torch.float64) for spacing in spacings]
    return torch.stack([turn @ torch.diag(size) for size in sizes])


@pytest.mark.parametrize("num_axes", [2, 3])
def test_the_spacing_follows_the_resampling(num_axes):
    sizes = [size[:num_axes] for size in SIZES]
    inputs, label = heads(sizes), labels(sizes[0])
    spacings = [[0.5, 2.0, 3.0][:num_axes], [1.0, 1.5, 0.7][:num_axes]]
    expected = 0.0
    for weight, x, size in zip((1.0, 0.5, 0.25), inputs, sizes, strict=True):
        at_head = [
            [mm * old / new for mm, old, new in zip(spacing, sizes[0], size, strict=True)] for spacing in spacings
        ]
        distance = signed_distance(resampled(label, size).long(), 3, at_head)
        target = {"label": resampled(label, size), "distance": distance}
        expected += weight * ours.BoundaryLoss(softmax=True)(x, target).item()
    loss = DeepSupervisionLoss(ours.BoundaryLoss(softmax=True))
    for form in (label, label[:, 0]):
        target = MetaTensor(form, affine=affine(spacings, num_axes))
        before = target.affine.clone()
        assert loss(inputs, target).item() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(target.affine, before) and target.shape == form.shape


def test_the_middle_of_the_volume_stays_where_it_is():
    label = MetaTensor(labels(), affine=affine([[0.5, 2.0, 3.0]] * 2, 3))
    middles = []
    for size in SIZES:
        middle = torch.tensor([*[(n - 1) / 2 for n in size], 1.0], dtype=torch.float64)
        target = deep_supervision.resampled(Target.parse(label, heads()[0]), size)
        middles.append(target.affine @ middle)
    torch.testing.assert_close(middles, [middles[0]] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_map_is_resampled_linearly_and_stays_in_millimeters(dtype):
    inputs, label = heads(), labels()
    distance = signed_distance(label, 3, (0.5, 2.0, 3.0)).to(dtype)
    targets = []
    for size in SIZES:
        at_head = F.interpolate(distance.double(), size=size, mode="trilinear", align_corners=False)
        targets.append({"label": resampled(label, size), "distance": at_head})
    inner = ours.CompoundLoss([ours.DiceLoss(softmax=True), ours.BoundaryLoss(softmax=True)], [0.5, 0.2])
    expected = looped(inner, inputs, targets)
    total = DeepSupervisionLoss(inner)(inputs, {"label": label, "distance": distance})
    assert total.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 2e-3)
    flat = DeepSupervisionLoss(ours.BoundaryLoss(softmax=True, normalize="none", include_background=False))
    constant = {"label": torch.zeros_like(label), "distance": torch.full_like(distance, 7.0)}
    probabilities = [x.softmax(1)[:, 1:].double().sum((2, 3, 4)).mean().item() for x in inputs]
    in_mm = sum(w * 7 * p for w, p in zip((1, 0.5, 0.25), probabilities, strict=True))
    assert flat(inputs, constant).item() == pytest.approx(in_mm, rel=1e-6)


def test_terms_are_those_of_the_full_resolution_and_weights_learn_from_all_heads():
    inputs, label = heads(), labels()
    inner = ours.get_loss({"type": "compound", "components": ["dice", "focal"], "learnable_weights": True})
    alone = ours.get_loss({"type": "compound", "components": ["dice", "focal"]})
    loss = DeepSupervisionLoss(inner)
    total = loss(inputs, label)
    (found,) = (module for module in loss.modules() if isinstance(module, ours.CompoundLoss))
    alone(inputs[0], label)
    assert {name: term.item() for name, term in found.last_terms.items()} == {
        name: term.item() for name, term in alone.last_terms.items()
    }
    assert found.get_weights() == pytest.approx({"dice": 0.5, "focal": 0.5})
    expected = looped(alone, inputs, [resampled(label, size) for size in SIZES])
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert [*loss.parameters()] == [inner.weighting.theta]
    (gradient,) = torch.autograd.grad(total, [inner.weighting.theta])
    parts = [
        torch.autograd.grad(inner(x, resampled(label, size)), inner.weighting.theta)[0]
        for x, size in zip(inputs, SIZES, strict=True)
    ]
    torch.testing.assert_close(gradient, parts[0] + 0.5 * parts[1] + 0.25 * parts[2])


def test_other_losses_get_float32_and_plain_labels():
    inputs, label = heads(dtype=torch.float16), labels()
    cross_entropy = DeepSupervisionLoss(nn.CrossEntropyLoss())
    targets = [resampled(label, size)[:, 0].long() for size in SIZES]
    expected = looped(nn.CrossEntropyLoss(), [x.float() for x in inputs], targets)
    target = {"label": label[:, 0], "distance": torch.zeros(2, 3, *SIZES[0])}
    for given in (label[:, 0], target):
        total = cross_entropy(inputs, given)
        assert total.dtype == torch.float32 and total.item() == pytest.approx(expected, rel=1e-6)
    mine = DeepSupervisionLoss(ours.CrossEntropyLoss())(inputs, label)
    assert mine.dtype == torch.float32 and mine.item() == pytest.approx(expected, rel=1e-3)


def test_one_tensor_is_one_head():
    x, label = heads()[0], labels()
    value = ours.DiceLoss(softmax=True)(x, label)
    assert DeepSupervisionLoss(ours.DiceLoss(softmax=True))(x, label).item() == value.item()
    assert DeepSupervisionLoss(ours.DiceLoss(softmax=True))((x,), label).item() == value.item()


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_without_an_affine_the_full_resolution_counts_as_1_mm(num_axes):
    sizes = [size[:num_axes] for size in SIZES]
    inputs, label = heads(sizes), labels(sizes[0])
    with_affine = MetaTensor(label, affine=torch.eye(4, dtype=torch.float64))
    for inner in (ours.BoundaryLoss(softmax=True), ours.CompoundLoss([ours.BoundaryLoss(softmax=True)])):
        expected = DeepSupervisionLoss(inner)(inputs, with_affine).item()
        for form in (label, label[:, 0], label.to(torch.uint8)):
            loss = DeepSupervisionLoss(copy.deepcopy(inner))
            with pytest.warns(UserWarning, match="no affine .* voxels count as 1 mm"):
                assert loss(inputs, form).item() == pytest.approx(expected, rel=1e-12)
            assert type(form) is torch.Tensor
    in_voxels = looped(ours.BoundaryLoss(softmax=True, spacing=1.0), inputs, [resampled(label, s) for s in sizes])
    assert expected != pytest.approx(in_voxels, rel=0.05)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_weights_are_one_per_head(form):
    inputs, label = heads(), labels()
    inner = ours.DiceLoss(softmax=True)
    targets = [resampled(label, size) for size in SIZES]
    loss = DeepSupervisionLoss(inner, weights=form([0.75, 0.5, 2.0]))
    assert loss(inputs, label).item() == pytest.approx(looped(inner, inputs, targets, (0.75, 0.5, 2.0)), rel=1e-12)
    # as of a network that gives one tensor in validation
    assert loss(inputs[0], label).item() == pytest.approx(0.75 * inner(inputs[0], label).item(), rel=1e-12)
    theirs = monai.losses.DeepSupervisionLoss(inner, weights=[1.0, 1.0])(inputs, label.double())
    assert theirs.item() == pytest.approx(looped(inner, inputs, targets), rel=1e-6)  # 1, 0.5, 0.25
    for wrong in ([1.0, 0.5], [1.0, 0.5, 0.25, 0.125]):
        with pytest.raises(ValueError, match=r"^weights: must hold one per head \(3\); got \[1.0, 0.5"):
            DeepSupervisionLoss(inner, weights=form(wrong))(inputs, label)
    with pytest.raises(ValueError, match=r"^weights: must be a list of numbers of at least 0 or none; got"):
        DeepSupervisionLoss(inner, weights=form([1.0, -0.5]))


def test_what_cannot_be_done_is_one_line():
    assert monai.losses.DeepSupervisionLoss(ours.DiceLoss(), "expo").get_weights(3) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"^weight_mode: must be one of same, exp, two; got 'expo'\. .* 'exp'\?$"):
        DeepSupervisionLoss(ours.DiceLoss(), "expo")
    with pytest.raises(ValueError, match=r"^loss: must be a module; got 'dice'\.$"):
        DeepSupervisionLoss("dice")
    with pytest.raises(ValueError, match=r"^input: must be a tensor or a list of at least one; got \{'image': "):
        DeepSupervisionLoss(ours.DiceLoss())({"image": heads()[0]}, labels())
    loss = DeepSupervisionLoss(ours.BoundaryLoss(softmax=True, spacing=2.0))
    inputs, label = heads(), labels()
    for nothing in (None, []):
        with pytest.raises(ValueError, match=r"^input: must be a tensor or a list of at least one; got"):
            loss(nothing, label)
    with pytest.raises(ValueError, match=r"^BoundaryLoss: spacing: cannot follow .*; got 2.0\.$"):
        loss(inputs, label)
    assert torch.isfinite(loss(inputs[:1], label))
    assert torch.isfinite(loss(inputs, {"label": label, "distance": signed_distance(label, 3, 2.0)}))


@pytest.mark.parametrize("kind", ["index", "without a channel axis", "dense"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_one_tensor_of_a_network_is_taken_apart(spatial_dims, kind):
    """MONAI's DynUNet stacks its heads on axis 1 while it trains, all at the full resolution."""
    network = DynUNet(
        spatial_dims, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8], deep_supervision=True, deep_supr_num=1
    )
    shape = (2, *[16] * spatial_dims)
    labels = torch.randint(0, 3, shape)
    dense = F.one_hot(labels, 3).movedim(-1, 1).float()
    target = {"index": labels.unsqueeze(1), "without a channel axis": labels, "dense": dense}[kind]
    heads = network.train()(torch.randn(2, 1, *shape[1:]))
    assert heads.shape == (2, 2, 3, *shape[1:])
    loss = DeepSupervisionLoss(ours.DiceLoss(softmax=True))
    assert torch.equal(loss(heads, target), loss(list(heads.unbind(1)), target))
    perfect = torch.stack([40 * dense, 40 * dense], 1)
    assert loss(perfect, target).item() == pytest.approx(0, abs=1e-4)
    scores = network.eval()(torch.randn(2, 1, *shape[1:]))
    assert torch.equal(loss(scores, target), loss([scores], target))


@pytest.mark.parametrize(
    ("input_shape", "label_shape"),
    [((1, 2, 3, 8, 8, 8), (1, 1, 8, 8)), ((1, 2, 8, 8), (1, 1, 8, 8, 8)), ((1, 2, 3, 4, 8, 8), (2, 1, 4, 8, 8))],
)
def test_what_does_not_fit_the_labels_axes_is_refused(input_shape, label_shape):
    loss = DeepSupervisionLoss(ours.DiceLoss(softmax=True))
    with pytest.raises(ShapeError, match="^target: must be"):
        loss(torch.zeros(input_shape), torch.zeros(label_shape))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_heads_of_one_channel(spatial_dims, dtype):
    label = torch.randint(0, 2, (2, 1, *[6] * spatial_dims)).to(dtype)
    heads = torch.randn(2, 3, 1, *[6] * spatial_dims)
    loss = DeepSupervisionLoss(ours.DiceLoss(sigmoid=True))
    assert torch.equal(loss(heads, label), loss(list(heads.unbind(1)), label))
