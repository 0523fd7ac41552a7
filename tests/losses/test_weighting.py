# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a compound: what learned ones converge to, what they never do, and that they cost nothing."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import monai.losses
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import monai_losses_ext as ours
from monai_losses_ext import CompoundLoss, get_loss
from monai_losses_ext.losses.weighting import (
    DWAWeighting,
    FixedWeighting,
    SoftmaxWeighting,
    UncertaintyWeighting,
    Weighting,
)
from monai_losses_ext.losses.weighting_config import LEARNED, WEIGHTINGS

PLAIN = {"type": "softmax", "floor": 0, "pull": 0}
every_mode = pytest.mark.parametrize("kind", WEIGHTINGS)


class Constant(nn.Module):
    """A term that no network can change; its sign is what the test says it is."""

    def __init__(self, value, non_negative=True):
        super().__init__()
        self.value = value
        self.non_negative = non_negative

    def forward(self, input, target):
        return input.new_tensor(self.value)


def constants(values, **arguments):
    return CompoundLoss([Constant(value) for value in values], **arguments)


def learn(loss, optimizer, steps):
    """Minimize the loss over its weights; return them after every evaluation."""
    seen = []
    x = torch.zeros(1, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        total = loss(x, x)
        assert torch.isfinite(total)
        total.backward()
        seen.append(list(loss.get_weights().values()))
        return total

    for _ in range(steps):
        optimizer.step(closure)
    return [*seen, list(loss.get_weights().values())]


def converge(loss):
    return learn(loss, torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe"), steps=1)


def problem(dtype=torch.float64):
    return torch.randn(2, 3, 5, 6, dtype=dtype, requires_grad=True), torch.randint(0, 3, (2, 5, 6))


def compound(kind="softmax", weights=(0.7, 0.3), **arguments):
    return CompoundLoss([ours.DiceLoss(softmax=True), ours.FocalLoss(use_softmax=True)], weights, weighting=kind)


@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 1.0), (torch.optim.Adam, 0.1)])
def test_a_plain_softmax_drains_into_the_smallest_term(optimizer, lr):
    loss = constants([0.8, 0.05], weighting=PLAIN)
    weights = learn(loss, optimizer(loss.parameters(), lr=lr), steps=60)
    assert weights[0] == [0.5, 0.5]
    assert weights[-1][1] > 0.95
    assert all(later[1] > earlier[1] for earlier, later in itertools.pairwise(weights))


def softmax_optimum(losses, prior, floor, pull):
    """Minimize the total over the weights ``(w, 1 - w)`` themselves, by search."""
    prior = [p / sum(prior) for p in prior]

    def total(w):
        weights = (w, 1 - w)
        kl = sum(p * math.log(p / v) for p, v in zip(prior, weights, strict=True))
        return sum(v * loss for v, loss in zip(weights, losses, strict=True)) + pull * kl

    low, high = max(floor * prior[0], 1e-12), min(1 - floor * prior[1], 1 - 1e-12)
    w = minimize_scalar(total, bounds=(low, high), method="bounded", options={"xatol": 1e-10}).x
    return [w, 1 - w]


def uncertainty_optimum(losses, initial, max_ratio):
    return [
        minimize_scalar(
            lambda w, loss=loss: w * loss + math.log(1 + 1 / (2 * w)),
            bounds=(w0 / max_ratio, w0 * max_ratio),
            method="bounded",
            options={"xatol": 1e-10},
        ).x
        for loss, w0 in zip(losses, initial, strict=True)
    ]


@pytest.mark.parametrize("losses", [(0.8, 0.05), (0.3, 3.0), (0.8, 0.0), (-0.4, 0.9)])
@pytest.mark.parametrize("initial", [(0.5, 0.5), (3.0, 1.0)])
@pytest.mark.parametrize(("floor", "pull"), [(0.1, 1.0), (0.0, 0.5), (0.3, 0.05)])
def test_softmax_learns_its_optimum_above_its_floor(losses, initial, floor, pull):
    loss = constants(losses, weights=initial, weighting={"type": "softmax", "floor": floor, "pull": pull})
    start, weights = list(loss.get_weights().values()), converge(loss)
    prior = [w / sum(initial) for w in initial]
    assert start == pytest.approx(prior, abs=1e-15)
    for step in weights:
        assert sum(step) == pytest.approx(1, abs=1e-12)
        assert all(w >= floor * p for w, p in zip(step, prior, strict=True))
    assert abs(weights[-1][0] - start[0]) > 0.02
    assert weights[-1] == pytest.approx(softmax_optimum(losses, initial, floor, pull), abs=2e-3)


