# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Planes to look at: cut from a volume, turned to anatomical directions, cropped around what was segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from scipy.ndimage import map_coordinates

from monai_losses_ext.handlers._engine import class_mask

# Axes point to the patient's left, front and top, so that a plane drawn from the lower left corner looks as
# radiologists see it: the patient's right on the left.
DISPLAY_AXES = "LAS"
TITLES = ("sagittal", "coronal", "axial")
MARGIN_MM = 10.0


@dataclass(frozen=True)
class Plane:
    """A plane of one case.

    Args:
        title: its anatomical name.
        image: gray values, ``[X, Y]``, X to the right and Y upwards.
        prediction: masks of the classes, ``[K, X, Y]``.
        reference: masks of the classes, ``[K, X, Y]``.
        spacing: voxel size along X and Y, in mm.
    """

    title: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float]

    def centers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of the voxels' centers along X and Y, in mm from the lower left corner."""
        x, y = ((np.arange(n) + 0.5) * mm for n, mm in zip(self.image.shape, self.spacing, strict=True))
        return x, y


def cut_planes(output: dict[str, Any], values: Sequence[int]) -> list[Plane]:
    """Cut the planes that show the most of the reference, every class counting alike.

    Args:
        output: what the evaluator gave out for one case: ``label`` ``[1, *S]``, ``pred`` on the same grid, a label map
            or one-hot, and ``image`` ``[C, *T]``, on a grid of its own if label and image have affines: after turning,
            padding or resampling the network's input it is still shown in the right place. 2-D or 3-D.
        values: the classes.

    Returns:
        Three planes of a volume, with the image's first channel; one plane of a 2-D image.
    """
    image, label = output["image"], output["label"]
    turn = display_turn(label)
    prediction, reference = turned(output["pred"], turn), turned(label, turn)
    to_world = affine_3d(label) @ nib.orientations.inv_ornt_aff(turn, as_array(label)[0].shape)
    spacing = [float(mm) for mm in np.linalg.norm(to_world[:3, :3], axis=0)]
    has_affines = isinstance(image, MetaTensor) and isinstance(label, MetaTensor)
    to_image = np.linalg.inv(affine_3d(image)) @ to_world if has_affines else np.eye(4)
    planes = []
    for axis in (2, 1, 0):
        x, y = (a for a in range(3) if a != axis)
        if min(reference.shape[1 + x], reference.shape[1 + y]) < 2:
            continue
        index = fullest_slice(reference, prediction, values, axis)
        flat = [volume.take(index, axis=1 + axis) for volume in (prediction, reference)]
        masks = np.stack([class_mask(volume, value) for volume in flat for value in values])
        in_plane = (spacing[x], spacing[y])
        window = shown_window(masks, in_plane)
        slices = [slice(index, index + 1)] * 3
        slices[x], slices[y] = window
        gray = sample(as_array(image)[0], to_image, slices).squeeze(axis)
        masks = masks[(slice(None), *window)]
        planes.append(Plane(TITLES[axis], gray, masks[: len(values)], masks[len(values) :], in_plane))
    return planes


def as_array(volume: torch.Tensor) -> np.ndarray:
    """Return a view of a volume ``[C, *S]`` as an array ``[C, X, Y, Z]``, one voxel thick if it is 2-D."""
    plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    array = plain.detach().cpu().numpy()
    return array[..., None] if array.ndim == 3 else array


def affine_3d(volume: torch.Tensor) -> np.ndarray:
    """Return the affine ``[4, 4]`` from voxels to mm of a volume ``[C, *S]``; identity where it has none."""
    if not isinstance(volume, MetaTensor):
        return np.eye(4)
    return to_affine_nd(3, to_affine_nd(volume.ndim - 1, volume.affine.cpu().numpy()))


def display_turn(label: torch.Tensor) -> np.ndarray:
    """Return nibabel's orientation transform of a label ``[1, *S]`` to ``DISPLAY_AXES``; nothing turns in 2-D."""
    if label.ndim == 3:
        return np.array([[0, 1], [1, 1], [2, 1]])
    stored = nib.orientations.io_orientation(affine_3d(label))
    return nib.orientations.ornt_transform(stored, nib.orientations.axcodes2ornt(DISPLAY_AXES))


def turned(volume: torch.Tensor, turn: np.ndarray) -> np.ndarray:
    """Return a view of a volume ``[C, *S]``, turned to ``[C, X, Y, Z]``."""
    spatial_first = nib.orientations.apply_orientation(np.moveaxis(as_array(volume), 0, -1), turn)
    return np.moveaxis(spatial_first, -1, 0)


def sample(image: np.ndarray, to_image: np.ndarray, slices: list[slice]) -> np.ndarray:
    """Return the values of ``image`` ``[X, Y, Z]`` at the voxels ``slices`` of another grid.

    ``to_image``, ``[4, 4]``, leads from that grid's voxels to the image's; outside the image all is as its darkest
    voxel.
    """
    grid = np.mgrid[tuple(slices)].reshape(3, -1)
    # Rounded, so that a voxel on the border does not fall outside by 1e-15.
    points = np.round(to_image[:3, :3] @ grid + to_image[:3, 3:], 4)
    values = map_coordinates(image.astype(np.float32), points, order=1, cval=float(image.min()))
    return values.reshape([s.stop - s.start for s in slices])


def fullest_slice(reference: np.ndarray, prediction: np.ndarray, values: Sequence[int], axis: int) -> int:
    """Return the index along ``axis`` where the classes' shares of their own volume sum up to the most.

    Of the reference; of the prediction where the reference is empty; the middle where both are.
    """
    across = tuple(a for a in range(3) if a != axis)
    for volume in (reference, prediction):
        areas = np.stack([np.count_nonzero(class_mask(volume, value), axis=across) for value in values])
        if areas.any():
            return int((areas / np.maximum(areas.sum(axis=1, keepdims=True), 1)).sum(axis=0).argmax())
    return reference.shape[1 + axis] // 2


def shown_window(masks: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice]:
    """Return where any of the masks ``[N, X, Y]`` is, with a margin of 10 mm or half the size, whichever is more."""
    window = []
    for axis, mm in enumerate(spacing):
        inside = np.flatnonzero(masks.any(axis=(0, 2 - axis)))
        first, last = (inside[0], inside[-1] + 1) if inside.size else (0, masks.shape[1 + axis])
        margin = max(round(MARGIN_MM / mm), (last - first) // 2, 1)
        window.append(slice(max(first - margin, 0), min(last + margin, masks.shape[1 + axis])))
    return window[0], window[1]
