# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Files of weights and of a training's state, which are whole whatever happens while they are written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from monai_losses_ext.errors import UserError, describe, fail
from monai_losses_ext.handlers.stopping import disk_full
from monai_losses_ext.weights import check_finite


def check_readable(state: Mapping[str, Any]) -> None:
    """Check that :func:`load_state` will be able to read what is about to be saved.

    Raises:
        UserError: with the first entry that it could not.
    """
    for part in ("objects", "values", "same"):
        for name, value in state[part].items():
            buffer = io.BytesIO()
            try:
                torch.save(value, buffer)
                torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu", weights_only=True)
            except Exception:
                rule = "must consist of tensors, numbers and texts, so that the training can be resumed"
                raise fail(f"TrainingState: {part}: {name}", rule, value) from None


def check_weights_of_training(state: Mapping[str, Any], name: str) -> None:
    """Check that the weights of what is trained can be saved: see :func:`monai_losses_ext.weights.check_finite`."""
    hint = " The training has diverged; what was saved before is whole. Train anew with a smaller --optimizer#lr."
    check_finite(state, f"training: the weights of the {name}", hint)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's bare ``state_dict``; see :func:`save_whole`.

    Raises:
        UserError: for weights that are NaN or infinite, and where the disk is full.
    """
    state = network.state_dict()
    check_weights_of_training(state, "network")
    save_whole(state, path)


def save_whole(content: Any, path: Path) -> None:
    """Write a file with ``torch.save`` so that a crash or a full disk leaves the former one as it was.

    Raises:
        UserError: where it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # torch.save turns the error of a write into a RuntimeError of its own.
        causes = (error, error.__cause__, error.__context__)
        reason = next((cause for cause in causes if isinstance(cause, OSError)), None)
        if reason is None:
            raise
        raise disk_full(reason, path) from None


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :class:`TrainingState` wrote.

    Raises:
        UserError: if there is no such file or it is no such state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"resume: there is no training to resume at {path}. Train without --resume.") from None
    except Exception as error:
        raise UserError(f"resume: {path} cannot be read ({describe(str(error))}).") from None
    if not isinstance(state, dict) or set(state) != {"trainer", "scaler", "objects", "values", "same"}:
        raise UserError(f"resume: {path} holds no state of a training.")
    return state


def plain(state: Any) -> Any:
    """Return a state with Python's own types, as ``torch.load(weights_only=True)`` refuses most others."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, Mapping):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(plain, state)) if type(state) in (list, tuple) else [*map(plain, state)]
    return state
