# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Small volumes, each made for one difficulty. A case is the image and the label, ``[1, *S]``, voxels of 1 mm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

Volume = NDArray[Any]
Case = dict[str, torch.Tensor]
Phantom = Callable[[np.random.Generator, bool], Case]

SMALL_VOXELS = 63  # lesions below this look different from the larger ones


def lesions(random: np.random.Generator, training: bool) -> Case:
    """Return 20 to 30 balls of radius 1 to 6: the large ones bright, the small ones, which are most, a little dark."""
    grid, label = _grid(48), np.zeros((48,) * 3, np.int16)
    for number in range(1, int(random.integers(21, 32))):
        radius = float(np.exp(random.uniform(0, np.log(6))))
        for _ in range(30):  # tries to find a free place
            squared = _squared(grid, random.uniform(radius + 1, 46 - radius, 3))
            if not label[squared <= (radius + 1.8) ** 2].any():
                label[squared <= radius**2 + 0.01] = number
                break
    sizes = np.bincount(label.ravel(), minlength=2)
    contrast = np.where(sizes < SMALL_VOXELS, -0.8, 0.9)
    contrast[0] = 0
    return _case(contrast[label] * random.uniform(0.8, 1), label > 0, random, noise=0.6)


def tubes(random: np.random.Generator, training: bool) -> Case:
    """Return five winding tubes, about three voxels wide, that fade in places."""
    line, signal = np.zeros((48,) * 3, bool), np.zeros((48,) * 3)
    for _ in range(5):
        place, heading = random.uniform(6, 42, 3), _unit(random.standard_normal(3))
        fading = np.cos(random.uniform(0.1, 0.2) * np.arange(160) + random.uniform(0, 6))
        for step in range(160):  # half a voxel each
            heading = _unit(heading + 0.12 * random.standard_normal(3))
            place = place + 0.5 * heading
            if not all(2 <= x <= 45 for x in place):
                break
            voxel = tuple(np.round(place).astype(int))
            line[voxel] = True
            signal[voxel] = 0.65 + 0.45 * fading[step]
    distance, nearest = ndimage.distance_transform_edt(~line, return_indices=True)
    label = distance <= 1.5
    return _case(np.where(label, signal[tuple(nearest)], 0.0), label, random, noise=0.5)


def faint(random: np.random.Generator, training: bool) -> Case:
    """Return seven balls, of which some hardly differ from what is around them."""
    return _case(*_balls(random, contrasts=(0.1, 0.9)), random, noise=0.5)


def outliers(random: np.random.Generator, training: bool) -> Case:
    """Return one organ, and balls far from it that look like it but are smaller."""
    grid = _grid(40)
    center, radii = random.uniform(14, 26, 3), random.uniform(5, 8, 3)
    organ = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, center, radii, strict=True)) <= 1
    far = ndimage.distance_transform_edt(~organ) >= 7
    like = np.zeros_like(organ)
    for _ in range(12):
        like |= _squared(grid, random.uniform(3, 37, 3)) <= random.uniform(2.5, 4) ** 2
    return _case(0.8 * (organ | (like & far)), organ, random, noise=1.0)


def two_organs(random: np.random.Generator, training: bool) -> Case:
    """Return balls of two classes, the second fainter."""
    first, _ = _balls(random, contrasts=(1, 1), count=3)
    second, _ = _balls(random, contrasts=(1, 1), count=3)
    second = second * (ndimage.distance_transform_edt(first == 0) > 2)
    return _case(1.2 * first + 0.6 * second, first + 2 * second, random, noise=0.5)


def half_annotated(random: np.random.Generator, training: bool) -> Case:
    """Return :func:`two_organs`; every other training case lacks the second class in its label, and says so."""
    case = two_organs(random, training)
    lacks = training and bool(random.integers(2))
    case["annotated"] = torch.tensor([True, True, not lacks])
    if lacks:
        case["label"][case["label"] == 2] = 0
    return case


def half_annotated_unsaid(random: np.random.Generator, training: bool) -> Case:
    """Return :func:`half_annotated` without the word of it."""
    case = half_annotated(random, training)
    del case["annotated"]
    return case


def vague(random: np.random.Generator, training: bool) -> Case:
    """Return balls whose border is drawn up to 1.5 voxels off, in or out, which nothing in the image tells."""
    grid = _grid(32)
    signal, label = np.zeros((32,) * 3), np.zeros((32,) * 3, bool)
    for _ in range(5):
        squared, radius = _squared(grid, random.uniform(6, 26, 3)), random.uniform(3, 5.5)
        signal = np.maximum(signal, squared <= radius**2)
        label |= squared <= (radius + random.uniform(-1.5, 1.5)) ** 2
    return _case(ndimage.gaussian_filter(signal, 1.0), label, random, noise=0.6)


def wrong_labels(random: np.random.Generator, training: bool) -> Case:
    """Return balls; a third are not in the training labels, and another third are shifted by two voxels."""
    grid = _grid(32)
    signal, label = np.zeros((32,) * 3), np.zeros((32,) * 3, bool)
    for _ in range(5):
        center, radius = random.uniform(6, 26, 3), random.uniform(3, 5.5)
        signal = np.maximum(signal, _squared(grid, center) <= radius**2)
        fate, shift = int(random.integers(3)), 2 * _unit(random.standard_normal(3))
        if training and fate == 0:
            continue
        label |= _squared(grid, center + shift if training and fate == 1 else center) <= radius**2
    return _case(signal, label, random, noise=0.8)


def _balls(random: np.random.Generator, contrasts: tuple[float, float], count: int = 7) -> tuple[Volume, Volume]:
    """Return balls of radius 2 to 5 in 32 x 32 x 32 voxels, as contrasts and as a mask."""
    grid, signal = _grid(32), np.zeros((32,) * 3)
    for _ in range(count):
        ball = _squared(grid, random.uniform(5, 27, 3)) <= random.uniform(2, 5) ** 2
        signal[ball] = random.uniform(*contrasts)
    return signal, signal > 0


def _case(signal: Volume, label: Volume, random: np.random.Generator, noise: float) -> Case:
    """Return a case: the signal, blurred a little, with a slow bias and white noise."""
    bias = ndimage.gaussian_filter(random.standard_normal(signal.shape), 12)
    image = ndimage.gaussian_filter(np.asarray(signal, float), 0.6) + 0.25 * bias / bias.std()
    image += noise * random.standard_normal(signal.shape)
    return {
        "image": torch.from_numpy(image.astype(np.float32))[None],
        "label": torch.from_numpy(np.asarray(label).astype(np.int64))[None],
    }


def _grid(size: int) -> list[Volume]:
    return list(np.meshgrid(*[np.arange(size, dtype=float)] * 3, indexing="ij", sparse=True))


def _squared(grid: list[Volume], center: Volume) -> Volume:
    """Return the squared distance of each voxel from a center, in voxels."""
    return np.asarray(sum((x - c) ** 2 for x, c in zip(grid, center, strict=True)))


def _unit(vector: Volume) -> Volume:
    return np.asarray(vector / np.linalg.norm(vector))
