# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Skeleton recall: thin structures that stay connected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.distance import voxel_size
from monai_losses_ext.losses.base import (
    Absent,
    Batch,
    ClassWeights,
    Positive,
    Reduction,
    Sums,
    VoxelLoss,
    activation_of,
)
from monai_losses_ext.maps import skeleton_of
from monai_losses_ext.sums.target import IgnoreIndex, Target

SMOOTH = 1e-5


class SkeletonRecallLoss(VoxelLoss):
    """Penalize what is missed of a thin tube along the middle of each structure: a gap costs as much as its length.

    ``1 - (sum p s + 1e-5) / (sum s + 1e-5)`` per sample and class, with ``s`` the skeleton of the reference, thickened
    to a tube that stays inside. False positives cost nothing, so it belongs beside a loss of the whole volume.

    The skeleton comes with the target (``skeleton``), or is made of the label at every step, on the CPU, by
    scikit-image (extra ``maps``).

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` a class that a sample lacks, of which nothing is missed, or ``skip`` it.
        radius: of the tube in mm, for skeletons that are made here; None: the published two voxels.
        spacing: voxel size in mm, for such a radius; of the target's affine unless given, else 1.

    Shape:
        input ``[B, C, *S]`` with two or three spatial axes, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]`` or a
        dictionary with such a label; result ``[]``, or for ``none`` ``[B, C']`` (``[C']`` with ``batch``).

    Source:
        Kirchhoff et al. 2024, https://arxiv.org/abs/2404.03010.

    Example:
        >>> import torch
        >>> target = {"label": torch.tensor([[[0, 1, 1, 1]]]), "skeleton": torch.tensor([[[0, 0, 1, 1]]])}
        >>> probabilities = torch.tensor([[[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]])
        >>> round(SkeletonRecallLoss()(probabilities, target).item(), 3)  # one of two
        0.5
    """

    terms = ("skeleton", "skeleton_ref")

    def __init__(
        self,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: Reduction = "mean",
        batch: Batch = False,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
        radius: Positive | None = None,
        spacing: Positive | Sequence[Positive] | None = None,
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(SkeletonRecallLoss.__init__, locals())
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation=activation,
            other_act=other_act,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.batch = batch
        self.radius = radius
        self.spacing = spacing

    def completed(self, target: Target, num_channels: int) -> Target:
        """Return the target with a skeleton of its label, made here where it brought none."""
        if target.skeleton is not None:
            return target
        spacing = self.spacing if self.spacing is not None else voxel_size(target.affine, target.label.ndim - 2)
        masks = (target.dense(num_channels, torch.float32) > 0.5).cpu().numpy()
        if self.activation == "softmax" and num_channels > 1:
            masks[:, 0] = False  # a background has no skeleton
        sizes = np.broadcast_to(1.0 if spacing is None else np.asarray(spacing, float), (len(masks), masks.ndim - 2))
        tubes = np.zeros(masks.shape, bool)
        for i, size in enumerate(sizes):
            tubes[i] = skeleton_of(masks[i], size.tolist(), self.radius) if masks[i].size else False
        return replace(target, skeleton=torch.from_numpy(tubes).to(target.label.device))

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"`` (``[C']`` with ``batch``)."""
        (found, whole), counted = self.entries(sums, self.batch, ref=1)
        values = 1 - (found + SMOOTH) / (whole + SMOOTH)
        if self.class_weight is not None:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        values = self.reduce(values, counted)
        return values[0] if self.batch and self.reduction == "none" else values
