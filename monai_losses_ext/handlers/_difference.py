# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Where two nested values of a config differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "absent"
SHOWN = 60  # characters of a long text


def difference(theirs: Any, ours: Any) -> tuple[str, str, str] | None:
    """Return the first place where two values differ, or None.

    Dictionaries are compared by key, lists and tuples by position, everything else by ``==``.

    Returns:
        The place as on the command line, ``#components#1#gamma``, or nothing for the whole value; both values there as
        an error message shows them: ``absent`` where there is none, long ones from where they differ.
    """
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        parts = [(f"#{key}", theirs.get(key, ABSENT), ours.get(key, ABSENT)) for key in keys]
    elif _is_list(theirs) and _is_list(ours):
        longer = range(max(len(theirs), len(ours)))
        at = [[values[i] if i < len(values) else ABSENT for i in longer] for values in (theirs, ours)]
        parts = [(f"#{i}", *pair) for i, pair in enumerate(zip(*at, strict=True))]
    else:
        return None if theirs == ours else ("", *_shown(theirs, ours))
    for place, one, other in parts:
        found = difference(one, other)
        if found is not None:
            return (place + found[0], *found[1:])
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(theirs: Any, ours: Any) -> tuple[str, str]:
    """Return both values in words, cut so that what differs is seen."""
    texts = [value if value is ABSENT else " ".join(repr(value).split()) for value in (theirs, ours)]
    if max(map(len, texts)) <= SHOWN:
        return texts[0], texts[1]
    first = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, first - 20)
    cut = [("..." if start else "") + text[start : start + SHOWN] for text in texts]
    ends = ["..." if start + SHOWN < len(text) else "" for text in texts]
    return cut[0] + ends[0], cut[1] + ends[1]
