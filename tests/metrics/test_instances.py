# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Components and their matching beside flood fill and loops, and what recall, precision and F1 must do."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_losses_ext.metrics import Components, instance_scores, match_components, median_volume, pooled

UNIT = (1.0, 1.0, 1.0)


def components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Return the voxels of each component, by flood fill over all neighbors, in the order of their first voxels."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        inside, border = {start}, [start]
        while border:
            voxel = border.pop()
            for step in itertools.product((-1, 0, 1), repeat=mask.ndim):
                beside = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if beside in left:
                    left.remove(beside)
                    inside.add(beside)
                    border.append(beside)
        found.append(inside)
    return found


def matched(prediction: np.ndarray, reference: np.ndarray, threshold: Fraction) -> tuple[list[int], list[bool], int]:
    """Return the sizes of the reference's components, which were found, and how many were predicted."""
    predicted, true = components(prediction), components(reference)
    pairs = []
    for i, a in enumerate(true):
        for j, b in enumerate(predicted):
            iou = Fraction(len(a & b), len(a | b))
            if iou > threshold:
                pairs.append((-iou, i, j))
    found: dict[int, int] = {}
    for _, i, j in sorted(pairs):
        if i not in found and j not in found.values():
            found[i] = j
    return [len(a) for a in true], [i in found for i in range(len(true))], len(predicted)


def mask(*boxes: tuple[slice, ...], shape: tuple[int, ...] = (20, 12, 8)) -> torch.Tensor:
    """Return a volume in which boxes are true."""
    volume = torch.zeros(shape, dtype=torch.bool)
    for box in boxes:
        volume[box] = True
    return volume


def box(*bounds: tuple[int, int]) -> tuple[slice, ...]:
    return tuple(slice(*pair) for pair in bounds)


LESIONS = (
    box((1, 7), (1, 7), (1, 7)),
    box((9, 12), (1, 4), (1, 3)),
    box((15, 16), (10, 11), (6, 7)),  # a single voxel
    box((9, 11), (8, 11), (2, 5)),
)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from([(5, 6, 4), (3, 9, 2), (7, 8), (1, 6, 6)]),
    density=st.floats(0.05, 0.5),
    kept=st.floats(0.3, 1),
    threshold=st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(3, 4)]),
    seed=st.integers(0, 10**6),
)
def test_matching_equals_loops(
    shape: tuple[int, ...], density: float, kept: float, threshold: Fraction, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.random(shape) < density
    prediction = (reference & (rng.random(shape) < kept)) | (rng.random(shape) < density / 4)
    sizes, found, n_predicted = matched(prediction, reference, threshold)
    spacing = [0.5, 2.0, 3.0][: len(shape)]
    masks = torch.from_numpy(prediction), torch.from_numpy(reference)
    got = match_components(*masks, spacing, float(threshold))
    assert got.volumes_mm3 == pytest.approx([size * math.prod(spacing) for size in sizes])
    assert got.found == found
    assert (got.n_predicted, got.n_reference, got.n_found) == (n_predicted, len(found), sum(found))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), axis=st.integers(0, 2))
