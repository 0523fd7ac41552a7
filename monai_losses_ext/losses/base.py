# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What all losses here share: they declare the voxel sums they need and turn ``[B, C]`` numbers into a value."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from monai_losses_ext import arguments, errors
from monai_losses_ext.distributed import has_many_ranks, sum_over_ranks
from monai_losses_ext.losses.range_check import PROBABILITY_TERMS, RangeCheck
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.api import compute
from monai_losses_ext.sums.target import IgnoreIndex, Target, labels

Reduction = Literal["none", "mean", "sum"]
NonNegative = Annotated[float, arguments.Limits(minimum=0)]
Positive = Annotated[float, arguments.Limits(above=0)]
Fraction = Annotated[float, arguments.Limits(minimum=0, maximum=1)]
Absent = Literal["count", "skip"]
Batch = bool | Literal["all_ranks"]
ClassWeights = NonNegative | Sequence[NonNegative] | Tensor | None
# Labels alone, or a dictionary with them and what belongs to them; or either, taken apart already.
TargetLike = Tensor | Mapping[str, Tensor] | Target


class Sums:
    """The sums of a pass by the names of their terms, ``[B, C]`` each.

    Args:
        values: ``[T, B, C]``.
        terms: their names, in order.
        target: what they are sums of.

    Attributes:
        num_channels: C.
        is_index: whether the target held index labels.
        annotated: the classes that each case was annotated for, ``[B, C]`` bool; None: all.
    """

    def __init__(self, values: Tensor, terms: Sequence[str], target: Target) -> None:
        self.values = values
        self.num_channels = values.shape[2]
        self.is_index = target.is_index
        self.annotated = target.annotated
        self._num_regions = target.num_regions
        self._first: dict[str, int] = {}
        row = 0
        for term in terms:
            self._first[term] = row
            row += T.rows(term, target.num_regions)

    def __getitem__(self, term: str) -> Tensor:
        return self.values[self._first[term]]

    def rows(self, terms: Sequence[str], first_class: int = 0) -> Tensor:
        """Return several terms at once, ``[len(terms), B, C']``, from a class on: one small operation, not many."""
        start = self._first[terms[0]]
        if all(self._first[term] == start + i for i, term in enumerate(terms)):
            return self.values[start : start + len(terms), :, first_class:]
        return torch.stack([self[term] for term in terms])[:, :, first_class:]

    def region(self, term: str) -> Tensor:
        """Return the sums over each region, ``[B, C, R + 1]``, first over the voxels that are in none."""
        start = self._first[term]
        return self.values[start : start + self._num_regions + 1].permute(1, 2, 0)

    def bins(self, number: int) -> Tensor:
        """Return the count, the sum of probabilities and that of the reference in each bin, ``[3, B, C, number]``."""
        start = self._first[T.bins(number)]
        return self.values[start : start + 3 * number].unflatten(0, (3, number)).permute(0, 2, 3, 1)


