# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What keeps the weights of a loss equal in every process of a training."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def average_gradient(weights: Tensor) -> Tensor:
    """Let the gradient that reaches the weights be the mean over all ranks, so that they stay equal there.

    The loss cannot be wrapped in DistributedDataParallel, which refuses one without parameters. The hook is on the
    weights of this step, not on the parameter behind them: a copy of the module would lose that one.
    """
    if weights.requires_grad and has_many_ranks():
        weights.register_hook(mean_over_ranks)
    return weights


def has_many_ranks() -> bool:
    """Tell whether this is one process of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean over all ranks, which all have to ask for it."""
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
