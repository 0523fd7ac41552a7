# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of losses, in one pass over the volume."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import monai.losses
import numpy as np
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses.base import Target, VoxelLoss, as_list, fused_values, label_and_distance
from monai_losses_ext.losses.cross_entropy import CrossEntropyLoss
from monai_losses_ext.losses.focal import FocalLoss
from monai_losses_ext.losses.hausdorff import HausdorffDTLoss
from monai_losses_ext.losses.weighting import FixedWeighting, Weighting, get_weighting

# Losses that know no sign of their own, and are never negative for probabilities and labels, with their default alpha
# and no more smoothing above than below.
NON_NEGATIVE = (
    HausdorffDTLoss,
    monai.losses.DiceLoss,
    monai.losses.GeneralizedDiceLoss,
    monai.losses.GeneralizedWassersteinDiceLoss,
    monai.losses.DiceCELoss,
    monai.losses.DiceFocalLoss,
    monai.losses.GeneralizedDiceFocalLoss,
    monai.losses.FocalLoss,
    monai.losses.TverskyLoss,
    monai.losses.HausdorffDTLoss,
    monai.losses.SoftclDiceLoss,
    monai.losses.SoftDiceclDiceLoss,
    nn.CrossEntropyLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
)


class CompoundLoss(_Loss):
    """Weighted sum of several losses: ``sum w_i L_i``.

    Components that see the same probabilities share one pass over the volume forward and one backward, whatever their
    number, and whether their weights are fixed or learned.

    Learned weights are parameters of this module: give them to the optimizer, in a group of their own without weight
    decay. In a training of several processes their gradient is averaged, so that they stay equal.

    Args:
        losses: the components, losses of this package or any module called with ``(input, target)``; not compounds.
        weights: the initial weight of each component, none negative, in a list, an array or a tensor; equal weights
            that sum to 1 unless given.
        names: one per component, as they appear in logs; None, or no list: taken from the classes (``dice``, ``focal``,
            ``dice_2``).
        learnable: learn the weights by gradient, by ``softmax`` unless weighting says how.
        weighting: how terms become the total: ``fixed``, ``softmax``, ``uncertainty`` or ``dwa``, or a dictionary with
            such a type and its options, e.g. ``{"type": "softmax", "floor": 0.1}``; see
            :mod:`monai_losses_ext.losses.weighting`. ``softmax`` and ``uncertainty`` are learned, with or without
            ``learnable``. A :class:`Weighting` object brings its own initial weights.

    Shape:
        As its components. With fixed weights some may have ``reduction="none"``, if these all give values per sample,
        class and voxel, ``[B, C', *S]`` or with voxel axes of 1, as focal and Dice loss (that with ``batch`` too); or
        all ``[B, *S]``, as the cross-entropy; or all ``[B, C']``, as the others. A single number counts for each value.

    Attributes:
        weighting: the mode, a :class:`monai_losses_ext.losses.weighting.Weighting`.
        last_terms: after a forward pass, each component's value without its weight, detached.

    Raises:
        ValueError: for no component, a nested compound, a negative weight, names and weights of another number, an
            unknown weighting or option, or a weighting that cannot take these components, weights or ``learnable``; in
            a forward pass for terms whose axes differ.

    Example:
        >>> import torch
        >>> from monai_losses_ext import CompoundLoss, DiceLoss, FocalLoss
        >>> loss = CompoundLoss([DiceLoss(softmax=True), FocalLoss(use_softmax=True)], weights=[0.7, 0.3])
        >>> total = loss(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.int64))
        >>> loss.get_weights(), sorted(loss.last_terms)
        ({'dice': 0.7, 'focal': 0.3}, ['dice', 'focal'])
        >>> [name for name, _ in CompoundLoss([DiceLoss(), FocalLoss()], learnable=True).named_parameters()]
        ['weighting.theta']
    """

    def __init__(
        self,
        losses: Sequence[nn.Module],
        weights: Sequence[float] | np.ndarray[Any, Any] | Tensor | None = None,
        names: Sequence[str | None] | None = None,
        learnable: bool = False,
        weighting: str | Mapping[str, Any] | Weighting | None = None,
    ) -> None:
        super().__init__()
        losses = as_list("losses", "must be a list of losses", losses)
        if not losses:
            raise errors.fail("losses", "must hold at least one loss", losses)
        for loss in losses:
            if not isinstance(loss, nn.Module):
                raise errors.fail("losses", "must be loss modules; get_loss builds them from names", loss)
            if isinstance(loss, CompoundLoss):
                raise errors.fail("losses", "compounds do not nest; list their components instead", type(loss).__name__)
        rule = f"must hold one entry per loss ({len(losses)})"
        values = [1 / len(losses)] * len(losses) if weights is None else as_list("weights", rule, weights)
        wanted = [None] * len(losses) if names is None else as_list("names", rule, names)
        for argument, given in (("weights", values), ("names", wanted)):
            if len(given) != len(losses):
                raise errors.fail(argument, rule, f"{len(given)} entries")
        self.names = tuple(str(name or default) for name, default in zip(wanted, _default_names(losses), strict=True))
        if len(set(self.names)) < len(losses):
            raise errors.fail("names", "must differ from each other", list(self.names))
        for name, value in zip(self.names, values, strict=True):
            arguments.number(f"weights: {name}", value, arguments.Limits(minimum=0))
        if not isinstance(learnable, bool):
            raise errors.fail("learnable", "must be true or false", learnable)
        if isinstance(weighting, Weighting) and (weights is not None or len(weighting.effective()) != len(losses)):
            rule = f"an object brings its own weights, one per loss ({len(losses)}), and excludes the argument weights"
            raise errors.fail("weighting", rule, weighting.effective().tolist())
        self.losses = nn.ModuleList(losses)
        self.weighting = get_weighting(weighting, learnable, values)
        self._check_signs()
        self.last_terms: dict[str, Tensor] = {}

    def get_weights(self) -> dict[str, float]:
        """Return the weight that each component has now, by name."""
        return dict(zip(self.names, self.weighting.effective().tolist(), strict=True))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named components, from the next forward pass on.

        Raises:
            ValueError: for an unknown name or a negative weight, or where weights are not fixed; none is changed then.
        """
        for name, value in weights.items():
            errors.one_of("weights", name, self.names)
            arguments.number(f"weights: {name}", value, arguments.Limits(minimum=0))
        if not isinstance(self.weighting, FixedWeighting):
            raise errors.fail("weights", "can be set (and scheduled) only with fixed weighting", self.weighting.kind)
        for name, value in weights.items():
            self.weighting.weights[self.names.index(name)] = value

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """Tell the weighting each component's mean over an epoch; only ``dwa`` makes use of it, for the next epoch.

        In a training of several processes all of them have to call it; the means are averaged.

        Raises:
            ValueError: for an unknown name or a missing one.
        """
        for name in means:
            errors.one_of("means", name, self.names)
        if len(means) < len(self.names):
            raise errors.fail("means", f"must hold all of {', '.join(self.names)}", sorted(means))
        self.weighting.end_epoch([means[name] for name in self.names])

    def forward(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the weighted sum for a batch.

        Args:
            input: logits, ``[B, C, *S]``.
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, or dense labels ``[B, C, *S]``; or a dictionary with
                such a ``label`` and its signed ``distance`` map, for a boundary loss among the components.
        """
        terms = self.component_values(input, target)
        named = dict(zip(self.names, terms, strict=True))
        _check_axes(named)
        self.last_terms = {name: term.detach() for name, term in named.items()}
        return self.weighting.combine(terms)

    def component_values(self, input: Tensor, target: Target) -> list[Tensor]:  # noqa: A002
        """Return the value of each component, without its weight."""
        fused = [i for i, loss in enumerate(self.losses) if isinstance(loss, VoxelLoss) and not _is_voxel_map(loss)]
        members = [loss for loss in self.losses if isinstance(loss, VoxelLoss) and not _is_voxel_map(loss)]
        values = dict(zip(fused, fused_values(members, input, target), strict=True)) if fused else {}
        for i, loss in enumerate(self.losses):
            if i not in values:
                values[i] = loss(input, label_and_distance(target)[0])
        return [values[i] for i in range(len(self.losses))]

    def _check_signs(self) -> None:
        """Refuse a component that may be negative where the weighting cannot take that."""
        for name, loss in zip(self.names, self.losses, strict=True):
            if self.weighting.takes_negative or _is_non_negative(loss):
                continue
            rule = f"may be negative, which weighting {self.weighting.kind!r} cannot take; use softmax, or set "
            if _smooths_above(loss):
                rule += "smooth_nr to at most smooth_dr"
            else:
                rule += "non_negative = True on a loss that never is"
            raise errors.fail(f"losses: {name}", rule, type(loss).__name__)


