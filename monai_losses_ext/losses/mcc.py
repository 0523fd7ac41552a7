# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Matthews correlation coefficient as a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import (
    Absent,
    Batch,
    ClassWeights,
    NonNegative,
    Reduction,
    Sums,
    VoxelLoss,
    activation_of,
)
from monai_losses_ext.sums.target import IgnoreIndex


class MCCLoss(VoxelLoss):
    """Penalize a low correlation of prediction and reference, true negatives included.

    ``1 - (tp tn - fp fn + smooth_nr) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn) + smooth_dr)`` per sample and
    class: 0 for a perfect segmentation, 1 for one by chance, 2 for the opposite. Unlike Dice it is the same when
    foreground and background change places.

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        smooth_nr: added to the numerator.
        smooth_dr: added under the root.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` a class that a sample lacks, or ``skip`` it, so that it is not in the mean.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for ``none``
        ``[B, C']`` (``[C']`` with ``batch``).

    Edge cases:
        A class without any voxel, or of all voxels, costs 0 where the prediction is exactly that, else 1: there is
        nothing to correlate with.

    Source:
        Abhishek and Hamarneh 2021, https://arxiv.org/abs/2010.13454.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
        >>> round(MCCLoss()(p, g).item(), 3)  # tp, tn, fn = 1, fp = 0: 1 - 1 / 2
        0.5
    """

    terms = ("tp", "pred", "ref", "count")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 0.0,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(MCCLoss.__init__, locals())
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
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.non_negative = smooth_nr == 0

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"`` (``[C']`` with ``batch``)."""
        (tp, pred, ref, count), counted = self.entries(sums, self.batch, ref=2)
        # As roots, since four numbers of voxels multiplied may be beyond float32.
        fp, fn, unpredicted, rest = pred - tp, ref - tp, count - pred, count - ref
        tn = rest - fp
        scale = torch.where(count > 0, count, 1)
        product = (pred / scale) * (ref / scale) * (unpredicted / scale) * (rest / scale)
        numerator = (tp / scale) * (tn / scale) - (fp / scale) * (fn / scale) + self.smooth_nr / scale**2
        values = 1 - numerator / (product.clamp_min(0) + self.smooth_dr / scale**4).clamp_min(TINY).sqrt()
        values = torch.where((fp == 0) & (fn == 0), 0.0, values)
        if self.class_weight is not None:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        values = self.reduce(values, counted)
        return values[0] if self.batch and self.reduction == "none" else values


TINY = 1e-30  # of a root's argument: its slope at 0 is infinite
