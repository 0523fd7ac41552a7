# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How a run ends before its time: one line that says why, and whoever has to close something is told.

Ignite asks only the first handler of an error, because that one raises it again. So all handlers of this package share
one, which :func:`at_stop` registers. A ``StatsHandler``, which would write a traceback, has to stand behind them.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from monai_losses_ext.errors import UserError, describe

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("No space left on device", "database or disk is full", "Disk quota exceeded", "File too large")
WORKER_WORDS = ("is killed by signal", "exited unexpectedly")

Callback = Callable[[BaseException], None]
Explanation = Callable[[BaseException], BaseException | None]
_callbacks: WeakKeyDictionary[Engine, list[Callback]] = WeakKeyDictionary()
_explanations: WeakKeyDictionary[Engine, list[Explanation]] = WeakKeyDictionary()


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its text is one line.

    A ``KeyboardInterrupt``, so that nothing which catches errors goes on with the training.

    Args:
        line: what happened and how to go on.
        signal_number: of the signal.

    Attributes:
        exit_status: what the process should exit with, 128 + the signal's number, as shells have it.
    """

    def __init__(self, line: str, signal_number: int) -> None:
        super().__init__(line)
        self.exit_status = 128 + signal_number


def at_stop(engine: Engine, callback: Callback | None = None, explain: Explanation | None = None) -> None:
    """Have a say when an error ends the engine's run.

    Args:
        engine: a trainer or an evaluator.
        callback: is called with the error; it may be called again with the same one. That is a :class:`UserError` or
            :class:`Interrupted` of one line wherever the reason is known, see :func:`one_line`. Any other goes into
            the log once, with its traceback.
        explain: returns the error that is behind the one that it is given, or None where it knows of no other.
    """
    if engine not in _callbacks:
        _callbacks[engine], _explanations[engine] = [], []
        engine.add_event_handler(Events.EXCEPTION_RAISED, _stop)
    if callback is not None:
        _callbacks[engine].append(callback)
    if explain is not None:
        _explanations[engine].append(explain)


def _stop(engine: Engine, error: BaseException) -> NoReturn:
    known = (explain(error) for explain in _explanations[engine])
    reason = next((other for other in known if other is not None), None) or one_line(error)
    if not isinstance(reason, (UserError, KeyboardInterrupt)) and not getattr(reason, "is_logged", False):
        logging.getLogger(__name__).error("stopped by an error", exc_info=reason)
        reason.is_logged = True  # type: ignore[attr-defined]
    for callback in _callbacks[engine]:
        with suppress(Exception):  # closing a run may fail for the same reason, which is what matters
            callback(reason)
    if reason is error:
        raise error
    raise reason from error


def one_line(error: BaseException) -> BaseException:
    """Return the error of one line that a user can act on, where the reason is known; else the error itself.

    Known are an error of one line that MONAI or Ignite wrapped, a full disk, a data loader's worker that was killed,
    and a GPU whose memory does not suffice.
    """
    if isinstance(error, (UserError, KeyboardInterrupt)):
        return error
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return cause
        if (isinstance(cause, OSError) and cause.errno in FULL) or any(words in str(cause) for words in FULL_WORDS):
            return disk_full(cause)
        if "DataLoader worker" in str(cause) and any(words in str(cause) for words in WORKER_WORDS):
            return UserError(
                f"num_workers: a process that loads cases was killed ({describe(_first_line(cause))}), most often "
                "because the memory did not suffice. Give a smaller --num_workers or --cache_rate."
            )
        if isinstance(cause, torch.OutOfMemoryError):
            return UserError(
                f"device: the GPU's memory does not suffice ({describe(_first_line(cause))}). Give a smaller "
                "--batch_size or --patch_size."
            )
    return error


def disk_full(error: BaseException, path: object = None) -> UserError:
    """Return the one-line error for what could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    file = path or getattr(error, "filename", None)
    what = f"{file} cannot be written" if file else "a file of the run cannot be written"
    return UserError(
        f"output: {what} ({describe(reason)}). What was saved before is whole; free some space, then go on with "
        "--resume true."
    )


def is_first_rank() -> bool:
    """Tell whether this is the only process of a training, or the first of several."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from, the error itself first."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    # A worker's error is a traceback as text, with the message at its end.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1 if len(lines) > 1 and lines[0].startswith("Caught ") else 0] if lines else type(error).__name__
