# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The middle line of each mask, as a thin tube within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monai_losses_ext.extras import need

PUBLISHED_DILATIONS = 2  # steps of one voxel to all neighbors


def skeleton_of(
    masks: NDArray[Any], spacing: Sequence[float] | None = None, radius: float | None = None
) -> NDArray[np.bool_]:
    """Return the skeleton of each mask, thickened to a tube that stays inside of the mask.

    Every component keeps at least one voxel of skeleton: thinning may delete a component of even width as a whole, and
    then the voxel that lies deepest stands for it.

    Args:
        masks: ``[K, *S]``, one mask per class, 0 and 1, of up to three axes each.
        spacing: voxel size in mm, one number per axis of ``S``; 1 unless given. Only the radius depends on it.
        radius: of the tube, in mm; None for the published one, two voxels to all sides.

    Returns:
        ``[K, *S]``.

    Raises:
        UserError: where scikit-image, of the extra ``maps``, is not installed.

    Source:
        Kirchhoff et al. 2024, https://arxiv.org/abs/2404.03010. Differs in mending what thinning deletes, and in a
        radius in mm.

    Example:
        >>> line = np.zeros((1, 7, 9), bool)
        >>> line[0, 2:5, 1:8] = True
        >>> bool(skeleton_of(line, radius=0.5)[0, 3, 4])
        True
    """
    if masks.ndim == 2:  # thinning is for two axes or three
        return skeleton_of(masks[..., None], None if spacing is None else [*spacing, 1.0], radius)[..., 0]
    need("skeleton_of", "maps")
    neighbors = np.ones((3,) * (masks.ndim - 1), bool)
    tubes = []
    for mask in masks > 0:
        thin = skeleton_line(mask)
        if not thin.any():
            tubes.append(thin)
        elif radius is None:
            tubes.append(ndimage.binary_dilation(thin, neighbors, PUBLISHED_DILATIONS) & mask)
        else:
            tubes.append((ndimage.distance_transform_edt(~thin, sampling=spacing) <= radius) & mask)
    return np.stack(tubes)


def skeleton_line(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the skeleton of one mask, one voxel thin, with at least one voxel in every component.

    Args:
        mask: boolean, ``[*S]``, of two axes or three.

    Raises:
        UserError: where scikit-image, of the extra ``maps``, is not installed.
    """
    need("skeleton_line", "maps")
    from skimage.morphology import skeletonize

    thin: NDArray[np.bool_] = skeletonize(mask).astype(bool) if mask.any() else np.zeros_like(mask)
    return thin | _deepest_of_deleted(mask, thin)


def _deepest_of_deleted(mask: NDArray[np.bool_], thin: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return one voxel, the deepest, of each component that has no voxel in ``thin``."""
    components, number = ndimage.label(mask, np.ones((3,) * mask.ndim, bool))
    deepest = np.zeros_like(mask)
    kept = np.unique(components[thin])
    deleted = np.setdiff1d(np.arange(1, number + 1), kept)
    if len(deleted):
        depth = ndimage.distance_transform_edt(mask)
        for place in ndimage.maximum_position(depth, components, deleted):
            deepest[place] = True
    return deepest
