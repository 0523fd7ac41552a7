# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy on voxel sums."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import (
    Absent,
    ClassWeights,
    Fraction,
    Reduction,
    Sums,
    TargetLike,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import IgnoreIndex, Target, plain


class CrossEntropyLoss(VoxelLoss):
    """Penalize every voxel by the surprise at its label.

    Softmax: ``sum w_c g_c (-log p_c)`` over voxels and classes, divided as ``torch.nn.CrossEntropyLoss`` does. Sigmoid:
    the mean over voxels and channels of ``-w_c g log p - (1 - g) log(1 - p)``.

    Args:
        sigmoid: a sigmoid and a binary cross-entropy per channel, for classes that overlap. Otherwise softmax; an input
            of one channel is always binary.
        softmax: say that it is softmax; the default.
        reduction: ``mean``, ``sum``, or ``none`` for a map of voxels.
        weight: softmax: a factor per class, and with index labels the mean is divided by the sum of the voxels'
            weights. Sigmoid: a factor for the positive voxels of each class.
        label_smoothing: softmax only: share of each label that is spread over all classes.
        ignore_index: label, or list of labels, of the voxels that do not count.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        top_k: share of the voxels, the hardest of all samples together, that the mean or the sum is over, as in nnU-Net
            (its 10 is 0.1 here); None: all. Such a loss is no formula on sums: it takes a pass of its own over the
            volume, and its memory.
        absent: sigmoid only: ``count`` the voxels of a channel that a sample lacks, or ``skip`` them.

    Shape:
        input logits ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]``; result ``[]``, or for
        ``none`` ``[B, *S]`` (softmax) and ``[B, C, *S]`` (sigmoid).

    Edge cases:
        The mean over no voxel at all (all ignored) is 0, where torch gives NaN.

    Source:
        ``torch.nn.CrossEntropyLoss`` and ``torch.nn.BCEWithLogitsLoss``; label smoothing: Szegedy et al. 2016,
        https://arxiv.org/abs/1512.00567.

    Example:
        >>> import torch
        >>> round(CrossEntropyLoss()(torch.zeros(1, 4, 5), torch.tensor([[0, 1, 2, 3, 3]])).item(), 4)  # log 4
        1.3863
    """

    def __init__(
        self,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: Reduction = "mean",
        weight: ClassWeights = None,
        label_smoothing: Fraction = 0.0,
        ignore_index: IgnoreIndex = None,
        to_onehot_y: bool = False,
        absent: Absent = "count",
        top_k: Annotated[float, arguments.Limits(above=0, maximum=1)] | None = None,
    ) -> None:
        activation_of(sigmoid, softmax, None)
        arguments.check_arguments(CrossEntropyLoss.__init__, locals())
        if sigmoid and label_smoothing:
            raise errors.fail("label_smoothing", "must be 0 with sigmoid: it is for softmax only", label_smoothing)
        activation = "sigmoid" if sigmoid else "softmax"
        super().__init__(
            to_onehot_y=to_onehot_y,
            activation=activation,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            absent=absent,
        )
        self.label_smoothing = float(label_smoothing)
        self.top_k = top_k

    def activation_for(self, num_channels: int) -> str:
        """Return ``sigmoid`` for one channel, the chosen activation otherwise."""
        return super().activation_for(num_channels) if num_channels > 1 or self.strict else "sigmoid"

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums needed."""
        if self.activation_for(num_channels) == "sigmoid":
            return ("ce", "ce_neg", "count")
        return ("ce", "ref", "count", "logp") if self.label_smoothing else ("ce", "ref", "count")

    def formula(self, sums: Sums) -> Tensor:
        """Return the summed or averaged cross-entropy, a scalar."""
        num_channels = sums.num_channels
        ce = sums["ce"]
        weight = self.class_weight
        weight = None if weight is None else self.per_counted_class("weight", weight, ce, num_channels)
        is_sigmoid = self.activation_for(num_channels) == "sigmoid"
        other = sums["ce_neg"] if is_sigmoid else sums["logp"] if self.label_smoothing else None
        counted = self.counted(sums) if is_sigmoid else None  # of a softmax every voxel has a class that is there
        values, count = self._weighed(ce, other, weight, is_sigmoid, sums.annotated), sums["count"]
        if counted is not None:
            values, count = torch.where(counted, values, 0.0), torch.where(counted, count, 0.0)
        total = values.sum()
        if self.reduction == "sum":
            return total
        if is_sigmoid:
            return total / divisor(count.sum())
        # As torch divides: by the voxels' weights for index labels, by the voxels for dense ones.
        counts = _times(weight, sums["ref"]) if sums.is_index else count[:, 0]
        return total / divisor(counts.sum())

    def _weighed(
        self, ce: Tensor, other: Tensor | None, weight: Any, is_sigmoid: bool, annotated: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of each class, of sums or of voxels ``[B, C, ...]``.

        Args:
            ce: the part of the labels.
            other: sigmoid: that of the negative voxels; softmax: ``-log p`` of all classes, for smoothed labels.
            weight: of each class, with the axes of the parts; or one for all, or None.
            is_sigmoid: which of the two it is.
            annotated: the classes that smoothed labels are spread over, ``[B, C]``; None: all.
        """
        values = _times(weight, ce)
        if is_sigmoid:
            return values if other is None else values + other
        if other is None:
            return values
        classes: Any = ce.shape[1]
        if annotated is not None:
            classes = annotated.sum(1, keepdim=True).view(-1, *[1] * (ce.ndim - 1))
        return (1 - self.label_smoothing) * values + self.label_smoothing / classes * _times(weight, other)

    def is_formula(self) -> bool:
        """Tell whether the loss is a formula on sums; a value per voxel is not."""
        return self.reduction != "none" and self.top_k is None

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002
        """Return the loss of a batch; see the class."""
        if self.is_formula():
            return super().forward(input, target)
        values, counted = self._voxel_map(input, target)
        return values if self.top_k is None else self._of_the_hardest(values, counted, self.top_k)

    def _of_the_hardest(self, values: Tensor, counted: Tensor | None, share: float) -> Tensor:
        """Return the mean or the sum over a share of the voxels that count, at least one of them."""
        if self.reduction == "none":
            raise errors.fail("top_k", "needs reduction mean or sum", self.reduction)
        number = values.numel() if counted is None else int(counted.expand_as(values).sum())
        hardest = values.flatten().topk(min(values.numel(), max(1, round(share * number)))).values
        total = hardest.sum()
        return total if self.reduction == "sum" else total / max(1, len(hardest))

    def _voxel_map(self, input: Tensor, target: TargetLike) -> tuple[Tensor, Tensor | None]:  # noqa: A002
        """Return the loss of each voxel, and which of them count, None where all do."""
        target = Target.parse(target, input)
        num_channels = input.shape[1]
        activation = self.activation_for(num_channels)
        is_sigmoid = activation == "sigmoid"
        target = target.ignoring(self.ignore_index, activation).folded(activation)
        terms = [term for term in self.terms_for(num_channels) if term in T.LOG_TERMS]
        parts, multiplier = T.voxel_maps(plain(input), target, terms, activation)
        weight = self.class_weight
        if weight is not None:
            weight = self.per_counted_class("weight", weight, parts["ce"], num_channels)
            weight = weight.view(-1, *[1] * (input.ndim - 2)) if isinstance(weight, Tensor) else weight
        other = parts.get("ce_neg") if is_sigmoid else parts.get("logp")
        values = self._weighed(parts["ce"], other, weight, is_sigmoid, target.annotated)
        values = values if multiplier is None else values * multiplier
        counted = None if multiplier is None else multiplier > 0
        if is_sigmoid and target.annotated is not None:
            annotated = target.annotated.view(*target.annotated.shape, *[1] * (input.ndim - 2))
            counted = annotated.expand_as(values) if counted is None else counted & annotated
        if is_sigmoid:
            return values, counted
        return values.sum(1), None if counted is None else counted[:, 0]


def _times(weight: Any, values: Tensor) -> Tensor:
    return values if weight is None else weight * values
