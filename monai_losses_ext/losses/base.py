# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What all losses here share: they declare the voxel sums they need and turn ``[B, C]`` numbers into a value."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from monai_losses_ext import arguments, errors
from monai_losses_ext.sums import voxel_sums
from monai_losses_ext.sums.voxel_sums import check_input, with_channel_axis

Reduction = Literal["none", "mean", "sum"]
NonNegative = Annotated[float, arguments.Limits(minimum=0)]
Positive = Annotated[float, arguments.Limits(above=0)]
Fraction = Annotated[float, arguments.Limits(minimum=0, maximum=1)]
ClassWeights = NonNegative | Sequence[NonNegative] | Tensor | None
Sums = Mapping[str, Tensor]
# Labels alone, or a dictionary with them and their signed distance map.
LABEL, DISTANCE = "label", "distance"
Target = Tensor | Mapping[str, Tensor]


class VoxelLoss(_Loss):
    """A loss that is a formula on voxel sums.

    A subclass sets ``terms`` and writes :meth:`formula`. Its keywords are MONAI's, with MONAI's meaning.

    Args:
        include_background: whether class 0 counts. It is left out of the sums, after the activation, so that it never
            changes the probabilities of the other classes. Ignored, with a warning, for one channel.
        to_onehot_y: kept for MONAI's sake. Index labels are recognised by their shape, with or without it.
        activation: ``softmax``, ``sigmoid`` or ``none``.
        other_act: a function applied to the input in place of an activation.
        reduction: ``mean``, ``sum`` or ``none``.
        weight: one number per class, or one for all. For a loss without background the list may hold the background's
            entry or not; it is not used.
        ignore_index: label of the voxels that do not count; see :func:`monai_losses_ext.sums.terms.kept_voxels`.

    Attributes:
        backend: how the sums are computed, see :func:`monai_losses_ext.sums.voxel_sums`; ``auto`` unless set.
        strict: raise an error for softmax over one channel (a constant), where MONAI warns and leaves it out.
        non_negative: whether the value is never below 0, for probabilities and labels between 0 and 1.
    """

    terms: tuple[str, ...] = ()
    class_weight: Tensor | None
    backend = "auto"
    strict = False
    non_negative = True

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        activation: str = "none",
        other_act: Callable[..., Tensor] | None = None,
        reduction: str = "mean",
        weight: float | Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=str(reduction))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.activation = activation
        self.other_act = other_act
        self.ignore_index = ignore_index
        self.register_buffer("class_weight", per_class("weight", weight))

    @abstractmethod
    def formula(self, sums: Sums, is_index: bool) -> Tensor:
        """Return the loss from the sums asked for.

        Args:
            sums: term to ``[B, C]``, background included.
            is_index: whether the target held index labels.
        """

    def shaped(self, value: Tensor, ndim: int) -> Tensor:
        """Return the loss in the shape that MONAI's class gives it, for an input of ``ndim`` axes."""
        return value

    @property
    def map_options(self) -> Hashable:
        """What the distance map of a surface term depends on; None for a loss without such a term."""
        return None

    def distance_map(self, input: Tensor, label: Tensor, distance: Tensor | None) -> Tensor | None:  # noqa: A002
        """Return the distance map that the surface terms need, ``[B, C, *S]``; ``distance`` came with the label."""
        return None

    def forward(self, input: Tensor, target: Target) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the loss of a batch.

        Args:
            input: logits, ``[B, C, *S]`` with 1 to 3 spatial axes.
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, or dense labels ``[B, C, *S]``; or a dictionary with
                such a ``label`` and its signed ``distance`` map ``[B, C, *S]``, which losses of regions pass over.
        """
        return fused_values([self], input, target)[0]

    def activation_for(self, num_channels: int) -> str:
        """Return the activation for an input of this many channels; a softmax over one would be a constant."""
        if self.activation != "softmax" or num_channels > 1:
            return self.activation
        if self.strict:
            rule = "softmax over one channel is constant and has no gradient; use sigmoid: true, or two channels"
            raise errors.fail("softmax", rule, f"{num_channels} channel")
        warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=4)
        return "none"

    def without_background(self, values: Tensor) -> Tensor:
        """Drop the column of class 0 from ``[B, C]`` values where the background does not count."""
        return values[:, 1:] if not self.include_background and values.shape[1] > 1 else values

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums that :meth:`formula` needs for an input of this many channels."""
        return self.terms

    @overload
    def per_counted_class(self, argument: str, values: None, num_channels: int) -> None: ...

    @overload
    def per_counted_class(self, argument: str, values: Tensor, num_channels: int) -> Tensor: ...

    def per_counted_class(self, argument: str, values: Tensor | None, num_channels: int) -> Tensor | None:
        """Return the values of the classes that count, ``[C']`` or ``[]``, from a list that may name the background.

        Raises:
            ValueError: where the list's length fits neither.
        """
        if values is None or values.ndim == 0:
            return values
        skips = not self.include_background and num_channels > 1
        counted = num_channels - 1 if skips else num_channels
        if len(values) not in (num_channels, counted):
            rule = f"the length of {argument} must be the number of classes, {num_channels} for this input"
            rule += f" or {counted} without the background" if skips else ""
            raise errors.fail(argument, rule, values.tolist())
        return values[1:] if skips and len(values) == num_channels else values

    def warn_about_one_channel(self, num_channels: int) -> None:
        """Warn, as MONAI does, about flags that mean nothing for one channel."""
        if num_channels > 1:
            return
        if self.to_onehot_y:
            warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=4)
        if not self.include_background:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=4)


