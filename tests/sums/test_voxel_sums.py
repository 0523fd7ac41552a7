# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The backends against the definition, the definition against loops, and what must hold whatever the backend."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import oracles
import pytest
import torch
from monai.data import MetaTensor
from voxel_problems import problem, terms_of, value_and_gradient

from monai_losses_ext.sums import chunked, voxel_sums
from monai_losses_ext.sums.terms import focal

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
SHAPES = [(7,), (5, 6), (3, 4, 5)]

CASES = [
    case
    for case in product(("softmax", "sigmoid", "none"), ("index", "one_hot", "soft"), (None, 1, 255), (1, 2, 4), SHAPES)
    if case[3] > 1 or (case[1] != "index" and case[0] != "softmax")
]


@pytest.mark.parametrize(("activation", "kind", "ignore", "num_classes", "shape"), CASES)
def test_chunks_equal_the_definition(monkeypatch, activation, kind, ignore, num_classes, shape):
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", 7)  # many chunks, the last one shorter
    data = problem(activation, kind, ignore, num_classes, shape)
    sums, gradient = value_and_gradient(*data, activation, ignore, "chunked")
    expected, expected_gradient = value_and_gradient(*data, activation, ignore, "reference")
    for term in sums:
        torch.testing.assert_close(sums[term], expected[term], rtol=1e-10, atol=1e-10, msg=term)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ignore", [None, 1, 255])
@pytest.mark.parametrize("kind", ["index", "one_hot", "soft"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_several_samples_in_a_chunk_equal_the_definition(monkeypatch, activation, kind, ignore, channels_last):
    x, target, phi = problem(activation, kind, ignore, 3, (4, 5, 6), batch=5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", 3 * 120)  # 2, 2 and 1 sample
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    sums, gradient = value_and_gradient(x, target, phi, activation, ignore, "chunked")
    expected, expected_gradient = value_and_gradient(x, target, phi, activation, ignore, "reference")
    for term in sums:
        torch.testing.assert_close(sums[term], expected[term], rtol=1e-10, atol=1e-10, msg=term)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("threads", "shape", "samples"),
    [
        (2, (2, 3, 32, 48, 32), 2),
        (2, (9, 3, 32, 48, 32), 2),
        (4, (2, 3, 32, 48, 32), 1),  # a sample is enough for four threads
        (64, (32, 2, 64, 64), 32),  # 64 threads have little to do with all of them
        (8, (40, 2, 512, 512), 1),
        (2, (2, 3, 96, 96, 96), 1),
        (2, (0, 3, 8, 8), 1),
        (2, (3, 2, 0, 8), 3),
    ],
)
def test_as_many_samples_in_a_chunk_as_keep_the_threads_busy(monkeypatch, threads, shape, samples):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert chunked._chunk_size(torch.empty(1).expand(shape))[0] == samples


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_lower_precision_against_float64(dtype, activation, kind):
    x, target, phi = problem(activation, kind, None, 3, (9, 8, 7), dtype)
    sums, gradient = value_and_gradient(x, target, phi, activation, None, "chunked")
    expected, expected_gradient = value_and_gradient(x.double(), target, phi, activation, None, "reference")
    tolerance = TOLERANCE[dtype]
    for term, value in sums.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), expected[term], rtol=tolerance, atol=10 * tolerance, msg=term)
    assert gradient.dtype == dtype
    rounding = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < max(tolerance, rounding)


def test_definition_against_loops():
    x = torch.randn(1, 3, 6, dtype=torch.float64)
    labels = torch.tensor([[0, 2, 1, 1, 0, 2]])
    sums = voxel_sums(x, labels, ["tp", "pred", "ref", "ce", "focal:2.0"], backend="reference")
    p = oracles.probabilities(x.tolist(), "softmax")[0]
    for c in range(3):
        g = [float(label == c) for label in labels[0]]
        ones = [1.0] * 6
        tp, fp, fn = oracles.overlap(p[c], g, ones)
        assert sums["tp"][0, c].item() == pytest.approx(tp, abs=1e-12)
        assert (sums["pred"] - sums["tp"])[0, c].item() == pytest.approx(fp, abs=1e-12)
        assert (sums["ref"] - sums["tp"])[0, c].item() == pytest.approx(fn, abs=1e-12)
        assert sums["ce"][0, c].item() == pytest.approx(oracles.focal_softmax(p[c], g, ones, 0.0), abs=1e-12)
        assert sums["focal:2.0"][0, c].item() == pytest.approx(oracles.focal_softmax(p[c], g, ones, 2.0), abs=1e-12)


