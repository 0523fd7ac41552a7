# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of losses, in one pass over the volume; MONAI's Dice with cross-entropy and Dice with focal loss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_losses_ext import _checks
from monai_losses_ext.losses.base import (
    ClassWeights,
    Fraction,
    NonNegative,
    Reduction,
    Target,
    VoxelLoss,
    fused_values,
    label_and_distance,
)
from monai_losses_ext.losses.cross_entropy import CrossEntropyLoss
from monai_losses_ext.losses.dice import DiceLoss
from monai_losses_ext.losses.focal import FocalLoss


class CompoundLoss(_Loss):
    """Weighted sum of several losses: ``sum w_i L_i``.

    Components that see the same probabilities share one pass over the volume forward and one backward, whatever their
    number.

    Args:
        losses: the components, losses of this package or any module called with ``(input, target)``; not compounds.
        weights: one per component, none negative; equal weights that sum to 1 unless given.
        names: one per component, as they appear in logs; None, or no list: taken from the classes (``dice``, ``focal``,
            ``dice_2``).

    Shape:
        As its components; those with ``reduction="none"`` are broadcast against each other.

    Attributes:
        last_terms: after a forward pass, each component's value without its weight, detached.

    Raises:
        ValueError: for no component, a nested compound, a negative weight, or names and weights of another number.

    Example:
        >>> import torch
        >>> from monai_losses_ext import CompoundLoss, DiceLoss, FocalLoss
        >>> loss = CompoundLoss([DiceLoss(softmax=True), FocalLoss(use_softmax=True)], weights=[0.7, 0.3])
        >>> total = loss(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.int64))
        >>> loss.get_weights(), sorted(loss.last_terms)
        ({'dice': 0.7, 'focal': 0.3}, ['dice', 'focal'])
    """

    weights: Tensor

    def __init__(
        self,
        losses: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        names: Sequence[str | None] | None = None,
    ) -> None:
        super().__init__()
        losses = list(losses)
        if not losses:
            raise _checks.fail("losses", "must hold at least one loss", losses)
        for loss in losses:
            if not isinstance(loss, nn.Module):
                raise _checks.fail("losses", "must be loss modules; get_loss builds them from names", loss)
            if isinstance(loss, CompoundLoss):
                raise _checks.fail(
                    "losses", "compounds do not nest; list their components instead", type(loss).__name__
                )
        values = [1 / len(losses)] * len(losses) if weights is None else list(weights)
        wanted = [None] * len(losses) if names is None else list(names)
        for argument, given in (("weights", values), ("names", wanted)):
            if len(given) != len(losses):
                raise _checks.fail(argument, f"must hold one entry per loss ({len(losses)})", f"{len(given)} entries")
        self.names = tuple(str(name or default) for name, default in zip(wanted, _default_names(losses), strict=True))
        if len(set(self.names)) < len(losses):
            raise _checks.fail("names", "must differ from each other", list(self.names))
        for name, value in zip(self.names, values, strict=True):
            _checks.number(f"weights: {name}", value, _checks.Limits(minimum=0))
        self.losses = nn.ModuleList(losses)
        self.register_buffer("weights", torch.tensor(values, dtype=torch.float64))
        self.last_terms: dict[str, Tensor] = {}

    def get_weights(self) -> dict[str, float]:
        """Return the weight of each component by name."""
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named components, from the next forward pass on.

        Raises:
            ValueError: for an unknown name or a negative weight; no weight is changed then.
        """
        for name, value in weights.items():
            _checks.one_of("weights", name, self.names)
            _checks.number(f"weights: {name}", value, _checks.Limits(minimum=0))
        for name, value in weights.items():
            self.weights[self.names.index(name)] = value

    def forward(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the weighted sum for a batch.

        Args:
            input: logits, ``[B, C, *S]``.
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, or dense labels ``[B, C, *S]``; or a dictionary with
                such a ``label`` and its signed ``distance`` map, for a boundary loss among the components.
        """
        terms = self.component_values(input, target)
        self.last_terms = {name: term.detach() for name, term in zip(self.names, terms, strict=True)}
        total = terms[0] * self.weights[0]
        for i in range(1, len(terms)):
            total = total + terms[i] * self.weights[i]
        return total.to(terms[0].dtype)

    def component_values(self, input: Tensor, target: Target) -> list[Tensor]:  # noqa: A002
        """Return the value of each component, without its weight."""
        fused = [i for i, loss in enumerate(self.losses) if isinstance(loss, VoxelLoss) and not _is_voxel_map(loss)]
        members = [loss for loss in self.losses if isinstance(loss, VoxelLoss) and not _is_voxel_map(loss)]
        values = dict(zip(fused, fused_values(members, input, target), strict=True)) if fused else {}
        for i, loss in enumerate(self.losses):
            if i not in values:
                values[i] = loss(input, label_and_distance(target)[0])
        return [values[i] for i in range(len(self.losses))]


class DiceCELoss(CompoundLoss):
    """Dice and cross-entropy, ``lambda_dice L_dice + lambda_ce L_ce``: the common default of medical segmentation.

    Takes MONAI's keywords. The cross-entropy acts on logits with a softmax over all classes whatever the activation of
    the Dice part and ``include_background`` say (binary for one channel), as in MONAI; for overlapping classes with a
    sigmoid use a :class:`CompoundLoss` of ``DiceLoss(sigmoid=True)`` and ``CrossEntropyLoss(sigmoid=True)``.

    Args:
        include_background: whether class 0 counts in the Dice part.
        to_onehot_y: kept for MONAI's sake; index labels are recognised by their shape.
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
        ignore_index: label of the voxels that do not count, in both parts.

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
        batch: bool = False,
        weight: ClassWeights = None,
        lambda_dice: NonNegative = 1.0,
        lambda_ce: NonNegative = 1.0,
        label_smoothing: Fraction = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        _checks.check_arguments(DiceCELoss.__init__, {k: v for k, v in locals().items() if k != "other_act"})
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
        )
        cross_entropy = CrossEntropyLoss(
            reduction=reduction, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index
        )
        super().__init__([dice, cross_entropy], [lambda_dice, lambda_ce], ["dice", "ce"])


class DiceFocalLoss(CompoundLoss):
    """Dice and focal loss, ``lambda_dice L_dice + lambda_focal L_focal``.

    Takes MONAI's keywords. With ``softmax`` both parts use the softmax (MONAI's focal part takes a sigmoid); otherwise
    the focal part takes a sigmoid of the logits.

    Args:
        include_background: whether class 0 counts, in both parts.
        to_onehot_y: kept for MONAI's sake; index labels are recognised by their shape.
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
        ignore_index: label of the voxels that do not count, in both parts.

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
        batch: bool = False,
        gamma: NonNegative = 2.0,
        weight: ClassWeights = None,
        lambda_dice: NonNegative = 1.0,
        lambda_focal: NonNegative = 1.0,
        alpha: Fraction | Sequence[NonNegative] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        _checks.check_arguments(DiceFocalLoss.__init__, {k: v for k, v in locals().items() if k != "other_act"})
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
        )
        super().__init__([dice, focal], [lambda_dice, lambda_focal], ["dice", "focal"])


def _is_voxel_map(loss: VoxelLoss) -> bool:
    """Tell whether the loss returns a value per voxel, which is no formula on sums."""
    return loss.reduction == "none" and isinstance(loss, (CrossEntropyLoss, FocalLoss))


def _default_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name each loss after its class: ``FocalTverskyLoss`` is ``focal_tversky``, a second one ``focal_tversky_2``."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for loss in losses:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(loss).__name__.removesuffix("Loss")).lower()
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
