# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Transforms that carry signed distance maps from the whole volume to the loss."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.engines.utils import default_prepare_batch
from monai.transforms import MapTransform
from numpy.typing import NDArray
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.distance import signed_distance, voxel_size
from monai_losses_ext.losses.base import Positive
from monai_losses_ext.maps import regions_of, skeleton_of
from monai_losses_ext.sums.target import DISTANCE, KEYS, LABEL, REGIONS, SKELETON

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class SignedDistanceMapd(MapTransform):
    """Add the signed distance map of every class of a label, in millimeters, for a boundary loss.

    It belongs after the transforms that fix the voxel grid (orientation, spacing, padding) and before the random ones:
    then the distances are those of the whole volume, and a cached dataset computes them once. Add the new key to the
    random *spatial* transforms, with interpolation ``bilinear`` and padding ``border``.

    What random transforms do to a map: crops, flips, rotations and shifts move it with the label. A zoom leaves its
    values alone, and rightly so, since they are millimeters of the patient: the zoom is in the patch's affine, as it is
    for the label. Elastic deformation has no such affine, so the map is right only as far as the deformation is small.

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks.
        names: keys of the maps; ``distance`` for one label, ``<key>_distance`` for several, unless given.
        dtype: ``float32``; or ``float16``, for half the cache and a relative error of 0.0005.
        absent: see :func:`monai_losses_ext.distance.signed_distance`, as are the next three.
        convention: ``signed`` or ``kervadec``.
        spacing: voxel size in mm; of the label's affine unless given; 1 mm, with a warning, for a label without one.
        backend: ``auto``, ``numba`` or ``scipy``.
        allow_missing_keys: pass over labels that a case lacks.

    Example:
        >>> import torch
        >>> case = {"label": MetaTensor(torch.tensor([[0, 0, 1, 1]]), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))}
        >>> SignedDistanceMapd("label", num_classes=2)(case)["distance"].tolist()
        [[-4.0, -2.0, 2.0, 4.0], [4.0, 2.0, -2.0, -4.0]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        absent: Literal["far", "zero"] = "far",
        convention: Literal["signed", "kervadec"] = "signed",
        spacing: Positive | Sequence[Positive] | None = None,
        backend: Literal["auto", "numba", "scipy"] = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "keys", "names", "__class__")}
        check_arguments(SignedDistanceMapd.__init__, arguments)
        super().__init__(keys, allow_missing_keys)
        default = [DISTANCE] if len(self.keys) == 1 else [f"{key}_{DISTANCE}" for key in self.keys]
        self.names = default if names is None else [names] if isinstance(names, str) else list(names)
        if len(self.names) != len(self.keys):
            raise errors.fail("names", f"must hold one name per key ({len(self.keys)})", self.names)
        self.num_classes = num_classes
        self.dtype = DTYPES[dtype]
        self.absent = absent
        self.convention = convention
        self.spacing = spacing
        self.backend = backend

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the maps of its labels, ``[C, *S]``, with the labels' affine."""
        case = dict(data)
        for key, name in self.key_iterator(case, self.names):
            label = torch.as_tensor(np.ascontiguousarray(case[key])) if isinstance(case[key], np.ndarray) else case[key]
            if not isinstance(label, Tensor):
                rule = "must be a tensor or an array (LoadImaged makes one of a path)"
                raise errors.fail(f"SignedDistanceMapd: {key!r}", rule, label)
            spacing = (
                self.spacing
                if self.spacing is not None
                else voxel_size(label.affine if isinstance(label, MetaTensor) else None, label.ndim - 1)
            )
            if spacing is None:
                warnings.warn(
                    f"SignedDistanceMapd: {key!r} has no affine, so its voxels count as 1 mm. Give spacing to say how "
                    "large they are.",
                    stacklevel=2,
                )
            distance = signed_distance(
                label.unsqueeze(0),
                self.num_classes,
                spacing,
                self.absent,
                self.convention,
                backend=self.backend,
            )[0].to(self.dtype)
            case[name] = MetaTensor(distance, meta=dict(label.meta)) if isinstance(label, MetaTensor) else distance
        return case


