# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a reader needs to judge a measurement: the machine, the versions, the commit and the command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def about_run(device: str, threads: int, seed: int) -> dict[str, Any]:
    """Describe this process's run of the benchmark; called before it measures, so that the load is that of others.

    Args:
        device: ``cuda`` or ``cpu``.
        threads: of torch.
        seed: of the batches.
    """
    head = subprocess.run(["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True)  # noqa: S607
    models = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": head.stdout.strip(),
        "command": "python -m monai_losses_ext.benchmark " + " ".join(map(_without_folder, sys.argv[1:])),
        "device": "cpu",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "scheduling": _scheduling(),
        "seed": seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "huge_pages_for_tensors": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "monai", "numpy")},
    }
    if device == "cuda":
        about |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": version("triton")}
    return about


def _scheduling() -> str:
    """Return how the system shares the cores between this process and others, where it tells.

    ``SCHED_OTHER`` is the usual way; a policy of real time has a priority, such as ``SCHED_RR, priority 10``.
    """
    if not hasattr(os, "sched_getscheduler"):  # Linux has it, macOS does not
        return "scheduling unknown"
    policy, priority = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK, os.sched_getparam(0).sched_priority
    names = {getattr(os, name): name for name in dir(os) if name.startswith("SCHED_")}
    return names.get(policy, str(policy)) + (f", priority {priority}" if priority else "")


def _without_folder(argument: str) -> str:
    """Return an argument of the command line with the folders of this machine left out."""
    return f"DIR/{Path(argument).name}" if Path(argument).is_absolute() else argument


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
