# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A pool of threads for work that lets go of the interpreter's lock.

Each thread is handed the same function, which takes pieces of the work from a list that all share until none is left.
The caller works too, and never waits for a thread that has not begun: on a loaded machine that may take longer than
the work. So calls may be nested, and several callers may share the threads.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

SECONDS_TO_END = 2.0
Work = Callable[[], None]
Result = TypeVar("Result")


def _nothing() -> None:
    pass


class _Call:
    """One call of :func:`spread`: tickets that threads may still take, and the answers of those that took one."""

    def __init__(self, work: Work, tickets: int) -> None:
        self.work = work
        self.tickets = [None] * tickets
        self.answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def take(self) -> bool:
        try:
            self.tickets.pop()  # by one thread at a time
        except IndexError:
            return False
        return True

    def help(self) -> None:
        if not self.take():
            return
        try:
            self.work()
        except BaseException as error:
            self.answers.put(error)
        else:
            self.answers.put(None)


class _Pool:
    """Threads that wait for calls; as many as were ever asked for at once."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []
        # Python ends a thread that wants the interpreter's lock after its end, by an abort where that is in torch.
        atexit.register(self.close)

    def grow(self, size: int) -> None:
        with self.lock:
            while len(self.threads) < size:
                name = f"voxel_sums_{len(self.threads)}"
                self.threads.append(threading.Thread(target=self._wait, name=name, daemon=True))
                self.threads[-1].start()

    def _wait(self) -> None:
        while (call := self.calls.get()) is not None:
            call.help()
            del call

    def close(self) -> None:
        """Let the threads end, and wait for them, though not for one that is stuck."""
        if _POOLS.get(os.getpid()) is not self:  # of the process that this one was forked from, as its threads are
            return
        for _ in self.threads:
            self.calls.put(None)
        for thread in self.threads:
            thread.join(SECONDS_TO_END)


# By process: a forked child has its parent's memory, but none of its threads, and its locks as they were.
_POOLS: dict[int, _Pool] = {}


def apart(work: Callable[[], Result]) -> Result:
    """Return what ``work`` returns in a thread of its own.

    There autograd works as ever, while within an operator, or beneath a mode that counts operators, it does not.
    """
    answers: list[Result] = []
    errors: list[BaseException] = []

    def answer() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=answer, name="voxel_sums")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]


def spread(work: Work, threads: int) -> None:
    """Run ``work`` in up to ``threads`` threads at once, this one among them, and return when all are done.

    Raises:
        BaseException: the first that any of them raised.
    """
    if threads <= 1:
        work()
        return
    pool = _POOLS.get(os.getpid()) or _POOLS.setdefault(os.getpid(), _Pool())
    if len(pool.threads) < threads - 1:
        pool.grow(threads - 1)
    call = _Call(work, threads - 1)
    for _ in range(threads - 1):
        pool.calls.put(call)
    helpers = threads - 1
    try:
        work()
    finally:
        while call.take():
            helpers -= 1
        failures = [answer for answer in (call.answers.get() for _ in range(helpers)) if answer is not None]
        call.work = _nothing  # so that the tensors it holds are let go of here, and not by a thread that is late
    if failures:
        raise failures[0]
