# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Boundary loss: how far from the reference's boundary the prediction errs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.distance import signed_distance, voxel_size
from monai_losses_ext.losses.base import (
    ClassWeights,
    Positive,
    Reduction,
    Sums,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.sums.target import IgnoreIndex, Target


class BoundaryLoss(VoxelLoss):
    """Penalize each false voxel by its distance to the reference's boundary.

    ``sum m phi p - sum m min(phi, 0)`` per sample and class, over the number of voxels, with ``phi`` the signed
    distance in millimeters, negative inside. It is 0 where the prediction is the reference, and never negative,
    whatever happened to the map on its way (crop, rotation, zoom, half precision). The published form, ``sum phi p``,
    has the same gradient and differs by a constant.

    The map comes with the target, if that is a dictionary ``{"label": ..., "distance": [B, C, *S]}`` (see
    :class:`monai_losses_ext.transforms.SignedDistanceMapd`); otherwise it is computed of the labels at every step,
    where whatever lies beyond the patch is not known.

    Use it beside a region loss, and raise its weight slowly: on its own it is flat far from a boundary.

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        batch: average over the samples before the reduction.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count. In a map that is computed here they
            lie outside of all classes.
        normalize: ``voxels``: the mean over the voxels that count, in mm; ``distance``: the same with every map divided
            by its largest absolute value, without a unit and at most 2; ``none``: the sum.
        absent: a class that the reference lacks: ``skip`` leaves it out of the mean. Where maps are computed here,
            ``far`` makes its map half the diagonal of the volume, so that a false positive costs something, and
            ``zero`` leaves it without a gradient, as MONAI does. A class that fills the volume gets the opposite.
        convention: ``signed``; or ``kervadec``, the published code's and MONAI's map, which is off by one inside. Only
            for maps that are computed here.
        spacing: voxel size in mm, one number or one per axis, for maps that are computed here; taken from the affine of
            the target, sample by sample, unless given; 1 mm, with a warning, for a target without an affine.
        distance_backend: ``numba``, ``scipy`` or ``auto``, see :func:`monai_losses_ext.distance.signed_distance`.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]`` or a dictionary with such a label;
        result ``[]``, or for ``none`` ``[B, C']`` (``[C']`` with ``batch``).

    Source:
        Kervadec et al. 2019, https://arxiv.org/abs/1812.07032. Differs by the constant, in the map inside, in
        millimeters and in absent classes.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[9.0, 9.0, 9.0, -9.0], [-9.0, -9.0, -9.0, 9.0]]])
        >>> loss = BoundaryLoss(softmax=True, include_background=False, spacing=2.0)
        >>> round(loss(logits, torch.tensor([[0, 0, 1, 1]])).item(), 2)  # one voxel of four, 2 mm inside
        0.5
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: Reduction = "mean",
        batch: bool = False,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        normalize: Literal["voxels", "distance", "none"] = "voxels",
        absent: Literal["far", "zero", "skip"] = "far",
        convention: Literal["signed", "kervadec"] = "signed",
        spacing: Positive | Sequence[Positive] | None = None,
        distance_backend: Literal["auto", "numba", "scipy"] = "auto",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(BoundaryLoss.__init__, locals())
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation=activation,
            other_act=other_act,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
        )
        self.terms = ("surface", "surface_min", "count")
        self.batch = batch
        self.normalize = normalize
        self.absent = absent
        self.convention = convention
        self.spacing = tuple(map(float, spacing)) if isinstance(spacing, Sized) else spacing
        self.distance_backend = distance_backend
        self._warned = False

    @property
    def map_options(self) -> Hashable:
        """What the map depends on."""
        scaled = self.normalize == "distance"
        return scaled, self.absent, self.convention, self.spacing, self.distance_backend, self.include_background

    @torch.no_grad()
    def with_map(self, input: Tensor, target: Target) -> Target:  # noqa: A002
        """Return the target with the map that the loss integrates: the one that came along, or a new one."""
        counted = target.counted()
        distance = target.distance
        if distance is None:
            distance = self._new_map(target, counted, input.shape[1])
        if self.normalize == "distance":
            axes = tuple(range(2, distance.ndim))
            known = distance if counted is None else distance.masked_fill(~counted, 0.0)
            largest = torch.maximum(known.amax(axes, keepdim=True), -known.amin(axes, keepdim=True))
            distance = known / torch.where(largest == 0, 1.0, largest)
        return replace(target, distance=distance)

    def _new_map(self, target: Target, counted: Tensor | None, num_classes: int) -> Tensor:
        """Return the map of the labels; voxels that do not count lie outside of all classes."""
        label = target.label
        if counted is not None and target.is_index:
            label = torch.where(counted, label if label.is_floating_point() else label.long(), -1)  # -1 is no class
        elif counted is not None:
            label = torch.where(counted, label, torch.zeros_like(label))
        spacing = self.spacing if self.spacing is not None else voxel_size(target.affine, label.ndim - 2)
        if spacing is None and not self._warned:
            self._warned = True
            warnings.warn(
                "BoundaryLoss: the target has no affine (a plain tensor; a compiled trainer makes them plain), so "
                "voxels count as 1 mm. Give spacing to say how large they are.",
                stacklevel=8,
            )
        return signed_distance(
            label,
            num_classes if target.is_index else None,
            spacing,
            "zero" if self.absent == "skip" else self.absent,
            self.convention,
            self.include_background,
            self.distance_backend,
        )

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"`` (``[C']`` with ``batch``)."""
        first = self.first_class(sums.num_channels)
        surface, constant, count = sums.rows(self.terms, first).unbind(0)
        values = surface - constant
        if self.normalize != "none":
            values = values / divisor(count)
        if self.class_weight is not None:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        counted = self.counted(sums)
        if self.batch:
            values = values if counted is None else torch.where(counted, values, 0.0)
            number = max(1, len(values)) if counted is None else divisor(counted.sum(0))
            values, counted = values.sum(0) / number, None if counted is None else counted.any(0)
        return self.reduce(values, counted)