@pytest.mark.parametrize("kind", ["index", "dense"])
def test_a_large_volume_is_exact(kind):
    p, side = 0.1, 128
    logits = torch.zeros(1, 2, side, side, side)
    logits[:, 1] = math.log(p / (1 - p))
    target = torch.ones(1, 1, side, side, side, dtype=torch.uint8)
    target = target if kind == "index" else torch.cat([1 - target, target], 1)
    sums = voxel_sums(logits, target, ["tp", "pred", "ce", "ref"])
    number = side**3
    assert sums["tp"][0, 1].item() == pytest.approx(p * number, rel=1e-6)
    assert sums["pred"][0].tolist() == pytest.approx([(1 - p) * number, p * number], rel=1e-6)
    assert sums["ce"][0, 1].item() == pytest.approx(-math.log(p) * number, rel=1e-6)
    assert sums["ref"][0].tolist() == [0, number]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradcheck_for_every_term(activation):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels, phi = torch.randint(0, 3, (2, 4)), torch.randn(2, 3, 4, dtype=torch.float64)
    terms = terms_of(activation)
    assert torch.autograd.gradcheck(lambda x: tuple(voxel_sums(x, labels, terms, activation, None, phi).values()), x)


def test_differentiable_twice_by_the_definition_alone():
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 4))

    def overlap(x, backend="reference"):
        sums = voxel_sums(x, labels, ["tp", "ce"], backend=backend)
        return (sums["tp"] ** 2 + sums["ce"]).sum()

    assert torch.autograd.gradgradcheck(overlap, x)
    (gradient,) = torch.autograd.grad(overlap(x, "chunked"), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(overlap)(x.detach()), gradient.detach())
    with pytest.raises(RuntimeError, match="differentiable once; the backend 'reference' is differentiable twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("target_kind", ["index", "dense"])
def test_layouts_give_the_same_numbers(target_kind):
    x = torch.randn(2, 3, 6, 5, 4)
    labels = torch.randint(0, 3, (2, 6, 5, 4))
    target = labels if target_kind == "index" else torch.stack([labels == c for c in range(3)], 1).float()
    expected, gradient = value_and_gradient(x, target, x, "softmax", None, "chunked")
    wide = torch.zeros(2, 3, 6, 5, 8)
    wide[..., ::2] = x
    layouts = [x.to(memory_format=torch.channels_last_3d), wide[..., ::2], MetaTensor(x)]
    for layout in layouts:
        sums, other = value_and_gradient(layout, target, x, "softmax", None, "chunked")
        for term, value in sums.items():
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(other), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradient_of_confident_voxels(gamma):
    """Where p rounds to 1, (1 - p)^(gamma - 1) must not meet a 1 - p of zero or less."""
    x = torch.randn(1, 2, 5000) * 20 + torch.linspace(-60, 60, 5000)
    labels = x.argmax(1)
    gradients = []
    for logits, backend in ((x, "chunked"), (x.double(), "reference")):
        logits = logits.clone().requires_grad_()
        voxel_sums(logits, labels, [focal(gamma)], backend=backend)[focal(gamma)].sum().backward()
        gradients.append(logits.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -3e38, 3e38])
def test_logits_near_the_largest_number(value):
    x = torch.zeros(1, 3, 4)
    x[:, 0] = value
    labels = torch.tensor([[1, 2, 1, 2]]) if value < 0 else torch.zeros(1, 4, dtype=torch.long)
    names = ["pred", "tp", "ce"]
    sums, expected = (voxel_sums(x, labels, names, backend=backend) for backend in ("chunked", "reference"))
    for term in sums:
        torch.testing.assert_close(sums[term], expected[term], rtol=1e-6, atol=1e-6)
    same = voxel_sums(torch.full_like(x, value), labels, ["pred"])["pred"]
    torch.testing.assert_close(same, torch.full((1, 3), 4 / 3))


def test_expanded_logits_get_a_gradient():
    row = torch.randn(1, 3, 1, 5, requires_grad=True)
    voxel_sums(row.expand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5)), ["ce"])["ce"].sum().backward()
    assert row.grad is not None and row.grad.abs().sum() > 0


