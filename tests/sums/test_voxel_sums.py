# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The backends against the definition, the definition against loops, and what must hold whatever the backend."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from monai.data import MetaTensor
from voxel_problems import problem, terms_of, value_and_gradient

from monai_losses_ext.sums import terms, voxel_sums
from monai_losses_ext.sums.api import HAS_NUMBA
from monai_losses_ext.sums.terms import focal

# What runs on this machine's CPU, whatever auto would choose; the table of parity is in test_parity.py.
CPU = ["chunked", "numba"] if HAS_NUMBA else ["chunked"]


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


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_a_large_volume_is_exact(kind, backend):
    p, side = 0.1, 128
    logits = torch.zeros(1, 2, side, side, side)
    logits[:, 1] = math.log(p / (1 - p))
    target = torch.ones(1, 1, side, side, side, dtype=torch.uint8)
    target = target if kind == "index" else torch.cat([1 - target, target], 1)
    sums = voxel_sums(logits, target, ["tp", "pred", "ce", "ref"], backend=backend)
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
    assert torch.autograd.gradcheck(
        lambda x: tuple(voxel_sums(x, {"label": labels, "distance": phi}, terms, activation).values()), x
    )


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


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("target_kind", ["index", "dense"])
def test_layouts_give_the_same_numbers(target_kind, backend):
    x = torch.randn(2, 3, 6, 5, 4)
    labels = torch.randint(0, 3, (2, 6, 5, 4))
    target = labels if target_kind == "index" else torch.stack([labels == c for c in range(3)], 1).float()
    expected, gradient = value_and_gradient(x, target, x, "softmax", None, backend)
    wide = torch.zeros(2, 3, 6, 5, 8)
    wide[..., ::2] = x
    layouts = [x.to(memory_format=torch.channels_last_3d), wide[..., ::2], MetaTensor(x)]
    for layout in layouts:
        sums, other = value_and_gradient(layout, target, x, "softmax", None, backend)
        for term, value in sums.items():
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(other), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradient_of_confident_voxels(gamma, backend):
    """Where p rounds to 1, (1 - p)^(gamma - 1) must not meet a 1 - p of zero or less."""
    x = torch.randn(1, 2, 5000) * 20 + torch.linspace(-60, 60, 5000)
    labels = x.argmax(1)
    gradients = []
    for logits, which in ((x, backend), (x.double(), "reference")):
        logits = logits.clone().requires_grad_()
        voxel_sums(logits, labels, [focal(gamma)], backend=which)[focal(gamma)].sum().backward()
        gradients.append(logits.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -3e38, 3e38])
def test_logits_near_the_largest_number(value, backend):
    x = torch.zeros(1, 3, 4)
    x[:, 0] = value
    labels = torch.tensor([[1, 2, 1, 2]]) if value < 0 else torch.zeros(1, 4, dtype=torch.long)
    names = ["pred", "tp", "ce"]
    sums, expected = (voxel_sums(x, labels, names, backend=backend) for backend in (backend, "reference"))
    for term in sums:
        torch.testing.assert_close(sums[term], expected[term], rtol=1e-6, atol=1e-6)
    same = voxel_sums(torch.full_like(x, value), labels, ["pred"])["pred"]
    torch.testing.assert_close(same, torch.full((1, 3), 4 / 3))


def test_expanded_logits_get_a_gradient():
    row = torch.randn(1, 3, 1, 5, requires_grad=True)
    voxel_sums(row.expand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5)), ["ce"])["ce"].sum().backward()
    assert row.grad is not None and row.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", CPU)
def test_ignored_voxels_may_hold_anything(backend):
    x, labels = torch.randn(1, 3, 8), torch.tensor([[0, 1, 2, 255, 1, 255, 0, 2]])
    broken = x.clone()
    broken[..., labels[0] == 255] = torch.tensor([float("nan"), float("inf")])
    expected, gradient = value_and_gradient(x, labels, x, "softmax", 255, backend)
    sums, other = value_and_gradient(broken, labels, x, "softmax", 255, backend)
    assert all(torch.equal(sums[term], expected[term]) for term in sums)
    assert torch.equal(gradient, other)
    assert not gradient[..., labels[0] == 255].any()


@pytest.mark.parametrize("backend", CPU)
def test_the_same_bits_every_time_and_under_autocast(backend):
    x, target, phi = problem("softmax", "index", None, 3, (20, 20, 20), torch.float32)
    first = value_and_gradient(x, target, phi, "softmax", None, backend)
    with torch.autocast("cpu", torch.bfloat16):
        second = value_and_gradient(x, target, phi, "softmax", None, backend)
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


