# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Tversky loss and focal Tversky loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_losses_ext.arguments import check_arguments
from monai_losses_ext.losses.base import (
    Absent,
    Batch,
    ClassWeights,
    NonNegative,
    Positive,
    Reduction,
    activation_of,
)
from monai_losses_ext.losses.dice import OverlapLoss
from monai_losses_ext.sums.target import IgnoreIndex


class TverskyLoss(OverlapLoss):
    """Penalize false positives and false negatives by weights of their own.

    ``1 - (tp + smooth_nr) / (tp + alpha fp + beta fn + smooth_dr)`` per sample and class. Raising ``beta`` alone makes
    misses dearer, raising ``alpha`` alone false alarms; 0.5 and 0.5 is the Dice loss, 1 and 1 the Jaccard loss.

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        alpha: weight of false positives; one for all classes, or one per class.
        beta: weight of false negatives; likewise.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        soft_label: count true positives so that a perfect soft prediction costs nothing.
        ignore_index: label, or list of labels, of the voxels that do not count.
        weight: one factor per class, or one for all.
        absent: ``count`` a class that a sample lacks, or ``skip`` it, so that it is not in the mean.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for ``none``
        ``[B, C']`` (``[C']`` with ``batch``).

    Edge cases:
        A class that neither holds costs ``1 - smooth_nr / smooth_dr``, 0 by default.

    Source:
        Salehi et al. 2017, https://arxiv.org/abs/1706.05721.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> [round(TverskyLoss(alpha=0.3, beta=beta)(p, g).item(), 3) for beta in (0.3, 0.7)]  # one miss
        [0.231, 0.412]
    """

    alpha: Tensor | float
    beta: Tensor | float

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        alpha: NonNegative | Sequence[NonNegative] = 0.5,
        beta: NonNegative | Sequence[NonNegative] = 0.5,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        weight: ClassWeights = None,
        absent: Absent = "count",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        check_arguments(TverskyLoss.__init__, locals())
        super().__init__(
            batch=batch,
            soft_label=soft_label,
            squared_pred=False,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation=activation,
            other_act=other_act,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.set_per_class("alpha", alpha, persistent=False)
        self.set_per_class("beta", beta, persistent=False)

    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return the Tversky loss per sample and class."""
        alpha = self.per_counted_class("alpha", self.alpha, tp, num_channels)
        beta = self.per_counted_class("beta", self.beta, tp, num_channels)
        errors = alpha * (pred - tp) + beta * (ref - tp)
        return 1 - (tp + self.smooth_nr) / (tp + errors + self.smooth_dr)


class FocalTverskyLoss(TverskyLoss):
    """Penalize poorly segmented classes more than well segmented ones: the Tversky loss to the power ``1 / gamma``.

    With ``gamma`` above 1 the slope grows as a class comes close to perfect, so that small, nearly found structures
    keep their pull; ``gamma`` 1 is the Tversky loss.

    Args:
        gamma: the paper's focal parameter, above 0, in practice 1 to 3; the exponent is ``1 / gamma``.
        alpha: weight of false positives (the paper's beta).
        beta: weight of false negatives (the paper's alpha).
        include_background: and all that follow, as in :class:`TverskyLoss`.

    Edge cases:
        The power has an infinite slope at a loss of 0, so a class closer to perfect than float precision counts as 0
        with gradient 0.

    Source:
        Abraham and Khan 2018, https://arxiv.org/abs/1810.07842. Differs in averaging over the classes, not summing, and
        in what ``alpha`` and ``beta`` stand for.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 1.0]]])
        >>> plain, focal = TverskyLoss(alpha=0.3, beta=0.7)(p, g), FocalTverskyLoss(gamma=2.0)(p, g)
        >>> torch.allclose(focal**2, plain)
        True
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        alpha: NonNegative | Sequence[NonNegative] = 0.3,
        beta: NonNegative | Sequence[NonNegative] = 0.7,
        gamma: Positive = 4 / 3,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        weight: ClassWeights = None,
        absent: Absent = "count",
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(FocalTverskyLoss.__init__, arguments)
        del arguments["gamma"]
        super().__init__(**arguments)
        self.gamma = float(gamma)
        self.non_negative = True  # a Tversky loss below 0 counts as 0

    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return the focal Tversky loss per sample and class."""
        return raised(super().score(tp, pred, ref, num_channels), 1 / self.gamma)


def raised(loss: Tensor, exponent: float) -> Tensor:
    """Return a loss to a power, 0 with a gradient of 0 where it is closer to perfect than its precision."""
    if exponent == 1:
        return loss
    smallest = torch.finfo(loss.dtype).eps
    # Asked this way round a NaN stays one: a comparison with it is false.
    return torch.where(loss <= smallest, 0.0, loss.clamp_min(smallest) ** exponent)