def test_softmax_without_a_floor_has_the_documented_optimum():
    losses, prior, pull = [0.8, 0.05, -0.2], [0.2, 0.5, 0.3], 0.7
    weights = converge(constants(losses, weights=prior, weighting={"type": "softmax", "floor": 0, "pull": pull}))[-1]
    mus = [pull * p / w - loss for p, w, loss in zip(prior, weights, losses, strict=True)]
    assert mus == pytest.approx([mus[0]] * 3, abs=1e-3)


@pytest.mark.parametrize("losses", [(0.8, 0.05), (0.3, 30.0), (0.8, 0.0)])
@pytest.mark.parametrize("initial", [(0.5, 0.5), (3.0, 1.0)])
@pytest.mark.parametrize("max_ratio", [10, 2])
def test_uncertainty_learns_its_optimum_within_its_bounds(losses, initial, max_ratio):
    loss = constants(losses, weights=initial, weighting={"type": "uncertainty", "max_ratio": max_ratio})
    start, weights = list(loss.get_weights().values()), converge(loss)
    assert start == list(initial)
    for step in weights:
        for w, w0 in zip(step, initial, strict=True):
            assert w0 / max_ratio * (1 - 1e-12) <= w <= w0 * max_ratio * (1 + 1e-12)
    assert any(abs(w / w0 - 1) > 0.05 for w, w0 in zip(weights[-1], initial, strict=True))
    assert weights[-1] == pytest.approx(uncertainty_optimum(losses, initial, max_ratio), rel=5e-3)


@every_mode
def test_the_first_step_uses_the_initial_weights(kind):
    x, labels = problem()
    parts = [ours.DiceLoss(softmax=True)(x, labels), ours.FocalLoss(use_softmax=True)(x, labels)]
    loss = compound(kind)
    total = 0.7 * parts[0] + 0.3 * parts[1]
    if kind == "uncertainty":
        total = total + math.log(1 + 1 / 1.4) + math.log(1 + 1 / 0.6)
    assert list(loss.get_weights().values()) == pytest.approx([0.7, 0.3], abs=1e-15)
    assert loss(x, labels).item() == pytest.approx(total.item(), abs=1e-14)
    assert [term.item() for term in loss.last_terms.values()] == [part.item() for part in parts]
    assert not any(term.requires_grad for term in loss.last_terms.values())


@pytest.mark.parametrize("weighting", ["softmax", PLAIN, {"type": "softmax", "floor": 0, "pull": 0.1}])
def test_softmax_stays_finite_with_zero_and_negative_terms(weighting):
    loss = constants([0.0, -0.5, 80.0], weighting=weighting)
    weights = learn(loss, torch.optim.Adam(loss.parameters(), lr=1.0), steps=300)
    assert all(math.isfinite(w) for step in weights for w in step)
    assert all(torch.isfinite(parameter).all() for parameter in loss.parameters())
    if weighting == "softmax":
        assert min(map(min, weights)) >= 0.1 / 3


@pytest.mark.parametrize("lies", [0.0, -0.5])
def test_uncertainty_stays_finite_with_a_zero_term_and_with_one_that_lied_about_its_sign(lies):
    loss = constants([lies, 80.0], weighting="uncertainty")
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    raised, lowered = learn(loss, optimizer, steps=200)[-1]
    assert 4.5 < raised < 5 and 0.05 < lowered < 0.056
    loss.losses[0].value = 80.0  # and it comes back from where it was
    assert 0.05 < learn(loss, optimizer, steps=400)[-1][0] < 0.056
    hasty = constants([lies, 80.0], weighting="uncertainty")
    weights = learn(hasty, torch.optim.SGD(hasty.parameters(), lr=1e6), steps=20)
    assert all(0.05 * (1 - 1e-12) <= w <= 5 * (1 + 1e-12) for step in weights for w in step)


