# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Time forward and backward, ours and the baseline in turn within one process, after checking that they agree."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from monai_losses_ext.benchmark.alone import run_alone
from monai_losses_ext.benchmark.cases import SHAPES, LossFunction, Pair, loss_pairs, make_batch

WARM_UP_SECONDS = 3
PARITY = 1e-5  # largest allowed relative difference of values and of gradients (norm), float32


def measure_speed_alone(loss: str, shape: str, repeats: int, seed: int, threads: int) -> dict[str, Any]:
    """Return :func:`measure_speed` of a fresh process."""
    row: dict[str, Any] = run_alone("speed", loss, shape, repeats, seed, threads)
    return row


def measure_speed(loss: str, shape: str, repeats: int, seed: int) -> dict[str, Any]:
    """Return the times of one case in milliseconds, and the ratios to the baseline, round by round.

    The baseline is measured as it is and, where the machine has a compiler, compiled.

    Args:
        loss: a key of :func:`cases.loss_pairs`.
        shape: a key of :data:`cases.SHAPES`.
        repeats: counted rounds, at least 2.
        seed: of the batch.
    """
    pair = loss_pairs()[loss]
    logits, labels = make_batch(SHAPES[shape], seed)
    check_parity(pair, logits, labels)

    def time_once(function: LossFunction) -> tuple[float, float]:
        return _forward_and_backward(function, logits, labels)

    row: dict[str, Any] = {"loss": loss, "shape": shape, "baseline": pair.baseline_name, "repeats": repeats}
    others = {"": pair.baseline}
    if loss != "floor":
        others["compiled_"] = torch.compile(pair.baseline)
        try:
            check_parity(Pair(pair.ours, others["compiled_"], f"{pair.baseline_name}, compiled"), logits, labels)
        except TorchDynamoException as error:
            row["not_compiled"] = first_line(error)
            del others["compiled_"]
    ours, *times = in_turn(
        *(partial(time_once, function) for function in (pair.ours, *others.values())), repeats=repeats
    )
    row["ours_ms"] = _summary(ours)
    for name, theirs in zip(others, times, strict=True):
        row[f"{name or 'baseline_'}ms"] = _summary(theirs)
        row[f"{name}ratio"] = quantiles([sum(a) / sum(b) for a, b in zip(ours, theirs, strict=True)])
    return row


Times = TypeVar("Times")


def in_turn(*sides: Callable[[], Times], repeats: int) -> list[list[Times]]:
    """Call the sides in turn, in one process, and return what each measured.

    Rounds of the first seconds are not counted: fresh memory is slow until the system has handed it around once.
    """
    for side in sides:
        side()  # may compile
    warm = time.perf_counter() + WARM_UP_SECONDS
    while all(side() for side in sides) and time.perf_counter() < warm:
        pass
    rounds = [[side() for side in sides] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def check_parity(pair: Pair, logits: Tensor, labels: Tensor) -> None:
    """Stop where ours and the baseline disagree, in value or gradient: their times could not be compared."""
    results = []
    for function in (pair.ours, pair.baseline):
        value = function(logits, labels)
        (gradient,) = torch.autograd.grad(value, logits)
        results.append((value.item(), gradient))
    (mine, gradient), (expected, expected_gradient) = results
    off = max(abs(mine / expected - 1), ((gradient - expected_gradient).norm() / expected_gradient.norm()).item())
    if not off < PARITY:
        raise RuntimeError(
            f"speed: ours and {pair.baseline_name} must agree before they are timed; they differ by {off:.1e}."
        )


def _forward_and_backward(function: LossFunction, logits: Tensor, labels: Tensor) -> tuple[float, float]:
    logits.grad = None
    start = time.perf_counter()
    value = function(logits, labels)
    middle = time.perf_counter()
    value.backward()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _summary(times: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    forward, backward = zip(*times, strict=True)
    both = [sum(pair) for pair in times]
    return {"forward": quantiles(forward), "backward": quantiles(backward), "both": quantiles(both)}


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median of the values, at least two, and what a fifth of them is below and above."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": round(cuts[1], 3), "median": round(statistics.median(values), 3), "p80": round(cuts[7], 3)}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure_speed(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
