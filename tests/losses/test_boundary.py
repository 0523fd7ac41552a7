# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The boundary loss: never negative, zero for the truth, in millimeters, with a gradient for absent classes."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.losses import BoundaryLoss as MonaiBoundaryLoss

from monai_losses_ext import BoundaryLoss, CompoundLoss, DiceLoss, FocalLoss, get_loss
from monai_losses_ext.distance import signed_distance


def affine(*spacing):
    return torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))]))


def test_equals_the_definition():
    logits = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 4, 3))
    labels[:, 0] = torch.arange(3)  # every class is there
    spacing = (0.5, 2.0)
    total = 0.0
    p = oracles.probabilities(logits.flatten(2).tolist(), "softmax")
    for b in range(2):
        for c in range(3):
            phi = oracles.signed_distance((labels[b] == c).tolist(), spacing)
            total += sum(d * q - min(d, 0) for d, q in zip(phi, p[b][c], strict=True)) / 12
    loss = BoundaryLoss(softmax=True, spacing=spacing)
    assert loss(logits, labels).item() == pytest.approx(total / 6, rel=1e-6)
    assert BoundaryLoss(softmax=True, spacing=spacing, reduction="sum")(logits, labels).item() == pytest.approx(total)
    summed = BoundaryLoss(softmax=True, spacing=spacing, reduction="sum", normalize="none")
    assert summed(logits, labels).item() == pytest.approx(total * 12)


@pytest.mark.parametrize("normalize", ["voxels", "distance", "none"])
@pytest.mark.parametrize("convention", ["signed", "kervadec"])
def test_is_zero_for_the_truth_and_grows_with_the_error(normalize, convention):
    labels = torch.zeros(1, 12, 12, dtype=torch.int64)
    labels[:, 4:8, 4:8] = 1
    loss = BoundaryLoss(softmax=True, normalize=normalize, convention=convention, spacing=1.0)

    def value(prediction):
        return loss(50.0 * torch.stack([prediction == 0, prediction == 1], 1).float(), labels).item()

    shifts = [value(labels.roll(shift, 2)) for shift in range(5)]
    assert shifts[0] == pytest.approx(0, abs=1e-5)
    assert all(a < b for a, b in itertools.pairwise(shifts))


def test_distance_normalization_has_no_unit():
    logits, labels = torch.randn(1, 2, 9, 8), torch.randint(0, 2, (1, 9, 8))
    values = [
        BoundaryLoss(softmax=True, normalize="distance", spacing=mm)(logits, labels).item() for mm in (0.5, 1.0, 3.0)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert 0 < values[0] < 2
    plain = [BoundaryLoss(softmax=True, spacing=mm)(logits, labels).item() for mm in (0.5, 1.0, 3.0)]
    assert plain == pytest.approx([plain[1] * mm for mm in (0.5, 1.0, 3.0)], rel=1e-5)


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parity_with_monai_up_to_the_constant(include_background, batch, reduction):
    logits = torch.randn(2, 3, 7, 6, 5, requires_grad=True)
    labels = torch.randint(0, 2, (2, 1, 7, 6, 5))
    flags = {"include_background": include_background, "batch": batch, "reduction": reduction, "softmax": True}
    theirs = MonaiBoundaryLoss(to_onehot_y=True, **flags)
    ours = BoundaryLoss(convention="kervadec", absent="zero", spacing=1.0, **flags)
    phi = signed_distance(labels, 3, convention="kervadec", absent="zero", include_background=include_background)
    constant = phi.clamp_max(0).mean((2, 3, 4))[:, 0 if include_background else 1 :]
    constant = constant.mean(0) if batch else constant
    constant = constant if reduction == "none" else getattr(constant, reduction)()
    value, expected = ours(logits, labels), theirs(logits, labels)
    assert torch.allclose(value, expected - constant, atol=1e-5)
    slopes = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (value, expected)]
    assert torch.allclose(*slopes, atol=1e-7)


