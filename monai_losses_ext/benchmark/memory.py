# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Peak memory of forward and backward beyond what stood before, each case in a process of its own (Linux)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from monai_losses_ext.benchmark.alone import run_alone
from monai_losses_ext.benchmark.cases import SHAPES, loss_pairs, make_batch, with_backend


def measure_memory(loss: str, shape: str, seed: int) -> dict[str, Any]:
    """Return the peak extra memory of each side, in copies of the logits; the gradient is one copy.

    ``chunked`` is ours without the kernels of the extra ``fast``.
    """
    row: dict[str, Any] = {"loss": loss, "shape": shape}
    for side in ("ours", "chunked", "baseline"):
        row[f"{side}_copies"] = run_alone("memory", loss, shape, side, seed)
    return row


def peak_copies(loss: str, shape: str, side: str, seed: int) -> float:
    """Run forward and backward once and return the peak extra memory in copies of the logits.

    The kernel's high-water mark of resident memory is set back just before, so that only this step counts.
    """
    pair = loss_pairs()[loss]
    function = pair.baseline if side == "baseline" else with_backend(pair.ours, side)
    small, labels = make_batch((1, SHAPES[shape][1], *[16] * (len(SHAPES[shape]) - 2)), seed)
    function(small, labels).backward()  # libraries load and threads start here, not below
    logits, labels = make_batch(SHAPES[shape], seed)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function(logits, labels).backward()
    return round(1024 * (_status("VmHWM") - before) / (logits.numel() * logits.element_size()), 2)


def _status(field: str) -> int:
    """Return a field of this process's memory status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    print(json.dumps(peak_copies(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
