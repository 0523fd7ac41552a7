# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Unified focal loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import (
    Absent,
    Batch,
    ClassWeights,
    Fraction,
    NonNegative,
    Sums,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.losses.tversky import raised
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import IgnoreIndex


class UnifiedFocalLoss(VoxelLoss):
    """Focal and focal Tversky loss with shared parameters, of which the asymmetric form spares rare classes the focus.

    ``s F + (1 - s) R`` with ``s = focal_share``. With rare classes c, the common class 0, and ``T_c`` the Tversky loss
    ``1 - tp / (tp + delta fn + (1 - delta) fp)`` of a class:

    - ``F``, the mean over voxels of ``-delta sum_c g_c log p_c - (1 - delta) (1 - p_0)^gamma g_0 log p_0``;
    - ``R``, the mean over classes and samples of ``T_c^(1 - gamma)`` and ``T_0``.

    So ``gamma`` takes weight from easy background voxels and gives it to rare classes that are nearly found. The
    symmetric form has both exponents for every class. With sigmoid each channel is such a problem of its own, its
    negative voxels being the common class, and the result their mean.

    Args:
        sigmoid: a sigmoid per channel, for classes that overlap. Otherwise softmax; an input of one channel is always
            binary.
        softmax: say that it is softmax; the default.
        variant: ``asymmetric`` or ``symmetric``.
        focal_share: share of ``F``, from 0 to 1 (the paper's lambda).
        delta: from 0 to 1; weight of rare classes in ``F``, of false negatives in ``R``.
        gamma: from 0 to 1; 0 is cross-entropy and Tversky loss. At 1 the rare classes have no gradient in ``R``.
        smooth_nr: added to the numerator of the Tversky index.
        smooth_dr: added to its denominator.
        batch: sum over the samples of a batch before the quotient; ``all_ranks``: over those of all processes.
        weight: one factor per class, or one for all, in both parts.
        ignore_index: label, or list of labels, of the voxels that do not count.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        absent: ``count`` a class that a sample lacks in ``R`` (with sigmoid in both parts), or ``skip`` it.

    Shape:
        input logits ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``.

    Edge cases:
        The power has an infinite slope at a loss of 0, so a class closer to perfect than float precision counts as 0
        with gradient 0.

    Source:
        Yeung et al. 2022, https://arxiv.org/abs/2102.04525, with the exponents of the authors' published code in both
        variants, and its mean over classes in ``R``, where the paper has a sum. That code is for two classes; here all
        but class 0 are rare.

    Example:
        >>> import torch
        >>> loss = UnifiedFocalLoss(delta=0.5, gamma=0.0, focal_share=1.0)
        >>> round(loss(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 0, 1]])).item(), 4)  # log(2) / 2
        0.3466
    """

    def __init__(
        self,
        sigmoid: bool = False,
        softmax: bool = False,
        variant: Literal["asymmetric", "symmetric"] = "asymmetric",
        focal_share: Fraction = 0.5,
        delta: Fraction = 0.6,
        gamma: Fraction = 0.5,
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        batch: Batch = False,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        to_onehot_y: bool = False,
        absent: Absent = "count",
    ) -> None:
        activation_of(sigmoid, softmax, None)
        arguments.check_arguments(UnifiedFocalLoss.__init__, locals())
        super().__init__(
            to_onehot_y=to_onehot_y,
            activation="sigmoid" if sigmoid else "softmax",
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.focal_share = float(focal_share)
        self.delta = float(delta)
        self.gamma = float(gamma)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.non_negative = smooth_nr <= smooth_dr
        self.batch = batch
        self.is_symmetric = variant == "symmetric"

    def activation_for(self, num_channels: int) -> str:
        """Return ``sigmoid`` for one channel, the chosen activation otherwise."""
        return super().activation_for(num_channels) if num_channels > 1 or self.strict else "sigmoid"

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums needed; the last two are the rare classes' part of ``F`` and the common one's."""
        focal = T.focal(self.gamma)
        rare = focal if self.is_symmetric else "ce"
        common = T.focal_neg(self.gamma) if self.activation_for(num_channels) == "sigmoid" else focal
        return ("tp", "pred", "ref", "count", rare, common)

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss, a scalar."""
        terms = self.terms_for(sums.num_channels)
        (tp, pred, ref, count, rare, common), counted = self.entries(sums, self.batch, ref=2, terms=terms)
        false_positive, false_negative = pred - tp, ref - tp
        regional = self._tversky(tp, false_positive, false_negative)
        if self.activation_for(sums.num_channels) == "sigmoid":
            negative = self._tversky(count - ref - false_positive, false_negative, false_positive)
            regional = (raised(regional, 1 - self.gamma) + self._of_common(negative)) / 2
            focal = self.delta * rare + (1 - self.delta) * common
            voxels = count if counted is None else torch.where(counted, count, 0.0)
        else:
            regional = torch.cat([self._of_common(regional[:, :1]), raised(regional[:, 1:], 1 - self.gamma)], 1)
            focal = torch.cat([(1 - self.delta) * common[:, :1], self.delta * rare[:, 1:]], 1)
            voxels = count[:, :1]
        if self.class_weight is not None:
            weight = self.per_counted_class("weight", self.class_weight, focal, sums.num_channels)
            regional, focal = weight * regional, weight * focal
        if counted is not None:
            focal = torch.where(counted, focal, 0.0)
        total = self.focal_share * focal.sum() / divisor(voxels.sum())
        return total + (1 - self.focal_share) * self.reduce(regional, counted)

    def _tversky(self, tp: Tensor, false_positive: Tensor, false_negative: Tensor) -> Tensor:
        errors = self.delta * false_negative + (1 - self.delta) * false_positive
        return 1 - (tp + self.smooth_nr) / (tp + errors + self.smooth_dr)

    def _of_common(self, tversky: Tensor) -> Tensor:
        return raised(tversky, 1 - self.gamma) if self.is_symmetric else tversky
