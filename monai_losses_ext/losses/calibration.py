# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Calibration: probabilities that are as often right as they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import (
    Absent,
    ClassWeights,
    Reduction,
    Sums,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import IgnoreIndex


class L1ACELoss(VoxelLoss):
    """Penalize the difference of mean probability and frequency, averaged over bins of the probability.

    Per sample and class, the voxels are sorted into ``bins`` equal intervals of their probability; the loss is the mean
    over the bins that hold any of ``|mean p - mean g|``, between 0 and 1. The bin of a voxel is hard, so the gradient
    goes through the probabilities alone.

    Use it beside a loss that segments: probabilities may be well calibrated and useless.

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        bins: number of intervals, ``((i - 1) / bins, i / bins]``, the first closed.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` a class that a sample lacks, or ``skip`` it, so that it is not in the mean.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for ``none``
        ``[B, C']``.

    Source:
        Barfoot et al. 2024, https://arxiv.org/abs/2403.06759, hard binning; 2025, https://arxiv.org/abs/2506.03942.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.9, 0.9, 0.1, 0.1]]]), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
        >>> round(L1ACELoss(bins=5)(p, g).item(), 3)  # (|0.9 - 0.5| + |0.1 - 0|) / 2
        0.25
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        bins: Annotated[int, arguments.Limits(minimum=1, maximum=1000)] = 20,
        reduction: Reduction = "mean",
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(L1ACELoss.__init__, locals())
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
        self.bins = int(bins)
        self.terms = (T.bins(self.bins),)

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"``."""
        count, pred, ref = sums.bins(self.bins)[:, :, self.first_class(sums.num_channels) :].unbind(0)
        gaps = torch.where(count > 0, (pred - ref).abs() / divisor(count), 0.0)
        values = gaps.sum(2) / divisor((count > 0).sum(2))
        if self.class_weight is not None:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        return self.reduce(values, self.counted(sums))
