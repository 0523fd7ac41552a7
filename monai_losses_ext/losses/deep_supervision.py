# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's deep supervision, with the targets that the losses here take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import monai.losses
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import NonNegative, TargetLike, VoxelLoss, as_list
from monai_losses_ext.losses.boundary import BoundaryLoss
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.sums.target import Target, label_alone, label_of

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class DeepSupervisionLoss(monai.losses.DeepSupervisionLoss):
    """A loss at every head of a network, on labels resampled to the head's resolution: ``sum_l w_l loss(head_l)``.

    MONAI's class, which fails on integer labels, on labels without a channel axis and on distance maps, and leaves a
    resampled label its old voxel size. Labels are resampled to the nearest voxel, whatever their type; maps linearly,
    in millimeters as they are.

    Weights of a compound within are learned from all heads. Its ``last_terms`` are those of the first head, which has
    the full resolution.

    Args:
        loss: the loss of each head.
        weight_mode: weight of head l: ``same``: 1; ``exp``: ``max(0.5^l, 0.0625)``; ``two``: 1 for the first, 0.5 for
            the others.
        weights: the heads' weights, none negative, instead of a mode: as many as heads. Where the input is one tensor,
            as of a network that gives no more outside of training, the first counts.

    Shape:
        input a list of ``[B, C, *S_l]``, the full resolution first; one tensor ``[B, heads, C, *S]``, as MONAI's
        DynUNet gives while it trains; or ``[B, C, *S]``. Target as the loss's own, of the full resolution. The label's
        axes tell the last two apart: give it a channel axis.

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

    @property
    def backend(self) -> str:
        """How the sums of the loss are computed; to set it sets the loss's."""
        return str(getattr(self.loss, "backend", "auto"))

    @backend.setter
    def backend(self, backend: str) -> None:
        if isinstance(self.loss, (VoxelLoss, CompoundLoss)):
            self.loss.backend = backend

    def get_loss(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the loss of one head, with the target at its resolution."""
        target = resampled(_parsed(target, input), input.shape[2:])
        if isinstance(self.loss, (VoxelLoss, CompoundLoss)):
            return self.loss(input, target)
        # MONAI's own may overflow in half precision, and know no maps.
        return self.loss(input if input.dtype == torch.float64 else input.float(), label_alone(target))

    def forward(self, input: Tensor | Sequence[Tensor] | None, target: TargetLike) -> Tensor:  # noqa: A002
        """Return the weighted sum over the heads; see the class."""
        heads = _heads(input, target)
        is_one = isinstance(input, Tensor) and len(heads) == 1
        if self.weights is not None and not is_one and len(self.weights) != len(heads):
            raise errors.fail("weights", f"must hold one per head ({len(heads)})", self.weights)
        weights = self.get_weights(levels=len(heads))
        parsed = _parsed(target, heads[0])
        self._check_spacing(parsed, heads)
        # The first head comes last, so that its terms are the ones that stay in last_terms.
        values = [weights[i] * self.get_loss(heads[i], parsed) for i in reversed(range(len(heads)))]
        return torch.stack(values).sum(0)

    def _check_spacing(self, target: Target, heads: Sequence[Tensor]) -> None:
        """Refuse a voxel size of the loss's own where a map is made for a smaller head."""
        if target.distance is not None or all(head.shape[2:] == target.label.shape[2:] for head in heads):
            return
        for loss in self.modules():
            if isinstance(loss, BoundaryLoss) and loss.spacing is not None:
                rule = "cannot follow the heads' resolution; use labels with an affine, or a distance map"
                raise errors.fail("BoundaryLoss: spacing", rule, loss.spacing)


def _heads(input: Tensor | Sequence[Tensor] | None, target: TargetLike) -> list[Tensor]:  # noqa: A002
    """Return the heads, the full resolution first; DynUNet's one tensor ``[B, heads, C, *S]`` is taken apart."""
    if isinstance(input, Tensor):
        return list(input.unbind(1)) if _holds_heads(input, target) else [input]
    heads = list(input or [])
    if not heads or not all(isinstance(head, Tensor) for head in heads):
        raise errors.fail("input", "must be a tensor or a list of at least one", input)
    return heads


def _holds_heads(input: Tensor, target: TargetLike) -> bool:  # noqa: A002
    """Tell whether a tensor is ``[B, heads, C, *S]``: it has an axis more than a label with a channel axis.

    Of two readings that both fit a label of whole numbers, the one without heads counts: ``[B, *S]`` labels and
    ``[B, C, *S]`` scores.
    """
    label = label_of(target)
    if input.ndim == label.ndim + 2:
        return input.shape[3:] == label.shape[1:]
    if input.ndim != label.ndim + 1 or input.ndim < 4:
        return False
    if input.shape[2] == 1 and label.shape[1] == 1:  # a head of one channel; volumes of one slice are rare
        return input.shape[3:] == label.shape[2:]
    is_plain = input.shape[2:] == label.shape[1:] and not (label.is_floating_point() or label.dtype == torch.bool)
    return not is_plain and input.shape[3:] == label.shape[2:] and label.shape[1] in (1, input.shape[2])


def _parsed(target: TargetLike, head: Tensor) -> Target:
    """Return the target, checked against a head, whose resolution may be lower."""
    label = label_of(target)
    if label.ndim not in (head.ndim - 1, head.ndim):
        return Target.parse(target, head)  # which says what is wrong
    size = label.shape[label.ndim - head.ndim + 2 :]
    full = head.detach().new_empty(1).expand(*head.shape[:2], *size)
    return Target.parse(target, full)


def resampled(target: Target, size: Sequence[int]) -> Target:
    """Return a target at another size: labels, regions and skeletons from the nearest voxel, the rest linearly.

    The affine follows; without one, the voxels of the full resolution are taken for 1 mm.
    """
    if tuple(target.label.shape[2:]) == tuple(size):
        return target
    affine = torch.eye(4, dtype=torch.float64) if target.affine is None else target.affine
    affine = torch.as_tensor(affine, dtype=torch.float64)
    scale = torch.eye(affine.shape[-1], dtype=torch.float64, device=affine.device)
    for axis, (old, new) in enumerate(zip(target.label.shape[2:], size, strict=True)):
        scale[axis, axis] = old / new
        scale[axis, -1] = (old / new - 1) / 2  # the middle of the first new voxel, in old voxels
    return replace(
        target,
        label=resample_label(target.label, size),
        affine=affine @ scale,
        distance=_interpolated(target.distance, size),
        weight=_interpolated(target.weight, size),
        regions=None if target.regions is None else resample_label(target.regions, size),
        skeleton=None if target.skeleton is None else resample_label(target.skeleton, size),
    )


def resample_label(label: Tensor, size: Sequence[int]) -> Tensor:
    """Return a label ``[B, *S]`` or ``[B, C, *S]`` of any dtype at another size, each voxel from the nearest.

    As ``torch.nn.functional.interpolate`` with ``nearest-exact``, which knows no integers.
    """
    for axis, (old, new) in enumerate(zip(label.shape[-len(size) :], size, strict=True), label.ndim - len(size)):
        middles = 2 * torch.arange(new, device=label.device) + 1  # twice the middle of each new voxel
        label = label.index_select(axis, middles * old // (2 * new))
    return label


def _interpolated(volume: Tensor | None, size: Sequence[int]) -> Tensor | None:
    if volume is None:
        return None
    return F.interpolate(volume, size=tuple(size), mode=LINEAR[len(size)], align_corners=False)