@pytest.mark.parametrize("kind", ["fixed", "dwa"])
def test_a_weight_of_zero_stays_zero(kind):
    x, labels = problem()
    loss = compound(kind, [0.0, 0.5])
    for means in ([1.0, 1.0], [3.0, 1.0], [0.0, 2.0]):
        assert loss(x, labels).item() == pytest.approx(0.5 * loss.last_terms["focal"].item())
        loss.end_epoch(dict(zip(loss.names, means, strict=True)))
        assert loss.get_weights() == {"dice": 0.0, "focal": 0.5}


def dwa_loop(history, initial, temperature):
    """The paper's rule, with initial weights: what the epoch after the history is weighted by."""
    if len(history) < 2:
        return list(initial)
    raised = [w0 * math.exp(min(2, b / a) / temperature) for w0, a, b in zip(initial, *history[-2:], strict=True)]
    return [sum(initial) * w / sum(raised) for w in raised]


@pytest.mark.parametrize(("initial", "temperature"), [((1.0, 1.0, 1.0), 2.0), ((0.5, 0.3, 0.1), 0.7)])
def test_dwa_is_the_papers_loop(initial, temperature):
    loss = constants([0, 0, 0], weights=initial, weighting={"type": "dwa", "temperature": temperature})
    history, moved = [], []
    for epoch in range(8):
        got = list(loss.get_weights().values())
        assert got == (pytest.approx(dwa_loop(history, initial, temperature)) if epoch >= 2 else list(initial))
        moved.append(got != pytest.approx(initial, rel=0.02))
        history.append(((0.4 + torch.rand(3)) * torch.tensor([1.0, 10.0, 0.1])).tolist())
        loss.end_epoch(dict(zip(loss.names, history[-1], strict=True)))
    assert moved == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [(0.0, 0.0, 1), (0.0, 0.3, 2), (0.3, 0.0, 0), (1.0, 9.0, 2), (math.nan, 1.0, 1), (1.0, math.inf, 1)],
)
def test_ratios_that_dwa_has_to_define(before, after, ratio):
    weighting = DWAWeighting([0.6, 0.4])
    weighting.end_epoch([before, 1.0])
    weighting.end_epoch(torch.tensor([after, 1.0]))
    first, second = 0.6 * math.exp(ratio / 2), 0.4 * math.exp(1 / 2)
    expected = [first / (first + second), second / (first + second)]
    assert weighting.effective().tolist() == pytest.approx(expected)
    for w, w0 in zip(expected, [0.6, 0.4], strict=True):
        assert w0 * math.exp(-1) <= w <= w0 * math.exp(1)


def test_means_are_checked_by_name_and_ignored_without_history():
    loss = compound("dwa")
    with pytest.raises(ValueError, match=r"^means: must be one of dice, focal; got 'focl'\. Did you mean 'focal'\?$"):
        loss.end_epoch({"dice": 1.0, "focl": 1.0})
    with pytest.raises(ValueError, match=r"^means: must hold all of dice, focal; got \['dice'\]\.$"):
        loss.end_epoch({"dice": 1.0})
    for kind in ("fixed", *LEARNED):
        loss = compound(kind)
        before = copy.deepcopy(loss.state_dict())
        for mean in (1.0, 2.0, 3.0):
            loss.end_epoch({"focal": mean, "dice": 1.0})
        assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@every_mode
def test_state_survives_a_file_and_goes_on(kind, tmp_path):
    x, labels = problem()

    def go_on(loss, epochs):
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.5) if loss.weighting.learned else None
        for epoch in epochs:
            loss.zero_grad()
            loss(x, labels).backward()
            if optimizer is not None:
                optimizer.step()
            loss.end_epoch({"dice": 1 / (1 + epoch), "focal": 1 + epoch % 2})
        return loss

    loss = go_on(compound(kind), range(4))
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    fresh = compound(kind, [0.5, 0.5])
    fresh.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True), strict=True)
    assert fresh.get_weights() == loss.get_weights()
    assert kind == "fixed" or fresh.get_weights() != pytest.approx(compound(kind).get_weights(), abs=1e-3)
    assert fresh(x, labels).item() == loss(x, labels).item()
    assert go_on(fresh, range(4, 6)).get_weights() == go_on(loss, range(4, 6)).get_weights()
    assert copy.deepcopy(loss).get_weights() == loss.get_weights()


class Operators(TorchDispatchMode):
    """Counts the operators that run, and those whose results are as large as a volume."""

    def __init__(self, volume):
        super().__init__()
        self.volume, self.calls, self.large = volume, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        results = result if isinstance(result, (tuple, list)) else [result]
        self.large[str(func)] += sum(isinstance(r, torch.Tensor) and r.numel() >= self.volume for r in results)
        return result


