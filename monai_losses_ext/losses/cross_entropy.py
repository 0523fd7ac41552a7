# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy on voxel sums."""

from __future__ import annotations

from torch import Tensor

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import (
    ClassWeights,
    Fraction,
    Reduction,
    Sums,
    Target,
    VoxelLoss,
    activation_of,
    divisor,
    label_and_distance,
)
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.voxel_sums import check_input, voxel_inputs


class CrossEntropyLoss(VoxelLoss):
    """Penalise every voxel by the surprise at its label.

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
        ignore_index: label of the voxels that do not count.
        to_onehot_y: kept for MONAI's sake; index labels are recognised by their shape.

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
        ignore_index: int | None = None,
        to_onehot_y: bool = False,
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
        )
        self.label_smoothing = float(label_smoothing)

    def activation_for(self, num_channels: int) -> str:
        """Return ``sigmoid`` for one channel, the chosen activation otherwise."""
        return super().activation_for(num_channels) if num_channels > 1 or self.strict else "sigmoid"

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums needed."""
        if self.activation_for(num_channels) == "sigmoid":
            return ("ce", "ce_neg", "count")
        return ("ce", "ref", "count", "logp") if self.label_smoothing else ("ce", "ref", "count")

    def formula(self, sums: Sums, is_index: bool) -> Tensor:
        """Return the summed or averaged cross-entropy, a scalar."""
        num_channels = sums["ce"].shape[1]
        weight = self.per_counted_class("weight", self.class_weight, num_channels)
        weight = None if weight is None else weight.to(sums["ce"])
        total = self._weighed(sums, weight, num_channels).sum()
        if self.reduction == "sum":
            return total
        if self.activation_for(num_channels) == "sigmoid":
            return total / divisor(sums["count"].sum())
        # As torch divides: by the voxels' weights for index labels, by the voxels for dense ones.
        counts = _times(weight, sums["ref"]) if is_index else sums["count"][:, 0]
        return total / divisor(counts.sum())

    def _weighed(self, parts: Sums, weight: Tensor | None, num_channels: int) -> Tensor:
        """Return the cross-entropy of each class, of sums or of voxels; ``weight`` has the axes of the parts."""
        values = _times(weight, parts["ce"])
        if self.activation_for(num_channels) == "sigmoid":
            return values + parts["ce_neg"]
        if not self.label_smoothing:
            return values
        rest = _times(weight, parts["logp"])
        return (1 - self.label_smoothing) * values + self.label_smoothing / num_channels * rest

    def forward(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002
        """Return the loss of a batch; see the class."""
        if self.reduction != "none":
            return super().forward(input, target)
        return self._voxel_map(input, label_and_distance(target)[0])

    def _voxel_map(self, logits: Tensor, target: Tensor) -> Tensor:
        check_input(logits)
        num_channels = logits.shape[1]
        activation = self.activation_for(num_channels)
        x, dense, dropped = voxel_inputs(logits, target, activation, self.ignore_index)
        terms = [term for term in self.terms_for(num_channels) if term in T.LOG_TERMS]
        parts = T.voxel_values(terms, activation, x.transpose(0, 1), dense.transpose(0, 1), None)  # C B *S
        weight = self.per_counted_class("weight", self.class_weight, num_channels)
        weight = None if weight is None else weight.to(x).view(-1, *[1] * (x.ndim - 1))
        values = self._weighed(parts, weight, num_channels)
        if activation == "sigmoid":
            values = values.transpose(0, 1)
        else:
            values, dropped = values.sum(0), None if dropped is None else dropped.squeeze(1)
        return values if dropped is None else values.masked_fill(dropped, 0.0)


def _times(weight: Tensor | None, values: Tensor) -> Tensor:
    return values if weight is None else weight * values
