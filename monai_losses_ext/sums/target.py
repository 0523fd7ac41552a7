# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a loss sees besides the logits: parsed and checked once, here, and read everywhere else as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_losses_ext.errors import ShapeError, fail, nearest

LABEL, DISTANCE, WEIGHT = "label", "distance", "weight"
ANNOTATED, REGIONS, SKELETON = "annotated", "regions", "skeleton"
KEYS = (LABEL, DISTANCE, WEIGHT, ANNOTATED, REGIONS, SKELETON)
IgnoreIndex = int | Sequence[int] | None

_INTERPOLATED = " Were labels resampled with an interpolation other than nearest?"
_RESCALE = " A mask of 0 and 255 is divided by 255; a label map needs an input with a channel per class."
_IGNORE = " A label that should not count goes into ignore_index."
# Parts of a target that have the spatial axes of the input.
VOLUMES = ("label", "weight", "distance", "mask", "regions", "skeleton")
_DETACH = "must not require a gradient (none is computed for it); detach it"
# Types that torch has no arithmetic for.
_WIDENED = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Target:
    """The reference of a batch, and which of its voxels count.

    Attributes:
        label: index labels ``[B, 1, *S]`` or dense labels ``[B, C, *S]``, a plain tensor on the input's device.
        is_index: whether ``label`` holds class indices; the label of a one-channel input is dense.
        affine: the label's affine, ``[4, 4]`` or ``[B, 4, 4]``, where it came with one.
        weight: how much a voxel counts in every sum, ``[B, 1, *S]``, at least 0; None: 1.
        distance: signed distance maps, ``[B, C, *S]`` in mm; None where none came along.
        ignored: index labels of voxels that do not count. Read where the label is, so that no mask is made of them.
        has_channel_axis: whether the label came with one.
        annotated: the classes that each case was annotated for, ``[B, C]`` bool; None: all.
        regions: the region of each voxel, ``[B, K, *S]`` of whole numbers, 0 for none; its channels are the last K of
            the classes, all of them or all but the background.
        skeleton: index labels ``[B, 1, *S]`` or masks ``[B, C, *S]`` of thin tubes within the reference.
        num_regions: the largest id of a region.
        mask: True where a voxel counts, ``[B, 1, *S]``, or ``[B, C, *S]`` where channels differ in that; None: all.
            It is for dense labels; for index labels there is ``ignored``.
    """

    label: Tensor
    is_index: bool
    affine: Tensor | None = None
    weight: Tensor | None = None
    distance: Tensor | None = None
    ignored: tuple[int, ...] = ()
    mask: Tensor | None = None
    has_channel_axis: bool = True
    annotated: Tensor | None = None
    regions: Tensor | None = None
    skeleton: Tensor | None = None
    num_regions: int = 0

    @staticmethod
    def parse(target: Tensor | Mapping[str, Any] | Target, input: Tensor) -> Target:  # noqa: A002 - MONAI's name
        """Take a target apart and check it against its input; of the values nothing is read.

        Args:
            target: index labels ``[B, *S]`` or ``[B, 1, *S]``, dense labels ``[B, C, *S]``, any real dtype; or a
                dictionary with such a ``label`` and any of the other :data:`KEYS`. One that was parsed stays as it is.
            input: logits or probabilities, ``[B, C, *S]``.

        Raises:
            UserError: for what is no tensor, an unknown key, another device, or a target that requires a gradient.
            ShapeError: where input and target do not fit.
        """
        check_input(input)
        if isinstance(target, Target):
            return target._fitting(input)
        label = label_of(target)
        parts: Mapping[str, Any] = target if isinstance(target, Mapping) else {}
        for key in parts:
            if key not in KEYS:
                raise fail("target", f"may hold {', '.join(KEYS)}", key, nearest(key, KEYS))
        affine = label.affine if isinstance(label, MetaTensor) else None
        has_channel_axis = label.ndim == input.ndim
        label = _with_channel_axis(_volume("target", label, input), input)
        weight, distance = parts.get(WEIGHT), parts.get(DISTANCE)
        if weight is not None:
            weight = _voxel_weight(_volume(WEIGHT, weight, input), input)
        if distance is not None:
            distance = _volume(DISTANCE, distance, input)
            if distance.shape != input.shape:
                rule = f"must have the input's shape {list(input.shape)}"
                raise ShapeError(f"{DISTANCE}: {rule}; got {list(distance.shape)}.")
            distance = distance if distance.is_floating_point() else distance.float()
        annotated, regions, skeleton = (parts.get(key) for key in (ANNOTATED, REGIONS, SKELETON))
        regions = None if regions is None else _regions(_volume(REGIONS, regions, input), input)
        return Target(
            label,
            label.shape[1] < input.shape[1],
            affine,
            weight,
            distance,
            has_channel_axis=has_channel_axis,
            annotated=None if annotated is None else _annotated(_volume(ANNOTATED, annotated, input), input),
            regions=regions,
            skeleton=None if skeleton is None else _skeleton(_volume(SKELETON, skeleton, input), input),
            num_regions=0 if regions is None else _largest(regions),
        )

    def _fitting(self, input: Tensor) -> Target:  # noqa: A002
        """Return this target where it is one of the input, by shape and device; raise where it is not."""
        label = self.label
        is_index = label.shape[1] == 1 and input.shape[1] > 1
        fits = label.shape[0] == input.shape[0] and label.shape[2:] == input.shape[2:] and is_index == self.is_index
        if not fits or (not is_index and label.shape[1] != input.shape[1]):
            raise ShapeError(f"target: must fit the input's shape {list(input.shape)}; got {list(label.shape)}.")
        _volume("target", label, input)
        return self

    def ignoring(self, ignore_index: IgnoreIndex, activation: str) -> Target:
        """Return the same target without the voxels of some labels.

        Args:
            ignore_index: one label or several. In dense labels of several channels, one that is a channel leaves out
                the voxels of that channel. Any other marks voxels by its value: with sigmoid it silences the channel in
                which it stands; with softmax and none, where every voxel has one class, the voxel, and so does a
                voxel without any class.
            activation: ``softmax``, ``sigmoid`` or ``none``.
        """
        values = tuple(value for value in labels(ignore_index) or () if can_hold(self.label.dtype, value))
        if not values:
            return self
        if self.is_index:
            return replace(self, ignored=values)
        masks = [self._dense_mask(value, activation) for value in values]
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return replace(self, mask=mask)

    def _dense_mask(self, value: int, activation: str) -> Tensor:
        label = self.label
        if 0 <= value < label.shape[1] and label.shape[1] > 1:
            return label[:, value : value + 1] <= 0.5
        marked = label == value
        if activation == "sigmoid" or label.shape[1] == 1:
            return ~marked
        return ~marked.any(1, keepdim=True) & (label != 0).any(1, keepdim=True)

    def folded(self, activation: str) -> Target:
        """Return the same target with each class that a case was not annotated for as one with its background.

        Only where classes exclude each other: a channel of a sigmoid stands for itself. The background counts as
        annotated, and a label to ignore stays one.
        """
        if self.annotated is None or activation == "sigmoid" or self.annotated.shape[1] == 1:
            return self
        annotated = self.annotated.clone()
        annotated[:, 0] = True
        num_classes, one_each = annotated.shape[1], [1] * (self.label.ndim - 2)
        if not self.is_index:
            counts = annotated.view(-1, num_classes, *one_each)
            rest = torch.where(counts, 0, self.label).sum(1, keepdim=True, dtype=self.label.dtype)
            label = torch.where(counts, self.label, 0)
            return replace(self, label=torch.cat([label[:, :1] + rest, label[:, 1:]], 1), annotated=annotated)
        known = annotated.clone()
        known[:, [value for value in self.ignored if 0 <= value < num_classes]] = True
        inside = self.label.long().clamp(0, num_classes - 1)
        is_known = known.gather(1, inside.flatten(1)).view_as(inside)
        return replace(self, label=self.label.masked_fill(~is_known & (self.label == inside), 0), annotated=annotated)

    def part(self, index: Any) -> Target:
        """Return the target of a part of the volumes; the index is that of a tensor ``[B, C, *S]``."""
        samples = index[0] if isinstance(index, tuple) else index
        cut = {name: volume[index] for name in VOLUMES if (volume := getattr(self, name)) is not None}
        annotated = self.annotated if self.annotated is None or samples is ... else self.annotated[samples]
        return replace(self, **cut, annotated=annotated)

    def counted(self) -> Tensor | None:
        """Return where voxels count, ``[B, 1 or C, *S]`` bool, whatever says so; None where all do."""
        if not self.ignored:
            return self.mask
        counted = self.label != self.ignored[0]
        for value in self.ignored[1:]:
            counted &= self.label != value
        return counted

    def multiplier(self, dtype: torch.dtype) -> Tensor | None:
        """Return what a voxel's values are multiplied by, ``[B, 1 or C, *S]``, 0 where it is ignored; None: 1."""
        counted = self.counted()
        if self.weight is None:
            return None if counted is None else counted.to(dtype)
        weight = self.weight.to(dtype)
        return weight if counted is None else torch.where(counted, weight, 0.0)

    def dense(self, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Return the labels as ``[B, C, *S]``, 0 where they do not count; index labels one-hot."""
        counted = self.counted()
        if not self.is_index:
            dense = self.label.to(dtype)
            return dense if counted is None else dense.masked_fill(~counted, 0.0)
        classes = torch.arange(num_classes, device=self.label.device).view(1, -1, *[1] * (self.label.ndim - 2))
        # Floats are compared eight at a time; a label that is ignored may be beyond them.
        one_hot = (self.label if self.ignored else self.label.to(dtype)) == classes
        return (one_hot if counted is None else one_hot & counted).to(dtype)

    def dense_skeleton(self, num_classes: int) -> Tensor | None:
        """Return the skeleton as ``[B, C, *S]``."""
        if self.skeleton is None or self.skeleton.shape[1] == num_classes:
            return self.skeleton
        classes = torch.arange(num_classes, device=self.skeleton.device)
        return self.skeleton == classes.view(1, -1, *[1] * (self.skeleton.ndim - 2))

    def check_values(self, num_classes: int) -> None:
        """Refuse labels that cannot be right: out of range, fractional, dense beyond 0 and 1, or a negative weight.

        Only on a CPU, since a GPU would have to wait for the values, and not while ``torch.compile`` traces. Kernels
        find the same while they read a tile, and then call this for its words.

        Raises:
            UserError: naming the first label, or all that are out of range.
        """
        if self.label.device.type != "cpu" or torch.compiler.is_compiling():
            return
        counted = self.counted()
        if self.is_index:
            _check_index(self.label if counted is None else self.label.masked_fill(~counted, 0), num_classes)
        elif self.label.dtype != torch.bool and self.label.numel():
            _check_dense(self.label if counted is None else self.label.masked_fill(~counted, 0))
        if self.weight is not None and self.weight.numel() and not (self.weight >= 0).all():
            wrong = self.weight[~(self.weight >= 0)][0].item()
            raise fail(WEIGHT, "must be at least 0 at every voxel", wrong)


def label_of(target: Tensor | Mapping[str, Any] | Target) -> Tensor:
    """Return the label of a target, as it came.

    Raises:
        UserError: where there is none.
    """
    if isinstance(target, Target):
        as_given = target.label if target.has_channel_axis else target.label.squeeze(1)
        return as_given if target.affine is None else MetaTensor(as_given, affine=target.affine)
    label = target.get(LABEL) if isinstance(target, Mapping) else target
    if not isinstance(label, Tensor):
        got = sorted(map(str, target)) if isinstance(target, Mapping) else type(target).__name__
        raise fail("target", f"must be a tensor, or a dictionary with {LABEL!r} (and {', '.join(KEYS[1:])})", got)
    return label


def label_alone(target: Tensor | Mapping[str, Any] | Target) -> Tensor:
    """Return the label of a target for a loss that knows nothing else, because it is not of this package.

    Raises:
        UserError: where there is none, or it does not tell all: classes were not annotated.
    """
    annotated = target.annotated if isinstance(target, Target) else None
    if isinstance(target, Mapping) and isinstance(target.get(ANNOTATED), Tensor):
        annotated = target[ANNOTATED]
    if annotated is not None and not bool(annotated.all()):
        rule = "is known to the losses of this package alone; leave it, or the other loss, out"
        raise fail(ANNOTATED, rule, "cases in which not all classes are annotated")
    return label_of(target)


def labels(ignore_index: Any) -> tuple[int, ...] | None:
    """Return one label or several, in a list, an array or a tensor, as a tuple; None where there is none.

    Raises:
        UserError: for what is no whole number of 64 bits.
    """
    if ignore_index is None:
        return None
    values = ignore_index.tolist() if hasattr(ignore_index, "tolist") else ignore_index
    values = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral) or not -(2**63) <= int(value) < 2**63:
            raise fail("ignore_index", "must be a whole number of 64 bits, or a list of them", value)
    return tuple(int(value) for value in values) or None


def check_input(input: Tensor) -> None:  # noqa: A002
    """Refuse what is no tensor of floating point numbers ``[B, C, *S]`` with 0 to 3 spatial axes."""
    if not isinstance(input, Tensor):
        raise fail("input", "must be a tensor", type(input).__name__)
    if not input.is_floating_point():
        raise fail("input", "must be floating point", input.dtype)
    if input.ndim < 2 or input.shape[1] == 0:
        raise ShapeError(f"input: must be [B, C, *S] with at least one channel; got {list(input.shape)}.")


def plain(tensor: Tensor) -> Tensor:
    """Return a MetaTensor as a plain tensor: sums have no affine."""
    # torch.compile stops at as_subclass, so it is called only where there is something to do.
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def can_hold(dtype: torch.dtype, value: int) -> bool:
    """Tell whether labels of this type can equal ``value``; torch would wrap 256 to 0 to compare it with uint8."""
    if dtype.is_floating_point or dtype == torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max


def _volume(name: str, volume: Any, input: Tensor) -> Tensor:  # noqa: A002
    """Return a part of the target as a plain tensor of a type with arithmetic."""
    if not isinstance(volume, Tensor) or volume.device != input.device:
        got = str(volume.device) if isinstance(volume, Tensor) else type(volume).__name__
        raise fail(name, f"must be a tensor on the input's device, {input.device}", got)
    if volume.requires_grad:
        raise fail(name, _DETACH, "requires_grad")
    if volume.is_complex():
        raise fail(name, "must be real", volume.dtype)
    return plain(volume).long() if volume.dtype in _WIDENED else plain(volume)


def _with_channel_axis(label: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return ``[B, 1, *S]`` or ``[B, C, *S]``; a label without a channel axis gets one."""
    if label.ndim == input.ndim - 1:
        label = label.unsqueeze(1)
    fits = label.ndim == input.ndim and label.shape[1] in (1, input.shape[1])
    if not fits or label.shape[0] != input.shape[0] or label.shape[2:] != input.shape[2:]:
        raise ShapeError(
            f"target: must be [B, *S], [B, 1, *S] or [B, C, *S] of the input's shape {list(input.shape)}; "
            f"got {list(label.shape)}."
        )
    return label


def _voxel_weight(weight: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return weights of voxels as ``[B, 1, *S]``, floating point."""
    weight = weight.unsqueeze(1) if weight.ndim == input.ndim - 1 else weight
    expected = (input.shape[0], 1, *input.shape[2:])
    if weight.shape != expected:
        raise ShapeError(f"{WEIGHT}: must be [B, 1, *S], here {list(expected)}; got {list(weight.shape)}.")
    return weight if weight.is_floating_point() else weight.float()


def _annotated(annotated: Tensor, input: Tensor) -> Tensor | None:  # noqa: A002
    """Return which classes of which case were annotated; None where a look at the values costs nothing and all were."""
    if annotated.shape != input.shape[:2]:
        raise ShapeError(f"{ANNOTATED}: must be [B, C], here {list(input.shape[:2])}; got {list(annotated.shape)}.")
    annotated = annotated != 0
    on_cpu = annotated.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if on_cpu and annotated.all() else annotated


def _regions(regions: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return ids of regions, whole numbers ``[B, K, *S]``."""
    num_classes = input.shape[1]
    channels = [num_classes] if num_classes == 1 else [num_classes - 1, num_classes]
    fits = regions.ndim == input.ndim and regions.shape[0] == input.shape[0] and regions.shape[2:] == input.shape[2:]
    if not fits or regions.shape[1] not in channels:
        expected = [[input.shape[0], channel, *input.shape[2:]] for channel in channels]
        rule = "must be [B, C, *S], or [B, C - 1, *S] without the background, here "
        raise ShapeError(f"{REGIONS}: {rule}{' or '.join(map(str, expected))}; got {list(regions.shape)}.")
    return regions.long() if regions.is_floating_point() or regions.dtype == torch.bool else regions


def _largest(regions: Tensor) -> int:
    """Return the largest id; it must be known before the sums are, so a GPU waits for it."""
    if not regions.numel():
        return 0
    low, high = (int(value) for value in torch.aminmax(regions))
    if low < 0:
        raise fail(REGIONS, "ids are whole numbers of at least 0, 0 for no region", low)
    return high


def _skeleton(skeleton: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    """Return a skeleton as ``[B, 1, *S]`` or ``[B, C, *S]``."""
    skeleton = skeleton.unsqueeze(1) if skeleton.ndim == input.ndim - 1 else skeleton
    fits = skeleton.ndim == input.ndim and skeleton.shape[1] in (1, input.shape[1])
    if not fits or skeleton.shape[0] != input.shape[0] or skeleton.shape[2:] != input.shape[2:]:
        rule = f"must be [B, 1, *S] or [B, C, *S] of the input's shape {list(input.shape)}"
        raise ShapeError(f"{SKELETON}: {rule}; got {list(skeleton.shape)}.")
    return skeleton


def _check_index(labels: Tensor, num_classes: int) -> None:
    if not labels.numel():
        return
    if labels.is_floating_point() and (broken := labels != labels.round()).any():
        raise fail("target", "index labels must be whole numbers", labels[broken][0].item(), _INTERPOLATED)
    low, high = torch.aminmax(labels)
    if low < 0 or high >= num_classes:
        wrong = torch.unique(labels[(labels < 0) | (labels >= num_classes)]).tolist()
        rule = f"index labels must lie in 0..{num_classes - 1} (the input has {num_classes} channels)"
        raise fail("target", rule, wrong, _IGNORE)


def _check_dense(labels: Tensor) -> None:
    """Refuse dense labels beyond 0 and 1; interpolation may overshoot by less than a half."""
    low, high = torch.aminmax(labels)
    if not (low >= -0.5 and high <= 1.5):  # NaN is neither
        wrong = labels[~((labels >= -0.5) & (labels <= 1.5))][0].item()
        raise fail("target", "dense labels (a channel per class) must be 0, 1 or between", wrong, _RESCALE)
