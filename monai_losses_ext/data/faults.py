# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a case in memory: the one set of rules of the dataset check and of a training's own check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from monai_losses_ext.data.labels import LabelMap, whole, whole_map
from monai_losses_ext.data.shapes import Array
from monai_losses_ext.data.volume import Volume, affine_fault, displacement_mm
from monai_losses_ext.errors import fail

SHOWN = 5  # of a list of names or fractions
MOST_VALUES = 64  # label values that are written out; of more, the range
ROUNDING = 1e-3  # what a label may lack to a whole number: a scale in the file's header leaves it a hair off


Label = TypeVar("Label", bound=Any)


class Fault(NamedTuple):
    """What is wrong with a volume of a case."""

    key: str  # "image", "label" or "weight"
    what: str  # continues a sentence that begins with the file
    values: frozenset[int] = frozenset()  # label values that are no classes


@dataclass(frozen=True)
class Rules:
    """What a case must have."""

    channels: int
    num_classes: int  # background included
    ignore_label: frozenset[int] = frozenset()  # values of voxels that nobody labeled
    label_map: Mapping[int, int] = field(default_factory=dict)  # value in the file to class

    def options(self) -> str:
        """Return the command line options of ``data check`` that give the same rules for labels."""
        text = f" --ignore_label {' '.join(map(str, sorted(self.ignore_label)))}" if self.ignore_label else ""
        return text + (f" --label_map '{as_json(self.label_map)}'" if self.label_map else "")


def make_rules(
    channels: int,
    num_classes: int,
    ignore_label: int | Sequence[int] | None = None,
    label_map: LabelMap | None = None,
) -> Rules:
    """Return the rules for a case, with what a user typed checked.

    Args:
        channels: of the image.
        num_classes: background included.
        ignore_label: value, or values, of voxels that nobody labeled.
        label_map: value in the file to class; the keys may be texts, as JSON has them. Other values stay as they are.

    Raises:
        UserError: one line, for values that are no whole numbers, or a class that there is not.
    """
    given = ignore_label if isinstance(ignore_label, (list, tuple)) else [] if ignore_label is None else [ignore_label]
    try:
        ignored = frozenset(map(whole, given))
    except ValueError:
        raise fail("ignore_label", "must be a whole number or a list of them", ignore_label) from None
    classes = whole_map(label_map)
    if any(not 0 <= new < num_classes and new not in ignored for new in classes.values()):
        raise fail("label_map", f"must map to classes, which are 0 to {num_classes - 1}", label_map)
    return Rules(channels, num_classes, ignored, classes)


def faults(image: Volume, label: Volume, rules: Rules, weight: Volume | None = None) -> Iterator[Fault]:
    """Give what is wrong with a case in memory.

    Args:
        image: voxels [C, *S].
        label: voxels [1, *S], values as they are in the file.
        rules: what they must have.
        weight: voxels [1, *S]; None for a case without weights.
    """
    voxels = image.voxels
    if voxels.ndim != 4:
        shape = by(voxels.shape[1:])
        yield Fault("image", f"must be 3-D, with channels along a fourth axis; its shape is {shape}")
        return
    if len(voxels) != rules.channels:
        yield Fault("image", f"has {len(voxels)} channels; the task has {rules.channels}")
    if broken := _not_finite(voxels):
        yield Fault("image", broken)
    yield from _faults_of_grid("label", label, image, ", of whole numbers")
    yield from faults_of_values(label.voxels, rules)
    if weight is not None:
        yield from _faults_of_grid("weight", weight, image)
        yield from _faults_of_weight(weight.voxels)


def faults_of_values(label: Array, rules: Rules) -> Iterator[Fault]:
    """Give what is wrong with the values of a label, of any shape, as they are in the file."""
    whole = np.issubdtype(label.dtype, np.integer) or label.dtype == bool
    if not whole:
        broken = ~(abs(label - np.round(label)) <= ROUNDING)  # true for NaN too
        if broken.any():
            yield Fault("label", f"has values that are no whole numbers: {shortened(np.unique(label[broken]))}")
            return
    rounded = np.round(label)
    outside = np.unique(rounded[(rounded < 0) | (rounded >= rules.num_classes)])
    unknown = {int(value) for value in outside} - rules.ignore_label - set(rules.label_map)
    if unknown:
        what = f"has values outside 0..{rules.num_classes - 1}, the task's labels: {_values(unknown)}"
        yield Fault("label", what, frozenset(unknown))


