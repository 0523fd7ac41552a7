# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Poly-1 cross-entropy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import (
    Absent,
    ClassWeights,
    Sums,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.sums.target import IgnoreIndex

Epsilon = Annotated[float, arguments.Limits(minimum=-1)]


class Poly1Loss(VoxelLoss):
    """Cross-entropy and ``epsilon (1 - p_t)``, with ``p_t`` the probability of what is right: a coefficient set anew.

    Softmax: ``sum w_c g_c (-log p_c + epsilon (1 - p_c))`` over voxels and classes, over the sum of their weights.
    Sigmoid: the mean over voxels and channels, of which ``w_c`` weighs the positive voxels. ``epsilon`` above 0 pulls
    harder at voxels that are nearly right, below 0 less.

    Args:
        sigmoid: a sigmoid per channel, for classes that overlap. Otherwise softmax; an input of one channel is always
            binary.
        softmax: say that it is softmax; the default.
        epsilon: at least -1; 0 is the cross-entropy, 1 to 2 are usual.
        reduction: ``mean`` or ``sum``.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        absent: sigmoid only: ``count`` the voxels of a channel that a sample lacks, or ``skip`` them.

    Shape:
        input logits ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``.

    Source:
        Leng et al. 2022, https://arxiv.org/abs/2204.12511, Poly-1.

    Example:
        >>> import torch
        >>> round(Poly1Loss(epsilon=1.0)(torch.zeros(1, 2, 1), torch.tensor([[1]])).item(), 4)  # log 2 + 1 / 2
        1.1931
    """

    def __init__(
        self,
        sigmoid: bool = False,
        softmax: bool = False,
        epsilon: Epsilon = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        to_onehot_y: bool = False,
        absent: Absent = "count",
    ) -> None:
        activation_of(sigmoid, softmax, None)
        arguments.check_arguments(Poly1Loss.__init__, locals())
        super().__init__(
            to_onehot_y=to_onehot_y,
            activation="sigmoid" if sigmoid else "softmax",
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.epsilon = float(epsilon)

    def activation_for(self, num_channels: int) -> str:
        """Return ``sigmoid`` for one channel, the chosen activation otherwise."""
        return super().activation_for(num_channels) if num_channels > 1 or self.strict else "sigmoid"

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums needed."""
        is_sigmoid = self.activation_for(num_channels) == "sigmoid"
        return ("ce", "ref", "tp", "ce_neg", "pred", "count") if is_sigmoid else ("ce", "ref", "tp")

    def formula(self, sums: Sums) -> Tensor:
        """Return the summed or averaged loss, a scalar."""
        ce, ref, tp = sums.rows(("ce", "ref", "tp")).unbind(0)
        weight: Any = 1
        if self.class_weight is not None:
            weight = self.per_counted_class("weight", self.class_weight, ce, sums.num_channels)
        values, count = weight * (ce + self.epsilon * (ref - tp)), weight * ref
        if self.activation_for(sums.num_channels) == "sigmoid":
            negative, pred, count = sums.rows(("ce_neg", "pred", "count")).unbind(0)
            values = values + negative + self.epsilon * (pred - tp)
            counted = self.counted(sums)
            if counted is not None:
                values, count = torch.where(counted, values, 0.0), torch.where(counted, count, 0.0)
        total = values.sum()
        return total if self.reduction == "sum" else total / divisor(count.sum())
