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
from monai.data.utils import affine_to_spacing
from monai.transforms import LoadImage

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
        image: grey values, ``[X, Y]``, X to the right and Y upwards.
        prediction: masks of the classes, ``[K, X, Y]``.
        reference: masks of the classes, ``[K, X, Y]``.
        spacing: voxel size along X and Y, in mm.
    """

    title: str
    image: np.ndarray
    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float]

    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of the voxels' centres along X and Y, in mm from the lower left corner."""
        x, y = ((np.arange(n) + 0.5) * mm for n, mm in zip(self.image.shape, self.spacing, strict=True))
        return x, y


def cut_planes(output: dict[str, Any], values: Sequence[int]) -> list[Plane]:
    """Cut the planes that show the most of the reference, every class counting alike.

    Args:
        output: what the evaluator gave out for one case: ``image`` ``[C, *S]``, ``label`` ``[1, *S]`` and ``pred``, a
            label map or one-hot; 2-D or 3-D. The label's affine, where it has one, says how it lies in the patient.
        values: the classes.

    Returns:
        Three planes of a volume; one of a 2-D image.
    """
    turn, spacing = display_turn(output["label"])
    image, prediction, reference = (
        turned(volume, turn) for volume in (displayed_image(output), output["pred"], output["label"])
    )
    planes = []
    for axis in (2, 1, 0):
        across = [a for a in range(3) if a != axis]
        if min(reference.shape[1 + a] for a in across) < 2:
            continue
        index = fullest_slice(reference, prediction, values, axis)
        grey, predicted, true = (volume.take(index, axis=1 + axis) for volume in (image, prediction, reference))
        masks = np.stack([class_mask(flat, value) for flat in (predicted, true) for value in values])
        in_plane = (spacing[across[0]], spacing[across[1]])
        window = shown_window(masks, in_plane)
        masks = masks[(slice(None), *window)]
        planes.append(Plane(TITLES[axis], grey[0][window], masks[: len(values)], masks[len(values) :], in_plane))
    return planes


def displayed_image(output: dict[str, Any]) -> torch.Tensor:
    """Return a case's image ``[C, *S]`` on the label's grid.

    The image of the output if it lies on that grid; else the file it came from; else zeros.
    """
    image, shape = output["image"], tuple(output["label"].shape[1:])
    if tuple(image.shape[1:]) != shape and isinstance(image, MetaTensor) and image.meta.get("filename_or_obj"):
        image = LoadImage(image_only=True, ensure_channel_first=True)(image.meta["filename_or_obj"])
    return image if tuple(image.shape[1:]) == shape else torch.zeros(1, *shape)


def display_turn(label: torch.Tensor) -> tuple[np.ndarray | None, list[float]]:
    """Return nibabel's orientation transform to ``DISPLAY_AXES``, None in 2-D, and the spacing in mm after it."""
    ndim = label.ndim - 1
    affine = label.affine.cpu().numpy() if isinstance(label, MetaTensor) else np.eye(ndim + 1)
    spacing = [float(mm) for mm in affine_to_spacing(affine, r=ndim)]
    if ndim == 2:
        return None, [*spacing, 1.0]
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(DISPLAY_AXES)
    )
    return turn, [spacing[axis] for axis in np.argsort(turn[:, 0])]


def turned(volume: torch.Tensor, turn: np.ndarray | None) -> np.ndarray:
    """Return a view of a volume ``[C, *S]``, turned to ``[C, X, Y, Z]``."""
    plain = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    array = plain.detach().cpu().numpy()
    if turn is None:
        return array[..., None]
    spatial_first = nib.orientations.apply_orientation(np.moveaxis(array, 0, -1), turn)
    return np.moveaxis(spatial_first, -1, 0)


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
        window.append(slice(max(first - margin, 0), last + margin))
    return window[0], window[1]
