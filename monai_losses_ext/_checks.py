# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors for what a user typed or passed: one line, one wording.

Every message reads ``<argument>: <rule>; got <value>.`` and, where a name was misspelt, ends with the nearest allowed
one. Nothing else in the package words an input error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any


class ShapeError(ValueError, AssertionError):
    """Input and target do not fit together.

    Also an ``AssertionError``, because that is what MONAI raises for it and what its users catch.
    """


def describe(value: Any) -> str:
    """Return ``value`` as an error message shows it: short, and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the allowed name closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def fail(argument: str, rule: str, value: Any, hint: str = "") -> ValueError:
    """Build the one-line error; the caller raises it."""
    return ValueError(f"{argument}: {rule}; got {describe(value)}.{hint}")


def one_of(argument: str, value: Any, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        ValueError: naming the argument, what is allowed, what was received and the nearest allowed name.
    """
    names = list(allowed)
    if value not in names:
        raise fail(argument, f"must be one of {', '.join(names)}", value, nearest(value, names))
    return str(value)


def number(
    argument: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf, above: float | None = None
) -> float:
    """Return ``value`` as a float if it is a finite number within the limits.

    Args:
        argument: the name shown in the error.
        value: what the user passed; a bool is not a number.
        minimum: the least value allowed.
        maximum: the greatest value allowed.
        above: a value that must be exceeded, for open intervals.
    """
    limits = f"above {above:g}" if above is not None else f"at least {minimum:g}" if minimum > -math.inf else ""
    if maximum < math.inf:
        limits = f"between {minimum:g} and {maximum:g}"
    rule = f"must be a number{' ' if limits else ''}{limits}"
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise fail(argument, rule, value)
    if not minimum <= value <= maximum or (above is not None and value <= above):
        raise fail(argument, rule, value)
    return float(value)