def test_ignored_voxels_may_hold_anything():
    x, labels = torch.randn(1, 3, 8), torch.tensor([[0, 1, 2, 255, 1, 255, 0, 2]])
    broken = x.clone()
    broken[..., labels[0] == 255] = torch.tensor([float("nan"), float("inf")])
    expected, gradient = value_and_gradient(x, labels, x, "softmax", 255, "chunked")
    sums, other = value_and_gradient(broken, labels, x, "softmax", 255, "chunked")
    assert all(torch.equal(sums[term], expected[term]) for term in sums)
    assert torch.equal(gradient, other)
    assert not gradient[..., labels[0] == 255].any()


def test_the_same_bits_every_time_and_under_autocast():
    x, target, phi = problem("softmax", "index", None, 3, (20, 20, 20), torch.float32)
    first = value_and_gradient(x, target, phi, "softmax", None, "chunked")
    with torch.autocast("cpu", torch.bfloat16):
        second = value_and_gradient(x, target, phi, "softmax", None, "chunked")
    assert all(torch.equal(first[0][term], second[0][term]) for term in first[0])
    assert torch.equal(first[1], second[1])


def test_the_input_is_left_alone_and_may_be_used_twice():
    x, target, _ = problem("softmax", "index", None, 3, (6, 6), torch.float32)
    before, x = x.clone(), x.requires_grad_()
    (voxel_sums(x, target, ["tp"])["tp"].sum() + voxel_sums(x, target, ["tp"])["tp"].sum()).backward()
    assert torch.equal(x.detach(), before)
    once = x.detach().clone().requires_grad_()
    voxel_sums(once, target, ["tp"])["tp"].sum().backward()
    torch.testing.assert_close(x.grad, 2 * once.grad)


def test_extreme_logits_stay_finite():
    x = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], requires_grad=True)
    sums = voxel_sums(x, torch.tensor([[1, 1, 0]]), ["tp", "pred", "ce", "focal:0.5", "focal:2.0"])
    sum(value.sum() for value in sums.values()).backward()
    assert all(torch.isfinite(value).all() for value in sums.values())
    assert torch.isfinite(x.grad).all()
    assert sums["ce"][0, 1].item() == pytest.approx(2e4)


@pytest.mark.parametrize("below", [60.0, 75.0, 90.0, 110.0, 300.0])
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_the_logarithm_of_a_probability_that_float32_can_hardly_hold_or_not(below, ignore_index):
    x = torch.randn(1, 3, 50)
    labels = torch.randint(0, 3, (1, 50))
    x[0, :, 7] = torch.tensor([0.0, -below, -1.0])
    labels[0, 7] = 1
    if ignore_index is not None:
        labels[0, ::5] = ignore_index
    names = ["tp", "ce", "focal:2.0", "focal:0.5"]
    results = []
    for logits, backend in ((x, "chunked"), (x.double(), "reference")):
        logits = logits.clone().requires_grad_()
        sums = voxel_sums(logits, labels, names, ignore_index=ignore_index, backend=backend)
        sum(sums.values()).sum().backward()
        results.append(({name: value.detach().double() for name, value in sums.items()}, logits.grad.double()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_class_ruled_out_by_minus_infinity_counts_for_nothing(backend):
    x, labels = torch.randn(2, 2, 7, dtype=torch.float64), torch.randint(0, 2, (2, 7))
    ruled_out = torch.cat([x, torch.full((2, 1, 7), -math.inf, dtype=torch.float64)], 1)
    terms = ["tp", "pred", "ce", "focal:2.0"]
    gradients = []
    for logits in (x.requires_grad_(), ruled_out.requires_grad_()):
        sums = voxel_sums(logits, labels, terms, backend=backend)
        gradients.append(torch.autograd.grad(sum(sums[term][:, :2].sum() for term in terms), logits)[0])
        for term in terms:
            expected = voxel_sums(x, labels, [term])[term]
            torch.testing.assert_close(sums[term][:, :2], expected)
            assert not sums[term][:, 2:].any()
    torch.testing.assert_close(gradients[1][:, :2], gradients[0])
    assert not gradients[1][:, 2].any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3)])
