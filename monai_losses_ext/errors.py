# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Errors for what a user typed or passed: one line, one wording.

Every message reads ``<argument>: <rule>; got <value>.`` and, where a name was misspelt, ends with the nearest allowed
one. Nothing else in the package words an input error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """What a user typed or passed cannot be right; its text is one line that says what to do.

    The library raises it and never ends the process. The command line and a bundle's run print the line and exit with
    status 1.
    """


class ShapeError(UserError, AssertionError):
    """Input and target do not fit together.

    Also an ``AssertionError``, because that is what MONAI raises for it and what its users catch.
    """


def describe(value: Any) -> str:
    """Return ``value`` as an error message shows it: short, and on one line."""
    if isinstance(value, (str, bytes)):
        value = value[:200]
    elif isinstance(value, (dict, list, tuple, set)) and _is_large(value):
        kind = type(value).__name__
        return f"a {kind} with {len(value)} entries" if len(value) > 100 else f"a deeply nested {kind}"
    elif isinstance(value, int) and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # a whole number of too many digits to print
        text = f"a {type(value).__name__} of huge numbers"
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_large(value: Any, budget: int = 1000) -> bool:
    """Tell whether a structure says more than ``budget`` entries: too many to show, or to look at at all."""
    stack, seen = [value], 0
    while stack:
        item = stack.pop()
        seen += 1
        if seen + len(stack) > budget:
            return True
        if isinstance(item, dict):
            stack.extend(list(item.values())[:budget])
        elif isinstance(item, (list, tuple, set)):
            stack.extend(list(item)[:budget])
    return False


def nearest(word: Any, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the allowed name that ``word`` was meant to be, or nothing.

    That is the one with these initials (``ce`` for ``cross_entropy``), the closest one, or one that holds the word;
    written as a class (``DiceCELoss`` for ``dice_ce``) or as a name.
    """
    if not isinstance(word, str):
        return ""
    names: dict[str, str] = {}
    for name in allowed:
        names.setdefault(_plain(name), name)
    typed = _plain(word)
    close = [plain for plain, name in names.items() if "_" in name and typed == "".join(w[:1] for w in name.split("_"))]
    close = close or difflib.get_close_matches(typed, names, n=1, cutoff=0.6)
    if not close and len(typed) > 2:
        close = [plain for plain in names if typed in plain]
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    """Return a name as classes and configs have it in common."""
    letters = name.lower().replace("_", "")
    return letters.removesuffix("loss") or letters


def fail(argument: str, rule: str, value: Any, hint: str = "") -> UserError:
    """Build the one-line error; the caller raises it."""
    return UserError(f"{argument}: {rule}; got {describe(value)}.{hint}")


def one_of(argument: str, value: Any, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises:
        UserError: naming the argument, what is allowed, what was received and the nearest allowed name.
    """
    names = list(allowed)
    if value not in names:
        raise fail(argument, f"must be one of {', '.join(names)}", value, nearest(value, names))
    return str(value)
