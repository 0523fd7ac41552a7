# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the values in label files mean: their names, the classes that they become, and what a case was annotated for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from monai_losses_ext.errors import fail

ANNOTATED = "annotated"
LabelMap = Mapping[str, int] | Mapping[int, int]  # value in the label files to class; JSON has texts as keys


def whole_map(label_map: LabelMap | None) -> dict[int, int]:
    """Return a label map, whose keys may be texts as JSON has them, in whole numbers.

    Raises:
        UserError: one line, for what is no such map.
    """
    try:
        return {whole(old): whole(new) for old, new in dict(label_map or {}).items()}
    except (TypeError, ValueError):
        rule = 'must map values of the label files to classes, in whole numbers, as {"17": 1, "53": 2}'
        raise fail("label_map", rule, label_map) from None


def whole(value: object) -> int:
    """Return a whole number, also of a text; true and false are none.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str, np.integer)):
        raise ValueError(value)
    return int(value)


def named_labels(index: Mapping[str, Any]) -> dict[int, str] | None:
    """Return the labels that a ``dataset.json`` names, value to name; None where it names none.

    Raises:
        UserError: one line, for ``labels`` that cannot be read.
    """
    labels = index.get("labels")
    if labels is None:
        return None
    if isinstance(labels, Mapping) and labels:
        if all(re.fullmatch(r"-?\d+", key) for key in labels):
            return {int(key): str(name) for key, name in labels.items()}
        if all(_is_whole(value) for value in labels.values()):  # nnU-Net's way round
            return {int(value): str(name) for name, value in labels.items()}
        labels = dict(labels)
    raise fail("dataset.json: labels", 'must name each value, as {"0": "background", "1": "liver"}', labels)


def check_annotated(value: Any, known: Collection[int] | None) -> None:
    """Check what a case of ``dataset.json`` says that it was annotated for.

    Args:
        value: a list of labels, as the files have them; the background need not be named.
        known: the labels that there are; None where nothing tells.

    Raises:
        UserError: one line, for no list, an empty one, or an id that is no label.
    """
    if not isinstance(value, list) or not value or not all(map(_is_whole, value)):
        raise fail(ANNOTATED, "must list the labels that the case was annotated for, as [1, 2]", value)
    unknown = [label for label in value if known is not None and label != 0 and label not in known]
    if known is not None and unknown:
        rule = f"must list labels of the files, which are {', '.join(map(str, sorted(known)))}"
        raise fail(ANNOTATED, rule, unknown[0])


def class_sources(
    named: Collection[int] | None, num_classes: int, label_map: LabelMap | None = None
) -> list[frozenset[int]]:
    """Return the labels in the files that each class is made of; none for class 0, the background.

    Args:
        named: the labels that ``dataset.json`` names; None where it names none, and the classes are the labels.
        num_classes: C, background included.
        label_map: label to class; others stay as they are.

    Raises:
        UserError: one line, where a label map alone does not tell which labels there are.

    >>> class_sources([0, 1, 2, 5], 3, {5: 1})
    [frozenset(), frozenset({1, 5}), frozenset({2})]
    """
    classes = whole_map(label_map)
    if named is None and classes:
        rule = f"must name the labels of the files where a label_map changes them and cases say what is {ANNOTATED}"
        raise fail("dataset.json: labels", rule, "none")
    labels = range(num_classes) if named is None else named
    sources = (frozenset(old for old in labels if classes.get(old, old) == new) for new in range(1, num_classes))
    return [frozenset(), *sources]


def annotated_channels(labels: Sequence[int] | None, sources: Sequence[Collection[int]]) -> np.ndarray[Any, Any]:
    """Return which channels a case was annotated for, [C] bool: those of which it was for every label.

    Args:
        labels: what the case was annotated for; None for all.
        sources: the labels in the files that each channel is made of, as :func:`class_sources` gives them, or those of
            a sigmoid's regions. A channel of no label always counts.

    >>> annotated_channels([1], [[], [1], [2]]).tolist()
    [True, True, False]
    >>> annotated_channels([1, 2], [[1, 2, 3], [1, 2]]).tolist()
    [False, True]
    """
    return np.array([labels is None or set(labels).issuperset(channel) for channel in sources])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
