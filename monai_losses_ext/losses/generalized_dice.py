# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Generalized Dice loss: one quotient for all classes of a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import (
    Absent,
    Batch,
    NonNegative,
    Reduction,
    Sums,
    activation_of,
)
from monai_losses_ext.losses.dice import OverlapLoss
from monai_losses_ext.sums.target import IgnoreIndex


class GeneralizedDiceLoss(OverlapLoss):
    """Penalize a lack of overlap over all classes at once, each weighed by how large its reference is.

    ``1 - (2 sum_c w_c tp_c + smooth_nr) / (sum_c w_c (2 tp_c + fp_c + fn_c) + smooth_dr)`` per sample, with ``w_c`` of
    the number of the reference's voxels: ``1 / n_c^2`` (``square``), ``1 / n_c`` (``simple``) or 1 (``uniform``).

    Args:
        include_background: whether class 0 counts.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        w_type: ``square``, ``simple`` or ``uniform``.
        reduction: ``mean`` over samples, ``sum``, or ``none``.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        soft_label: count true positives so that a perfect soft prediction costs nothing.
        ignore_index: label, or list of labels, of the voxels that do not count.
        absent: ``count`` a class that a sample lacks, or ``skip`` it.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for ``none``
        ``[B, 1, 1, ...]`` (``[1, 1, ...]`` with ``batch``), as in MONAI.

    Edge cases:
        A class that the reference lacks has the largest weight of the classes that are there, as in MONAI, and 1 where
        none is (MONAI: 0, so that the loss is constant).

    Source:
        Sudre et al. 2017, https://arxiv.org/abs/1707.03237.

    Example:
        >>> import torch
        >>> p, g = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
        >>> round(GeneralizedDiceLoss()(p, g).item(), 3)  # 1 - 2 / 3
        0.333
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        w_type: Literal["square", "simple", "uniform"] = "square",
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        soft_label: bool = False,
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        w_type = str(getattr(w_type, "value", w_type))  # type: ignore[assignment]  # MONAI's enumeration
        arguments.check_arguments(GeneralizedDiceLoss.__init__, locals())
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
            ignore_index=ignore_index,
            absent=absent,
        )
        self.w_type = w_type

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, 1]`` values for ``reduction="none"`` (``[1]`` with ``batch``)."""
        tp, pred, ref, counted = self.overlap(sums)
        weight = self.size_weights(ref, counted)
        numerator = 2 * (weight * tp).sum(1, keepdim=True) + self.smooth_nr
        values = 1 - numerator / ((weight * (pred + ref)).sum(1, keepdim=True) + self.smooth_dr)
        values = self.reduce(values, None if counted is None else counted.any(1, keepdim=True))
        return values[0] if self.batch and self.reduction == "none" else values

    def size_weights(self, ref: Tensor, counted: Tensor | None) -> Tensor:
        """Return the weights of the classes, ``[B, C']``, 0 for those that do not count."""
        power = {"square": 2, "simple": 1, "uniform": 0}[self.w_type]
        present = ref > 0 if counted is None else (ref > 0) & counted
        weight = torch.where(present, 1 / torch.where(present, ref, 1) ** power, 0)
        largest = weight.amax(1, keepdim=True)
        weight = torch.where(present, weight, torch.where(largest > 0, largest, 1))
        return weight if counted is None else torch.where(counted, weight, 0)

    def score(self, tp: Tensor, pred: Tensor, ref: Tensor, num_channels: int) -> Tensor:
        """Return the Dice loss of each class alone; the loss itself has one quotient for all."""
        return 1 - (2 * tp + self.smooth_nr) / (pred + ref + self.smooth_dr)

    def shaped(self, value: Tensor, ndim: int) -> Tensor:
        """Return the loss; for ``reduction="none"`` with axes of length 1 in place of the spatial ones, as in MONAI."""
        return value.view(*value.shape, *[1] * (ndim - 2)) if self.reduction == "none" else value