def classes_of(label: Label, rules: Rules) -> Label:
    """Return a label that has no fault, in whole numbers, with its values mapped to classes.

    Args:
        label: any shape; an array or a tensor.
        rules: with the label map.
    """
    whole: Label = label.round()
    if not rules.label_map:
        return whole
    classes: Label = whole + 0  # a copy, of a tensor too
    for old, new in rules.label_map.items():
        classes[whole == old] = new
    return classes


def remedy(values: Iterable[int], rules: Rules) -> str:
    """Return what to do about label values that are no classes, with an example that covers them."""
    unknown = sorted(values)
    free = [new for new in range(1, rules.num_classes) if new not in rules.label_map.values()]
    example = dict(rules.label_map) | {old: free[i] if i < len(free) else 0 for i, old in enumerate(unknown)}
    shown = as_json(example) if len(unknown) <= MOST_VALUES else "{...}"
    return (
        f"A label_map gives values their classes and merges them (0 is background), such as --label_map '{shown}'; "
        "ignore_label is the value of voxels that nobody labeled, such as --ignore_label "
        f"{unknown[0] if len(unknown) == 1 else 255}"
    )


def as_json(label_map: Mapping[int, int]) -> str:
    """Return a label map as it is typed."""
    return json.dumps({str(old): new for old, new in label_map.items()})


def shortened(items: Iterable[object]) -> str:
    """Return the first few items of a list in words."""
    names = [str(item) for item in items]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def by(sizes: Iterable[float]) -> str:
    """Return sizes as ``16 x 16 x 12``."""
    return " x ".join(f"{size:.4g}" for size in sizes)


def _faults_of_grid(key: str, volume: Volume, image: Volume, what: str = "") -> Iterator[Fault]:
    """Give what is wrong with the shape and the place of a volume of one channel, which are the image's."""
    shape, expected = volume.voxels.shape[1:], image.voxels.shape[1:]
    if len(volume.voxels) != 1:
        yield Fault(key, f"has {len(volume.voxels)} channels; it must have one{what}")
    elif shape != expected:
        yield Fault(key, f"has the shape {by(shape)}; the image has {by(expected)}")
    else:
        yield from _faults_of_place(key, volume, image)


def _faults_of_place(key: str, volume: Volume, image: Volume) -> Iterator[Fault]:
    for name, other in (("image", image), (key, volume)):
        if what := affine_fault(other.affine):
            if name == key or key == "label":  # the image's own is told once
                yield Fault(name, what)
            return
    away = displacement_mm(volume.voxels.shape[1:], image.affine, volume.affine)
    if away > 0.5 * float(np.linalg.norm(image.affine[:3, :3], axis=0).min()):
        notes = [f"; of the {name}, {other.note}" for name, other in (("image", image), (key, volume)) if other.note]
        yield Fault(key, f"lies up to {away:.3g} mm from the image: their affines differ{''.join(notes)}")


def _faults_of_weight(weight: Array) -> Iterator[Fault]:
    if broken := _not_finite(weight):
        yield Fault("weight", broken)
    negative = weight[weight < 0]
    if negative.size:
        yield Fault("weight", f"has {negative.size} voxels below 0, down to {negative.min():.4g}")


def _not_finite(voxels: Array) -> str:
    """Return how many voxels of a volume are no numbers, in words; nothing where all are."""
    if not np.issubdtype(voxels.dtype, np.floating):
        return ""
    broken = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
    return f"has {broken} voxels that are NaN or infinite" if broken else ""


def _values(values: Iterable[int]) -> str:
    """Return all of some whole numbers, neighbors as a range; of very many, the range of all."""
    ordered = sorted(values)
    if len(ordered) > MOST_VALUES:
        return f"{len(ordered)} values from {ordered[0]} to {ordered[-1]}"
    runs: list[list[int]] = []
    for value in ordered:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)
