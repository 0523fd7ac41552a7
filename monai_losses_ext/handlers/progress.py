# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A line in the log for every epoch: which of how many, what came out, how long the rest will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.handlers._engine import numeric

MAX_SHOWN = 12  # metrics of a line; of more, only the means and totals


class ProgressLog:
    """Log a line at the end of every epoch, and one a minute within a long epoch or validation.

    ``epoch 3/50: loss 0.512, lr 0.00912, mean_dice 0.71; took 12 s, 9 min left``. The time left is that of the epochs
    that this process has trained, validation included, times those to come.

    Wherever it stands in the list of handlers, its line is written when the other handlers are through with the epoch.

    Args:
        validator: the evaluator that the trainer's ValidationHandler runs: its metrics stand in the line of the epoch
            in which it ran.
        name: how lines of an engine that is no trainer begin, such as ``evaluate``.
        every_s: seconds between two lines within an epoch.
    """

    def __init__(self, validator: Engine | None = None, name: str = "evaluate", every_s: float = 60.0) -> None:
        self.validator = validator
        self.name = name
        self.every_s = number("every_s", every_s, Limits(above=0))
        self._log = logging.getLogger(__name__)
        self._started = self._epoch_started = self._last_line = 0.0
        self._first_epoch = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer and its validator, or on an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step, engine)
        if self.validator is not None:
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._step, engine)

    def _start(self, engine: Engine) -> None:
        self._started = self._last_line = time.monotonic()
        self._first_epoch = engine.state.epoch
        if not engine.has_event_handler(self._end_epoch, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)  # now, so that it comes after all others

    def _start_epoch(self, engine: Engine) -> None:
        self._epoch_started = time.monotonic()

    def _step(self, running: Engine, engine: Engine) -> None:
        now = time.monotonic()
        if now - self._last_line < self.every_s:
            return
        self._last_line = now
        length = running.state.epoch_length
        done = (running.state.iteration - 1) % length + 1 if length else running.state.iteration
        what = "iterations" if running is engine else "validation batches"
        self._log.info(f"{self._where(engine)}: {done} of {length or '?'} {what}")

    def _end_epoch(self, engine: Engine) -> None:
        now = self._last_line = time.monotonic()
        metrics = dict(engine.state.metrics)
        if self.validator is not None and self.validator.state.epoch == engine.state.epoch:
            metrics |= self.validator.state.metrics
        line = f"{self._where(engine)}: {shown_metrics(metrics)}; took {duration(now - self._epoch_started)}"
        to_come = (engine.state.max_epochs or engine.state.epoch) - engine.state.epoch
        if to_come > 0:
            an_epoch = (now - self._started) / (engine.state.epoch - self._first_epoch)
            line += f", {duration(an_epoch * to_come)} left"
        self._log.info(line)

    def _where(self, engine: Engine) -> str:
        if not hasattr(engine, "optimizer"):
            return self.name
        return f"epoch {engine.state.epoch}/{engine.state.max_epochs}"


def shown_metrics(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of a line; of many only the loss, its terms, the learning rate and the means."""
    values = numeric(metrics)
    if len(values) > MAX_SHOWN:
        kept = ("loss", "lr", "mean_")
        values = {name: value for name, value in values.items() if name.startswith(kept)}
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no metrics"


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: ``12 s``, ``9 min``, ``3 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
