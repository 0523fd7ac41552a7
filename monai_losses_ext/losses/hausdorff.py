# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's Hausdorff losses, with the targets and precisions that the losses here take."""

from __future__ import annotations

from collections.abc import Callable

import monai.losses
import torch
from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import Positive, Reduction, TargetLike
from monai_losses_ext.sums.target import Target, plain
from monai_losses_ext.sums.terms import voxel_inputs


class HausdorffDTLoss(monai.losses.HausdorffDTLoss):
    """Penalize squared errors by their distance to both boundaries: MONAI's estimate of the Hausdorff distance.

    The distance maps of reference and prediction are computed by MONAI at every step, in voxels: expect it to take many
    times as long as a boundary loss.

    Args:
        alpha: exponent of the distance.
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean``, ``sum`` or ``none``.
        batch: sum over the samples of a batch before the quotient.

    Shape:
        input ``[B, C, H, W]`` or ``[B, C, H, W, D]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``.

    Source:
        Karimi and Salcudean 2019, https://arxiv.org/abs/1904.10030.
    """

    def __init__(
        self,
        alpha: Positive = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: Reduction = "mean",
        batch: bool = False,
    ) -> None:
        arguments.check_arguments(HausdorffDTLoss.__init__, locals())
        super().__init__(
            alpha=alpha,
            include_background=include_background,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            batch=batch,
        )

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the loss of a batch; see the class."""
        parsed = Target.parse(target, input)
        if parsed.weight is not None:
            raise errors.fail("weight", "of voxels is not known to MONAI's Hausdorff losses; leave it out", "a weight")
        if parsed.annotated is not None:
            raise errors.fail("annotated", "is not known to MONAI's Hausdorff losses; leave it out", "partial labels")
        parsed.check_values(input.shape[1])
        logits, dense, _ = voxel_inputs(plain(input), parsed, "none")
        if logits.numel() == 0:
            return logits.sum()
        if self.softmax and logits.shape[1] == 1:  # MONAI warns, and takes the logits for probabilities
            raise errors.fail("softmax", "is constant over one channel; use sigmoid, or two channels", "1 channel")
        with torch.autocast(logits.device.type, enabled=False):
            value: Tensor = super().forward(logits, dense)
        return value


class LogHausdorffDTLoss(HausdorffDTLoss):
    """The logarithm of 1 + :class:`HausdorffDTLoss`, which grows more slowly with an outlier.

    Args:
        alpha: exponent of the distance.
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean``, ``sum`` or ``none``.
        batch: sum over the samples of a batch before the quotient.
    """

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002
        """Return the loss of a batch; see the class."""
        return torch.log(super().forward(input, target) + 1)