def test_monais_knows_no_voxel_size():
    logits, labels = torch.randn(1, 2, 7, 6), torch.randint(0, 2, (1, 1, 7, 6)).float()
    sizes = [MetaTensor(labels, affine=affine(mm, mm)) for mm in (1.0, 3.0)]
    theirs = [MonaiBoundaryLoss(softmax=True, to_onehot_y=True)(logits, target).item() for target in sizes]
    ours = [BoundaryLoss(softmax=True)(logits, target).item() for target in sizes]
    assert theirs[1] == theirs[0] and ours[1] == pytest.approx(3 * ours[0])


def test_one_axis_which_monais_refuses():
    logits, labels = torch.randn(1, 2, 7), torch.randint(0, 2, (1, 1, 7))
    with pytest.raises(ValueError, match="Only 2D .* and 3D"):
        MonaiBoundaryLoss(softmax=True, to_onehot_y=True)(logits, labels)
    flags = {"softmax": True, "convention": "kervadec", "absent": "zero", "spacing": 1.0}
    as_image = BoundaryLoss(**flags)(logits[..., None], labels[..., None])
    assert BoundaryLoss(**flags)(logits, labels).item() == pytest.approx(as_image.item())


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shift=st.floats(-5, 5),
    scale=st.floats(0, 4),
    sure=st.floats(0, 60),
    half=st.booleans(),
    soft=st.booleans(),
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_is_never_negative_whatever_the_map_and_the_target(activation, seed, shift, scale, sure, half, soft):
    generator = torch.Generator().manual_seed(seed)
    x = sure * torch.randn(1, 3, 6, 5, generator=generator)
    target = torch.rand(1, 3, 6, 5, generator=generator)
    target = target if soft else (target > 0.5).float()
    phi = scale * torch.randn(1, 3, 6, 5, generator=generator) + shift
    target = {"label": target, "distance": phi.half() if half else phi}
    values = BoundaryLoss(**{activation: True}, reduction="none")(x, target)
    assert (values >= 0).all()


def test_false_positives_of_an_absent_class_are_pushed_down():
    labels = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    labels[:, :2] = 1  # class 2 is absent
    logits = torch.zeros(1, 3, 8, 8, 8)
    logits[:, 2, 4:6, 4:6, 4:6] = 3.0
    logits.requires_grad_()
    blob = (slice(None), 2, slice(4, 6), slice(4, 6), slice(4, 6))
    for absent, pushed in (("far", True), ("zero", False)):
        loss = BoundaryLoss(sigmoid=True, absent=absent, spacing=1.0, include_background=False)
        slope = torch.autograd.grad(loss(logits, torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)), logits)[0]
        assert (slope[blob] > 0).all() == pushed
        assert (slope[blob] == 0).all() != pushed
    slope = torch.autograd.grad(BoundaryLoss(softmax=True, spacing=1.0)(logits, labels), logits)[0]
    assert (slope[blob] > 0).all()
    dense = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    theirs = MonaiBoundaryLoss(sigmoid=True, include_background=False)(logits, dense)
    assert (torch.autograd.grad(theirs, logits)[0][blob] == 0).all()


def test_spacing_comes_in_any_list():
    logits, labels = torch.randn(1, 2, 6, 5), torch.randint(0, 2, (1, 6, 5))
    values = [
        CompoundLoss([BoundaryLoss(softmax=True, spacing=form([0.5, 2.0]))])(logits, labels).item()
        for form in (list, tuple, np.array, torch.tensor)
    ]
    assert values == [values[0]] * 4


