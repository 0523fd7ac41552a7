# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The loss, its terms and weights and the learning rate, once an epoch."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from monai_losses_ext.handlers._engine import is_last_iteration, metric_name


class LossTracker:
    """Put the epoch's mean loss, its terms and weights and the learning rate into ``trainer.state.metrics``.

    Keys: ``loss``; ``loss_<term>`` and ``weight_<term>`` for each term of a compound loss; ``lr``, and ``lr_1``,
    ``lr_2``, ... for further parameter groups. MONAI's MLflow, TensorBoard and stats handlers log them at the epoch
    that they belong to, wherever this handler stands in the list: they are written in the epoch's last iteration, and
    the handlers read at its end. (A value written at the end itself, after a handler has read, is logged one epoch
    late.) ``lr`` is the rate that the epoch's last step was taken with, whether a scheduler moves it after that or not.

    Means are weighted by batch size. Nothing is copied from the device before the epoch's end.

    MONAI's MLFlowHandler logs the loss and ``lr_group_<i>`` of each iteration too, unless it is given
    ``iteration_log=False``; the names differ, so nothing is overwritten.

    Args:
        loss: the loss that the trainer uses. If it has ``last_terms`` (name -> tensor) its terms are tracked, if it has
            ``get_weights()`` (name -> float) its weights; any other loss is tracked as a whole.
        optimizer: the optimizer that the trainer uses.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.LossTracker", "loss": "@loss", "optimizer": "@optimizer"}``
    """

    def __init__(self, loss: Any, optimizer: torch.optim.Optimizer) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self._batch_sizes: list[int] = []
        self._values: dict[str, list[torch.Tensor]] = {}

    def attach(self, engine: Engine) -> None:
        """Register on a trainer that fires ``IterationEvents.LOSS_COMPLETED``, as MONAI's SupervisedTrainer does."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        # In LOSS_COMPLETED the batch is whole and no scheduler has moved the rate yet.
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._collect)
        # Only for an epoch whose length was not known beforehand, or that was cut short.
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _start(self, engine: Engine) -> None:
        self._batch_sizes, self._values = [], {}

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self._batch_sizes.append(len(output["image"]))
        terms = getattr(self.loss, "last_terms", {})
        for name, value in {"loss": output["loss"], **{f"loss_{metric_name(k)}": v for k, v in terms.items()}}.items():
            self._values.setdefault(name, []).append(value.detach())
        if is_last_iteration(engine):
            self._write(engine)

    def _write(self, engine: Engine) -> None:
        if not self._batch_sizes:
            return
        sizes = torch.tensor(self._batch_sizes, dtype=torch.float64)
        table = torch.stack([torch.stack(values) for values in self._values.values()]).cpu().double()
        means = (table @ (sizes / sizes.sum())).tolist()
        metrics = dict(zip(self._values, means, strict=True))
        weights = self.loss.get_weights() if hasattr(self.loss, "get_weights") else {}
        metrics.update({f"weight_{metric_name(name)}": float(weight) for name, weight in weights.items()})
        for i, group in enumerate(self.optimizer.param_groups):
            metrics[f"lr_{i}" if i else "lr"] = float(group["lr"])
        engine.state.metrics.update(metrics)
        self._batch_sizes, self._values = [], {}
