# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A short training of a small network on phantoms, and what it reaches on others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor

from monai_losses_ext import get_loss
from monai_losses_ext.benchmark.purpose.measures import Outcome, measure
from monai_losses_ext.benchmark.purpose.phantoms import Case, Phantom
from monai_losses_ext.benchmark.purpose.purposes import PURPOSES, Purpose, Row
from monai_losses_ext.transforms.batch import prepare_batch

TRAINING_CASES, HELD_OUT_CASES = 12, 10
BATCH, LEARNING_RATE = 2, 5e-3
HELD_OUT = 1000  # the first seed of the held-out cases, which are the same for every training


def measure_purpose(name: str, row: str, seed: int, parts: Path, steps: int | None = None) -> dict[str, Any]:
    """Train with one loss for one purpose, or read what an earlier call measured.

    Args:
        name: the purpose.
        row: name of the training.
        seed: of the network's initial weights, and of the order and the flips of the cases.
        parts: folder with a file per training that is over; a measurement that was cut short goes on from there.
        steps: length of the training, where it is not the purpose's.

    Returns:
        ``purpose``, ``row``, ``seed``, ``steps``, ``seconds`` of training, and ``metrics``.
    """
    purpose = PURPOSES[name]
    steps = steps or purpose.steps
    part = parts / f"{name}--{list(purpose.rows).index(row)}--{seed}.json"
    expected = {"purpose": name, "row": row, "seed": seed, "steps": steps, "loss": dict(purpose.rows[row].loss)}
    if part.is_file():
        measured: dict[str, Any] = json.loads(part.read_text())
        if {key: measured.get(key) for key in expected} == expected:
            return measured
    start = time.perf_counter()
    network = train(purpose, purpose.rows[row], seed, steps)
    seconds = time.perf_counter() - start
    metrics = measure(list(_outcomes(network, purpose)), purpose.metrics, purpose.level)
    rounded = {metric: round(value, 4) for metric, value in metrics.items()}
    measured = {**expected, "seconds": round(seconds, 1), "metrics": rounded}
    parts.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(measured))
    return measured


def train(purpose: Purpose, row: Row, seed: int, steps: int) -> UNet:
    """Return a network that was trained with a row's loss: same weights at first, same cases in the same order."""
    cases = _cases(row.phantom or purpose.phantom, TRAINING_CASES, 0, training=True)
    if purpose.maps is not None:
        make = purpose.maps()
        cases = [make(case) for case in cases]
    torch.manual_seed(seed)
    network = UNet(3, 1, 1 + purpose.foreground, (12, 24, 48), (2, 2), num_res_units=1, norm="instance").train()
    loss = get_loss(dict(row.loss), softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        image, target = prepare_batch(_batch(cases, random))
        optimizer.zero_grad()
        loss(network(image), target).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _cases(phantom: Phantom, count: int, first: int, training: bool) -> list[Case]:
    return [phantom(np.random.default_rng(first + i), training) for i in range(count)]


def _batch(cases: list[Case], random: np.random.Generator) -> dict[str, Tensor]:
    """Return cases at random, all flipped alike along axes at random."""
    picked = [cases[i] for i in random.integers(0, len(cases), BATCH)]
    axes = [axis for axis in (2, 3, 4) if random.random() < 0.5]
    stacked = {key: torch.stack([torch.as_tensor(case[key]) for case in picked]) for key in picked[0]}
    return {key: value.flip(axes) if value.ndim == 5 else value for key, value in stacked.items()}


@torch.no_grad()
def _outcomes(network: UNet, purpose: Purpose) -> Iterator[Outcome]:
    """Give the network's answer to each held-out case."""
    for case in _cases(purpose.phantom, HELD_OUT_CASES, HELD_OUT, training=False):
        yield Outcome(network(case["image"][None])[0].softmax(0), case["label"][0])