class _OfLabeld(MapTransform):
    """A map of labels, from their masks; for :class:`RegionMapd` and :class:`SkeletonMapd`."""

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
            masks = volume > 0.5 if self.num_classes is None else volume == _classes(self.num_classes, volume.ndim)
            size: Any = self.spacing
            if size is None:
                size = voxel_size(label.affine if isinstance(label, MetaTensor) else None, volume.ndim - 1)
            sizes = np.broadcast_to(1.0 if size is None else np.asarray(size, float), volume.ndim - 1)
            made = torch.from_numpy(np.ascontiguousarray(self.of_masks(masks, sizes.tolist())))
            case[name] = MetaTensor(made, meta=dict(label.meta)) if isinstance(label, MetaTensor) else made
        return case


def _classes(num_classes: int, ndim: int) -> NDArray[np.int64]:
    """Return the foreground classes, along the first of ``ndim`` axes."""
    return np.arange(1, num_classes).reshape(-1, *[1] * (ndim - 1))


class RegionMapd(_OfLabeld):
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


class SkeletonMapd(_OfLabeld):
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
        return (tubes * _classes(self.num_classes, tubes.ndim)).sum(0, keepdims=True).astype(np.int32)


class UnpackLabeld(MapTransform):
    """Put the labels back where a batch carries them in a dictionary with their distance map.

    The first of a trainer's post-processing transforms, for metrics and transforms that expect the label itself.

    Args:
        keys: what to unpack; what is no such dictionary is left as it is.
        allow_missing_keys: pass over keys that a case lacks.
    """

    def __init__(self, keys: KeysCollection = LABEL, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with its labels as tensors."""
        case = dict(data)
        for key in self.key_iterator(case):
            if isinstance(case[key], Mapping):
                case[key] = case[key][LABEL]
        return case


def prepare_batch(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
    """Hand the labels and all that belongs to them to the loss: a trainer's ``prepare_batch``.

    Args:
        batchdata: with ``image`` and ``label``, and any other key of a target: see
            :class:`monai_losses_ext.sums.Target`.
        device: where the tensors go.
        non_blocking: whether the copy may run beside what follows.
        kwargs: further arguments of the copy.

    Returns:
        The image, and the label, or ``{"label": ..., "weight": ...}`` where the batch has more. The trainer keeps that
        as the batch's ``label``; where it has post-processing or metrics, :class:`UnpackLabeld` comes first there.

    Example:
        >>> batch = {"image": torch.zeros(1), "label": torch.ones(1), "annotated": torch.tensor([[True, False]])}
        >>> prepare_batch(batch)[1]
        {'label': tensor([1.]), 'annotated': tensor([[ True, False]])}
    """
    image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
    others = {key: batchdata[key] for key in KEYS if key != LABEL and key in batchdata}
    if not others:
        return image, label
    moved = {key: part.to(device=device, non_blocking=non_blocking, **kwargs) for key, part in others.items()}
    return image, {LABEL: label, **moved}


def prepare_batch_with_distance(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hand the labels and their distance map to the loss together: a trainer's ``prepare_batch``.

    Args:
        batchdata: with ``image``, ``label`` and ``distance``.
        device: where the tensors go.
        non_blocking: whether the copy may run beside what follows.
        kwargs: further arguments of the copy.

    Returns:
        The image, and ``{"label": ..., "distance": ...}`` with all else that :func:`prepare_batch` finds. The trainer
        keeps that as the batch's ``label``; where it has post-processing or metrics, :class:`UnpackLabeld` comes first
        there.

    Raises:
        UserError: if there is no map.
    """
    if DISTANCE not in batchdata:
        raise errors.UserError(
            "prepare_batch: the batch has no distance map. Add monai_losses_ext.transforms.SignedDistanceMapd "
            "to the transforms, after those that change the spacing and before the random ones, and 'distance' to the "
            f"keys of the random spatial ones; got {', '.join(sorted(map(str, batchdata)))}."
        )
    image, target = prepare_batch(batchdata, device, non_blocking, **kwargs)
    return image, cast(dict[str, Tensor], target)