def test_turned_or_swapped_masks_give_the_same_counts(seed: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    reference = torch.from_numpy(rng.random((6, 7, 5)) < 0.2)
    prediction = reference ^ torch.from_numpy(rng.random((6, 7, 5)) < 0.03)
    one = match_components(prediction, reference, UNIT)
    turned = match_components(prediction.flip(axis), reference.flip(axis), UNIT)
    swapped = match_components(reference, prediction, UNIT)
    assert (turned.n_found, turned.n_predicted) == (one.n_found, one.n_predicted)
    assert (swapped.n_found, swapped.n_reference, swapped.n_predicted) == (
        one.n_found,
        one.n_predicted,
        one.n_reference,
    )


def scores(prediction: torch.Tensor, reference: torch.Tensor, **arguments: float) -> dict[str, float]:
    found = match_components(prediction, reference, UNIT, **arguments)
    return instance_scores(found, median_volume(found))


@pytest.mark.parametrize("missed", range(len(LESIONS)))
def test_any_missed_lesion_costs_the_same_recall(missed: int) -> None:
    rest = [lesion for i, lesion in enumerate(LESIONS) if i != missed]
    got = scores(mask(*rest), mask(*LESIONS))
    assert (got["recall"], got["precision"]) == (0.75, 1.0)
    assert got["f1"] == pytest.approx(6 / 7)
    # The median is the mean of 18 and 18 voxels: smaller than that is the single voxel.
    assert got["small_recall"] == (0.0 if missed == 2 else 1.0)


def test_a_false_positive_costs_precision_alone() -> None:
    got = scores(mask(*LESIONS, box((15, 19), (1, 4), (1, 4))), mask(*LESIONS))
    assert (got["recall"], got["precision"]) == (1.0, 0.8)


def test_of_a_split_lesion_one_piece_at_most_finds_it() -> None:
    lesion = box((1, 11), (1, 5), (1, 5))
    halves = [box((1, 5), (1, 5), (1, 5)), box((7, 11), (1, 5), (1, 5))]
    assert match_components(mask(*halves), mask(lesion), UNIT) == Components([160.0], [False], 2)
    assert match_components(mask(*halves), mask(lesion), UNIT, 0.3) == Components([160.0], [True], 2)
    uneven = [box((1, 7), (1, 5), (1, 5)), box((8, 11), (1, 5), (1, 5))]
    assert match_components(mask(*uneven), mask(lesion), UNIT) == Components([160.0], [True], 2)
    assert scores(mask(*uneven), mask(lesion)) == {
        "recall": 1.0,
        "precision": 0.5,
        "f1": 2 / 3,
        "small_recall": pytest.approx(math.nan, nan_ok=True),  # the only one is not below its own volume
    }


def test_of_two_merged_lesions_one_at_most_is_found() -> None:
    lesions = [box((1, 8), (1, 5), (1, 5)), box((9, 11), (1, 5), (1, 5))]
    bridged = mask(*lesions, box((8, 9), (1, 5), (1, 5)))
    for threshold in (0.5, 0.0):
        assert match_components(bridged, mask(*lesions), UNIT, threshold).found == [True, False]
    assert match_components(bridged, mask(*lesions), UNIT, 0.8).found == [False, False]


def test_the_threshold_is_passed_not_met() -> None:
    half = mask(box((0, 2), (0, 1), (0, 1)))
    assert not match_components(half, mask(box((0, 4), (0, 1), (0, 1))), UNIT, 0.5).n_found
    assert match_components(half, mask(box((0, 4), (0, 1), (0, 1))), UNIT, 0.49).n_found
    assert not match_components(half, half, UNIT, 1.0).n_found
    apart = mask(box((5, 6), (5, 6), (5, 6)))
    assert not match_components(half, apart, UNIT, 0.0).n_found


def test_corners_join() -> None:
    diagonal = torch.eye(5, dtype=torch.bool)
    assert match_components(diagonal, diagonal, (1, 1)).n_reference == 1
    corner = torch.zeros(2, 2, 2, dtype=torch.bool)
    corner[0, 0, 0] = corner[1, 1, 1] = True
    assert match_components(corner, corner, UNIT).n_reference == 1


def test_empty_masks() -> None:
    empty, full = torch.zeros(3, 4, 5, dtype=torch.bool), torch.ones(3, 4, 5, dtype=torch.bool)
    names = ["recall", "precision", "f1", "small_recall"]
    nan = math.nan
    for prediction, reference, expected in (
        (empty, empty, [nan, nan, nan, nan]),
        (empty, full, [0.0, nan, 0.0, nan]),
        (full, empty, [nan, 0.0, 0.0, nan]),
        (full, full, [1.0, 1.0, 1.0, nan]),
    ):
        got = scores(prediction, reference)
        assert list(got) == names
        assert list(got.values()) == pytest.approx(expected, nan_ok=True)


def test_pooled_components_count_alike_whichever_case_they_are_in() -> None:
    cases = [Components([8.0], [True], 1), Components([1.0, 2.0, 9.0], [False, False, True], 5), Components([], [], 2)]
    whole = pooled(cases)
    assert whole == Components([8.0, 1.0, 2.0, 9.0], [True, False, False, True], 8)
    assert median_volume(whole) == 5.0
    assert instance_scores(whole, 5.0) == {"recall": 0.5, "precision": 0.25, "f1": 1 / 3, "small_recall": 0.0}
    assert pooled([]) == Components([], [], 0)
    assert math.isnan(median_volume(pooled([])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iou_threshold": 1.5}, r"iou_threshold: must be a number between 0 and 1; got 1\.5\."),
        ({"spacing": (1, 1)}, "spacing: must have one value for each of 3 axes"),
        ({"prediction": mask().int()}, "prediction: must be a tensor of booleans"),
        ({"prediction": mask()[1:]}, "prediction: must have the reference's shape"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        match_components(**{"prediction": mask(), "reference": mask(), "spacing": UNIT, **arguments})