class VoxelLoss(_Loss):
    """A loss that is a formula on voxel sums.

    A subclass sets ``terms`` and writes :meth:`formula`. Its keywords are MONAI's, with MONAI's meaning.

    Args:
        include_background: whether class 0 counts. It is left out of the sums, after the activation, so that it never
            changes the probabilities of the other classes. Ignored, with a warning, for one channel.
        to_onehot_y: kept for MONAI's sake. Index labels are recognized by their shape, with or without it.
        activation: ``softmax``, ``sigmoid`` or ``none``.
        other_act: a function applied to the input in place of an activation.
        reduction: ``mean``, ``sum`` or ``none``.
        weight: one number per class, or one for all. For a loss without background the list may hold the background's
            entry or not; it is not used.
        ignore_index: a label, or a list of labels, whose voxels do not count; see
            :meth:`monai_losses_ext.sums.Target.ignoring`.
        absent: a class of which a sample has no voxel: ``count`` it in the mean as any other, or ``skip`` it. (With
            ``batch`` it is the batch that has none.)

    A class that a case was not annotated for never counts (``annotated`` in the target).

    Attributes:
        backend: how the sums are computed, see :func:`monai_losses_ext.sums.voxel_sums`; ``auto`` unless set.
        strict: raise an error for softmax over one channel (a constant), where MONAI warns and leaves it out.
        non_negative: whether the value is never below 0, for probabilities and labels between 0 and 1.
    """

    terms: tuple[str, ...] = ()
    class_weight: Tensor | float | None
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
        ignore_index: IgnoreIndex = None,
        absent: Absent = "count",
    ) -> None:
        super().__init__(reduction=str(reduction))
        self.absent: str = absent
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.activation = activation
        self.other_act = other_act
        self.ignore_index = ignore_index
        labels(ignore_index)  # only to check it
        self.set_per_class("class_weight", weight, "weight")
        self._range = RangeCheck(type(self).__name__) if activation == "none" and other_act is None else None

    @abstractmethod
    def formula(self, sums: Sums) -> Tensor:
        """Return the loss from the sums asked for, which hold the background's too."""

    def shaped(self, value: Tensor, ndim: int) -> Tensor:
        """Return the loss in the shape that MONAI's class gives it, for an input of ``ndim`` axes."""
        return value

    @property
    def map_options(self) -> Hashable:
        """What the distance map of a surface term depends on; None for a loss without such a term."""
        return None

    def with_map(self, input: Tensor, target: Target) -> Target:  # noqa: A002
        """Return the target with the distance map that the surface terms need."""
        return target

    def completed(self, target: Target, num_channels: int) -> Target:
        """Return the target with whatever else the loss needs and it lacks: what a label alone makes."""
        return target

    def is_formula(self) -> bool:
        """Tell whether the loss is a formula on sums and can share a pass; one that gives a value per voxel is not."""
        return True

    def forward(self, input: Tensor, target: TargetLike) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the loss of a batch.

        Args:
            input: logits, or probabilities for a loss without activation, ``[B, C, *S]`` with 1 to 3 spatial axes.
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, or dense labels ``[B, C, *S]``; or a dictionary with
                such a ``label`` and what belongs to it, see :class:`monai_losses_ext.sums.Target`.
        """
        return fused_values([self], input, Target.parse(target, input))[0]

    def activation_for(self, num_channels: int) -> str:
        """Return the activation for an input of this many channels; a softmax over one would be a constant."""
        if self.activation != "softmax" or num_channels > 1:
            return self.activation
        if self.strict:
            rule = "softmax over one channel is constant and has no gradient; use sigmoid: true, or two channels"
            raise errors.fail("softmax", rule, f"{num_channels} channel")
        warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=4)
        return "none"

    def first_class(self, num_channels: int) -> int:
        """Return the first class that counts: 1 without the background, 0 with it or for one channel."""
        return 0 if self.include_background or num_channels == 1 else 1

    def terms_for(self, num_channels: int) -> tuple[str, ...]:
        """Return the sums that :meth:`formula` needs for an input of this many channels."""
        return self.terms

    def counted(self, sums: Sums) -> Tensor | None:
        """Return which classes of which sample enter a mean, ``[B, C']`` bool; None: all."""
        first = self.first_class(sums.num_channels)
        annotated = None if sums.annotated is None else sums.annotated[:, first:]
        if self.absent != "skip":
            return annotated
        present = sums["ref"][:, first:] > 0
        return present if annotated is None else present & annotated

    def entries(
        self, sums: Sums, batch: bool | str, ref: int, terms: Sequence[str] | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return the sums of the loss's terms that enter a quotient, and which of them enter a mean.

        Args:
            sums: of all samples and classes.
            batch: whether samples are added up first; ``all_ranks``: those of all processes.
            ref: place among the terms of what is 0 for a class that is absent.
            terms: those of the loss unless given.

        Returns:
            One tensor per term, ``[B or 1, C']``, and a bool one of that shape; None where all enter.
        """
        first = self.first_class(sums.num_channels)
        rows = sums.rows(self.terms if terms is None else terms, first)
        counted = None if sums.annotated is None else sums.annotated[:, first:]
        if batch:
            rows, counted = over_batch(rows, counted, batch)
        if self.absent == "skip":
            counted = rows[ref] > 0 if counted is None else (rows[ref] > 0) & counted
        return rows.unbind(0), counted

    def reduce(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the values of all classes, or their sum or mean, as ``reduction`` says.

        Args:
            values: any shape.
            counted: where False, a value is 0, and left out of the mean; None: all count.
        """
        if counted is not None:
            values = torch.where(counted, values, 0.0)
        if self.reduction == "none":
            return values
        if self.reduction == "sum" or not values.numel():
            return values.sum()
        return values.mean() if counted is None else values.sum() / divisor(counted.sum())

    def set_per_class(self, name: str, values: Any, argument: str | None = None, persistent: bool = True) -> None:
        """Keep one number for all classes as a number, and one per class as a buffer."""
        tensor = per_class(argument or name, values)
        if tensor is None or tensor.ndim:
            self.register_buffer(name, tensor, persistent=persistent)
        else:
            setattr(self, name, tensor.item())

    def per_counted_class(self, argument: str, values: Tensor | float, like: Tensor, num_channels: int) -> Any:
        """Return the values of the classes that count, ``[C']``, in the dtype of ``like``; one for all as it is.

        Raises:
            UserError: where the length of the list is neither the number of classes nor that of the classes counted.
        """
        if not isinstance(values, Tensor):
            return values
        first = self.first_class(num_channels)
        if len(values) not in (num_channels, num_channels - first):
            rule = f"the length of {argument} must be the number of classes, {num_channels} for this input"
            rule += f" or {num_channels - 1} without the background" if first else ""
            raise errors.fail(argument, rule, values.tolist())
        return (values[first:] if len(values) == num_channels else values).to(like)

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
    num_channels = input.shape[1]
    maps = [loss.map_options for loss in losses if loss.map_options is not None]
    passes: dict[tuple[Any, ...], list[VoxelLoss]] = {}
    for loss in losses:
        loss.warn_about_one_channel(num_channels)
        # A loss without a map joins the pass of one that has a map.
        options = maps[0] if maps and loss.map_options is None else loss.map_options
        ignored = None if loss.ignore_index is None else labels(loss.ignore_index)
        key = (loss.activation_for(num_channels), loss.other_act, ignored, loss.backend, options)
        passes.setdefault(key, []).append(loss)
    values: dict[int, Tensor] = {}
    for (activation, other_act, ignored, backend, _), members in passes.items():
        x = input if other_act is None else other_act(input)
        part = (target if ignored is None else target.ignoring(ignored, activation)).folded(activation)
        mapped = next((loss for loss in members if loss.map_options is not None), None)
        part = replace(part, distance=None) if mapped is None else mapped.with_map(x, part)
        for loss in members:
            part = loss.completed(part, num_channels)
        terms = tuple(dict.fromkeys(term for loss in members for term in loss.terms_for(num_channels)))
        if any(loss.absent == "skip" for loss in members):
            terms = tuple(dict.fromkeys((*terms, "ref")))
        check = next((loss._range for loss in members if loss._range is not None), None)
        if check is not None and check.is_due(input):
            terms = tuple(dict.fromkeys((*terms, *PROBABILITY_TERMS)))
        sums = Sums(compute(x, part, terms, activation, backend), terms, part)
        if check is not None:
            check.look_at(sums, input)
        for loss in members:
            values[id(loss)] = loss.shaped(loss.formula(sums), input.ndim)
    return [values[id(loss)] for loss in losses]


def over_batch(rows: Tensor, annotated: Tensor | None, batch: bool | str) -> tuple[Tensor, Tensor | None]:
    """Add up the samples of a batch; for ``all_ranks``, those of all processes, which all must call this.

    Args:
        rows: ``[T, B, C']``.
        annotated: which classes of which sample count, ``[B, C']`` bool; None: all.
        batch: True or ``all_ranks``.

    Returns:
        ``[T, 1, C']``, and ``[1, C']``: the classes that count in any sample.
    """
    total = rows.sum(1, keepdim=True)
    annotated = None if annotated is None else annotated.any(0, keepdim=True)
    if batch == "all_ranks" and has_many_ranks():
        counts = torch.ones_like(total[0]) if annotated is None else annotated.to(total)
        total = sum_over_ranks(torch.cat([total, counts.unsqueeze(0)]))
        total, annotated = total[:-1], total[-1] > 0
    return total, annotated


def divisor(count: Tensor) -> Tensor:
    """Return what a sum is divided by, 1 where nothing counts: the sum is 0 there, and stays it, its gradient too."""
    return count + (count == 0)


def activation_of(sigmoid: bool, softmax: bool, other_act: Any) -> str:
    """Turn MONAI's three activation arguments into one value.

    Raises:
        TypeError: where ``other_act`` is no function.
        UserError: where more than one is given.
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
        UserError: for a text, a dictionary, and what holds nothing.
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
