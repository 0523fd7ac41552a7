# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Focal loss on voxel sums."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import (
    ClassWeights,
    Fraction,
    NonNegative,
    Reduction,
    Sums,
    Target,
    VoxelLoss,
    divisor,
    label_and_distance,
    per_class,
)
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.voxel_sums import check_input, voxel_inputs


class FocalLoss(VoxelLoss):
    """Penalise hard voxels: cross-entropy scaled by the probability that was missed.

    ``alpha (1 - p_t)^gamma (-log p_t)`` with ``p_t`` the probability given to the truth. Raising ``gamma`` takes weight
    from voxels that are right already; ``gamma`` 0 without alpha is the cross-entropy.

    Args:
        include_background: whether class 0 counts; it is always part of the softmax.
        to_onehot_y: kept for MONAI's sake; index labels are recognised by their shape.
        gamma: exponent, at least 0.
        alpha: balance between classes. One number in [0, 1] weighs the foreground by alpha and the background by
            1 - alpha (softmax), or positive voxels by alpha and negative ones by 1 - alpha (sigmoid). A list holds
            alpha per class: the class's weight (softmax), or as for one number but per channel (sigmoid).
        weight: one factor per class, or one for all.
        reduction: ``mean`` over voxels, samples and classes; ``sum`` over samples and classes of the mean over voxels
            (as in MONAI); ``none`` for a map of voxels.
        use_softmax: softmax over the channels; otherwise a sigmoid per channel.
        ignore_index: label of the voxels that do not count.

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

    alpha: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: NonNegative = 2.0,
        alpha: Fraction | Sequence[NonNegative] | Tensor | None = None,
        weight: ClassWeights = None,
        reduction: Reduction = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        arguments.check_arguments(FocalLoss.__init__, locals())
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation="softmax" if use_softmax else "sigmoid",
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
        )
        self.gamma = float(gamma)
        self.register_buffer("alpha", per_class("alpha", alpha), persistent=False)
        if self.alpha is not None and (self.alpha.ndim == 0 or not use_softmax) and bool((self.alpha > 1).any()):
            where = "for sigmoid" if self.alpha.ndim else "where it is one number"
            raise errors.fail("alpha", f"must lie between 0 and 1 {where}", alpha)
        self._positive, self._negative = T.focal(self.gamma), T.focal_neg(self.gamma)
        self.terms = (self._positive, "count") if use_softmax else (self._positive, self._negative, "count")

    def activation_for(self, num_channels: int) -> str:
        """Return the activation; a softmax over one channel is refused."""
        if self.activation == "softmax" and num_channels == 1:
            rule = "softmax over one channel is constant and has no gradient; use sigmoid, or two channels"
            raise errors.fail("use_softmax", rule, "1 channel")
        return self.activation

    def formula(self, sums: Sums, is_index: bool) -> Tensor:
        """Return the summed or averaged focal loss, a scalar."""
        values = self._balanced(sums[self._positive], sums.get(self._negative))  # B C'
        count = self.without_background(sums["count"])
        if self.reduction == "mean":
            return values.sum() / divisor(count.sum())
        return (values / divisor(count)).sum()

    def _balanced(self, positive: Tensor, negative: Tensor | None) -> Tensor:
        """Weigh the two parts by alpha and the class weights; channels stand on axis 1, ``[B, C, ...]``."""
        num_channels, tail = positive.shape[1], [1] * (positive.ndim - 2)

        def column(values: Tensor) -> Tensor:
            return values.to(positive).view(-1, *tail) if values.ndim else values.to(positive)

        if negative is None:
            values = positive
            if self.alpha is not None and self.alpha.ndim == 0:
                alpha = self.alpha.repeat(num_channels)
                alpha[0] = 1 - self.alpha
                values = column(alpha) * positive
            values = self.without_background(values)
            if self.alpha is not None and self.alpha.ndim == 1:
                values = column(self.per_counted_class("alpha", self.alpha, num_channels)) * values
        else:
            positive, negative = self.without_background(positive), self.without_background(negative)
            values = positive + negative
            if self.alpha is not None:
                alpha = column(self.per_counted_class("alpha", self.alpha, num_channels))
                values = alpha * positive + (1 - alpha) * negative
        if self.class_weight is not None:
            values = column(self.per_counted_class("weight", self.class_weight, num_channels)) * values
        return values

    def forward(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002
        """Return the loss of a batch; see the class."""
        if self.reduction != "none":
            return super().forward(input, target)
        return self._voxel_map(input, label_and_distance(target)[0])

    def _voxel_map(self, logits: Tensor, target: Tensor) -> Tensor:
        check_input(logits)
        num_channels = logits.shape[1]
        activation = self.activation_for(num_channels)
        self.warn_about_one_channel(num_channels)
        x, dense, dropped = voxel_inputs(logits, target, activation, self.ignore_index)
        parts = T.voxel_values(self.terms, activation, x.transpose(0, 1), dense.transpose(0, 1), None)
        negative = parts[self._negative].transpose(0, 1) if self._negative in parts else None
        values = self._balanced(parts[self._positive].transpose(0, 1), negative)
        return values if dropped is None else values.masked_fill(dropped, 0.0)