def test_spacing_comes_from_the_affine_of_each_sample():
    logits, labels = torch.randn(2, 2, 6, 5, 4), torch.randint(0, 2, (2, 1, 6, 5, 4))
    loss = BoundaryLoss(softmax=True)
    given = [
        BoundaryLoss(softmax=True, spacing=mm)(logits[b : b + 1], labels[b : b + 1]).item()
        for b, mm in enumerate([(0.5, 1.0, 3.0), (2.0, 2.0, 1.0)])
    ]
    for b, mm in enumerate([(0.5, 1.0, 3.0), (2.0, 2.0, 1.0)]):
        turned = affine(*mm) @ torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        target = MetaTensor(labels[b : b + 1], affine=affine(*mm))
        assert loss(logits[b : b + 1], target).item() == pytest.approx(given[b])
        in_voxels = BoundaryLoss(softmax=True, spacing=(mm[1], mm[0], mm[2]))(logits[b : b + 1], labels[b : b + 1])
        target = MetaTensor(labels[b : b + 1], affine=turned)
        assert loss(logits[b : b + 1], target).item() == pytest.approx(in_voxels.item())
    # a sagittal slice of a volume: its axes are the patient's second and third
    slice_affine = torch.tensor([[0.0, 0, 2, 0], [0.5, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 1]])
    in_plane = BoundaryLoss(softmax=True, spacing=(0.5, 3.0))(logits[..., 0], labels[..., 0])
    assert loss(logits[..., 0], MetaTensor(labels[..., 0], affine=slice_affine)).item() == pytest.approx(
        in_plane.item()
    )
    both = MetaTensor(labels, affine=torch.stack([affine(0.5, 1.0, 3.0), affine(2.0, 2.0, 1.0)]))
    assert loss(logits, both).item() == pytest.approx(sum(given) / 2)


