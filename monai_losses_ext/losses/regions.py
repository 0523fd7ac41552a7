# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses in which every component of a class counts as much as any other, however small."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_losses_ext import arguments
from monai_losses_ext.distance import voxel_size
from monai_losses_ext.losses.base import (
    ClassWeights,
    NonNegative,
    Positive,
    Reduction,
    Sums,
    VoxelLoss,
    activation_of,
    divisor,
)
from monai_losses_ext.maps import regions_of
from monai_losses_ext.sums.target import IgnoreIndex, Target


class RegionLoss(VoxelLoss):
    """A mean over the regions of each class, then over the classes that have any, then over the samples that have any.

    A subclass writes :meth:`of_regions`. A region without a voxel of its component, as a crop may leave it, does not
    count.
    """

    def __init__(self, smooth_nr: float, smooth_dr: float, spacing: Any, **shared: Any) -> None:
        super().__init__(**shared)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.spacing = spacing
        self.non_negative = smooth_nr <= smooth_dr

    @abstractmethod
    def of_regions(self, sums: Sums) -> Tensor:
        """Return the loss of each region, ``[B, C, R]``."""

    def completed(self, target: Target, num_channels: int) -> Target:
        """Return the target with regions of its components, made of the label where it brought none."""
        if target.regions is not None:
            return target
        spacing = self.spacing if self.spacing is not None else voxel_size(target.affine, target.label.ndim - 2)
        dense = target.dense(num_channels, torch.float32)[:, 0 if num_channels == 1 else self._first_region :]
        sizes = np.broadcast_to(1.0 if spacing is None else np.asarray(spacing, float), (len(dense), dense.ndim - 2))
        maps = np.zeros(dense.shape, np.int32)
        for i, (masks, size) in enumerate(zip((dense > 0.5).cpu().numpy(), sizes, strict=True)):
            maps[i] = regions_of(masks, size.tolist()) if masks.size else 0
        regions = torch.from_numpy(maps).to(target.label.device)
        return replace(target, regions=regions, num_regions=int(regions.max()) if regions.numel() else 0)

    @property
    def _first_region(self) -> int:
        return 1 if self.activation == "softmax" else 0

    def formula(self, sums: Sums) -> Tensor:
        """Return the loss: a scalar, or ``[B, C']`` values for ``reduction="none"``, 0 for classes without a region."""
        first = self.first_class(sums.num_channels)
        counted = (sums.region("region_ref")[:, first:, 1:] > 0).detach()
        values = torch.where(counted, self.of_regions(sums)[:, first:], 0.0)
        number = counted.sum(2)
        values = values.sum(2) / divisor(number)
        if self.class_weight is not None:
            values = values * self.per_counted_class("weight", self.class_weight, values, sums.num_channels)
        if self.reduction != "mean":
            return self.reduce(values)
        classes = (number > 0).sum(1)
        samples = values.sum(1) / divisor(classes)
        return samples.sum() / divisor((classes > 0).sum())


