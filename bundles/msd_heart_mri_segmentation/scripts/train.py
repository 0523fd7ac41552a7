# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Parts of a training: what the optimizer trains, and what has to be the same when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

OF_THE_MOMENT = ("last_epoch", "base_lrs", "verbose", "_step_count", "_last_lr", "_is_initial")  # no options


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


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return a new learning rate scheduler's class and options, which its saved state would overrule.

    Args:
        scheduler: as PyTorch's: its ``state_dict()`` tells its options. It has taken no step yet.
    """
    return {"class": type(scheduler).__name__, **_options(scheduler.state_dict())}


def data_fingerprint(dataset_dir: str) -> str:
    """Return what tells one data set from another, whatever its folder is called: of dataset.json and files' sizes."""
    from monai_losses_ext.data.dataset import dataset_fingerprint  # inference needs MONAI alone

    return dataset_fingerprint(dataset_dir).get("dataset_fingerprint", "")


def _options(value: Any) -> Any:
    """Return a scheduler's state as plain numbers and texts, without what changes from step to step."""
    if isinstance(value, Mapping):
        return {str(name): _options(item) for name, item in value.items() if name not in OF_THE_MOMENT}
    if isinstance(value, (list, tuple)):
        return [_options(item) for item in value]
    if torch.is_tensor(value):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
