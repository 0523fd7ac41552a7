# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dice + cross-entropy on the cores that users have: free, loaded by other programs, or beside a thread of Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import monai_losses_ext as package
from monai_losses_ext.benchmark.alone import run_alone
from monai_losses_ext.benchmark.cases import SHAPES, loss_pairs, make_batch, with_backend
from monai_losses_ext.benchmark.speed import in_turn, quantiles

OURS, CHUNKED, BOUNDARY = "ours", "ours without fast", "ours, Dice + focal + boundary with a given map"
ALL_MAPS = "ours, Dice + cross-entropy + blob + skeleton recall + boundary with given maps"
BASELINE, CROSS_ENTROPY, FLOOR = "MONAI DiceCELoss", "torch cross_entropy", "a fresh gradient set to zero"
WORDS = {
    "free": "free cores",
    "busy": "two busy loops beside it",
    "python": "a thread that computes in Python beside it",
}
# A patch of the hippocampus beside the shapes of the other suites, and a small volume.
SMALL = "2x3x32x48x32"
CONDITION_SHAPES = {**SHAPES, SMALL: (2, 3, 32, 48, 32), "2x3x64^3": (2, 3, 64, 64, 64)}
# Condition, shape and threads of torch; None: as many as asked for.
CASES = [
    ("free", "2x3x96^3", None), ("free", "2x3x128^3", None), ("free", "2x14x96^3", None),
    ("free", SMALL, 1), ("free", SMALL, None),
    ("busy", "2x3x128^3", None), ("busy", "2x14x96^3", None), ("busy", SMALL, None),
    ("python", "2x3x64^3", None), ("python", "2x3x128^3", None),
]  # fmt: skip


def measure_condition(condition: str, shape: str, threads: int, repeats: int, seed: int) -> dict[str, Any]:
    """Return the times of forward and backward of each side, in a process of its own."""
    row: dict[str, Any] = run_alone("conditions", condition, shape, threads, repeats, seed)
    return row


def _measure(condition: str, shape: str, repeats: int, seed: int) -> dict[str, Any]:
    logits, labels = make_batch(CONDITION_SHAPES[shape], seed)
    distance = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    pair = loss_pairs()["dice_ce"]
    components = [{"type": name} for name in ("dice", "focal", "boundary")]
    boundary = package.get_loss({"type": "compound", "components": components})
    components = [{"type": name} for name in ("dice", "cross_entropy", "blob", "skeleton_recall", "boundary")]
    everything = package.get_loss({"type": "compound", "components": components})
    maps = {"distance": distance, "regions": _regions(labels, logits.shape[1]), "skeleton": labels * (labels % 2)}
    sides: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: pair.ours(logits, labels),
        CHUNKED: partial(with_backend(pair.ours, "chunked"), logits, labels),
        BOUNDARY: lambda: boundary(logits, {"label": labels, "distance": distance}),
        ALL_MAPS: lambda: everything(logits, {"label": labels, **maps}),
        BASELINE: lambda: pair.baseline(logits, labels),
        CROSS_ENTROPY: lambda: torch.nn.functional.cross_entropy(logits, labels[:, 0]),
    }

    def time_once(function: Callable[[], Tensor] | None) -> float:
        logits.grad = None
        start = time.perf_counter()
        if function is None:
            torch.empty_like(logits).zero_()
        else:
            function().backward()
        return 1e3 * (time.perf_counter() - start)

    with _condition(condition):
        times = in_turn(*(partial(time_once, side) for side in (*sides.values(), None)), repeats=repeats)
    return {
        "condition": condition,
        "shape": shape,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "sides": {
            name: {**quantiles(values), "worst": round(max(values), 3)}
            for name, values in zip((*sides, FLOOR), times, strict=True)
        },
    }


def _regions(labels: Tensor, num_classes: int) -> Tensor:
    """Return twenty slabs of each sample as regions, for every class but the background."""
    length = labels.shape[2]
    slabs = 1 + torch.arange(length) * min(20, length) // length
    slabs = slabs.view(-1, *[1] * (labels.ndim - 3)).expand(labels.shape[2:])
    return slabs.expand(labels.shape[0], num_classes - 1, *labels.shape[2:]).to(torch.int32).contiguous()


@contextlib.contextmanager
def _condition(name: str) -> Iterator[None]:
    """Load the cores, and let go of them whatever happens."""
    if name == "busy":
        loops = [subprocess.Popen([sys.executable, "-c", _UNTIL_ORPHANED, str(os.getpid())]) for _ in range(2)]
        try:
            yield
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
        return
    done = threading.Event()
    if name == "python":
        threading.Thread(target=_compute, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


_UNTIL_ORPHANED = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6):
        pass
"""


def _compute(done: threading.Event) -> None:
    """Compute in Python, which holds the interpreter's lock, as a data loader's thread does."""
    while not done.is_set():
        sum(i * i for i in range(1000))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[4]), int(sys.argv[5]))))
