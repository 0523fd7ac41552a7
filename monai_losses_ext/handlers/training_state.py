# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What survives a crash: the state of a training, its best network so far, and its last one."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from monai_losses_ext.errors import UserError, describe, one_of
from monai_losses_ext.handlers._difference import ABSENT, difference
from monai_losses_ext.handlers.state_file import (
    check_readable,
    check_weights_of_training,
    load_state,
    plain,
    save_weights,
    save_whole,
)


class TrainingState:
    """Save after every epoch what a training needs to go on, and go on from there.

    Beside the objects it keeps the trainer's epoch and iteration and, with mixed precision, the gradient scaler, which
    MONAI's trainer makes anew in every ``run()``. It saves once more before the first epoch, so that a training can be
    resumed whenever it is stopped. A crash or a full disk while saving leaves the former file whole, and a network with
    weights that are NaN or infinite is not saved.

    Its place in the list of handlers does not matter for what is saved: it is always the last one to act on the end of
    an epoch. It should stand before the MLflow handler all the same: a file that is refused then stops the training
    before a run is opened.

    With random numbers that depend on nothing but seed and epoch (:class:`EpochSeed`), a training that was killed and
    resumed comes to the same numbers as one that ran through: the epoch that was cut short is trained again.

    Args:
        path: the file.
        objects: name -> what has ``state_dict()`` and ``load_state_dict()``: network, optimizer, scheduler, loss, ...
        values: name -> number or text to keep beside them, such as the name of the run.
        same: name -> what has to be the same in the training that is resumed, such as the number of epochs, on which
            the learning rate's schedule depends. Values may be nested dictionaries and lists.
        resume: whether to go on from the file when the training starts.
        save: whether to write; False on every rank but the first.

    Raises:
        UserError: when the training starts, where the file is of another training, with the first value that differs;
            where a value could be saved but not be read again, since reading a state runs no code from the file;
            when an epoch ends, where weights are not finite or the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        objects: Mapping[str, Any],
        values: Mapping[str, float | str] | None = None,
        same: Mapping[str, Any] | None = None,
        resume: bool = False,
        save: bool = True,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects)
        self.values = plain(values or {})
        self.same = plain(same or {})
        self.resume = resume
        self.save = save

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: Engine) -> None:
        self._is_checked = False
        if self.save and self.resume:  # without a resume, the first save checks
            check_readable(self._state(engine))
        if self.resume:
            self._restore(engine)
        elif self.save:
            self._save(engine)
        if self.save and not engine.has_event_handler(self._save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)  # now, so that it comes after all others

    def _save(self, engine: Engine) -> None:
        state = self._state(engine)
        for name, item in self.objects.items():
            if isinstance(item, nn.Module):
                # Parameters alone: a buffer may say by NaN that it holds nothing yet.
                check_weights_of_training(dict(item.named_parameters()), name)
        if not self._is_checked:
            check_readable(state)
            self._is_checked = engine.state.iteration > 0  # an optimizer has its state from the first step on
        save_whole(state, self.path)

    def _state(self, engine: Engine) -> dict[str, Any]:
        scaler = getattr(engine, "scaler", None)
        return {
            "trainer": {"epoch": engine.state.epoch, "iteration": engine.state.iteration},
            "scaler": None if scaler is None else plain(scaler.state_dict()),
            "objects": {name: plain(item.state_dict()) for name, item in self.objects.items()},
            "values": self.values,
            "same": self.same,
        }

    def _restore(self, engine: Engine) -> None:
        state = load_state(self.path)
        for name, value in self.same.items():
            found = difference(state["same"].get(name, ABSENT), value)
            if found is not None:
                place, theirs, ours = found
                raise UserError(
                    f"resume: {self.path} is of a training with {name}{place} {theirs}; this config has {ours}. Give "
                    "what that training had, or train anew without --resume."
                )
        for name, item in self.objects.items():
            self._restore_object(name, item, state["objects"])
        engine.state.epoch, engine.state.iteration = state["trainer"]["epoch"], state["trainer"]["iteration"]
        if engine.state.max_epochs is not None and engine.state.epoch >= engine.state.max_epochs:
            logging.getLogger(__name__).info(
                f"resume: all {engine.state.max_epochs} epochs are trained already: there is nothing to do"
            )
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _restore_object(self, name: str, item: Any, states: Mapping[str, Any]) -> None:
        try:
            item.load_state_dict(states[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"resume: {self.path} is of another training: its {name} does not fit this config "
                f"({describe(str(error))})."
            ) from None


class BestModel:
    """Save the network's weights, as a bare ``state_dict``, whenever the validation is better than ever before.

    MONAI's CheckpointSaver does the same, but a crash while it writes destroys the former file, and it keeps the best
    value only inside the model's file, if at all. A resumed training that does not know the best value would overwrite
    the best weights with worse ones.

    Args:
        path: the file.
        network: whose weights.
        metric: the evaluator's metric; higher is better.
        save: whether to write; False on every rank but the first.

    Attributes:
        best: the highest value so far; minus infinity before the first.

    Raises:
        UserError: when a validation ends, where the evaluator has no such metric, weights are NaN or infinite, or the
            disk is full.
    """

    def __init__(
        self, path: str | os.PathLike[str], network: nn.Module, metric: str = "mean_dice", save: bool = True
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.metric = metric
        self.save = save
        self.best = -math.inf

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        value = float(engine.state.metrics[one_of("BestModel: metric", self.metric, engine.state.metrics)])
        if value > self.best:
            if self.save:
                save_weights(self.network, self.path)
            self.best = value

    def state_dict(self) -> dict[str, float]:
        """Return the highest value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a highest value."""
        self.best = float(state["best"])


class FinalModel:
    """Save the network's weights, as a bare ``state_dict``, when the training is completed.

    MONAI's CheckpointSaver would also do so when the training fails, even at its very start, and overwrite the weights
    of a former training.

    Args:
        path: the file.
        network: whose weights.

    Raises:
        UserError: where weights are NaN or infinite, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        save_weights(self.network, self.path)
