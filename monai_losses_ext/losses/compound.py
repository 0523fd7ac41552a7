# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of losses, in one pass over the volume."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from monai_losses_ext import arguments, errors
from monai_losses_ext.losses import foreign
from monai_losses_ext.losses.axes import check_axes
from monai_losses_ext.losses.base import TargetLike, VoxelLoss, as_list, fused_values
from monai_losses_ext.losses.weighting import FixedWeighting, Weighting
from monai_losses_ext.losses.weighting_config import get_weighting
from monai_losses_ext.sums.target import Target, label_alone


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
        mixed_activations: take components that read the input in different ways, one as logits of a softmax and
            another of a sigmoid, say. Unless it is set, that is an error, since it is nearly always a slip.

    Shape:
        As its components. With fixed weights some may have ``reduction="none"``, if these all give values per sample,
        class and voxel, ``[B, C', *S]`` or with voxel axes of 1, as focal and Dice loss (that with ``batch`` too); or
        all ``[B, *S]``, as the cross-entropy; or all ``[B, C']``, as the others. A single number counts for each value.

    Attributes:
        weighting: the mode, a :class:`monai_losses_ext.losses.weighting.Weighting`.
        last_terms: after a forward pass, each component's value without its weight, detached.

    Raises:
        ValueError: for no component, a nested compound, a negative weight, names and weights of another number, an
            unknown weighting or option, a weighting that cannot take these components, weights or ``learnable``, or
            components of different activations; in a forward pass for terms whose axes differ.

    Example:
        >>> import torch
        >>> from monai_losses_ext import CompoundLoss, DiceLoss, FocalLoss
        >>> loss = CompoundLoss([DiceLoss(softmax=True), FocalLoss(use_softmax=True)], weights=[0.7, 0.3])
        >>> total = loss(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.int64))
        >>> loss.get_weights(), sorted(loss.last_terms)
        ({'dice': 0.7, 'focal': 0.3}, ['dice', 'focal'])
        >>> parts = [DiceLoss(sigmoid=True), FocalLoss()]
        >>> [name for name, _ in CompoundLoss(parts, learnable=True).named_parameters()]
        ['weighting.theta']
    """

    def __init__(
        self,
        losses: Sequence[nn.Module],
        weights: Sequence[float] | np.ndarray[Any, Any] | Tensor | None = None,
        names: Sequence[str | None] | None = None,
        learnable: bool = False,
        weighting: str | Mapping[str, Any] | Weighting | None = None,
        mixed_activations: bool = False,
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
        if not mixed_activations:
            self._check_activations()
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

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the weighted sum for a batch.

        Args:
            input: logits, ``[B, C, *S]``.
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, or dense labels ``[B, C, *S]``; or a dictionary with
                such a ``label`` and what belongs to it, see :class:`monai_losses_ext.sums.Target`. A component that is
                no loss of this package gets the label alone.
        """
        terms = self.component_values(input, target)
        named = dict(zip(self.names, terms, strict=True))
        check_axes(named)
        self.last_terms = {name: term.detach() for name, term in named.items()}
        return self.weighting.combine(terms)

    def component_values(self, input: Tensor, target: TargetLike) -> list[Tensor]:  # noqa: A002
        """Return the value of each component, without its weight."""
        parsed = target
        if any(isinstance(loss, VoxelLoss) for loss in self.losses):
            parsed = Target.parse(target, input)
        fused = {i: loss for i, loss in enumerate(self.losses) if isinstance(loss, VoxelLoss) and loss.is_formula()}
        values: dict[int, Tensor] = {}
        if fused and isinstance(parsed, Target):
            values = dict(zip(fused, fused_values([*fused.values()], input, parsed), strict=True))
        for i, loss in enumerate(self.losses):
            if i not in values:
                values[i] = loss(input, parsed if isinstance(loss, VoxelLoss) else label_alone(target))
        return [values[i] for i in range(len(self.losses))]

    @property
    def backend(self) -> str:
        """How the sums of the components are computed; to set it sets it for all of them."""
        backends = {loss.backend for loss in self.losses if isinstance(loss, VoxelLoss)}
        return backends.pop() if len(backends) == 1 else "auto"

    @backend.setter
    def backend(self, backend: str) -> None:
        for loss in self.losses:
            if isinstance(loss, VoxelLoss):
                loss.backend = backend

    def _check_activations(self) -> None:
        """Refuse components that would read one input in two ways."""
        first = None
        for name, loss in zip(self.names, self.losses, strict=True):
            activation = foreign.activation(loss)
            if activation is None:
                continue
            if first is not None and first[1] != activation:
                rule = "must all read the input alike, by softmax, by sigmoid, or as probabilities (none), unless "
                rule += "mixed_activations=True"
                raise errors.fail("losses", rule, f"{first[1]} for {first[0]!r} and {activation} for {name!r}")
            first = first or (name, activation)

    def _check_signs(self) -> None:
        """Refuse a component that may be negative where the weighting cannot take that."""
        for name, loss in zip(self.names, self.losses, strict=True):
            if self.weighting.takes_negative or foreign.is_non_negative(loss):
                continue
            rule = f"may be negative, which weighting {self.weighting.kind!r} cannot take; use softmax, or set "
            if foreign.smooths_above(loss):
                rule += "smooth_nr to at most smooth_dr"
            else:
                rule += "non_negative = True on a loss that never is"
            raise errors.fail(f"losses: {name}", rule, type(loss).__name__)


def _default_names(losses: Sequence[nn.Module]) -> list[str]:
    """Name each loss after its class: ``FocalTverskyLoss`` is ``focal_tversky``, a second one ``focal_tversky_2``."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for loss in losses:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(loss).__name__.removesuffix("Loss")).lower()
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names
