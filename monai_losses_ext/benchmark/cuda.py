# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory on a GPU, against MONAI as it is, MONAI compiled, and what the memory's bandwidth allows.

Everything but the memory's peak and its limit works on a CPU as well, which is how it is tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import monai_losses_ext as ours
from monai_losses_ext.benchmark.cases import PARITY_SIDE, SHAPES, Pair, loss_pairs, make_batch, their_maps
from monai_losses_ext.benchmark.speed import check_parity, first_line, quantiles
from monai_losses_ext.distance import signed_distance

CUDA_LOSSES = ("dice", "tversky", "cross_entropy", "focal", "dice_ce", "dice_focal", "dice_focal_boundary")
WARM_UP = 3  # rounds; the first compiles
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
HEAD_START_CYCLES = 10_000_000  # of the GPU, some 5 ms

Step = Callable[[], Tensor]


def measure_bandwidth(device: str) -> float:
    """Return how fast memory is copied, in bytes a second, read and written bytes counted."""
    source = torch.zeros(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    times = [_seconds(device, lambda: copy.copy_(source)) for _ in range(WARM_UP + 10)][WARM_UP:]
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def measure_case(loss: str, shape: str, repeats: int, seed: int, device: str, bandwidth: float) -> dict[str, Any]:
    """Return forward and backward of one case: milliseconds and peak extra memory of each side, and the floor.

    Args:
        loss: one of :data:`CUDA_LOSSES`.
        shape: a key of :data:`cases.SHAPES`.
        repeats: counted rounds.
        seed: of the batch.
        device: ``cuda`` or ``cpu``.
        bandwidth: bytes a second.
    """
    has_map = loss == "dice_focal_boundary"
    pair = _with_boundary() if has_map else loss_pairs()[loss]
    if not has_map:
        small = (*SHAPES[shape][:2], *[PARITY_SIDE] * (len(SHAPES[shape]) - 2))
        check_parity(pair, *_batch(small, seed, device))
    logits, labels = _batch(SHAPES[shape], seed, device)
    phi = signed_distance(labels, logits.shape[1], 1.0) if has_map else None
    target = labels if phi is None else {"label": labels, "distance": phi}
    sides: dict[str, Callable[..., Tensor]] = {"ours": pair.ours, pair.baseline_name: pair.baseline}
    if not has_map:
        sides[f"{pair.baseline_name}, compiled"] = torch.compile(pair.baseline)
    # Read in forward and in backward, and the gradient written once; a map is read twice as well.
    moved = 3 * _bytes(logits) + 2 * _bytes(labels) + (0 if phi is None else 2 * _bytes(phi))
    row: dict[str, Any] = {"loss": loss, "shape": shape, "repeats": repeats, "floor_ms": 1e3 * moved / bandwidth}
    row["sides"] = {name: _measure_side(function, logits, target, repeats) for name, function in sides.items()}
    return row


def measure_budget(loss: str, shape: str, gib: float | None, seed: int, device: str) -> dict[str, Any]:
    """Return what one forward and backward needs of ours and of the baseline, and which of them a small memory holds.

    Args:
        loss: a loss with a baseline of :data:`CUDA_LOSSES`.
        shape: a key of :data:`cases.SHAPES`.
        gib: the GPU's memory that may be used; None is the logits and twice their size besides.
        seed: of the batch.
        device: ``cuda``, or ``cpu``, where nothing is measured and all fits.
    """
    pair = loss_pairs()[loss]
    logits, labels = _batch(SHAPES[shape], seed, device)
    budget = int(3 * _bytes(logits) + _bytes(labels) if gib is None else gib * 2**30)
    row: dict[str, Any] = {"loss": loss, "shape": shape, "logits_gib": _bytes(logits) / 2**30, "gib": budget / 2**30}
    sides = {"ours": pair.ours, pair.baseline_name: pair.baseline}
    row["sides"] = {name: {"copies": None} for name in sides}
    for name, function in sides.items():
        row["sides"][name] |= _measure_side(function, logits, labels, 2)
    _limit(device, budget)
    for name, function in sides.items():
        row["sides"][name]["fits"] = "error" not in _measure_side(function, logits, labels, 2)
    _limit(device, None)
    return row


def _limit(device: str, budget: int | None) -> None:
    """Let this process use no more than ``budget`` bytes of the GPU's memory, None: all."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if budget is None else min(1.0, budget / total))


def measure_maps(shape: str, repeats: int, seed: int, device: str) -> dict[str, Any]:
    """Return the time of the foreground's signed maps, on the device and as MONAI makes them, in milliseconds."""
    labels = _batch(SHAPES[shape], seed, device)[1]
    num_classes = SHAPES[shape][1]
    masks = torch.cat([labels == c for c in range(1, num_classes)], 1).float()
    theirs = their_maps()

    def make() -> Tensor:
        return signed_distance(labels, num_classes, 1.0, "zero", "kervadec", include_background=False)[:, 1:]

    error = (make() - theirs(masks)).abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"maps: ours and MONAI's must agree before they are timed; they differ by {error:.1e}.")
    row: dict[str, Any] = {"shape": shape, "repeats": repeats}
    for side, function in (("ours", make), ("MONAI compute_distance_map", lambda: theirs(masks))):
        row[side] = quantiles([1e3 * _seconds(device, function) for _ in range(WARM_UP + repeats)][WARM_UP:])
    return row


def _with_boundary() -> Pair:
    """Return the three terms with a given map, and Dice alone: what they add is what counts."""
    dice = ours.DiceLoss(softmax=True)
    three = ours.CompoundLoss([dice, ours.FocalLoss(use_softmax=True), ours.BoundaryLoss(softmax=True)])
    return Pair(three, lambda logits, target: dice(logits, target["label"]), "ours, Dice alone")  # type: ignore[index]


def _batch(shape: tuple[int, ...], seed: int, device: str) -> tuple[Tensor, Tensor]:
    return make_batch(shape, seed, device=device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _measure_side(function: Callable[..., Tensor], logits: Tensor, target: Any, repeats: int) -> dict[str, Any]:
    """Return the times and the peak of one loss, or that it did not fit."""
    device = logits.device.type
    try:
        return _times_and_peak(function, logits, target, repeats)
    except torch.cuda.OutOfMemoryError:
        return {"error": "out of memory"}
    except TorchDynamoException as error:
        return {"error": f"not compiled: {first_line(error)}"}
    finally:
        logits.grad = None
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def _times_and_peak(function: Callable[..., Tensor], logits: Tensor, target: Any, repeats: int) -> dict[str, Any]:
    device = logits.device.type
    forward, backward = [], []
    copies = None
    for i in range(WARM_UP + repeats):
        logits.grad = None
        if device == "cuda" and i == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        values: list[Tensor] = []
        forward.append(1e3 * _seconds(device, lambda values=values: values.append(function(logits, target))))  # type: ignore[misc]
        backward.append(1e3 * _seconds(device, values[0].backward))
        if device == "cuda" and i == WARM_UP:
            copies = round((torch.cuda.max_memory_allocated() - before) / _bytes(logits), 3)
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    times = {"forward": forward, "backward": backward, "both": both}
    return {"ms": {name: quantiles(all_[WARM_UP:]) for name, all_ in times.items()}, "copies": copies}


def _seconds(device: str, run: Callable[[], Any]) -> float:
    """Return how long it takes, on a GPU by its own clock, while Python is ahead of it.

    So it is in a training, where the network keeps the GPU busy: the time to start a kernel does not count.
    """
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return 1e-3 * events[0].elapsed_time(events[1])