class CCDiceLoss(RegionLoss):
    """Dice and cross-entropy within the region of each component: a lesion of three voxels weighs as a large one.

    Of each component, Dice loss (and ``lambda_ce`` times the mean cross-entropy) within its region, the voxels nearer
    to it than to any other component; then the mean over regions, over classes that have any, over samples that have
    any. With hard predictions, missing any one of n components costs 1 / n.

    The regions come with the target (``regions``, see :class:`monai_losses_ext.sums.Target`), or are made of the label
    at every step, on the CPU.

    Use it beside a loss of the whole volume: a sample without any component has no value here, and no gradient.

    Args:
        include_background: whether class 0 counts, where it has regions.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input; the cross-entropy is that of all classes then.
        reduction: ``mean``, ``sum`` of the values of the classes, or ``none``.
        smooth_nr: added to the numerator of Dice.
        smooth_dr: added to its denominator.
        lambda_ce: weight of the cross-entropy, at least 0.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        spacing: voxel size in mm, for regions that are made here; of the target's affine unless given, else 1.

    Shape:
        input logits ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]`` or a dictionary with such a
        label; result ``[]``, or for ``none`` ``[B, C']``.

    Source:
        CC-DiceCE, https://arxiv.org/abs/2511.17146; several classes: https://arxiv.org/abs/2604.24276.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1, 0, 0, 0, 1, 1]])
        >>> logits = 40 * torch.stack([labels == 0, labels == 1], 1).float()
        >>> logits[0, :, 0] = torch.tensor([40.0, 0.0])  # the component of one voxel is missed
        >>> round(CCDiceLoss(softmax=True, lambda_ce=0.0)(logits, labels).item(), 3)
        0.5
    """

    terms: tuple[str, ...] = ("region_tp", "region_pred", "region_ref", "region_ce", "region_count")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        lambda_ce: NonNegative = 1.0,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        spacing: Positive | Sequence[Positive] | None = None,
    ) -> None:
        activation = activation_of(sigmoid, softmax, None)
        arguments.check_arguments(CCDiceLoss.__init__, locals())
        super().__init__(
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            spacing=spacing,
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation=activation,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
        )
        self.lambda_ce = float(lambda_ce)
        if activation == "none" and lambda_ce == 0:
            self.terms = ("region_tp", "region_pred", "region_ref")

    def of_regions(self, sums: Sums) -> Tensor:
        """Return Dice and cross-entropy within each region."""
        tp, pred, ref = (sums.region(term)[..., 1:] for term in ("region_tp", "region_pred", "region_ref"))
        dice = 1 - (2 * tp + self.smooth_nr) / (pred + ref + self.smooth_dr)
        if self.lambda_ce == 0:
            return dice
        ce, count = (sums.region(term)[..., 1:] for term in ("region_ce", "region_count"))
        return dice + self.lambda_ce * ce / divisor(count)


class BlobLoss(RegionLoss):
    """Dice of each component, with the other components of its class left out of the volume.

    Of each component, ``1 - (2 tp_r + smooth_nr) / (pred_r + ref_r + smooth_dr)``; ``pred_r`` is all that is predicted
    of the class but for the other components' voxels: a false positive costs every component. Then the mean over
    components, over classes that have any, over samples that have any.

    The components come with the target (``regions``), or are made of the label at every step, on the CPU.

    Use it beside a loss of the whole volume.

    Args:
        include_background: whether class 0 counts, where it has regions.
        to_onehot_y: kept for MONAI's sake; index labels are recognized by their shape.
        sigmoid: take a sigmoid per channel of the input.
        softmax: take a softmax over the channels of the input.
        other_act: a function applied to the input instead.
        reduction: ``mean``, ``sum`` of the values of the classes, or ``none``.
        smooth_nr: added to the numerator.
        smooth_dr: added to the denominator.
        weight: one factor per class, or one for all.
        ignore_index: label, or list of labels, of the voxels that do not count.
        spacing: voxel size in mm, for regions that are made here; of the target's affine unless given, else 1.

    Shape:
        input ``[B, C, *S]``, target ``[B, *S]``, ``[B, 1, *S]`` or ``[B, C, *S]`` or a dictionary with such a label;
        result ``[]``, or for ``none`` ``[B, C']``.

    Source:
        Kofler et al. 2022, https://arxiv.org/abs/2205.08209. Differs from the published code, which masks the raw
        output before the sigmoid, so that what is masked counts as p = 0.5: here probabilities are.

    Example:
        >>> import torch
        >>> g = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 1.0, 1.0]]])
        >>> p = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]])  # the component of one voxel is missed
        >>> round(BlobLoss()(p, g).item(), 3)
        0.5
    """

    terms = ("region_tp", "region_ref", "tp", "pred")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: Reduction = "mean",
        smooth_nr: NonNegative = 1e-5,
        smooth_dr: NonNegative = 1e-5,
        weight: ClassWeights = None,
        ignore_index: IgnoreIndex = None,
        spacing: Positive | Sequence[Positive] | None = None,
    ) -> None:
        activation = activation_of(sigmoid, softmax, other_act)
        arguments.check_arguments(BlobLoss.__init__, locals())
        super().__init__(
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            spacing=spacing,
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            activation=activation,
            other_act=other_act,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
        )

    def of_regions(self, sums: Sums) -> Tensor:
        """Return Dice of each component without the others."""
        tp, ref = (sums.region(term)[..., 1:] for term in ("region_tp", "region_ref"))
        elsewhere = (sums["pred"] - sums["tp"]).unsqueeze(2)
        return 1 - (2 * tp + self.smooth_nr) / (tp + elsewhere + ref + self.smooth_dr)
