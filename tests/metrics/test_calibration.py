# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Calibration errors beside loops in float64, the loss of the same name, and probabilities that are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_losses_ext.losses import L1ACELoss
from monai_losses_ext.metrics import bin_sums, calibration, calibration_errors


def by_loops(p: np.ndarray, g: np.ndarray, bins: int) -> dict[str, float]:
    """Return both errors, written from their definitions."""
    inside: list[list[int]] = [[] for _ in range(bins)]
    for i, value in enumerate(p.ravel()):
        scaled = np.float32(value) * np.float32(bins)  # the edge of a bin is where float32 has it
        inside[min(max(math.ceil(scaled) - 1, 0), bins - 1)].append(i)
    p, g = p.ravel().astype(np.float64), g.ravel().astype(np.float64)
    gaps = [(abs(p[bin_].mean() - g[bin_].mean()), len(bin_)) for bin_ in inside if bin_]
    return {
        "ece": sum(gap * n for gap, n in gaps) / p.size,
        "ace": sum(gap for gap, _ in gaps) / len(gaps),
    }


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(4, 5, 6), (9, 7), (1, 3, 2)]),
    bins=st.sampled_from([1, 2, 7, 20]),
    edges=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_errors_equal_loops(shape: tuple[int, ...], bins: int, edges: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(shape).astype(np.float32)
    if edges:  # 0, 1 and the edges of bins
        p = (rng.integers(0, bins + 1, shape) / bins).astype(np.float32)
    g = rng.random(shape) < p**2
    got = calibration_errors(bin_sums(torch.from_numpy(p), torch.from_numpy(g), bins))
    assert got == pytest.approx(by_loops(p, g, bins), abs=1e-12)


def test_ace_is_what_the_loss_penalizes() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 3, 9, 8, 7, generator=generator).softmax(1)
    label = torch.randint(0, 3, (2, 1, 9, 8, 7), generator=generator)
    losses = L1ACELoss(bins=15, reduction="none")(p, label)
    for b in range(2):
        for c in range(3):
            ace = calibration_errors(bin_sums(p[b, c], label[b, 0] == c, 15))["ace"]
            assert ace == pytest.approx(losses[b, c].item(), abs=1e-6)


def test_sums_of_cases_add_up_to_those_of_all_their_voxels() -> None:
    generator = torch.Generator().manual_seed(1)
    cases = [(torch.rand(n, 6, generator=generator), torch.rand(n, 6, generator=generator) < 0.3) for n in (3, 40, 11)]
    added = torch.stack([bin_sums(p, g) for p, g in cases]).sum(0)
    torch.testing.assert_close(added, bin_sums(torch.cat([p for p, _ in cases]), torch.cat([g for _, g in cases])))
    assert added.dtype == torch.float64
    assert calibration_errors(added) != pytest.approx(calibration_errors(bin_sums(*cases[1])), abs=1e-3)


def test_probabilities_that_come_true_have_no_error() -> None:
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).repeat_interleave(400)
    reference = torch.arange(2000) % 4 < 4 * levels
    assert calibration_errors(bin_sums(levels, reference)) == {"ece": 0.0, "ace": 0.0}
    # Most voxels are right about the background: ECE sees little of the rest, ACE all of it.
    p = torch.cat([torch.zeros(9900), torch.full((100,), 0.9)])
    reference = torch.arange(10000) >= 9950
    got = calibration_errors(bin_sums(p, reference))
    assert got == pytest.approx({"ece": 0.4 * 0.01, "ace": 0.4 / 2}, abs=1e-7)


def test_many_voxels_are_added_up_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.full((128, 128, 128), 0.1)
    whole = bin_sums(p, torch.zeros_like(p, dtype=torch.bool))
    assert whole[1].sum().item() == pytest.approx(128**3 * p[0, 0, 0].item(), rel=1e-12)
    monkeypatch.setattr(calibration, "CHUNK", 1000)
    torch.testing.assert_close(bin_sums(p[:9], p[:9] > 1), bin_sums(p[:9].flip(0), p[:9] > 1))


def test_voxels_that_are_not_known_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    p, known = torch.rand(5, 6, 7, generator=generator), torch.rand(5, 6, 7, generator=generator) < 0.6
    reference = torch.rand(5, 6, 7, generator=generator) < p
    wrong = torch.where(known, p, 1 - p)
    assert torch.equal(bin_sums(p, reference, known=known), bin_sums(wrong, reference, known=known))
    assert bin_sums(p, reference, known=known)[0].sum() == known.sum()
    errors = calibration_errors(bin_sums(p, reference, known=torch.zeros_like(known)))
    assert all(math.isnan(value) for value in errors.values())


def test_scores_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match=r"^probability: must be between 0 and 1; got \[0\.0, 3\.0\]\."):
        bin_sums(torch.tensor([0.0, 3.0]), torch.tensor([True, False]))
    assert math.isnan(calibration_errors(bin_sums(torch.tensor([math.nan, 0.5]), torch.tensor([True, False])))["ece"])
