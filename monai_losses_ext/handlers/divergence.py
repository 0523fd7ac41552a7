# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A training whose loss is NaN or infinite is over; it says where that began, and spoils nothing that was saved."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from torch import nn

from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers.stopping import is_first_rank

SKIPPED = 10  # steps in a row that a gradient scaler may skip


@dataclass
class _Step:
    """A step whose loss is being looked at."""

    epoch: int
    iteration: int
    cases: str
    values: torch.Tensor  # the loss and its terms, on the CPU as soon as ``copied`` says so
    names: list[str]
    copied: torch.cuda.Event | None

    def is_finite(self) -> bool:
        return bool(self.values[0].isfinite())

    def words(self) -> str:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.names, self.values.tolist(), strict=True))
        return f"epoch {self.epoch}, iteration {self.iteration} ({terms}; cases: {self.cases})"


class StopOnDivergence:
    """End a training at the first loss that is NaN or infinite, before anything is saved after it.

    On a GPU the loss is copied while the next step runs, so the training never waits for it and ends a step or two
    later. With a gradient scaler (mixed precision) single such losses are no divergence, since the scaler skips those
    steps; ten in a row are. Whatever the loss is, :class:`TrainingState`, :class:`BestModel` and :class:`FinalModel`
    write no weights that are NaN or infinite.

    Of several processes the first one ends the training: gradients are averaged, so all weights are NaN after the
    step. Others write a line into the log, which names their cases.

    Args:
        loss: the loss that the trainer uses; the terms of a compound are told.

    Raises:
        UserError: out of the engine's ``run``: one line with epoch, iteration, terms and cases.
    """

    def __init__(self, loss: Any = None) -> None:
        self.loss = loss
        self._steps: deque[_Step] = deque()
        self._first: _Step | None = None  # of the non-finite losses in a row
        self._in_a_row = 0

    def attach(self, engine: Engine) -> None:
        """Register on a trainer that fires ``IterationEvents``, as MONAI's SupervisedTrainer does."""
        # Before the backward pass: on a CPU no step is taken with such a loss.
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._look)

    def _look(self, engine: Engine) -> None:
        self._steps.append(self._step(engine))
        while self._steps and (self._steps[0].copied is None or self._steps[0].copied.query()):
            step = self._steps.popleft()
            if step.is_finite():
                self._first, self._in_a_row = None, 0
                continue
            self._first, self._in_a_row = self._first or step, self._in_a_row + 1
            scaler = getattr(engine, "scaler", None)
            if self._in_a_row >= (SKIPPED if scaler is not None and scaler.is_enabled() else 1):
                self._stop()

    def _stop(self) -> None:
        step, since = self._first, self._in_a_row
        if step is None:
            return
        line = f"the loss is not finite since {step.words()}"
        if not is_first_rank():
            if since == 1 or since == SKIPPED:
                logging.getLogger(__name__).warning(f"rank {torch.distributed.get_rank()}: {line}")
            return
        raise UserError(
            f"training: {line}. What was saved before is whole. Train anew with a smaller --optimizer#lr, or look at "
            "those cases."
        )

    def _step(self, engine: Engine) -> _Step:
        output: Any = engine.state.output
        named = {"loss": output["loss"], **last_terms(self.loss)}
        values = torch.stack([value.detach().float().mean() for value in named.values()])
        copied = None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return _Step(engine.state.epoch, engine.state.iteration, batch_cases(engine), values, list(named), copied)


def last_terms(loss: Any) -> dict[str, torch.Tensor]:
    """Return the terms that a compound loss had in its last step, or one inside another loss; empty for any other."""
    modules: list[Any] = list(loss.modules()) if isinstance(loss, nn.Module) else [loss]
    return next((dict(module.last_terms) for module in modules if hasattr(module, "last_terms")), {})


def batch_cases(engine: Engine) -> str:
    """Return the file names of the cases in the engine's batch, each once."""
    batch: Any = engine.state.batch
    images = batch.get("image") if isinstance(batch, Mapping) else None
    files = images.meta.get("filename_or_obj") if isinstance(images, MetaTensor) else None
    names = [os.path.basename(str(file)) for file in ([files] if isinstance(files, str) else files or [])]
    return ", ".join(dict.fromkeys(names)) or "not known"