def test_no_voxels_sum_up_to_zero(shape):
    x = torch.zeros(shape, requires_grad=True)
    sums = voxel_sums(x, torch.zeros(shape[0], *shape[2:], dtype=torch.long), ["tp", "ce", "count"])
    for value in sums.values():
        assert value.shape == shape[:2]
        assert not value.any()
    sum(value.sum() for value in sums.values()).backward()
    assert x.grad.shape == shape


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux tells it")
def test_peak_memory_is_little_more_than_the_gradient():
    measure = ["-W", "ignore", "-m", "monai_losses_ext.benchmark.memory", "dice_ce", "2x3x96^3", "ours", "0"]
    copies = float(subprocess.run([sys.executable, *measure], capture_output=True, text=True, check=True).stdout)
    assert 1 <= copies < 1.35  # one copy of the logits is the gradient


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 3, 7]]), r"target: index labels must lie in 0\.\.2 .* got \[3, 7\]\."),
        (torch.tensor([[0, -1, 1]]), r"got \[-1\]\. A label that should not count goes into ignore_index\."),
        (torch.tensor([[0.0, 0.5, 1.0]]), r"must be whole numbers; got 0\.5\. Were labels resampled"),
        (torch.tensor([[0.0, math.nan, 1.0]]), r"must be whole numbers; got nan\."),
        (torch.tensor([[0.0, math.inf, 1.0]]), r"must lie in 0\.\.2 .* got \[inf\]\."),
        (torch.tensor([[[0, 255, 1]] * 3]), r"target: dense labels .* got 255.*\. A mask of 0 and 255"),
        (torch.tensor([[[0.0, -1.0, 1.0]] * 3]), r"dense labels .* must be 0, 1 or between; got -1\.0\."),
        (torch.tensor([[[0.0, math.nan, 1.0]] * 3]), r"dense labels .* got nan\."),
        ([[0, 1, 2]], r"target: must be a tensor; got 'list'\."),
        (torch.tensor([[0, 1]]), r"target: must be \[B, \*S\].*input's shape \[1, 3, 3\]; got \[1, 1, 2\]\."),
    ],
)
def test_a_wrong_target_is_named_in_one_line(backend, labels, message):
    with pytest.raises(ValueError, match=message) as caught:
        voxel_sums(torch.zeros(1, 3, 3), labels, ["tp"], backend=backend)
    assert "\n" not in str(caught.value)


def test_a_voxel_to_ignore_may_hold_what_is_no_dense_label():
    mask = torch.tensor([[[0.0, 255.0, 1.0]]])
    assert voxel_sums(torch.zeros(1, 1, 3), mask, ["ref"], "sigmoid", ignore_index=255)["ref"].item() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms_": ["tpp"]}, "Did you mean 'tp'"),
        ({"terms_": []}, "terms: must name at least one of tp, "),
        ({"terms_": ["focal"]}, "a number of at least 0, as in 'focal:2.0'; got 'focal'"),
        ({"terms_": ["focal:two"]}, "a number of at least 0, as in 'focal:2.0'; got 'focal:two'"),
        ({"terms_": ["focal:-1"]}, "a number of at least 0"),
        ({"terms_": ["tp:2"]}, "must be one of focal, focal_neg"),
        ({"terms_": ["tp:"]}, "must be one of focal, focal_neg"),
        ({"terms_": ["ce_neg"]}, "sigmoid only"),
        ({"terms_": ["ce"], "activation": "none"}, "needs logits"),
        ({"terms_": ["surface"]}, "needs a signed distance map"),
        ({"terms_": ["tp"], "activation": "softmx"}, "Did you mean 'softmax'"),
        ({"terms_": ["tp"], "backend": "cuda"}, "backend: must be one of"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        voxel_sums(torch.zeros(1, 3, 3), torch.zeros(1, 3, dtype=torch.long), **arguments)


def test_a_target_that_requires_a_gradient_is_refused():
    with pytest.raises(ValueError, match="must not require a gradient"):
        voxel_sums(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, requires_grad=True), ["tp"])


def test_a_distance_map_that_requires_a_gradient_or_lies_elsewhere_is_refused():
    x, labels = torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="^distance: must not require a gradient"):
        voxel_sums(x, labels, ["surface"], distance=torch.zeros(1, 2, 3, requires_grad=True))
    with pytest.raises(ValueError, match="^distance: must be on the input's device, cpu; got 'meta'"):
        voxel_sums(x, labels, ["surface"], distance=torch.zeros(1, 2, 3, device="meta"))
