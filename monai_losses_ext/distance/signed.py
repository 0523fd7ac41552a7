# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Signed distance maps of label maps: what the boundary loss integrates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.distance.euclidean import (
    Array,
    distance_to_mask,
    distance_to_other_labels,
    in_threads,
    resolve,
)

CONVENTIONS = ("signed", "kervadec")
ABSENT = ("far", "zero")

_INTERPOLATED = " Were labels resampled with an interpolation other than nearest?"

Spacing = float | Sequence[float] | Sequence[Sequence[float]] | Tensor | None


def signed_distance(
    target: Tensor,
    num_classes: Annotated[int, arguments.Limits(minimum=1)] | None = None,
    spacing: Spacing = None,
    absent: str = "far",
    convention: str = "signed",
    include_background: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Return the signed distance of every voxel to the boundary of every class.

    Outside of a class it is the distance to the class, inside it is minus the distance to what is not the class: so it
    changes its sign, and nothing else, when inside and outside are exchanged, whatever the voxel size.

    Args:
        target: index labels ``[B, 1, *S]`` (a value that is no class lies outside of all), or with ``num_classes`` None
            one mask per class ``[B, C, *S]``, soft ones cut at 0.5; masks may overlap. 1 to 3 spatial axes, any dtype.
        num_classes: C, for index labels.
        spacing: voxel size in mm: one number, one per axis, or one list per sample; 1 unless given.
        absent: what a class gets that no voxel has, and (with the other sign) one that all voxels have: ``far``, half
            the volume's diagonal in mm, so that a false positive costs something; or ``zero``.
        convention: ``signed``, as above; or ``kervadec``, whose inside is ``-(distance - 1)`` whatever the spacing, as
            in the code of the paper (https://github.com/LIVIAETS/boundary-loss) and in MONAI: with voxels of less than
            1 mm it is positive inside.
        include_background: whether class 0 gets a map; without, its channel is 0.
        backend: ``numba`` or ``scipy`` (both on the CPU), ``triton`` (on CUDA), or ``auto``: ``triton`` for a target on
            CUDA where it is installed and works, ``numba`` otherwise where it is installed and works.

    Returns:
        ``[B, C, *S]`` in mm, float32, on the target's device.

    Raises:
        ValueError: for another type, shape, number of classes, spacing, convention or backend, and (on the CPU; a GPU
            would have to wait for it) for index labels that are no whole numbers, which count as no class.

    Example:
        >>> import torch
        >>> signed_distance(torch.tensor([[[0, 0, 1, 1]]]), num_classes=2, spacing=0.5)[0, 1].tolist()
        [1.0, 0.5, -0.5, -1.0]
    """
    arguments.check_arguments(signed_distance, {"target": target, "num_classes": num_classes})
    errors.one_of("absent", absent, ABSENT)
    errors.one_of("convention", convention, CONVENTIONS)
    target = target.as_subclass(Tensor).detach()
    if not 3 <= target.ndim <= 5:
        raise errors.ShapeError(f"target: must be [B, C, *S] with 1 to 3 spatial axes; got {list(target.shape)}.")
    if num_classes is not None and target.shape[1] != 1:
        raise errors.ShapeError(f"target: index labels must be [B, 1, *S]; got {list(target.shape)}.")
    spacings = spacing_per_sample(spacing, target.shape[0], target.ndim - 2)
    channels = target.shape[1] if num_classes is None else num_classes
    classes = range(0 if include_background or channels == 1 else 1, channels)
    backend = resolve(backend, target.device)
    far = [0.0 if absent == "zero" else _half_diagonal(target.shape[2:], mm) for mm in spacings]
    inner_offset = 1.0 if convention == "kervadec" else 0.0
    if backend == "triton":
        from monai_losses_ext.distance import triton  # only where it is installed

        return triton.signed_maps(target, num_classes, spacings, far, inner_offset, classes.start)
    maps = np.zeros((target.shape[0], channels, *target.shape[2:]), np.float32)
    for sample, out, mm, far_value in zip(target.cpu(), maps, spacings, far, strict=True):
        measure = _Measure(mm, far_value, inner_offset, backend)
        if num_classes is None:
            masks = (sample > 0.5).numpy()
            for c in classes:
                out[c] = measure.map_of_mask(masks[c])
        else:
            for c, values in measure.maps_of_labels(sample[0], num_classes, classes):
                out[c] = values
    return torch.from_numpy(maps).to(target.device)


def _half_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    return 0.5 * math.hypot(*(n * size for n, size in zip(shape, spacing, strict=True)))


@dataclass(frozen=True)
class _Measure:
    """How one volume is measured.

    Attributes:
        spacing: voxel size along each axis.
        far: value of a class without voxels.
        inner_offset: added to the map inside.
        backend: ``numba`` or ``scipy``.
    """

    spacing: Sequence[float]
    far: float
    inner_offset: float
    backend: str

    def map_of_mask(self, mask: Array, inside: Array | None = None, outside: Array | None = None) -> Array | float:
        """Return the map of a mask ``[*S]``; distances that are known, right inside or outside, are not taken again."""
        if mask.all():
            return -self.far
        if not mask.any():
            return self.far
        if inside is None:
            inside = outside = distance_to_other_labels(mask.view(np.uint8), self.spacing, self.backend)
        if outside is None:
            outside = distance_to_mask(mask, self.spacing, self.backend)
        return np.where(mask, self.inner_offset - inside, outside)

    def maps_of_labels(
        self, labels: Tensor, num_classes: int, classes: Sequence[int]
    ) -> Iterable[tuple[int, Array | float]]:
        """Return each class and its map; the distances inside of all labels ``[*S]`` are taken at once."""
        values = _classes(labels, num_classes)
        num_present = np.count_nonzero(np.bincount(values.ravel()))
        inside = outside = None
        if num_present == 2:  # what is outside of the one is inside of the other
            inside = outside = distance_to_other_labels(values, self.spacing, self.backend)
        elif num_present > 2:
            inside = distance_to_other_labels(values, self.spacing, self.backend, classes)

        def class_and_map(c: int) -> tuple[int, Array | float]:
            return c, self.map_of_mask(values == c, inside, outside)

        # numba's kernels have threads of their own.
        return map(class_and_map, classes) if self.backend == "numba" else in_threads(class_and_map, classes)


def _classes(labels: Tensor, num_classes: int) -> Array:
    """Return the labels as a small integer type, with one more class for all values that are no class."""
    if labels.is_floating_point() and (broken := labels != labels.round()).any():
        rule = "index labels must be whole numbers"
        raise errors.fail("target", rule, labels[broken][0].item(), _INTERPOLATED)
    labels = labels.long()  # torch has no arithmetic for uint16, and 255 is no int8
    is_class = (labels >= 0) & (labels < num_classes)
    dtype = torch.uint8 if num_classes < 255 else torch.int32
    values: Array = torch.where(is_class, labels, num_classes).to(dtype).numpy()
    return values


def spacing_per_sample(spacing: Spacing, num_samples: int, num_axes: int) -> list[list[float]]:
    """Return the voxel size of each sample along each axis.

    Raises:
        ValueError: where it is not one number, one per axis, or one list of these per sample, all above 0.
    """
    rule = f"must be a number above 0, {num_axes} of them (one per axis), or such a list per sample ({num_samples})"
    try:
        mm = torch.as_tensor(1.0 if spacing is None else spacing, dtype=torch.float64).cpu()
    except (TypeError, ValueError):  # a text, or lists of different lengths
        raise errors.fail("spacing", rule, spacing) from None
    shapes = ((), (num_axes,), (num_samples, num_axes))
    if mm.shape not in shapes or not ((mm > 0) & mm.isfinite()).all():
        raise errors.fail("spacing", rule, mm.tolist())
    values: list[list[float]] = mm.expand(num_samples, num_axes).tolist()
    return values
