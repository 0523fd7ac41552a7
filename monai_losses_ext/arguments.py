# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments against the type hints of what takes them: the one description of a constructor's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from monai_losses_ext.errors import fail, nearest

LARGEST_INTEGER, LARGEST_NUMBER = 2**63 - 1, 1e30  # of int64, and far below the largest float32
_HUGE = " It is too large to compute with."


def is_huge(value: Any) -> bool:
    """Tell whether a number is too large for tensors of int64 or float32, infinite, or NaN."""
    if isinstance(value, Integral):
        return abs(int(value)) > LARGEST_INTEGER
    return not abs(value) <= LARGEST_NUMBER


class Limits(NamedTuple):
    """Limits of a number, for use in ``Annotated[float, Limits(minimum=0)]``."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf

    def allow(self, value: float) -> bool:
        """Tell whether the number lies within the limits, and is one that a tensor can hold."""
        return not is_huge(value) and self.minimum <= value <= self.maximum and value > self.above

    def schema(self) -> dict[str, float]:
        """Return the limits as keywords of a JSON Schema."""
        keywords = {"minimum": self.minimum, "maximum": self.maximum, "exclusiveMinimum": self.above}
        return {keyword: limit for keyword, limit in keywords.items() if math.isfinite(limit)}

    def words(self) -> str:
        """Return the limits as an error message says them."""
        if self.maximum < math.inf and self.above > -math.inf:
            return f" above {self.above:g} and at most {self.maximum:g}"
        if self.maximum < math.inf:
            return f" between {self.minimum:g} and {self.maximum:g}"
        if self.above > -math.inf:
            return f" above {self.above:g}"
        return f" of at least {self.minimum:g}" if self.minimum > -math.inf else ""


def number(argument: str, value: Any, limits: Limits) -> float:
    """Return ``value`` as a float if it is a number (a bool is not) within the limits.

    Raises:
        UserError: naming the argument, the limits and what was received.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not limits.allow(value):  # type: ignore[arg-type]
        raise fail(argument, f"must be a number{limits.words()}", value, _number_hint(value))
    return float(value)


def _number_hint(value: Any) -> str:
    """Return what may be wrong with a number: finite but too large to compute with, or a text."""
    if isinstance(value, str):
        try:
            plain = repr(float(value)) if len(value) < 40 else ""
        except ValueError:
            return ""
        plain = plain if "." in plain else plain.replace("e", ".0e")
        return f" It is a text: write it without quotes, in YAML with a point ({plain})." if plain else ""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return _HUGE if is_number and value == value and abs(value) != math.inf and is_huge(value) else ""


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], where: str = "") -> None:
    """Check arguments against the type hints of ``function``: the one description of what a constructor takes.

    Hints may be ``bool``, ``int``, ``float``, ``str``, ``Literal``, ``Sequence[float]``, ``Tensor``, ``Callable``,
    ``None``, unions of these, and ``Annotated[float, Limits(minimum=0)]``.

    Args:
        function: whose hints count.
        arguments: name to value; names without a hint are passed over.
        where: put before the argument's name in an error, such as ``"loss: focal: "``.

    Raises:
        UserError: one line naming the argument, what it may be and what was received.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        if name in hints and not any(_matches(value, option) for option in options(hints[name])):
            rule = "must be " + " or ".join(dict.fromkeys(map(_words, options(hints[name]))))
            literals = [
                str(word) for option in options(hints[name]) for word in get_args(option) if _is_literal(option)
            ]
            hint = (nearest(value, literals) if literals and isinstance(value, str) else "") or _number_hint(value)
            raise fail(f"{where}{name}", rule, value, hint)


def options(hint: Any) -> list[Any]:
    """Return the alternatives of a type hint, with unions taken apart."""
    return [*get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]


def with_limits(option: Any) -> tuple[Any, Limits]:
    """Split ``Annotated[type, Limits(...)]`` into the two; a bare type has no limits."""
    return get_args(option) if get_origin(option) is Annotated else (option, Limits())  # type: ignore[return-value]


def _is_literal(option: Any) -> bool:
    return get_origin(option) is Literal


def _matches(value: Any, option: Any) -> bool:
    kind, limits = with_limits(option)
    if kind is None or kind is type(None):
        return value is None
    if _is_literal(kind):
        return value in get_args(kind)
    if kind in (float, int):
        is_number = isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
        return is_number and limits.allow(value)
    if get_origin(kind) is Sequence:
        items = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor is a list too
        is_list = isinstance(items, Sequence) and not isinstance(items, str)
        return is_list and all(_matches(item, get_args(kind)[0]) for item in items)
    return isinstance(value, get_origin(kind) or kind)


def _words(option: Any) -> str:
    kind, limits = with_limits(option)
    if kind is None or kind is type(None):
        return "none"
    if _is_literal(kind):
        words = get_args(kind)
        return f"one of {', '.join(map(str, words))}" if len(words) > 1 else repr(words[0])
    if kind in (float, int):
        return ("a number" if kind is float else "a whole number") + limits.words()
    if get_origin(kind) is Sequence:
        return f"a list of {_words(get_args(kind)[0]).removeprefix('a ').replace('number', 'numbers', 1)}"
    named = {bool: "true or false", str: "a text", dict: "an object"}
    return named.get(kind, f"a {getattr(kind, '__name__', str(kind)).lower()}")
