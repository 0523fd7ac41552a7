# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a compound loss that change with the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from ignite.engine import Engine, Events

from monai_losses_ext.errors import UserError, fail
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.schedules import get_schedules, weights_at


class WeightSchedule:
    """Set weights of a compound loss at the start of every epoch, as functions of the epoch.

    The values depend on nothing but the epoch's number, so a resumed training goes on with the right ones.
    :class:`LossTracker` puts them into the metrics, as ``weight_<name>``.

    In a training with several processes every one of them needs this handler, or each would train with weights of its
    own. Configs that cut handlers off the end of the list on all processes but the first, as many of the model zoo's
    do, need it at the beginning of the list.

    Args:
        loss: the trainer's loss, a compound with fixed weights.
        schedules: one or a list of what :func:`monai_losses_ext.schedules.get_schedule` takes.

    Raises:
        UserError: for a loss that is no compound or whose weights are not fixed, or a schedule of a component that it
            does not have; in the first step, in a process of several whose trainer does not have this handler.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.WeightSchedule", "loss": "@loss", "schedules":
        {"type": "rebalance", "component": "boundary", "regions": ["dice", "focal"]}}``
    """

    def __init__(self, loss: Any, schedules: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        if not isinstance(loss, CompoundLoss):
            raise fail("WeightSchedule: loss", "must be a compound loss", type(loss).__name__)
        self.loss = loss
        self.schedules = get_schedules(schedules)
        loss.set_weights(weights_at(self.schedules, 1))  # a misspelt component ends it here, not in the training
        self._guard = loss.register_forward_pre_hook(_refuse_to_be_left_out)

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        self._guard.remove()
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weights of the engine's epoch."""
        self.loss.set_weights(weights_at(self.schedules, engine.state.epoch))


def _refuse_to_be_left_out(loss: Any, inputs: Any) -> None:
    """End a training with several processes in one whose trainer did not get the schedule."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"WeightSchedule: must be among the train_handlers of every process, but is not on rank {dist.get_rank()}. "
            "Put it first in train#handlers: configs of several processes cut the list off at its end."
        )
