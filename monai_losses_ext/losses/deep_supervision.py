# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's deep supervision, with the targets that the losses here take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import monai.losses
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from monai.data import MetaTensor
from torch import Tensor, nn

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import (
    DISTANCE,
    LABEL,
    NonNegative,
    Target,
    VoxelLoss,
    as_list,
    label_and_distance,
)
from monai_losses_ext.losses.boundary import BoundaryLoss
from monai_losses_ext.losses.compound import CompoundLoss

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class DeepSupervisionLoss(monai.losses.DeepSupervisionLoss):
    """A loss at every head of a network, on labels resampled to the head's resolution: ``sum_l w_l loss(head_l)``.

    MONAI's class, which fails on integer labels, on labels without a channel axis and on distance maps, and leaves a
    resampled label its old voxel size. Labels are resampled to the nearest voxel, whatever their type; maps linearly,
    in millimetres as they are.

    Weights of a compound within are learned from all heads. Its ``last_terms`` are those of the first head, which has
    the full resolution.

    Args:
        loss: the loss of each head.
        weight_mode: weight of head l: ``same``: 1; ``exp``: ``max(0.5^l, 0.0625)``; ``two``: 1 for the first, 0.5 for
            the others.
        weights: the heads' weights, none negative, instead of a mode: as many as heads. Where the input is one tensor,
            as of a network that gives no more outside of training, the first counts.

    Shape:
        input a list of ``[B, C, *S_l]``, the full resolution first, or one tensor; target as the loss's own, of the
        full resolution.

    Raises:
        ValueError: for an input without a head, weights of another number, an unknown mode, and for a boundary loss
            with a ``spacing`` of its own: it would be wrong for the smaller heads. Use labels with an affine, or a
            distance map in the target; without both, the voxels of the full resolution count as 1 mm.

    Example:
        >>> from monai_losses_ext import DiceLoss
        >>> loss = DeepSupervisionLoss(DiceLoss(softmax=True))
        >>> heads = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)]
        >>> round(loss(heads, torch.ones(1, 8, 8, dtype=torch.int64)).item(), 4)  # (1 + 0.5) (1 + 1/3) / 2
        1.0
    """

    def __init__(
        self,
        loss: nn.Module,
        weight_mode: Literal["same", "exp", "two"] = "exp",
        weights: Sequence[NonNegative] | None = None,
    ) -> None:
        arguments.check_arguments(DeepSupervisionLoss.__init__, locals())
        given = None if weights is None else as_list("weights", "must be a list of numbers", weights)
        super().__init__(loss, weight_mode, given)

    def get_loss(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the loss of one head, with the target at its resolution."""
        label, distance = label_and_distance(target)
        size = input.shape[2:]
        if label.shape[-len(size) :] != size:
            label = resample_label(self._with_affine(label) if distance is None else label, size)
        if not isinstance(self.loss, (VoxelLoss, CompoundLoss)):
            # MONAI's own may overflow in half precision, and know no maps.
            return self.loss(input if input.dtype == torch.float64 else input.float(), label)
        if distance is None:
            return self.loss(input, label)
        if distance.shape[2:] != size:
            distance = F.interpolate(distance, size=tuple(size), mode=LINEAR[len(size)], align_corners=False)
        return self.loss(input, {LABEL: label, DISTANCE: distance})

    def forward(self, input: Tensor | Sequence[Tensor] | None, target: Target) -> Tensor:  # noqa: A002
        """Return the weighted sum over the heads; see the class."""
        heads = [input] if isinstance(input, Tensor) else list(input or [])
        if not heads or not all(isinstance(head, Tensor) for head in heads):
            raise errors.fail("input", "must be a tensor or a list of at least one", input)
        if self.weights is not None and not isinstance(input, Tensor) and len(self.weights) != len(heads):
            raise errors.fail("weights", f"must hold one per head ({len(heads)})", self.weights)
        weights = self.get_weights(levels=len(heads))
        # The first head comes last, so that its terms are the ones that stay in last_terms.
        values = [weights[i] * self.get_loss(heads[i], target) for i in reversed(range(len(heads)))]
        return torch.stack(values).sum(0)

    def _with_affine(self, label: Tensor) -> Tensor:
        """Return the label with the affine that a boundary loss takes its voxel size from: of 1 mm if it has none."""
        boundary_losses = [module for module in self.modules() if isinstance(module, BoundaryLoss)]
        for loss in boundary_losses:
            if loss.spacing is not None:
                rule = "cannot follow the heads' resolution; use labels with an affine, or a distance map"
                raise errors.fail("BoundaryLoss: spacing", rule, loss.spacing)
        has_size = isinstance(label, MetaTensor) or not boundary_losses
        return label if has_size else MetaTensor(label, affine=torch.eye(4, dtype=torch.float64))


def resample_label(label: Tensor, size: Sequence[int]) -> Tensor:
    """Return a label ``[B, *S]`` or ``[B, C, *S]`` of any dtype at another size, each voxel from the nearest.

    As ``torch.nn.functional.interpolate`` with ``nearest-exact``, which knows no integers. An affine follows.
    """
    result = label.as_subclass(Tensor) if isinstance(label, MetaTensor) else label
    sizes = list(zip(label.shape[-len(size) :], size, strict=True))
    for axis, (old, new) in enumerate(sizes, label.ndim - len(size)):
        middles = 2 * torch.arange(new, device=label.device) + 1  # twice the middle of each new voxel
        result = result.index_select(axis, middles * old // (2 * new))
    if not isinstance(label, MetaTensor):
        return result
    affine = torch.as_tensor(label.affine, dtype=torch.float64)
    scale = torch.eye(affine.shape[-1], dtype=torch.float64)
    for axis, (old, new) in enumerate(sizes):
        scale[axis, axis] = old / new
        scale[axis, -1] = (old / new - 1) / 2  # the middle of the first new voxel, in old voxels
    return MetaTensor(result, affine=affine @ scale)
