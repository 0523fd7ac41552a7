# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of a training: what the optimizer trains, and what its options are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(network: nn.Module, loss: nn.Module, loss_lr: float) -> list[dict[str, Any]]:
    """Return what the optimizer trains: the network, and the weights that the loss learns, if any, without decay."""
    learned = {"params": list(loss.parameters()), "lr": loss_lr, "weight_decay": 0.0}
    return [{"params": list(network.parameters())}, learned]


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's class and options, a value per group: what its saved state would overrule.

    The learning rate is the one that was asked for, not the one that a warm-up begins with.
    """
    settings: dict[str, Any] = {"class": type(optimizer).__name__}
    for name in optimizer.defaults:
        source = "initial_lr" if name == "lr" else name
        values = [group.get(source, group.get(name)) for group in optimizer.param_groups]
        settings[name] = [float(value) if torch.is_tensor(value) else value for value in values]
    return settings
