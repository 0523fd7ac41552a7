# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A training in several processes, as ``torchrun`` starts them: its beginning and end, and means over its ranks.

Only torch is needed here, since the losses use it.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monai_losses_ext.errors import UserError, fail

# Other ranks wait while the first one draws pictures and writes files.
TIMEOUT = datetime.timedelta(hours=2)


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU where there is none.

    Raises:
        UserError: outside of ``torchrun``, and for more processes than GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "a multi_gpu config is for several processes; start it with torchrun --nproc_per_node=N -m monai.bundle "
            "run, instead of python -m monai.bundle run."
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= count:
        raise fail("nproc_per_node", f"must be at most the number of GPUs, {count}", rank + 1)
    return torch.device("cuda", rank)


def start(device: torch.device | str) -> None:
    """Join the other processes: NCCL between GPUs, gloo between CPUs."""
    import ignite.distributed as idist  # with the extra for bundles; the losses do without

    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    # Ignite takes note of the group when it is first asked for the rank, and all ranks have to take part in that. Left
    # to itself it may happen in a handler that the first rank alone has, as in MONAI's CheckpointSaver.
    idist.sync()


def finish(release: Callable[[], None]) -> None:
    """Leave the other processes, for a clean exit. In a config's ``finalize``.

    With gloo a process may abort at its exit while a DistributedDataParallel module is alive, so whatever the config
    built is let go before the group is.

    Args:
        release: lets go of it.
    """
    dist.barrier()
    release()
    gc.collect()
    dist.destroy_process_group()


def has_many_ranks() -> bool:
    """Tell whether this is one process of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean over all ranks, which all have to ask for it."""
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # type: ignore[override]
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverRanks.forward(ctx, gradient)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks, which all have to ask for it, and in the backward pass too.

    Each rank's gradient is then that of all ranks' losses together: DistributedDataParallel, which takes the mean,
    makes of it that of one process with the whole batch.
    """
    total: Tensor = _SumOverRanks.apply(values)  # type: ignore[no-untyped-call]
    return total


def average_gradient(weights: Tensor) -> Tensor:
    """Let the gradient that reaches a loss's weights be the mean over all ranks, so that they stay equal there.

    The loss cannot be wrapped in DistributedDataParallel, which refuses one without parameters. The hook is on the
    weights of this step, not on the parameter behind them: a copy of the module would lose that one.
    """
    if weights.requires_grad and has_many_ranks():
        weights.register_hook(mean_over_ranks)
    return weights
