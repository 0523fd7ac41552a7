# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Focal loss on voxel sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import (
    Absent,
    ClassWeights,
    Fraction,
    NonNegative,
    Reduction,
    Sums,
    TargetLike,
    VoxelLoss,
    divisor,
)
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import IgnoreIndex, Target, plain


class FocalLoss(VoxelLoss):
    """Penalize hard voxels: cross-entropy scaled by the probability that was missed.

    ``alpha (1 - p_t)^gamma (-log p_t)`` with ``p_t`` the probability given to the truth. Raising ``gamma`` takes weight
    from voxels that are right already; ``gamma`` 0 without alpha is the cross-entropy.

    Args:
        include_background: whether class 0 counts; it is always part of the softmax.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        gamma: exponent, at least 0.
        alpha: balance between classes. One number in [0, 1] weighs the foreground by alpha and the background by
            1 - alpha (softmax), or positive voxels by alpha and negative ones by 1 - alpha (sigmoid). A list holds
            alpha per class: the class's weight (softmax), or as for one number but per channel (sigmoid).
        weight: one factor per class, or one for all.
        reduction: ``mean`` over voxels, samples and classes; ``sum`` over samples and classes of the mean over voxels
            (as in MONAI); ``none`` for a map of voxels.
        use_softmax: softmax over the channels; otherwise a sigmoid per channel.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` the voxels of a class that a sample lacks, or ``skip`` them.

    Shape:
        input logits ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for
        ``none`` ``[B, C', *S]``.

    Edge cases:
        Softmax over one channel raises an error: it is constant, and MONAI's loss is 0 there. Soft labels: softmax is
        linear in them, sigmoid follows MONAI. The mean over no voxel is 0.

    Source:
        Lin et al. 2017, https://arxiv.org/abs/1708.02002. Differs in the mean over all voxels, not over positive ones.

    Example:
        >>> import torch
        >>> easy, hard = torch.tensor([[[4.0]]]), torch.tensor([[[-4.0]]])
        >>> truth = torch.ones(1, 1, 1)
        >>> losses = FocalLoss(gamma=0), FocalLoss(gamma=2)
        >>> hard_to_easy = [(loss(hard, truth) / loss(easy, truth)).item() for loss in losses]
        >>> hard_to_easy[1] > 1000 * hard_to_easy[0]
        True
    """

    alpha: Tensor | float | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: NonNegative = 2.0,
        alpha: Fraction | Sequence[NonNegative] | Tensor | None = None,
        weight: ClassWeights = None,
        reduction: Reduction = "mean",
        use_softmax: bool = False,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        arguments.check_arguments(FocalLoss.__init__, locals())
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation="softmax" if use_softmax else "sigmoid",
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.gamma = float(gamma)
        self.set_per_class("alpha", alpha, persistent=False)
        is_list = isinstance(self.alpha, Tensor)
        if alpha is not None and not (is_list and use_softmax) and bool(torch.any(torch.as_tensor(self.alpha) > 1)):
            where = "for sigmoid" if is_list else "where it is one number"
            raise errors.fail("alpha", f"must lie between 0 and 1 {where}", alpha)
        self._positive, self._negative = T.focal(self.gamma), T.focal_neg(self.gamma)
        self.terms = (self._positive, "count") if use_softmax else (self._positive, self._negative, "count")

    def activation_for(self, num_channels: int) -> str:
        """Return the activation; a softmax over one channel is refused."""
        if self.activation == "softmax" and num_channels == 1:
            rule = "softmax over one channel is constant and has no gradient; use sigmoid, or two channels"
            raise errors.fail("use_softmax", rule, "1 channel")
        return self.activation

    def formula(self, sums: Sums) -> Tensor:
        """Return the summed or averaged focal loss, a scalar."""
        negative = sums[self._negative] if self._negative in self.terms else None
        values = self._balanced(sums[self._positive], negative)  # B C'
        count = sums["count"][:, self.first_class(sums.num_channels) :]
        counted = self.counted(sums)
        if counted is not None:
            values, count = torch.where(counted, values, 0.0), torch.where(counted, count, 0.0)
        if self.reduction == "mean":
            return values.sum() / divisor(count.sum())
        return (values / divisor(count)).sum()

    def _balanced(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        """Weigh the two parts by alpha and the class weights; channels stand on axis 1, ``[B, C, ...]``."""
        num_channels, tail = positive.shape[1], [1] * (positive.ndim - 2)
        first = self.first_class(num_channels)

        def of_class(argument: str, values: Tensor | float) -> Tensor | float:
            values = self.per_counted_class(argument, values, positive, num_channels)
            return values.view(-1, *tail) if isinstance(values, Tensor) else values

        values = positive[:, first:]
        if negative is not None:
            negative = negative[:, first:]
            if self.alpha is None:
                values = values + negative
            else:
                alpha = of_class("alpha", self.alpha)
                values = alpha * values + (1 - alpha) * negative
        elif isinstance(self.alpha, Tensor):
            values = of_class("alpha", self.alpha) * values
        elif self.alpha is not None:
            values = self.alpha * values
            if first == 0:  # the background, whose share is the rest
                values = torch.cat([(1 - self.alpha) * positive[:, :1], values[:, 1:]], 1)
        return values if self.class_weight is None else of_class("weight", self.class_weight) * values

    def is_formula(self) -> bool:
        """Tell whether the loss is a formula on sums; a value per voxel is not."""
        return self.reduction != "none"

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002
        """Return the loss of a batch; see the class."""
        return super().forward(input, target) if self.is_formula() else self._voxel_map(input, target)

    def _voxel_map(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002
        target = Target.parse(target, input)
        num_channels = input.shape[1]
        activation = self.activation_for(num_channels)
        self.warn_about_one_channel(num_channels)
        target = target.ignoring(self.ignore_index, activation).folded(activation)
        parts, multiplier = T.voxel_maps(plain(input), target, self.terms, activation)
        values = self._balanced(parts[self._positive], parts.get(self._negative))
        if multiplier is None:
            return values
        return values * (multiplier if multiplier.shape[1] == 1 else multiplier[:, -values.shape[1] :])