@every_mode
def test_weights_add_no_pass_and_no_volume(kind):
    x, labels = torch.randn(2, 3, 16, 16, 16, requires_grad=True), torch.randint(0, 3, (2, 16, 16, 16))
    seen = {}
    for name in ("fixed", kind):
        x.grad = None
        with Operators(volume=16**3) as seen[name]:
            compound(name)(x, labels).backward()
        assert seen[name].calls["monai_losses_ext.voxel_sums.default"] == 1
        assert seen[name].calls["monai_losses_ext.voxel_sums_backward.default"] == 1
        assert seen[name].large["monai_losses_ext.voxel_sums_backward.default"] == 1
    assert +seen[kind].large == +seen["fixed"].large


@every_mode
def test_the_networks_gradient_is_the_weighted_sum_of_gradients(kind):
    x, labels = problem()
    loss = compound(kind, [0.6, 0.4])
    if loss.weighting.learned:
        with torch.no_grad():
            next(loss.parameters()).add_(torch.tensor([0.5, -0.3]))
        assert loss.get_weights() != pytest.approx({"dice": 0.6, "focal": 0.4}, abs=0.02)
    (got,) = torch.autograd.grad(loss(x, labels), x)
    weights = list(loss.get_weights().values())
    parts = [torch.autograd.grad(part(x, labels), x)[0] for part in loss.losses]
    torch.testing.assert_close(got, weights[0] * parts[0] + weights[1] * parts[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", LEARNED)
def test_gradcheck_of_logits_and_weights(kind):
    x, labels = problem()
    loss = compound(kind)
    [(name, parameter)] = loss.named_parameters()
    start = (parameter + torch.tensor([0.4, -0.2])).detach().requires_grad_()
    total = lambda x, p: torch.func.functional_call(loss, {name: p}, (x, labels))
    assert torch.autograd.gradcheck(total, (x, start))
    assert total(x, start).dtype == torch.float64


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_the_dtypes(kind, dtype):
    x, labels = problem(dtype)
    loss = compound(kind)
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(x, labels)
    total.backward()
    assert total.dtype == torch.float32 and x.grad.dtype == dtype
    assert total.item() == pytest.approx(loss(x.double(), labels).item(), rel=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
def test_a_training_step_with_scaling_clipping_and_mixed_compounds(kind):
    network = nn.Conv2d(1, 3, 3, padding=1)
    foreign = [nn.CrossEntropyLoss(), monai.losses.DiceLoss(softmax=True, to_onehot_y=True)]
    loss = CompoundLoss([ours.TverskyLoss(softmax=True), foreign[0]], weighting=kind)
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": loss.parameters(), "weight_decay": 0.0}], lr=0.1
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    image, labels = torch.randn(2, 1, 8, 8), torch.randint(0, 3, (2, 8, 8))
    before, values = loss.get_weights(), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            total = loss(network(image), labels)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([*network.parameters(), *loss.parameters()], 1.0)
        scaler.step(optimizer)
        scaler.update()
        values.append(total.item())
    assert values[-1] < values[0]
    assert loss.get_weights() != pytest.approx(before, abs=0.05)
    mixed = CompoundLoss([ours.DiceLoss(softmax=True), foreign[1]], weighting=kind)
    assert torch.isfinite(mixed(network(image), labels[:, None]))


@every_mode
def test_terms_per_voxel_go_with_fixed_weights_alone(kind):
    x, labels = problem()
    loss = CompoundLoss([ours.DiceLoss(softmax=True), ours.CrossEntropyLoss(reduction="none")], weighting=kind)
    if kind == "fixed":
        assert loss(x, labels).shape == labels.shape
    else:
        with pytest.raises(ValueError, match=rf"one number each with weighting '{kind}' .*got \[2, 5, 6\]"):
            loss(x, labels)


@every_mode
def test_compiles_in_one_graph(kind):
    torch.compiler.reset()  # it keeps few versions of a function
    x, labels = problem(torch.float32)
    loss = compound(kind)
    step = torch.compile(lambda x: loss(2 * x, labels), backend="aot_eager", fullgraph=True)
    step(x).backward()
    got = [x.grad, *(parameter.grad for parameter in loss.parameters())]
    x.grad = None
    loss.zero_grad()
    loss(2 * x, labels).backward()
    torch.testing.assert_close(got, [x.grad, *(parameter.grad for parameter in loss.parameters())])
    assert set(loss.last_terms) == {"dice", "focal"}


@pytest.mark.parametrize("kind", [None, *WEIGHTINGS])
def test_learnable_and_the_name_say_the_same(kind):
    parts = [ours.DiceLoss(sigmoid=True), ours.FocalLoss()]
    learned = kind in LEARNED
    assert CompoundLoss(parts, weighting=kind).weighting.learned == learned
    assert len([*CompoundLoss(parts, weighting=kind).parameters()]) == learned
    if kind is None or learned:
        loss = CompoundLoss(parts, learnable=True, weighting=kind)
        assert loss.weighting.kind == (kind or "softmax")
    else:
        with pytest.raises(ValueError, match=rf"weighting: must be softmax or uncertainty where .*; got '{kind}'\.$"):
            CompoundLoss(parts, learnable=True, weighting=kind)


def test_weighting_objects():
    parts = [ours.DiceLoss(sigmoid=True), ours.FocalLoss()]
    for made in (
        FixedWeighting([2, 1]),
        SoftmaxWeighting([0.8, 0.2]),
        UncertaintyWeighting([1, 2]),
        DWAWeighting([1, 2]),
    ):
        loss = CompoundLoss(parts, weighting=made)
        assert loss.weighting is made
        assert list(loss.get_weights().values()) == made.effective().tolist()

    class Largest(Weighting):
        def effective(self):
            return torch.full((2,), torch.nan)

        def combine(self, terms):
            return torch.stack(list(terms)).max()

    x, labels = problem()
    loss = CompoundLoss(compound().losses, weighting=Largest())
    assert loss(x, labels) == max(loss.last_terms.values())


@pytest.mark.parametrize("kind", [*LEARNED, "dwa"])
def test_set_weights_needs_fixed_ones(kind):
    with pytest.raises(ValueError, match=rf"^weights: can be set .* only with fixed weighting; got '{kind}'\.$"):
        compound(kind).set_weights({"dice": 1.0})


def test_losses_that_may_be_negative():
    class Foreign(nn.Module):
        def forward(self, input, target):
            return input.mean()

    dice = ours.DiceLoss(softmax=True)
    known = [nn.CrossEntropyLoss(), monai.losses.GeneralizedDiceLoss(softmax=True)]
    known += [ours.BoundaryLoss(softmax=True), get_loss("hausdorff_dt")]
    declared = Foreign()
    declared.non_negative = True
    for kind in ("uncertainty", "dwa"):
        CompoundLoss([dice, *known, declared], weighting=kind)
        for refused in (Foreign(), monai.losses.BoundaryLoss(softmax=True)):
            with pytest.raises(
                ValueError, match=r"^losses: (foreign|boundary): may be negative, .*non_negative = True"
            ):
                CompoundLoss([dice, refused], weighting=kind)
    for kind in ("fixed", "softmax"):
        assert torch.isfinite(CompoundLoss([dice, Foreign()], weighting=kind)(*problem()))


@pytest.mark.parametrize("smooth_dr", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "loss_class",
    [ours.DiceLoss, ours.TverskyLoss, ours.FocalTverskyLoss, monai.losses.DiceLoss, monai.losses.DiceCELoss],
)
def test_overlap_losses_that_may_be_negative_by_their_smoothing(loss_class, smooth_dr):
    absent = torch.zeros(1, 3, 6, dtype=torch.float64)
    absent[:, 0] = 1
    loss = loss_class(softmax=True, smooth_nr=1.0, smooth_dr=smooth_dr)
    value = loss(60 * absent - 30, absent).item()
    falls_below = smooth_dr < 1 and loss_class is not ours.FocalTverskyLoss
    assert value < -0.5 if falls_below else value > -1e-12
    for kind in ("uncertainty", "dwa"):
        if falls_below:
            with pytest.raises(
                ValueError, match=r"^losses: \w+: may be negative, .*smooth_nr to at most smooth_dr; got"
            ):
                CompoundLoss([loss], weighting=kind)
        else:
            CompoundLoss([loss], weighting=kind)
    loss.non_negative = True  # the user knows better: every class is there
    CompoundLoss([loss], weighting="uncertainty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weighting": "softmx"},
            r"weighting: must be one of fixed, softmax, uncertainty, dwa; got 'softmx'\. Did you",
        ),
        ({"weighting": {"floor": 0.1}}, r"weighting: must be one of fixed, .*; got None"),
        ({"weighting": 3}, r"weighting: must be a name, a dictionary with a type, or a Weighting; got 3"),
        (
            {"weighting": {"type": "softmax", "flor": 0.1}},
            r"weighting: softmax: key: must be one of floor, pull; .*Did you",
        ),
        ({"weighting": {"type": "fixed", "floor": 0.1}}, r"weighting: fixed: takes no options; got 'floor'"),
        ({"weighting": {"type": "softmax", "floor": 1}}, r"weighting: softmax: floor: must be below 1, .*; got 1"),
        (
            {"weighting": {"type": "softmax", "floor": -0.1}},
            r"weighting: softmax: floor: must be a number between 0 and 1",
        ),
        ({"weighting": {"type": "softmax", "pull": "1"}}, r"weighting: softmax: pull: must be a number of at least 0"),
        (
            {"weighting": {"type": "uncertainty", "max_ratio": 1}},
            r"weighting: uncertainty: max_ratio: must be .* above 1",
        ),
        ({"weighting": {"type": "dwa", "temperature": 0}}, r"weighting: dwa: temperature: must be a number above 0"),
        ({"weighting": "dwa", "weights": [0, 0]}, r"weighting: dwa: weights: must hold one above 0"),
        ({"weighting": "softmax", "weights": [1, 0]}, r"weighting: softmax: weights: must be above 0 .*; got \[1, 0\]"),
        ({"learnable": True, "weights": [1, 0]}, r"weighting: softmax: weights: must be above 0"),
        ({"weighting": "uncertainty", "weights": [1, 0]}, r"weighting: uncertainty: weights: must be above 0"),
        ({"learnable": "yes"}, r"learnable: must be true or false; got 'yes'"),
        ({"weighting": FixedWeighting([1, 2, 3])}, r"weighting: an object brings its own weights, one per loss \(2\)"),
        ({"weighting": FixedWeighting([1, 2]), "weights": [1, 2]}, r"weighting: an object brings its own weights"),
    ],
)
def test_errors_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        CompoundLoss([ours.DiceLoss(), ours.FocalLoss()], **arguments)
    assert "\n" not in str(caught.value)


