# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Sums over regions, bins and skeletons, and of cases annotated in part, beside loops over volumes in float64."""

from __future__ import annotations

import math

import pytest
import torch

from monai_losses_ext.sums import Target, voxel_sums
from monai_losses_ext.sums.api import HAS_NUMBA

BACKENDS = ["reference", "chunked", *["numba"] * HAS_NUMBA]
REGION_TERMS = ["region_tp", "region_pred", "region_ref", "region_ce", "region_count"]
SHAPE = (5, 6, 7)


def volumes(num_classes=4, dtype=torch.float64, seed=0):
    """Return logits, labels, weights (some 0), regions and a skeleton."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(2, num_classes, *SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (2, 1, *SHAPE), generator=generator)
    weight = torch.rand(2, 1, *SHAPE, generator=generator) * (torch.rand(2, 1, *SHAPE, generator=generator) < 0.8)
    regions = torch.randint(0, 6, (2, num_classes - 1, *SHAPE), generator=generator)
    skeleton = labels * (torch.rand(2, 1, *SHAPE, generator=generator) < 0.3)
    return x.to(dtype), labels, weight, regions, skeleton


def probabilities(x, activation):
    return x.softmax(1) if activation == "softmax" else x.sigmoid()


def one_hot(labels, num_classes):
    return torch.stack([labels[:, 0] == c for c in range(num_classes)], 1).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_regions_are_sums_over_their_voxels(backend, activation, dtype):
    backend = "auto" if backend == "numba" and dtype == torch.float64 else backend
    x, labels, weight, regions, _ = volumes(dtype=dtype)
    g = one_hot(labels, 4)
    target = {"label": labels if activation == "softmax" else g, "weight": weight, "regions": regions}
    leaf = x.clone().requires_grad_()
    sums = voxel_sums(leaf, target, [*REGION_TERMS, "ce", "tp"], activation, backend=backend)
    slopes = torch.rand(5, 2, 4, 6, dtype=torch.float64)
    value = sum((sums[term] * slope).sum() for term, slope in zip(REGION_TERMS, slopes, strict=True)) + sums["ce"].sum()
    wide = x.double().requires_grad_()
    p = probabilities(wide, activation)
    ce = -(g * wide.log_softmax(1)).sum(1) if activation == "softmax" else None
    expected = torch.zeros(5, 2, 4, 6, dtype=torch.float64)
    for b in range(2):
        for c in range(1, 4):
            own = (
                ce[b]
                if ce is not None
                else torch.nn.functional.binary_cross_entropy(p[b, c], g[b, c], reduction="none")
            )
            for r in range(6):
                m = weight[b, 0].double() * (regions[b, c - 1] == r)
                values = (m * p[b, c] * g[b, c], m * p[b, c], m * g[b, c], m * own, m)
                expected[:, b, c, r] = torch.stack([value.sum() for value in values])
    rounding = 1e-9 if dtype == torch.float64 else 1e-5
    for term, right in zip(REGION_TERMS, expected, strict=True):
        assert sums[term].shape == (2, 4, 6)
        torch.testing.assert_close(sums[term].double(), right, rtol=rounding, atol=10 * rounding)
    total = (weight.double() * -(g * wide.log_softmax(1))).sum() if activation == "softmax" else (
        weight.double() * -(g * p.log())).sum()  # fmt: skip
    (right,) = torch.autograd.grad((expected * slopes).sum() + total, wide)
    (mine,) = torch.autograd.grad(value, leaf)
    assert (mine.double() - right).norm() <= max(rounding, torch.finfo(dtype).eps) * right.norm()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_in_bins_of_the_probability(backend, activation):
    x, labels, weight, *_ = volumes(dtype=torch.float32)
    g = one_hot(labels, 4)
    leaf = x.clone().requires_grad_()
    target = {"label": labels if activation == "softmax" else g, "weight": weight}
    sums = voxel_sums(leaf, target, ["bins:5", "pred"], activation, backend=backend)["bins:5"]
    p = probabilities(x.double().requires_grad_(), activation)
    assert sums.shape == (3, 2, 4, 5)
    m = weight.double().expand_as(p)
    edges = [0, 0.2, 0.4, 0.6, 0.8, 1]
    for i in range(5):
        inside = m * ((p > edges[i]) | (i == 0)) * (p <= edges[i + 1])
        expected = torch.stack([(inside * v).flatten(2).sum(2) for v in (torch.ones_like(p), p, g)])
        torch.testing.assert_close(sums[..., i].double(), expected, rtol=1e-5, atol=1e-4)
    slopes = torch.rand(5)
    (mine,) = torch.autograd.grad((sums[1] * slopes).sum(), leaf)
    wide = x.double().requires_grad_()
    q = probabilities(wide, activation)
    place = ((q * 5).ceil() - 1).clamp(0).long()
    (right,) = torch.autograd.grad((m * q * slopes.double()[place]).sum(), wide)
    torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_regions_and_bins_of_a_large_volume_are_exact(backend):
    p, side = 0.1, 128
    logits = torch.zeros(1, 2, side, side, side)
    logits[:, 1] = math.log(p / (1 - p))
    labels = torch.ones(1, 1, side, side, side, dtype=torch.uint8)
    target = {"label": labels, "regions": torch.ones(1, 1, side, side, side, dtype=torch.int32)}
    sums = voxel_sums(logits, target, [*REGION_TERMS, "bins:5"], backend=backend)
    number = side**3
    ce = -math.log(p) * number
    of_region = [sums[term][0, 1, 1].item() for term in REGION_TERMS]
    assert of_region == pytest.approx([p * number, p * number, number, ce, number], rel=1e-6)
    assert sums["bins:5"][:, 0, 1, 0].tolist() == pytest.approx([number, p * number, number], rel=1e-6)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_along_a_skeleton(backend, is_dense):
    x, labels, weight, _, skeleton = volumes(dtype=torch.float32)
    s = one_hot(skeleton, 4)
    leaf = x.clone().requires_grad_()
    target = {"label": labels, "weight": weight, "skeleton": s.to(torch.uint8) if is_dense else skeleton}
    sums = voxel_sums(leaf, target, ["skeleton", "skeleton_ref", "tp"], backend=backend)
    wide = x.double().requires_grad_()
    expected = (weight.double() * wide.softmax(1) * s).flatten(2).sum(2)
    torch.testing.assert_close(sums["skeleton"].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sums["skeleton_ref"].double(), (weight.double() * s).flatten(2).sum(2), rtol=1e-5, atol=1e-5
    )
    slopes = torch.rand(2, 4)
    (mine,) = torch.autograd.grad((sums["skeleton"] * slopes).sum(), leaf)
    (right,) = torch.autograd.grad((expected * slopes.double()).sum(), wide)
    torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


PARTIAL = torch.tensor([[True, False, True, False], [True, True, True, True]])
TERMS = ["tp", "pred", "pred_sq", "ref", "abs_diff", "ce", "logp", "focal:2.0", "focal:0.5", "count"]


def merged(x, labels, annotated):
    """Return probabilities and reference of each case with the classes without annotation in the background."""
    p, g = x.softmax(1), one_hot(labels, x.shape[1])
    rows = []
    for volume in (p, g):
        out = torch.where(annotated[:, :, None, None, None], volume, 0)
        rest = torch.where(annotated[:, :, None, None, None], 0, volume).sum(1, keepdim=True)
        rows.append(torch.cat([out[:, :1] + rest, out[:, 1:]], 1))
    return rows


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_without_annotation_are_one_with_the_background(backend, dtype, is_dense):
    backend = "auto" if backend == "numba" and dtype == torch.float64 else backend
    x, labels, weight, *_ = volumes(dtype=dtype)
    target = {"label": one_hot(labels, 4) if is_dense else labels, "weight": weight, "annotated": PARTIAL}
    leaf = x.clone().requires_grad_()
    sums = voxel_sums(leaf, target, TERMS, backend=backend)
    wide = x.double().requires_grad_()
    p, g = merged(wide, labels, PARTIAL)
    m, log = weight.double(), p.clamp_min(1e-300).log()
    volumes_ = (p * g, p, p * p, g, (p - g).abs(), -g * log, -log, -g * (1 - p) ** 2 * log,
                -g * (1 - p).clamp_min(1e-300) ** 0.5 * log, torch.ones_like(p))  # fmt: skip
    expected = torch.stack([torch.where(PARTIAL, (m * v).flatten(2).sum(2), 0) for v in volumes_])
    mine = torch.stack([sums[term] for term in TERMS])
    rounding = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mine.double(), expected, rtol=rounding, atol=10 * rounding)
    slopes = torch.rand(len(TERMS), 2, 4, dtype=torch.float64)
    (mine,) = torch.autograd.grad((mine * slopes).sum(), leaf)
    (right,) = torch.autograd.grad((expected * slopes).sum(), wide)
    assert (mine.double() - right).norm() <= rounding * right.norm()
    assert not sums["count"][~PARTIAL].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_that_moves_between_background_and_a_class_without_annotation_changes_nothing(backend):
    x, labels, *_ = volumes(dtype=torch.float32)
    annotated = PARTIAL[:1].repeat(2, 1)
    target = {"label": labels, "annotated": annotated}
    group = x[:, [0, 1, 3]].logsumexp(1, keepdim=True)
    parts = torch.rand(2, 3, *SHAPE).log_softmax(1) + group
    moved = torch.stack([parts[:, 0], parts[:, 1], x[:, 2], parts[:, 2]], 1)
    before, after = (voxel_sums(v, target, TERMS, backend=backend) for v in (x, moved))
    for term in TERMS:
        torch.testing.assert_close(before[term], after[term], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_probabilities_neither_overflow_nor_vanish(backend):
    x = torch.tensor([[[-60.0], [-60.0], [40.0]]], requires_grad=True)
    target = {"label": torch.zeros(1, 1, 1), "annotated": torch.tensor([[1, 0, 1]])}
    ce = voxel_sums(x, target, ["ce"], backend=backend)["ce"]
    torch.testing.assert_close(ce, torch.tensor([[100 - 0.6931472, 0, 0]]))
    (gradient,) = torch.autograd.grad(ce.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[[-0.5], [-0.5], [1.0]]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_of_a_sigmoid_without_annotation_do_not_count(backend):
    x, labels, *_ = volumes(dtype=torch.float32)
    g = one_hot(labels, 4)
    leaf = x.clone().requires_grad_()
    names = ["tp", "pred", "ce", "ce_neg", "count"]
    sums = voxel_sums(leaf, {"label": g, "annotated": ~PARTIAL}, names, "sigmoid", backend=backend)
    whole = voxel_sums(x, g, names, "sigmoid", backend=backend)
    for name in names:
        torch.testing.assert_close(sums[name], torch.where(PARTIAL, 0.0, whole[name]))
    (gradient,) = torch.autograd.grad(sum(sums[name].sum() for name in names[:4]), leaf)
    assert not gradient[PARTIAL].any() and gradient[~PARTIAL].any()


def test_a_label_to_ignore_stays_one_where_its_class_is_not_annotated():
    labels = torch.tensor([[[0, 1, 2, 2]]])
    target = Target.parse({"label": labels, "annotated": torch.tensor([[1, 1, 0]])}, torch.zeros(1, 3, 4))
    assert target.ignoring(2, "softmax").folded("softmax").label.tolist() == [[[0, 1, 2, 2]]]
    assert target.folded("softmax").label.tolist() == [[[0, 1, 0, 0]]]


@pytest.mark.parametrize(("key", "value", "message"), [
    ("annotated", torch.ones(2, 3), r"annotated: must be \[B, C\], here \[1, 3\]; got \[2, 3\]"),
    ("regions", torch.zeros(1, 1, 4), r"regions: must be \[B, C, \*S\], or \[B, C - 1, \*S\] without the background, "
     r"here \[1, 2, 4\] or \[1, 3, 4\]; got \[1, 1, 4\]"),
    ("regions", -torch.ones(1, 2, 4), "regions: ids are whole numbers of at least 0, 0 for no region; got -1"),
    ("skeleton", torch.zeros(1, 2, 4), r"skeleton: must be \[B, 1, \*S\] or \[B, C, \*S\] of the input's shape "
     r"\[1, 3, 4\]; got \[1, 2, 4\]"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused_in_one_line(key, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        voxel_sums(torch.zeros(1, 3, 4), {"label": torch.zeros(1, 1, 4), key: value}, ["tp"])