def fused_values(losses: Sequence[VoxelLoss], input: Tensor, target: Target) -> list[Tensor]:  # noqa: A002
    """Return the value of each loss; those that see the same probabilities share one pass over the volume."""
    label, distance = label_and_distance(target)
    check_input(input)
    num_channels = input.shape[1]
    maps = [loss.map_options for loss in losses if loss.map_options is not None]
    passes: dict[tuple[Any, ...], list[int]] = {}
    for i, loss in enumerate(losses):
        loss.warn_about_one_channel(num_channels)
        # A loss without a map joins the pass of one that has a map.
        key = (loss.activation_for(num_channels), loss.other_act, loss.ignore_index, loss.backend)
        passes.setdefault((*key, maps[0] if maps and loss.map_options is None else loss.map_options), []).append(i)
    values: dict[int, Tensor] = {}
    for (activation, other_act, ignore_index, backend, _), members in passes.items():
        x = input if other_act is None else other_act(input)
        terms = list(dict.fromkeys(term for i in members for term in losses[i].terms_for(num_channels)))
        mapped = next((losses[i] for i in members if losses[i].map_options is not None), None)
        phi = None if mapped is None else mapped.distance_map(x, label, distance)
        sums = voxel_sums(x, label, terms, activation, ignore_index, phi, backend)
        is_index = with_channel_axis(x, label).shape[1] < x.shape[1]
        for i in members:
            values[i] = losses[i].shaped(losses[i].formula(sums, is_index), input.ndim)
    return [values[i] for i in range(len(losses))]


def label_and_distance(target: Target) -> tuple[Tensor, Tensor | None]:
    """Split a target into the labels and their signed distance map, None where it holds labels alone.

    Raises:
        ValueError: for a dictionary without labels.
    """
    if isinstance(target, Tensor):
        return target, None
    if not isinstance(target, Mapping) or not isinstance(target.get(LABEL), Tensor):
        got = sorted(target) if isinstance(target, Mapping) else type(target).__name__
        raise errors.fail("target", f"must be a tensor, or a dictionary with {LABEL!r} (and {DISTANCE!r})", got)
    return target[LABEL], target.get(DISTANCE)


def divisor(count: Tensor) -> Tensor:
    """Return what a sum is divided by, 1 where nothing counts: the sum is 0 there, and stays it, its gradient too."""
    return count + (count == 0)


def activation_of(sigmoid: bool, softmax: bool, other_act: Any) -> str:
    """Turn MONAI's three activation arguments into one value.

    Raises:
        TypeError: where ``other_act`` is no function.
        ValueError: where more than one is given.
    """
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act: must be a function or none; got {errors.describe(other_act)}.")
    chosen = [name for name, on in (("sigmoid", sigmoid), ("softmax", softmax), ("other_act", other_act)) if on]
    if len(chosen) > 1:
        raise errors.fail("activation", "at most one of sigmoid, softmax, other_act may be set", " and ".join(chosen))
    return "none" if not chosen or chosen[0] == "other_act" else chosen[0]


def as_list(argument: str, rule: str, values: Any) -> list[Any]:
    """Return what holds values one after another, be it an array or a tensor, as a list.

    Raises:
        ValueError: for a text, a dictionary, and what holds nothing.
    """
    items = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else values
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise errors.fail(argument, rule, values)
    return list(items)


def per_class(argument: str, values: float | Sequence[float] | Tensor | None) -> Tensor | None:
    """Return per-class values as a tensor, ``[C]`` or ``[]``, None as it is; float64, so that 0.3 stays 0.3 there."""
    if values is None:
        return None
    values = values.tolist() if isinstance(values, np.ndarray) else values  # torch takes no reversed array
    tensor = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    if tensor.ndim > 1 or not ((tensor >= 0) & tensor.isfinite()).all():
        raise errors.fail(argument, "must be one number per class, none of them negative", tensor.tolist())
    return tensor
