# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What survives a crash: the state of a training, and its best network so far."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_losses_ext.errors import describe, fail


class TrainingState:
    """Save after every epoch what a training needs to go on, and go on from there.

    Beside the objects it keeps the trainer's epoch and iteration and, with mixed precision, the gradient scaler, which
    MONAI's trainer makes anew in every ``run()``. Wherever it stands in the list, an epoch is saved when the other
    handlers have written theirs. List it before MONAI's MLFlowHandler all the same: a file that is refused then stops
    the training before a run is opened. A crash while saving leaves the former file whole.

    With random numbers that depend on nothing but seed and epoch (:class:`EpochSeed`), a training that was killed and
    resumed comes to the same numbers as one that ran through: the epoch that was cut short is trained again.

    Args:
        path: the file.
        objects: name -> what has ``state_dict()`` and ``load_state_dict()``: network, optimizer, scheduler, loss, ...
        values: name -> number or text to keep beside them, such as the name of the run; see :func:`saved_value`.
        same: name -> what has to be the same in the training that is resumed, such as the number of epochs, on which
            the learning rate's schedule depends.
        resume: whether to go on from the file when the training starts.
        save: whether to write; False on every rank but the first.

    Raises:
        SystemExit: one line, when the training starts, where the file is of another training, or where a value could
            be saved but not be read again: :func:`load_state` takes no code from a file.
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
        self.values = _plain(values or {})
        self.same = _plain(same or {})
        self.resume = resume
        self.save = save

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: Engine) -> None:
        self._is_checked = False
        if self.save:
            check_readable(self._state(engine))
        if self.resume:
            self._restore(engine)
        if self.save and not engine.has_event_handler(self._save, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)  # now, so that it comes after all others

    def _save(self, engine: Engine) -> None:
        state = self._state(engine)
        if not self._is_checked:  # once more, as an optimizer has its state from the first step on
            check_readable(state)
            self._is_checked = True
        save_whole(state, self.path)

    def _state(self, engine: Engine) -> dict[str, Any]:
        scaler = getattr(engine, "scaler", None)
        return {
            "trainer": {"epoch": engine.state.epoch, "iteration": engine.state.iteration},
            "scaler": None if scaler is None else _plain(scaler.state_dict()),
            "objects": {name: _plain(item.state_dict()) for name, item in self.objects.items()},
            "values": self.values,
            "same": self.same,
        }

    def _restore(self, engine: Engine) -> None:
        state = load_state(self.path)
        for name, value in self.same.items():
            if state["same"].get(name) != value:
                theirs, ours = describe(state["same"].get(name)), describe(value)
                raise SystemExit(
                    f"error: resume: {self.path} is of a training with {name} {theirs}; this config has {ours}."
                )
        for name, item in self.objects.items():
            self._restore_object(name, item, state["objects"])
        engine.state.epoch, engine.state.iteration = state["trainer"]["epoch"], state["trainer"]["iteration"]
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _restore_object(self, name: str, item: Any, states: Mapping[str, Any]) -> None:
        try:
            item.load_state_dict(states[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise SystemExit(
                f"error: resume: {self.path} is of another training: its {name} does not fit this config "
                f"({describe(str(error))})."
            ) from None


class BestModel:
    """Save the network's weights, as a bare ``state_dict``, whenever the validation is better than ever before.

    MONAI's CheckpointSaver does the same, but a crash while it writes destroys the former file, and it can keep its
    memory of the best value only inside the model's file: without, a resumed training would overwrite the best weights
    with worse ones.

    Args:
        path: the file.
        network: whose weights.
        metric: the evaluator's metric; higher is better.
        save: whether to write; False on every rank but the first.

    Attributes:
        best: the highest value so far.
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
        value = float(engine.state.metrics[self.metric])
        if value > self.best:
            self.best = value
            if self.save:
                save_whole(self.network.state_dict(), self.path)

    def state_dict(self) -> dict[str, float]:
        """Return the highest value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a highest value."""
        self.best = float(state["best"])


class FinalModel:
    """Save the network's weights, as a bare ``state_dict``, when the training is completed.

    MONAI's CheckpointSaver would also do so when the training fails, at its very start for instance, and write over the
    weights of a former one.

    Args:
        path: the file.
        network: whose weights.
    """

    def __init__(self, path: str | os.PathLike[str], network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        save_whole(self.network.state_dict(), self.path)


def check_readable(state: Mapping[str, Any]) -> None:
    """Check that :func:`load_state` will be able to read what is about to be saved.

    Raises:
        SystemExit: one line with the first entry that it could not.
    """
    for part in ("objects", "values", "same"):
        for name, value in state[part].items():
            buffer = io.BytesIO()
            try:
                torch.save(value, buffer)
                torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
            except Exception:
                rule = "must consist of tensors, numbers and texts, so that the training can be resumed"
                raise SystemExit(f"error: TrainingState: {fail(f'{part}: {name}', rule, value)}") from None


def save_whole(content: Any, path: Path) -> None:
    """Write a file with ``torch.save`` so that a crash or a full disk leaves the former one as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :class:`TrainingState` wrote.

    Raises:
        SystemExit: one line, if there is no such file or it is no such state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"error: resume: there is no training to resume at {path}. Train without --resume.") from None
    except Exception as error:
        raise SystemExit(f"error: resume: {path} cannot be read ({describe(str(error))}).") from None
    if not isinstance(state, dict) or set(state) != {"trainer", "scaler", "objects", "values", "same"}:
        raise SystemExit(f"error: resume: {path} holds no state of a training.")
    return state


def saved_value(path: str | os.PathLike[str], name: str) -> Any:
    """Return one of the values that :class:`TrainingState` kept in its file."""
    return load_state(path)["values"][name]


def _plain(state: Any) -> Any:
    """Return a state with Python's own types, as ``torch.load(weights_only=True)`` refuses most others."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_plain, state)) if type(state) in (list, tuple) else [*map(_plain, state)]
    return state
