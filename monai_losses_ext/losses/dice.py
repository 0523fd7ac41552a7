# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice loss, and the shape that all overlap losses have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

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


class OverlapLoss(VoxelLoss):
    """A loss that compares true positives, false positives and false negatives per sample and class.

    A subclass writes :meth:`score`. ``soft_label`` counts true positives as ``(|p| + |g| - |p - g|) / 2``, which is
    zero for a prediction equal to a soft reference, where ``p g`` is not (Wang et al. 2023,
    https://arxiv.org/abs/2303.16296); for hard labels both are the same.
    """

    def __init__(
        self, batch: Batch, soft_label: bool, squared_pred: bool, smooth_nr: float, smooth_dr: float, **shared: Any
    ) -> None:
        super().__init__(**shared)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.non_negative = smooth_nr <= smooth_dr  # a class that neither holds costs 1 - smooth_nr / smooth_dr
        self.batch = batch
        self.soft_label = soft_label
        self.squared_pred = squared_pred
        self.terms = ("tp", "pred_sq", "ref_sq") if squared_pred else ("tp", "pred", "ref")
        if soft_label and not squared_pred:
            self.terms = ("abs_diff", "pred", "ref")

    @abstractmethod
    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return the loss from true positives, all that is predicted and all there is, each ``[B or 1, C']``."""

    def overlap(self, sums: Sums) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return true positives, all that is predicted, all there is, and which of them count, each ``[B or 1, C']``.

        The last is bool, or None where all do.
        """
        (tp, pred, ref), counted = self.entries(sums, self.batch, ref=2)
        return ((pred + ref - tp) / 2 if self.terms[0] == "abs_diff" else tp), pred, ref, counted

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"`` (``[C']`` with ``batch``)."""
        tp, pred, ref, counted = self.overlap(sums)
        values = self.score(tp, pred, ref, sums.num_channels)
        if self.class_weight is not None and values.shape[1] > 1:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        values = self.reduce(values, counted)
        return values[0] if self.batch and self.reduction == "none" else values


class DiceLoss(OverlapLoss):
    """Penalize a lack of overlap, whatever the size of the structure.

    ``1 - (2 tp + smooth_nr) / (2 tp + fp + fn + smooth_dr)`` per sample and class: with ``jaccard``,
    ``1 - (tp + ...) / (tp + fp + fn + ...)``. A small structure weighs as much as a large one.

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        squared_pred: sum squares of prediction and reference in the denominator (Milletari et al.).
        jaccard: the Jaccard index in place of Dice.
        reduction: ``mean`` over samples and classes, ``sum``, or ``none``.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        weight: one factor per class, or one for all.
        soft_label: count true positives so that a perfect soft prediction costs nothing.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` a class that a sample lacks, or ``skip`` it, so that it is not in the mean.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for ``none``
        ``[B, C', 1, ...]`` (``[C', 1, ...]`` with ``batch``).

    Edge cases:
        A class that neither holds costs ``1 - smooth_nr / smooth_dr``, 0 by default, and one that the reference alone
        lacks nearly 1, whatever is predicted of it: ``absent="skip"`` leaves both out. A class weight is not used where
        one class counts.

    Source:
        Milletari et al. 2016, https://arxiv.org/abs/1606.04797. Differs in the smoothing and in averaging over classes.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[-9.0, -9.0, 9.0], [9.0, 9.0, -9.0]]])
        >>> round(DiceLoss(softmax=True)(logits, torch.tensor([[1, 1, 0]])).item(), 3)
        0.0
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
        weight: ClassWeights = None,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(DiceLoss.__init__, locals())
        super().__init__(
            batch=batch,
            soft_label=soft_label,
            squared_pred=squared_pred,
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
        self.jaccard = jaccard

    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return the Dice (or Jaccard) loss per sample and class."""
        both = pred + ref  # tp + fp + tp + fn
        sizes = 2 * (both - tp) if self.jaccard else both
        return 1 - (2 * tp + self.smooth_nr) / (sizes + self.smooth_dr)

    def shaped(self, value: Tensor, ndim: int) -> Tensor:
        """Return the loss; for ``reduction="none"`` with axes of length 1 in place of the spatial ones, as in MONAI."""
        return value.view(*value.shape, *[1] * (ndim - 2)) if self.reduction == "none" else value


class JaccardLoss(DiceLoss):
    """Penalize a small intersection over union: :class:`DiceLoss` with ``jaccard``.

    ``1 - (tp + smooth_nr / 2) / (tp + fp + fn + smooth_dr / 2)`` per sample and class.

    Args:
        include_background: and all others: as in :class:`DiceLoss`.

    Source:
        Rahman and Wang 2016, https://doi.org/10.1007/978-3-319-50835-1_22.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
        >>> round(JaccardLoss()(p, g).item(), 3)
        0.5
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        squared_pred: bool = False,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        weight: ClassWeights = None,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        arguments.check_arguments(JaccardLoss.__init__, {k: v for k, v in given.items() if k != "other_act"})
        super().__init__(jaccard=True, **given)


class LogCoshDiceLoss(DiceLoss):
    """The logarithm of the hyperbolic cosine of the Dice loss, which is smooth and flat near a perfect overlap.

    ``log cosh(L_dice)`` per sample and class, between 0 and 0.434.

    Args:
        include_background: and all others: as in :class:`DiceLoss`.

    Source:
        Jadon 2020, https://arxiv.org/abs/2006.14822. Differs in taking it of each class and not of their mean, so that
        a class weight weighs its part.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
        >>> round(LogCoshDiceLoss()(p, g).item(), 4)  # log cosh(1 / 3)
        0.0546
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        squared_pred: bool = False,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        weight: ClassWeights = None,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        arguments.check_arguments(LogCoshDiceLoss.__init__, {k: v for k, v in given.items() if k != "other_act"})
        super().__init__(**given)
        self.non_negative = True

    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return log cosh of the Dice loss per sample and class."""
        return super().score(tp, pred, ref, num_channels).cosh().log()
