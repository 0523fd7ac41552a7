# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How much each voxel counts: by its class, and by how near it is to two objects at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monai_losses_ext import errors

REACH = 6.0  # in sigmas: what lies beyond counts less than w0 / 6e7, below the precision of float32


def voxel_weights(
    masks: NDArray[Any],
    class_weight: Literal["inverse"] | Sequence[float] | None = None,
    w0: float = 0.0,
    sigma: float = 5.0,
    spacing: Sequence[float] | None = None,
    overlapping: bool = False,
) -> NDArray[np.float32]:
    """Return the weight of each voxel, ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))``: its class's, and more at borders.

    ``d1`` and ``d2`` are the distances to the nearest and the second nearest object, see :func:`border_weights`.

    Args:
        masks: ``[K, *S]``, one per class, 0 and 1, the background's first.
        class_weight: ``inverse``, see :func:`inverse_frequency`; one number per mask; or None for 1. Of several masks
            that hold a voxel the largest weight counts.
        w0: weight of the border; 0 for none.
        sigma: width of the border in mm.
        spacing: voxel size in mm, one number per axis of ``S``; 1 unless given.
        overlapping: whether masks may overlap. Then objects are those of one mask, and the largest border of all masks
            counts; otherwise the objects of all classes are seen together.

    Returns:
        ``[*S]``; 0 where a voxel is in no mask.

    Source:
        Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, equation 2. Differs in the distance to an object, not
        to its border: within an object it is 0.

    Example:
        >>> label = np.array([0, 1, 0, 0, 1, 0])
        >>> weights = voxel_weights(np.stack([label == 0, label == 1]), w0=10.0, sigma=2.0)
        >>> [round(float(w), 1) for w in weights]
        [1.4, 4.2, 4.2, 4.2, 4.2, 1.4]
    """
    masks = masks > 0
    if class_weight is None:
        weights = np.ones(len(masks))
    elif isinstance(class_weight, str):
        weights = inverse_frequency(masks)
    else:
        weights = np.asarray(class_weight, float)
    if len(weights) != len(masks):
        rule = f"must hold one number per class, the background's first ({len(masks)})"
        raise errors.fail("class_weight", rule, weights.tolist())
    total = np.zeros(masks.shape[1:], np.float32)
    for mask, weight in zip(masks, weights, strict=True):
        np.maximum(total, np.where(mask, np.float32(weight), 0), out=total)
    if w0:
        groups = masks[1:, None] if overlapping else [masks[1:]]
        borders = [border_weights(group, w0, sigma, spacing) for group in groups]
        if borders:
            total += np.where(masks.any(0), np.max(borders, axis=0), 0)
    return total


def inverse_frequency(masks: NDArray[Any]) -> NDArray[np.float64]:
    """Return a weight per mask, so that the weights of its voxels sum to the same for each.

    Args:
        masks: ``[K, *S]``, 0 and 1.

    Returns:
        ``[K]``: the number of voxels in any mask, over the mask's own and over the number of masks that have any; 0 for
        a mask without any. The mean over voxels is 1 where masks do not overlap.

    Example:
        >>> inverse_frequency(np.array([[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])).tolist()
        [0.6666666666666666, 2.0, 0.0]
    """
    masks = masks > 0
    counts = masks.reshape(len(masks), -1).sum(1)
    present = max(int((counts > 0).sum()), 1)
    return np.where(counts > 0, masks.any(0).sum() / (present * np.maximum(counts, 1)), 0.0)


def border_weights(
    masks: NDArray[Any], w0: float = 10.0, sigma: float = 5.0, spacing: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """Return ``w0 exp(-(d1 + d2)^2 / (2 sigma^2))``, largest where two objects are near: the gap between them.

    An object is a component of a mask: what hangs together by faces, edges or corners.

    Args:
        masks: ``[K, *S]``, 0 and 1, without the background's.
        w0: the largest weight.
        sigma: width in mm.
        spacing: voxel size in mm, one number per axis of ``S``; 1 unless given.

    Returns:
        ``[*S]``; 0 everywhere where there are fewer than two objects.
    """
    shape = masks.shape[1:]
    sizes = np.ones(len(shape)) if spacing is None else np.asarray(spacing, float)
    margin = [math.ceil(REACH * sigma / size) for size in sizes]
    nearest, second = np.full(shape, np.inf, np.float32), np.full(shape, np.inf, np.float32)
    for mask in masks > 0:
        components, _ = ndimage.label(mask, np.ones((3,) * len(shape), bool))
        for i, box in enumerate(ndimage.find_objects(components), 1):
            # Only so far around an object does it count: many small ones cost little.
            part = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margin, strict=True))
            distance = ndimage.distance_transform_edt(components[part] != i, sampling=sizes).astype(np.float32)
            second[part] = np.minimum(second[part], np.maximum(nearest[part], distance))
            nearest[part] = np.minimum(nearest[part], distance)
    return (w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))).astype(np.float32)
