# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Metrics in millimeters against brute force, against geometry done by hand, and with empty masks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from monai_losses_ext.metrics import class_metrics, nan_mean


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a random mask with structure: noise, averaged over neighbors, and some of it at the volume's border."""
    noise = rng.standard_normal(shape)
    for axis in range(len(shape)):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return noise > 1.0


def border(mask: np.ndarray) -> np.ndarray:
    """Return the coordinates of the mask's voxels with a face neighbor outside it, or on the volume's border."""
    found = []
    for voxel in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            beside = voxel.copy()
            beside[axis] += step
            if not 0 <= beside[axis] < mask.shape[axis] or not mask[tuple(beside)]:
                found.append(voxel)
                break
    return np.array(found)


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distance of each point of ``a`` to the nearest of ``b``."""
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(axis=1)


def box_surface(low: np.ndarray, high: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centers and areas of the surface elements of the box of voxels ``low <= v < high``.

    An element lies in each cube between 2 x 2 x 2 voxel centers that the surface crosses, and cuts the cube's edges in
    the middle: a rectangle at a face of the box, a bevel at its edges, a triangle at its corners.
    """
    centers, areas = [], []
    for cell in itertools.product(*(range(a - 1, b) for a, b in zip(low, high, strict=True))):
        crossed = [axis for axis in range(3) if cell[axis] in (low[axis] - 1, high[axis] - 1)]
        x, y, z = spacing
        if len(crossed) == 1:
            area = x * y * z / spacing[crossed[0]]
        elif len(crossed) == 2:
            (along,) = set(range(3)) - set(crossed)
            area = math.hypot(*(spacing[axis] / 2 for axis in crossed)) * spacing[along]
        elif len(crossed) == 3:
            area = np.linalg.norm(np.cross([-x / 2, y / 2, 0], [-x / 2, 0, z / 2])) / 2
        else:
            continue
        centers.append((np.array(cell) + 0.5) * spacing)
        areas.append(area)
    return np.array(centers), np.array(areas)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((9, 7, 5), (1.0, 1.0, 5.0)), ((6, 8, 7), (0.5, 2.0, 1.25)), ((11, 13), (0.7, 3.0))],
)
def test_distances_equal_brute_force_in_mm(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    for tolerance in (0.6, 1.0, 2.5):
        prediction, reference = blob(rng, shape), blob(rng, shape)
        a, b = border(prediction) * np.array(spacing), border(reference) * np.array(spacing)
        there, back = nearest(a, b), nearest(b, a)
        got = class_metrics(
            torch.from_numpy(prediction), torch.from_numpy(reference), spacing, tolerance, use_subvoxels=False
        )
        assert got["hd95"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-4)
        met = (there <= tolerance).sum() + (back <= tolerance).sum()
        assert got["nsd"] == pytest.approx(met / (len(a) + len(b)), abs=1e-6)
        assert got["dice"] == pytest.approx(2 * (prediction & reference).sum() / (prediction.sum() + reference.sum()))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (0.5, 2.0, 1.25), (1.0, 1.0, 1.0)])
