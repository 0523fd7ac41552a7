# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The beginning and the end of a training with several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import datetime
import gc
import os

import ignite.distributed as idist
import torch
import torch.distributed as dist

from monai_losses_ext.engine import running_workflow

# Other ranks wait while the first one draws pictures and writes files.
TIMEOUT = datetime.timedelta(hours=2)


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU where there is none.

    Raises:
        SystemExit: one line, outside of ``torchrun``.
    """
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            "error: a multi_gpu config is for several processes; start it with torchrun --nproc_per_node=N -m "
            "monai.bundle run, instead of python -m monai.bundle run."
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if rank >= count:
        raise SystemExit(f"error: nproc_per_node: must be at most the number of GPUs, {count}; got {rank + 1} or more.")
    return torch.device("cuda", rank)


def start(device: torch.device | str) -> None:
    """Join the other processes: NCCL between GPUs, gloo between CPUs. In a config's ``initialize``."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    # Ignite takes note of the group when it is first asked for the rank, and all ranks have to take part in that. Left
    # to itself it may happen in a handler that the first rank alone has, as in MONAI's CheckpointSaver.
    idist.sync()


def check_share(num_cases: int, num_processes: int) -> None:
    """Check that there is a held-out case for every process.

    Raises:
        SystemExit: one line, if there is not.
    """
    if num_cases < num_processes:
        rule = f"must hold out a case for each of {num_processes} processes"
        raise SystemExit(f"error: validation_fraction: {rule}; got {num_cases} held-out cases.")


def finish() -> None:
    """Leave the other processes, for a clean exit. In a config's ``finalize``.

    With gloo a process may abort at its exit while a DistributedDataParallel module is alive, so whatever the config
    built is let go before the group is.
    """
    dist.barrier()
    parser = running_workflow().parser
    parser.ref_resolver.resolved_content.clear()
    parser.ref_resolver.items.clear()
    gc.collect()
    dist.destroy_process_group()