def test_warns_once_where_no_spacing_is_known():
    logits, labels = torch.randn(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
    loss = BoundaryLoss(softmax=True)
    with pytest.warns(UserWarning, match="no affine"):
        value = loss(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss(logits, labels) == value
        assert BoundaryLoss(softmax=True, spacing=1.0)(logits, labels) == value
        BoundaryLoss(softmax=True)(logits, {"label": labels, "distance": torch.zeros(1, 2, 4, 4)})


def test_a_given_map_gives_what_the_computed_one_gives():
    logits, labels = torch.randn(2, 3, 6, 5, 4), torch.randint(0, 3, (2, 1, 6, 5, 4))
    phi = signed_distance(labels, 3, 1.5)
    loss = BoundaryLoss(softmax=True, spacing=1.5)
    assert loss(logits, {"label": labels, "distance": phi}).item() == pytest.approx(loss(logits, labels).item())
    assert loss(logits, {"label": labels, "distance": phi.half()}).item() == pytest.approx(
        loss(logits, labels).item(), rel=1e-3
    )


@pytest.mark.parametrize("there", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", ["voxels", "distance"])
def test_ignored_voxels_do_not_count(there, normalize):
    logits, labels = torch.randn(1, 2, 8, dtype=torch.float64), torch.randint(0, 2, (1, 8))
    phi = torch.randn(1, 2, 8, dtype=torch.float64)
    loss = BoundaryLoss(softmax=True, ignore_index=255, normalize=normalize)
    value = loss(logits[..., :5], {"label": labels[:, :5], "distance": phi[..., :5]})
    labels[:, 5:] = 255
    phi[..., 5:] = there
    assert loss(logits, {"label": labels, "distance": phi}).item() == pytest.approx(value.item())
    labels[:] = 255
    logits.requires_grad_()
    loss(logits, {"label": labels, "distance": phi}).backward()
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("kind", ["one channel", "regions", "a class"])
def test_ignored_voxels_lie_outside_of_all_classes_in_a_computed_map(kind):
    inside = torch.zeros(1, 1, 9)
    inside[..., 2:5] = 1
    if kind == "one channel":
        ignore_index, label, clean, flags = 255, inside.clone(), inside, {"sigmoid": True}
    elif kind == "regions":
        clean = torch.cat([inside, inside.roll(1, 2)], 1)
        ignore_index, label, flags = 255, clean.clone(), {"sigmoid": True}
    else:
        label = inside[:, 0].long()
        ignore_index, flags = 2, {"softmax": True}
        clean = torch.cat([1 - inside, inside, 0 * inside], 1)
        clean[..., 7:] = 0
    label[..., 7:] = ignore_index
    loss = BoundaryLoss(ignore_index=ignore_index, spacing=1.0, **flags)
    logits = torch.randn(clean.shape)
    expected = loss(logits, {"label": label, "distance": signed_distance(clean)})
    assert loss(logits, label).item() == pytest.approx(expected.item())


@pytest.mark.filterwarnings("ignore:BoundaryLoss")
def test_compiles():
    logits, labels = torch.randn(2, 3, 6, 5, 4), torch.randint(0, 3, (2, 1, 6, 5, 4))
    loss = BoundaryLoss(softmax=True, ignore_index=2)
    compiled = torch.compile(loss, backend="aot_eager")
    with_affine = MetaTensor(labels, affine=affine(0.5, 1.0, 3.0))
    for target in (labels, with_affine, {"label": labels, "distance": torch.randn_like(logits)}):
        assert torch.equal(compiled(logits, target), loss(logits, target))


def test_compound_shares_the_pass_and_passes_the_label_on(monkeypatch):
    from monai_losses_ext.losses import base

    passes = []
    monkeypatch.setattr(
        base, "compute", lambda *args, _original=base.compute: passes.append(args[2]) or _original(*args)
    )
    logits, labels = torch.randn(1, 3, 6, 5, 4), torch.randint(0, 3, (1, 1, 6, 5, 4))
    target = {"label": labels, "distance": signed_distance(labels, 3)}
    parts = [DiceLoss(softmax=True), FocalLoss(use_softmax=True), BoundaryLoss(softmax=True)]
    parts.append(torch.nn.Identity())
    parts[-1].forward = lambda x, y: torch.nn.functional.cross_entropy(x, y[:, 0])
    loss = CompoundLoss(parts, weights=[0.3, 0.2, 0.4, 0.1], names=["a", "b", "c", "d"])
    value = loss(logits, target)
    assert len(passes) == 1 and set(passes[0]) >= {"tp", "focal:2.0", "surface"}
    alone = [part(logits, target) for part in parts[:3]] + [parts[3].forward(logits, labels)]
    expected = sum(w * v for w, v in zip([0.3, 0.2, 0.4, 0.1], alone, strict=True))
    assert value.item() == pytest.approx(expected.item())


def test_two_boundary_losses_have_a_map_each():
    logits, labels = torch.randn(1, 2, 6, 5), torch.randint(0, 2, (1, 1, 6, 5))
    a, b = BoundaryLoss(softmax=True, spacing=1.0), BoundaryLoss(softmax=True, spacing=3.0)
    value = CompoundLoss([a, DiceLoss(softmax=True), b], weights=[1, 0, 1])(logits, labels)
    assert value.item() == pytest.approx(a(logits, labels).item() + b(logits, labels).item())


def test_errors_are_one_line():
    loss = BoundaryLoss(softmax=True)
    with pytest.raises(ValueError, match=r"^target: must be a tensor, or a dictionary with 'label'.*\['distance'\]"):
        loss(torch.zeros(1, 2, 4), {"distance": torch.zeros(1, 2, 4)})
    with pytest.raises(ValueError, match=r"^distance: must have the input's shape \[1, 2, 4\]; got \[1, 1, 4\]"):
        loss(torch.zeros(1, 2, 4), {"label": torch.zeros(1, 4), "distance": torch.zeros(1, 1, 4)})
    ignoring = BoundaryLoss(softmax=True, normalize="distance", ignore_index=255)
    for shape in ((1, 1, 4), (1, 2, 3), (1, 2), (2,), (1, 2, 0)):
        target = {"label": torch.zeros(1, 4), "distance": torch.zeros(shape)}
        with pytest.raises(AssertionError, match=r"^distance: must have the input's shape \[1, 2, 4\]; got"):
            ignoring(torch.zeros(1, 2, 4), target)
    for distance, got in ((torch.zeros(1, 2, 4, device="meta"), "'meta'"), ([1.0], "'list'")):
        with pytest.raises(ValueError, match=rf"^distance: must be a tensor on the input's device, cpu; got {got}\.$"):
            loss(torch.zeros(1, 2, 4), {"label": torch.zeros(1, 4), "distance": distance})
    with pytest.raises(ValueError, match=r"absent: must be one of far, zero, skip; got 'fat'\. Did you mean 'far'\?"):
        get_loss({"type": "boundary", "absent": "fat"})
