# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Maps that a label alone makes, once per case: the region of each component, skeletons."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.distance import voxel_size
from monai_losses_ext.losses.base import Positive
from monai_losses_ext.maps import regions_of, skeleton_of
from monai_losses_ext.sums.target import REGIONS, SKELETON


class OfLabeld(MapTransform):
    """A map of labels, from their masks; for the transforms of regions, skeletons and weights."""

    default_name: str

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int | None,
        names: str | Sequence[str] | None,
        spacing: float | Sequence[float] | None,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        name = self.default_name
        default = [name] if len(self.keys) == 1 else [f"{key}_{name}" for key in self.keys]
        self.names = default if names is None else [names] if isinstance(names, str) else list(names)
        if len(self.names) != len(self.keys):
            raise errors.fail("names", f"must hold one name per key ({len(self.keys)})", self.names)
        self.num_classes = num_classes
        self.spacing = spacing

    def masks_of(self, volume: NDArray[Any]) -> NDArray[np.bool_]:
        """Return the masks of the foreground's classes, ``[K, *S]``."""
        return volume > 0.5 if self.num_classes is None else volume == classes(1, self.num_classes, volume.ndim)

    def of_masks(self, masks: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[Any]:
        """Return the map of masks ``[K, *S]`` of voxels of this size in mm."""
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the maps of its labels, with the labels' affine."""
        case = dict(data)
        for key, name in self.key_iterator(case, self.names):
            label = case[key]
            if not isinstance(label, (Tensor, np.ndarray)):
                rule = "must be a tensor or an array (LoadImaged makes one of a path)"
                raise errors.fail(f"{type(self).__name__}: {key!r}", rule, label)
            volume = np.asarray(label)
            masks = self.masks_of(volume)
            size: Any = self.spacing
            if size is None:
                size = voxel_size(label.affine if isinstance(label, MetaTensor) else None, volume.ndim - 1)
            sizes = np.broadcast_to(1.0 if size is None else np.asarray(size, float), volume.ndim - 1)
            made = torch.from_numpy(np.ascontiguousarray(self.of_masks(masks, sizes.tolist())))
            case[name] = MetaTensor(made, meta=dict(label.meta)) if isinstance(label, MetaTensor) else made
        return case


def classes(first: int, num_classes: int, ndim: int) -> NDArray[np.int64]:
    """Return the classes from the first on, along the first of ``ndim`` axes."""
    return np.arange(first, num_classes).reshape(-1, *[1] * (ndim - 1))


class RegionMapd(OfLabeld):
    """Add the region of each component of a label, ``regions``, for losses in which every component counts.

    It belongs after the transforms that fix the voxel grid and before the random ones: then the regions are those of
    the whole volume, and a cached dataset computes them once. Add the new key to the random *spatial* transforms, with
    interpolation ``nearest`` and padding ``zeros``. After the crop it takes components as the patch has them.

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks.
        names: keys of the maps; ``regions`` for one label, ``<key>_regions`` for several, unless given.
        spacing: voxel size in mm; of the label's affine unless given; 1 mm for a label without one.
        allow_missing_keys: pass over labels that a case lacks.

    The map is ``[C - 1, *S]`` for whole numbers and ``[C, *S]`` for masks; see
    :func:`monai_losses_ext.maps.regions_of`.

    Example:
        >>> import torch
        >>> RegionMapd("label", num_classes=2)({"label": torch.tensor([[1, 0, 0, 0, 1]])})["regions"].tolist()
        [[1, 1, 1, 2, 2]]
    """

    default_name = REGIONS

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        spacing: Positive | Sequence[Positive] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        check_arguments(RegionMapd.__init__, {"num_classes": num_classes, "spacing": spacing})
        super().__init__(keys, num_classes, names, spacing, allow_missing_keys)

    def of_masks(self, masks: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[Any]:
        """Return the regions, int32: torch has no arithmetic for the smallest unsigned types."""
        return regions_of(masks, spacing).astype(np.int32)


class SkeletonMapd(OfLabeld):
    """Add a tube along the middle of each structure, ``skeleton``, for :class:`SkeletonRecallLoss`.

    It belongs where :class:`RegionMapd` does, and its key into the random *spatial* transforms, with interpolation
    ``nearest`` and padding ``zeros``. It needs scikit-image (extra ``maps``).

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks.
        names: keys of the maps; ``skeleton`` for one label, ``<key>_skeleton`` for several, unless given.
        radius: of the tube in mm; None for the published two voxels.
        spacing: voxel size in mm; of the label's affine unless given; 1 mm for a label without one.
        allow_missing_keys: pass over labels that a case lacks.

    The map is ``[1, *S]``, the class on its skeleton and 0 elsewhere, for whole numbers; ``[C, *S]`` for masks.
    """

    default_name = SKELETON

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        radius: Positive | None = None,
        spacing: Positive | Sequence[Positive] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        given = {"num_classes": num_classes, "radius": radius, "spacing": spacing}
        check_arguments(SkeletonMapd.__init__, given)
        super().__init__(keys, num_classes, names, spacing, allow_missing_keys)
        self.radius = radius

    def of_masks(self, masks: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[Any]:
        """Return the tubes, as one volume of classes where classes exclude each other."""
        tubes = skeleton_of(masks, spacing, self.radius)
        if self.num_classes is None:
            return tubes.astype(np.uint8)
        return (tubes * classes(1, self.num_classes, tubes.ndim)).sum(0, keepdims=True).astype(np.int32)
