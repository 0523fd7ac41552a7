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
            "error: this config is for several processes; start it with: torchrun --nproc_per_node=N -m monai.bundle "
            "run --config_file \"['.../train.json','.../multi_gpu_train.json']\"."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def start(device: torch.device) -> None:
    """Join the other processes: NCCL between GPUs, gloo between CPUs. In a config's ``initialize``."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    # Ignite takes note of the group when it is first asked for the rank, and all ranks have to take part in that. Left
    # to itself it would happen in CheckpointSaver, which the first rank alone has.
    idist.sync()


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
