# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A run that is told to stop, by Ctrl-C or by a cluster's scheduler, ends its step and says how to go on."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from ignite.engine import Engine, Events

from monai_losses_ext.handlers.stopping import Interrupted, at_stop, is_first_rank

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C; Slurm, docker, Kubernetes; a terminal that was closed
PATIENCE = 20.0  # seconds that other ranks give the first one to end


class StopOnSignal:
    """On SIGINT, SIGTERM or SIGHUP end the running step, then the run, with :class:`Interrupted`.

    What :class:`TrainingState` saved at the end of the last epoch is what a resumed training goes on from; the epoch
    that was cut short is trained again, to the same numbers. :class:`ResumableMLFlowHandler` marks the run KILLED. A
    second signal stops at once. The former signal handlers are put back when the run ends. Outside of the main thread,
    where Python takes no signals, it does nothing.

    Of several processes the first one ends the run and the others follow it, because a process that leaves first would
    keep it waiting in a collective operation.

    Args:
        validator: the evaluator that the trainer's ValidationHandler runs; it is stopped after a case too.

    Raises:
        Interrupted: out of the engine's ``run``. A bundle's run prints its line and exits with 128 + the signal's
            number: 130, 143, 129.
    """

    def __init__(self, validator: Engine | None = None) -> None:
        self.validator = validator
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._since = 0.0
        self._pid = os.getpid()
        self._trainer: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Register on a trainer and its validator, or on an evaluator. Before handlers that take long."""
        engine.add_event_handler(Events.STARTED, self._install)
        engine.add_event_handler(Events.COMPLETED, self._restore)
        for loop in filter(None, (engine, self.validator)):
            loop.add_event_handler(Events.ITERATION_COMPLETED, self._check)
            at_stop(loop, explain=self._explain)
        at_stop(engine, lambda error: self._restore())

    def _install(self, engine: Engine) -> None:
        self._received, self._trainer, self._pid = None, engine, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            # nohup ignores SIGHUP, and a shell SIGINT of what it runs in the background: let it be.
            if number not in self._before and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data loader's worker, a fork; Ctrl-C reaches it too
            return
        if self._received is not None:
            raise self._error()
        self._received, self._since = number, time.monotonic()
        logging.getLogger(__name__).info(
            f"{signal.Signals(number).name}: the run ends after this step; a second signal ends it at once"
        )

    def _check(self, engine: Engine) -> None:
        if self._received is not None and (is_first_rank() or time.monotonic() - self._since > PATIENCE):
            raise self._error()

    def _explain(self, error: BaseException) -> Interrupted | None:
        """A signal to all processes ends the loader's workers and other ranks too, which shows as an error here."""
        return None if self._received is None or isinstance(error, Interrupted) else self._error()

    def _error(self) -> Interrupted:
        number = self._received or signal.SIGINT
        state = self._trainer.state if self._trainer is not None else None
        where, go_on = "", ""
        if state is not None and (state.max_epochs or 1) > 1:
            where = f" in epoch {state.epoch} of {state.max_epochs}"
            go_on = f" --resume true goes on with epoch {max(state.epoch, 1)}, from what was saved before it."
        return Interrupted(f"stopped by {signal.Signals(number).name}{where}.{go_on}", number)
