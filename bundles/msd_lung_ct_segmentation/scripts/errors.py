# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A mistake of the user ends a run with one line on stderr and exit status 1, not with MONAI's tracebacks."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
from collections.abc import Iterator
from types import TracebackType

WORKER = re.compile(r"^(?:[\w.]+\.)?UserError: (.*)$", re.MULTILINE)


class UserError(ValueError):
    """What a user typed or passed cannot be right; its text is one line that says what to do."""


def one_line_errors() -> None:
    """From now on, let an uncaught :class:`UserError` end the process with its line alone. First entry of ``run``.

    MONAI and Ignite wrap an error several times and log its traceback on the way. The line is looked up behind the
    wrapping, and what is logged of such an error is dropped. Any other error, and one that is caught, is as ever.
    """
    for handler in [*logging.getLogger().handlers, logging.lastResort]:
        if handler is not None and _is_news not in handler.filters:
            handler.addFilter(_is_news)
    former = sys.excepthook
    if getattr(former, "is_of_bundle", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = user_line(error)
        status = getattr(error, "exit_status", None)  # of a run that a signal stopped, as shells have it
        if line is None:
            former(kind, error, trace)
        elif status is None:
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
            atexit._run_exitfuncs()  # such as the one that takes the folder's lock away
            os._exit(status)  # everything is written; an exception would end the process with status 1

    hook.is_of_bundle = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def user_line(error: BaseException | None) -> str | None:
    """Return the line of the UserError that an error is, or was caused by; None where there is none.

    The class is known by its name: the package ``monai_losses_ext`` has one too, and ``Interrupted`` for a run that a
    signal stopped.
    """
    for cause in _causes(error):
        text = str(cause)
        of_worker = "in DataLoader worker process" in text  # its message is the traceback that the worker saw
        if any(kind.__name__ in ("UserError", "Interrupted") for kind in type(cause).__mro__):
            return text.strip().splitlines()[-1].partition(": ")[2] if of_worker else " ".join(text.splitlines())
        found = WORKER.search(text) if of_worker else None
        if found:
            return found[1]
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a log record says more than the line that the run will end with."""
    return record.levelno < logging.ERROR or user_line(sys.exc_info()[1]) is None