def test_subvoxel_nsd_equals_the_geometry_of_boxes(spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(1)
    for tolerance in (0.4, 1.0, 2.1):
        masks, surfaces = [], []
        for _ in range(2):
            low = rng.integers(0, 4, 3)
            high = low + rng.integers(1, 5, 3)
            mask = torch.zeros(8, 8, 8, dtype=torch.bool)
            mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
            masks.append(mask)
            surfaces.append(box_surface(low, high, np.array(spacing)))
        (a, area_a), (b, area_b) = surfaces
        met = area_a[nearest(a, b) <= tolerance].sum() + area_b[nearest(b, a) <= tolerance].sum()
        got = class_metrics(*masks, spacing, tolerance, ["nsd"])["nsd"]
        assert got == pytest.approx(met / (area_a.sum() + area_b.sum()), abs=1e-6)


def test_a_shift_by_one_slice_of_5_mm_is_seen_as_5_mm() -> None:
    n, slices = 20, 10
    reference = torch.zeros(n + 2, n + 2, slices + 3, dtype=torch.bool)
    reference[1:-1, 1:-1, 1 : 1 + slices] = True
    prediction = torch.roll(reference, 1, dims=2)
    # One end of each box lies 5 mm from the other box; of its other end, all but the rim within 1 mm does.
    end = (n - 1) ** 2 + 4 * (n - 1) * math.sqrt(1 + 25) / 2 + 4 * math.sqrt(25 + 25 + 1) / 8
    side = 4 * (n - 1) * 5 + 4 * math.sqrt(2) / 2 * 5
    missed = end + (n - 3) ** 2
    expected_nsd = 1 - missed / (2 * end + (slices - 1) * side)
    got = class_metrics(prediction, reference, (1, 1, 5.0), tolerance_mm=1.0)
    assert got == {"dice": 0.9, "nsd": pytest.approx(expected_nsd, abs=1e-6), "hd95": pytest.approx(5.0)}
    # What MONAI says when nobody tells it the spacing, as its handlers do.
    pair = prediction[None, None], reference[None, None]
    assert compute_surface_dice(*pair, [1.0], include_background=True).item() == 1.0
    assert compute_hausdorff_distance(*pair, include_background=True, percentile=95).item() == 1.0


def test_cropping_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    for margin in (0, 3):  # 0: the structures touch the border of the volume
        pair = [torch.from_numpy(np.pad(blob(rng, (7, 9, 6)), margin))[None, None] for _ in range(2)]
        spacing = [1.0, 0.8, 5.0]
        for subvoxels in (True, False):
            got = class_metrics(pair[0][0, 0], pair[1][0, 0], spacing, 1.0, use_subvoxels=subvoxels)
            whole = compute_surface_dice(
                *pair, [1.0], include_background=True, spacing=spacing, use_subvoxels=subvoxels
            ).item()
            assert got["nsd"] == whole
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        assert got["hd95"] == hd95.item()
        assert got["dice"] == pytest.approx(compute_dice(*pair).item(), abs=1e-6)


def test_empty_masks() -> None:
    empty, full = torch.zeros(3, 4, 12, dtype=torch.bool), torch.ones(3, 4, 12, dtype=torch.bool)
    both = class_metrics(empty, empty, (1.0, 1.0, 1.0))
    assert list(both) == ["dice", "nsd", "hd95"]
    assert all(math.isnan(value) for value in both.values())
    missed = class_metrics(empty, full, (1.0, 1.0, 1.0))
    assert missed == {"dice": 0.0, "nsd": 0.0, "hd95": 13.0}  # 3, 4, 12: a box with a diagonal of 13
    assert class_metrics(full, empty, (2.0, 2.0, 2.0))["hd95"] == 26.0
    assert class_metrics(full, full, (1.0, 1.0, 1.0)) == {"dice": 1.0, "nsd": 1.0, "hd95": 0.0}


def test_only_the_metrics_asked_for() -> None:
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    assert class_metrics(mask, mask, (1, 1, 1), metrics=["dice"]) == {"dice": 1.0}


MASK = torch.ones(2, 3, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": 2 * MASK.int()}, r"prediction: must be a tensor of booleans; got torch\.int32\."),
        ({"reference": MASK.float()}, r"reference: must be a tensor of booleans; got torch\.float32\."),
        ({"prediction": MASK[:1]}, r"prediction: must have the reference's shape \(2, 3, 4\); got \(1, 3, 4\)\."),
        ({"spacing": (1, 1)}, r"spacing: must have one value for each of 3 axes; got \[1\.0, 1\.0\]\."),
        ({"spacing": 1.0}, r"spacing: must be a list of numbers above 0; got 1\.0\."),
        ({"tolerance_mm": None}, r"tolerance_mm: must be a number of at least 0; got None\."),
        ({"metrics": ["dcie"]}, r"metrics: must be one of dice, nsd, hd95, cldice; got 'dcie'\. Did you mean 'dice'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        class_metrics(**{"prediction": MASK, "reference": MASK, "spacing": (1, 1, 1), **arguments})


@pytest.mark.parametrize("spacing", [np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]), [1, 2.0, np.float32(3)]])
def test_a_spacing_of_any_kind_of_list(spacing: Any) -> None:
    assert class_metrics(~MASK, MASK, spacing)["hd95"] == pytest.approx(math.hypot(2 * 1, 3 * 2, 4 * 3))


def test_nan_mean() -> None:
    assert nan_mean([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(nan_mean([math.nan]))
    assert math.isnan(nan_mean([]))
