# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The region of each component of a mask: the voxels that are nearer to it than to any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def regions_of(masks: NDArray[Any], spacing: Sequence[float] | None = None) -> NDArray[Any]:
    """Return which component each voxel is nearest to, mask by mask.

    A component is what hangs together by faces, edges or corners (in three dimensions, 26 neighbors). Its region is its
    Voronoi cell: of voxels that are as near to two components, either may have them.

    Args:
        masks: ``[K, *S]``, one mask per class, 0 and 1.
        spacing: voxel size in mm, one number per axis of ``S``; 1 unless given.

    Returns:
        ``[K, *S]`` of the smallest unsigned type that holds the ids: 1 to the number of the mask's components, all of
        them somewhere; 0 everywhere for a mask without any.

    Source:
        The cells of CC-DiceCE, https://arxiv.org/abs/2511.17146.

    Example:
        >>> regions_of(np.array([[1, 0, 0, 0, 1]])).tolist()
        [[1, 1, 1, 2, 2]]
    """
    neighbors = np.ones((3,) * (masks.ndim - 1), bool)
    found, largest = [], 0
    for mask in masks:
        components, number = ndimage.label(mask > 0, neighbors)
        largest = max(largest, number)
        if number:
            nearest = ndimage.distance_transform_edt(
                components == 0, sampling=spacing, return_distances=False, return_indices=True
            )
            components = components[tuple(nearest)]
        found.append(components)
    return np.stack(found).astype(np.min_scalar_type(largest))