def _is_non_negative(loss: nn.Module) -> bool:
    """Tell whether the loss says that it is never negative, or is known to be so."""
    said = getattr(loss, "non_negative", None)
    return said if isinstance(said, bool) else isinstance(loss, NON_NEGATIVE) and not _smooths_above(loss)


def _smooths_above(loss: nn.Module) -> bool:
    """Tell whether an overlap loss, or one within, falls below 0 for a class that neither side holds."""
    return any(getattr(part, "smooth_nr", 0) > getattr(part, "smooth_dr", 0) for part in loss.modules())


def _is_voxel_map(loss: VoxelLoss) -> bool:
    """Tell whether the loss returns a value per voxel, which is no formula on sums."""
    return loss.reduction == "none" and isinstance(loss, (CrossEntropyLoss, FocalLoss))


def _check_axes(terms: Mapping[str, Tensor]) -> None:
    """Refuse terms whose axes differ in what they are, which torch would add up all the same where lengths agree."""
    shapes = {name: list(term.shape) for name, term in terms.items() if term.ndim > 0}
    if not shapes:
        return
    most = max([len(shape) for shape in shapes.values()])
    samples = next(shape[0] for shape in shapes.values() if len(shape) == most)
    # Dice of a whole batch, [C', 1, ...], has no axis of samples.
    full = [
        [samples, *shape] if len(shape) == most - 1 and all(length == 1 for length in shape[1:]) else shape
        for shape in shapes.values()
    ]
    fits = all(len(shape) == most for shape in full) and all(
        len({length for length in lengths if axis < 2 or length != 1}) <= 1
        for axis, lengths in enumerate(zip(*full, strict=True))
    )
    if not fits:
        rule = "values of reduction='none' must have the same axes (samples, classes, voxels) to be added up"
        raise errors.fail("losses", rule, shapes)


def _default_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name each loss after its class: ``FocalTverskyLoss`` is ``focal_tversky``, a second one ``focal_tversky_2``."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for loss in losses:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(loss).__name__.removesuffix("Loss")).lower()
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
