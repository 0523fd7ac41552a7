# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's two compounds: Dice with cross-entropy, and Dice with focal loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import Absent, Batch, ClassWeights, Fraction, NonNegative, Reduction
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.losses.cross_entropy import CrossEntropyLoss
from monai_losses_ext.losses.dice import DiceLoss
from monai_losses_ext.losses.focal import FocalLoss
from monai_losses_ext.sums.target import IgnoreIndex


class DiceCELoss(CompoundLoss):
    """Dice and cross-entropy, ``lambda_dice L_dice + lambda_ce L_ce``: the common default of medical segmentation.

    Takes MONAI's keywords. The cross-entropy acts on logits with a softmax over all classes whatever the activation of
    the Dice part and ``include_background`` say (binary for one channel), as in MONAI; for overlapping classes with a
    sigmoid use a :class:`CompoundLoss` of ``DiceLoss(sigmoid=True)`` and ``CrossEntropyLoss(sigmoid=True)``.

    Args:
        include_background: whether class 0 counts in the Dice part.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: activation of the Dice part.
        softmax: activation of the Dice part.
        other_act: activation of the Dice part.
        squared_pred: see :class:`DiceLoss`.
        jaccard: see :class:`DiceLoss`.
        reduction: ``mean`` or ``sum``.
        smooth_nr: see :class:`DiceLoss`.
        smooth_dr: see :class:`DiceLoss`.
        batch: see :class:`DiceLoss`.
        weight: one factor per class, background included; both parts use it, the Dice part of the classes it counts.
        lambda_dice: weight of the Dice part, at least 0.
        lambda_ce: weight of the cross-entropy, at least 0.
        label_smoothing: see :class:`CrossEntropyLoss`.
        ignore_index: label, or list of labels, of the voxels that do not count, in both parts.
        absent: see :class:`DiceLoss`, in both parts.

    Example:
        >>> import torch
        >>> loss = DiceCELoss(softmax=True, to_onehot_y=True)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)).item(), 4)  # (1 + 1/3) / 2 + log 2
        1.3598
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        weight: ClassWeights = None,
        lambda_dice: NonNegative = 1.0,
        lambda_ce: NonNegative = 1.0,
        label_smoothing: Fraction = 0.0,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        arguments.check_arguments(DiceCELoss.__init__, {k: v for k, v in locals().items() if k != "other_act"})
        dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        cross_entropy = CrossEntropyLoss(
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            absent=absent,
        )
        super().__init__([dice, cross_entropy], [lambda_dice, lambda_ce], ["dice", "ce"], mixed_activations=True)


class DiceFocalLoss(CompoundLoss):
    """Dice and focal loss, ``lambda_dice L_dice + lambda_focal L_focal``.

    Takes MONAI's keywords. With ``softmax`` both parts use the softmax (MONAI's focal part takes a sigmoid); otherwise
    the focal part takes a sigmoid of the logits.

    Args:
        include_background: whether class 0 counts, in both parts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: a sigmoid per channel, both parts.
        softmax: a softmax over the channels, both parts.
        other_act: activation of the Dice part.
        squared_pred: see :class:`DiceLoss`.
        jaccard: see :class:`DiceLoss`.
        reduction: ``mean``, ``sum`` or ``none``.
        smooth_nr: see :class:`DiceLoss`.
        smooth_dr: see :class:`DiceLoss`.
        batch: see :class:`DiceLoss`.
        gamma: see :class:`FocalLoss`.
        weight: one factor per class, or one for all; both parts.
        lambda_dice: weight of the Dice part, at least 0.
        lambda_focal: weight of the focal part, at least 0.
        alpha: see :class:`FocalLoss`.
        ignore_index: label, or list of labels, of the voxels that do not count, in both parts.
        absent: see :class:`DiceLoss`, in both parts.

    Example:
        >>> import torch
        >>> loss = DiceFocalLoss(softmax=True, gamma=0.0)
        >>> round(loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4)).item(), 4)  # (1 + 1/3) / 2 + log(2) / 2
        1.0132
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        gamma: NonNegative = 2.0,
        weight: ClassWeights = None,
        lambda_dice: NonNegative = 1.0,
        lambda_focal: NonNegative = 1.0,
        alpha: Fraction | Sequence[NonNegative] | Tensor | None = None,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        arguments.check_arguments(DiceFocalLoss.__init__, {k: v for k, v in locals().items() if k != "other_act"})
        dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            alpha=alpha,
            weight=weight,
            reduction=reduction,
            use_softmax=softmax,
            ignore_index=ignore_index,
            absent=absent,
        )
        super().__init__([dice, focal], [lambda_dice, lambda_focal], ["dice", "focal"], mixed_activations=True)
