# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""clDice beside its definition on scikit-image's skeletons, and what a gap in a tube costs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_losses_ext.metrics import class_metrics

skimage = pytest.importorskip("skimage.morphology")
SPACING = (1.0, 1.0, 1.0)


def cldice(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...] = SPACING) -> float:
    masks = torch.from_numpy(prediction), torch.from_numpy(reference)
    return class_metrics(*masks, spacing, metrics=["cldice"])["cldice"]


def tube(length: int = 30, radius: int = 2) -> np.ndarray:
    x, y, z = np.ogrid[:length, :11, :13]
    return ((y - 5) ** 2 + (z - 6) ** 2 <= radius**2) & (x >= 2) & (x < length - 2)


def blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a random mask whose components are none that thinning deletes."""
    mask = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > 0.1
    ids, n = ndimage.label(mask, np.ones((3,) * mask.ndim))
    kept = np.unique(ids[skimage.skeletonize(mask).astype(bool)])
    return np.isin(ids, kept) & mask if n else mask


@pytest.mark.parametrize("shape", [(14, 12, 13), (25, 31)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, reference = blobs(rng, shape), blobs(rng, shape)
    lines = [set(map(tuple, np.argwhere(skimage.skeletonize(mask)))) for mask in (prediction, reference)]
    voxels = [set(map(tuple, np.argwhere(mask))) for mask in (prediction, reference)]
    precision = len(lines[0] & voxels[1]) / len(lines[0])
    sensitivity = len(lines[1] & voxels[0]) / len(lines[1])
    assert 0 < precision < 1
    expected = 2 * precision * sensitivity / (precision + sensitivity)
    got = cldice(prediction, reference, SPACING[: len(shape)])
    assert got == pytest.approx(expected, abs=1e-12)
    padded = [np.pad(mask, 3) for mask in (prediction, reference)]
    assert cldice(*padded, SPACING[: len(shape)]) == got


def test_a_thinner_tube_costs_nothing_and_a_gap_its_length() -> None:
    reference = tube(radius=3)
    thin = tube(radius=1)
    assert cldice(thin, reference) == pytest.approx(1, abs=0.05)
    gap = thin.copy()
    gap[10:16] = False
    broken = cldice(gap, reference)
    line = int(skimage.skeletonize(reference).sum())
    assert broken == pytest.approx(2 * (1 - 6 / line) / (2 - 6 / line), abs=0.03)


def test_a_component_that_thinning_deletes_counts() -> None:
    """scikit-image leaves nothing of a box of even width."""
    even = np.zeros((6, 6, 14), bool)
    even[2:4, 2:4, 2:12] = True
    assert not skimage.skeletonize(even).any()
    assert cldice(even, even) == 1.0
    assert cldice(np.roll(even, 3, 0), even) == 0.0


def test_empty_masks() -> None:
    empty, full = np.zeros((6, 7, 8), bool), np.ones((6, 7, 8), bool)
    assert math.isnan(cldice(empty, empty))
    assert cldice(empty, full) == cldice(full, empty) == 0.0


def test_without_scikit_image_a_line_names_the_extra() -> None:
    code = """
import sys
sys.modules["skimage"] = None
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import SegmentationReport
SegmentationReport({"1": "vessel"}, metrics=["dice"])
try:
    SegmentationReport({"1": "vessel"}, metrics=["dice", "cldice"])
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == (
        'cldice: needs scikit-image, not installed here; install with: pip install "monai_losses_ext[maps]"'
    )