def test_the_config_of_the_documentation_learns():
    config = json.loads(
        """{"loss": {"type": "compound",
                     "components": [{"type": "dice", "weight": 0.5},
                                    {"type": "focal", "weight": 0.3, "alpha": 0.25, "gamma": 2.0},
                                    {"type": "boundary", "weight": 0.2}],
                     "learnable_weights": true}}"""
    )
    for loss in (get_loss(config), get_loss(config["loss"])):
        assert isinstance(loss.weighting, SoftmaxWeighting)
        assert loss.get_weights() == pytest.approx({"dice": 0.5, "focal": 0.3, "boundary": 0.2}, abs=1e-15)
        loss(*problem()).backward()
        assert loss.weighting.theta.grad.all()


def test_learned_weights_stay_equal_on_two_ranks_by_the_hook(tmp_path):
    script = Path(__file__).with_name("weighting_rank.py")
    commands = [[sys.executable, str(script), str(rank), "2", str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        _, errors = rank.communicate(timeout=180)
        assert rank.returncode == 0, errors
    for hook in ("without", "with"):
        first, second = (torch.load(tmp_path / f"{hook}-{rank}.pt", weights_only=True) for rank in range(2))
        for kind, key in (("softmax", "theta"), ("uncertainty", "u")):
            assert torch.equal(first[kind][key], second[kind][key]) == (hook == "with")
            assert not torch.equal(first[kind][key], WEIGHTINGS[kind]([1, 1, 1]).state_dict()[key])
    alone = DWAWeighting([1 / 3] * 3)
    for epoch in range(3):
        alone.end_epoch([1 + 0.5 / (1 + epoch) + i for i in range(3)])  # the mean of both ranks
    torch.testing.assert_close(first["dwa"], dict(alone.state_dict()))
    assert all(torch.equal(second["dwa"][name], value) for name, value in first["dwa"].items())
    assert alone.effective().tolist() != pytest.approx([1 / 3] * 3, rel=1e-3)
