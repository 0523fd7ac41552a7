# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The loss, its terms and weights and the learning rate, once an epoch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import nn

from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers._engine import is_last_iteration
from monai_losses_ext.handlers.divergence import last_terms
from monai_losses_ext.metrics import metric_name


class LossTracker:
    """Put the epoch's mean loss, its terms and weights and the learning rate into ``trainer.state.metrics``.

    Keys: ``loss``; ``loss_<term>`` and ``weight_<term>`` for each term of a compound loss; ``lr``, and ``lr_1``,
    ``lr_2``, ... for further parameter groups. MONAI's MLflow, TensorBoard and stats handlers log them at the epoch
    that they belong to, wherever this handler stands in the list: they are written in the epoch's last iteration, and
    the handlers read at its end. (A value written at the end itself, after a handler has read, is logged one epoch
    late.) ``lr`` is the rate that the epoch's last step was taken with, whether a scheduler moves it after that or not.

    Means are weighted by batch size. Nothing is copied from the device before the epoch's end.

    At the epoch's end it also tells a compound loss the means, of which the weighting ``dwa`` makes the next weights.

    When the training starts it checks that the optimizer trains what the loss has to learn.

    MONAI's MLFlowHandler logs each iteration too if it is given ``iteration_log=True``; with
    ``output_transform="$@loss_tracker.of_iteration"`` the terms and weights, under names that start with
    ``iteration_``, so that an epoch's values are not mixed with an iteration's; the weights are those after its step.

    Args:
        loss: the loss that the trainer uses. If it, or a module in it, has ``last_terms`` (name -> tensor), as a
            compound loss has, its terms are tracked, and its weights if it has ``get_weights()`` (name -> float); any
            other loss is tracked as a whole.
        optimizer: the optimizer that the trainer uses.
        across_ranks: average the terms over all processes of a distributed training. All of them must have this
            handler then. Without, each tracks what it saw itself.

    Raises:
        UserError: when the training starts, if the loss has weights to learn and the optimizer lacks them.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.LossTracker", "loss": "@loss", "optimizer": "@optimizer"}``
    """

    def __init__(self, loss: Any, optimizer: torch.optim.Optimizer, across_ranks: bool = False) -> None:
        self.loss = loss
        self.optimizer = optimizer
        self.across_ranks = across_ranks
        self._batch_sizes: list[int] = []
        self._values: dict[str, list[torch.Tensor]] = {}
        self._epoch_means: dict[str, float] = {}

    def attach(self, engine: Engine, name: str | None = None) -> None:
        """Register on a trainer, also as its ``key_train_metric`` by the ``name`` of a key above.

        The trainer fires ``IterationEvents.LOSS_COMPLETED``, as MONAI's SupervisedTrainer does.
        """
        engine.add_event_handler(Events.STARTED, self._check_optimizer)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        # In LOSS_COMPLETED the batch is whole and no scheduler has moved the rate yet.
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def of_iteration(self, output: Any) -> dict[str, float]:
        """Return the loss of the last iteration, its terms and weights: an ``output_transform`` for MLFlowHandler."""
        first = output[0] if isinstance(output, list) else output
        terms = last_terms(self.loss)
        values = {"loss": first["loss"], **{f"loss_{metric_name(name)}": term.mean() for name, term in terms.items()}}
        return {f"iteration_{name}": float(value) for name, value in {**values, **self._weights()}.items()}

    def _check_optimizer(self, engine: Engine) -> None:
        wanted = [p for p in self.loss.parameters() if p.requires_grad] if isinstance(self.loss, nn.Module) else []
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if any(id(p) not in held for p in wanted):
            raise UserError(
                "optimizer: must train the weights that the loss learns; it lacks them. In the config: "
                '"optimizer#params": "$[{\'params\': list(@network.parameters())}, '
                "{'params': list(@loss.parameters()), 'lr': 0.01, 'weight_decay': 0.0}]\"."
            )

    def _start(self, engine: Engine) -> None:
        self._batch_sizes, self._values = [], {}

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self._batch_sizes.append(len(output["image"]))
        for name, value in {"loss": output["loss"], **last_terms(self.loss)}.items():
            self._values.setdefault(name, []).append(value.detach().mean())  # as the trainer does
        if is_last_iteration(engine):
            self._write(engine)

    def _write(self, engine: Engine) -> None:
        if not self._batch_sizes:
            return
        means = dict(zip(self._values, self._means(), strict=True))
        metrics = {"loss": means.pop("loss")} | {f"loss_{metric_name(name)}": mean for name, mean in means.items()}
        metrics.update(self._weights())
        for i, group in enumerate(group for group in self.optimizer.param_groups if group["params"]):
            metrics[f"lr_{i}" if i else "lr"] = float(group["lr"])
        engine.state.metrics.update(metrics)
        self._epoch_means = means
        self._batch_sizes, self._values = [], {}

    def _end(self, engine: Engine) -> None:
        self._write(engine)  # only for an epoch whose length was not known beforehand, or that was cut short
        if self._epoch_means and hasattr(self._compound(), "end_epoch"):
            self._compound().end_epoch(self._epoch_means)  # not before the last backward pass: it changes the weights
        self._epoch_means = {}

    def _means(self) -> list[float]:
        """Return the epoch's mean of each value, over all ranks where that is wanted."""
        sizes = torch.tensor(self._batch_sizes, dtype=torch.float64)
        table = torch.stack([torch.stack(values) for values in self._values.values()])
        sums = torch.cat([table.cpu().double() @ sizes, sizes.sum().reshape(1)])  # Apple's GPUs have no float64
        if self.across_ranks and dist.is_available() and dist.is_initialized():
            sums = sums.to(table.device)  # NCCL takes nothing from the CPU
            dist.all_reduce(sums)
        means: list[float] = (sums[:-1] / sums[-1]).tolist()
        return means

    def _weights(self) -> dict[str, float]:
        compound = self._compound()
        weights = compound.get_weights() if hasattr(compound, "get_weights") else {}
        return {f"weight_{metric_name(name)}": float(weight) for name, weight in weights.items()}

    def _compound(self) -> Any:
        """Return the loss, or what in it has terms, as inside of deep supervision."""
        modules = self.loss.modules() if isinstance(self.loss, nn.Module) else []
        return next((module for module in modules if hasattr(module, "last_terms")), self.loss)