@pytest.mark.parametrize("backend", CPU)
def test_extreme_logits_stay_finite(backend):
    x = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], requires_grad=True)
    names = ["tp", "pred", "ce", "focal:0.5", "focal:2.0"]
    sums = voxel_sums(x, torch.tensor([[1, 1, 0]]), names, backend=backend)
    sum(value.sum() for value in sums.values()).backward()
    assert all(torch.isfinite(value).all() for value in sums.values())
    assert torch.isfinite(x.grad).all()
    assert sums["ce"][0, 1].item() == pytest.approx(2e4)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("below", [60.0, 75.0, 90.0, 110.0, 300.0])
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_the_logarithm_of_a_probability_that_float32_can_hardly_hold_or_not(below, ignore_index, backend):
    x = torch.randn(1, 3, 50)
    labels = torch.randint(0, 3, (1, 50))
    x[0, :, 7] = torch.tensor([0.0, -below, -1.0])
    labels[0, 7] = 1
    if ignore_index is not None:
        labels[0, ::5] = ignore_index
    names = ["tp", "ce", "focal:2.0", "focal:0.5"]
    results = []
    for logits, which in ((x, backend), (x.double(), "reference")):
        logits = logits.clone().requires_grad_()
        sums = voxel_sums(logits, labels, names, ignore_index=ignore_index, backend=which)
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


@pytest.mark.parametrize("backend", [*CPU, "reference"])
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
        ([[0, 1, 2]], r"target: must be a tensor, or a dictionary with 'label' .*; got 'list'\."),
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
        voxel_sums(x, {"label": labels, "distance": torch.zeros(1, 2, 3, requires_grad=True)}, ["surface"])
    with pytest.raises(ValueError, match="^distance: must be a tensor on the input's device, cpu; got 'meta'"):
        voxel_sums(x, {"label": labels, "distance": torch.zeros(1, 2, 3, device="meta")}, ["surface"])


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_a_label_of_64_bits_does_not_wrap(backend):
    with pytest.raises(ValueError, match=r"got \[4294967297\]"):
        voxel_sums(torch.zeros(1, 3, 3), torch.tensor([[0, 2**32 + 1, 1]]), ["tp"], backend=backend)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_one_broken_logit_reaches_the_sums_that_the_definition_lets_it(backend, activation):
    labels = torch.randint(0, 3, (2, 3000))
    x = torch.randn(2, 3, 3000)
    x[1, 2, 1234] = math.nan
    results = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        sums = voxel_sums(
            leaf, labels, [*terms_of(activation)[:7], "ce", "logp", "focal:2.0"], activation, backend=name
        )
        total = sum(value.sum() for value in sums.values() if value.requires_grad)
        results.append((sums, torch.autograd.grad(total, leaf)[0]))
    (mine, gradient), (expected, expected_gradient) = results
    for term, value in mine.items():
        assert torch.equal(value.isnan(), expected[term].isnan()), term
        torch.testing.assert_close(value, expected[term], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(gradient.isnan(), expected_gradient.isnan())
    assert not gradient[0].isnan().any()
    assert gradient[1].isnan().sum() == (3 if activation == "softmax" else 1)


@pytest.mark.parametrize("backend", CPU)
def test_a_class_ruled_out_where_it_is_labeled_costs_the_largest_number_and_pulls_nowhere(backend):
    x, labels = torch.randn(1, 3, 5), torch.tensor([[0, 1, 2, 1, 0]])
    x[0, 1, 3] = -math.inf
    results = []
    for name in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        ce = voxel_sums(leaf, labels, ["ce"], backend=name)["ce"]
        results.append((ce.detach(), torch.autograd.grad(ce.sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0][0, 1] >= torch.finfo(torch.float32).max
    assert not results[0][1][..., 3].any()


def test_a_new_term_runs_everywhere_on_its_first_day(monkeypatch):
    """Terms are defined in terms.py alone; kernels decline what they do not know, and the chunks compute it."""
    values = terms.voxel_values

    def with_cubes(names, activation, logits, *others):
        yield from values([name for name in names if name != "pred_cubed"], activation, logits, *others)
        yield "pred_cubed", torch.softmax(logits, 1) ** 3

    monkeypatch.setattr(terms, "PLAIN_TERMS", (*terms.PLAIN_TERMS, "pred_cubed"))
    monkeypatch.setattr(terms, "voxel_values", with_cubes)
    x, labels = torch.randn(2, 3, 400, requires_grad=True), torch.randint(0, 3, (2, 400))
    sums = voxel_sums(x, labels, ["tp", "pred_cubed"])
    expected = (x.softmax(1) ** 3).sum(2)
    torch.testing.assert_close(sums["pred_cubed"], expected)
    mine, right = (torch.autograd.grad(value.square().sum(), x)[0] for value in (sums["pred_cubed"], expected))
    torch.testing.assert_close(mine, right)
