# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What distance maps cost: making them, integrating them in a loss, carrying them through a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

from monai_losses_ext import BoundaryLoss, CompoundLoss, DiceLoss, FocalLoss
from monai_losses_ext.benchmark.cases import SHAPES, make_batch, their_maps
from monai_losses_ext.benchmark.speed import in_turn, quantiles
from monai_losses_ext.distance import signed_distance

CONFIGS = Path(__file__).parents[2] / "configs"
BUNDLE = Path(__file__).parents[2] / "bundles" / "msd_hippocampus_mri_segmentation"


def measure_maps(shape: str, backend: str, repeats: int, seed: int) -> dict[str, Any]:
    """Return the time of the foreground's signed maps, ours and MONAI's, from index and from one-hot labels each.

    Args:
        shape: a key of :data:`cases.SHAPES`.
        backend: ``numba`` or ``scipy``.
        repeats: counted rounds.
        seed: of the labels.
    """
    _, labels = make_batch(SHAPES[shape], seed)
    num_classes = SHAPES[shape][1]
    masks = torch.cat([labels == c for c in range(1, num_classes)], 1).float()
    theirs = their_maps()

    def ours(convention: str = "signed") -> torch.Tensor:
        return signed_distance(labels, num_classes, 1.0, "zero", convention, include_background=False, backend=backend)[
            :, 1:
        ]

    error = (ours("kervadec") - theirs(masks)).abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"distance: ours and MONAI's maps must agree before they are timed; they differ by {error}.")
    times = in_turn(lambda: _milliseconds(ours), lambda: _milliseconds(lambda: theirs(masks)), repeats=repeats)
    return {"what": "maps", "shape": shape, "backend": backend, "baseline": "MONAI compute_distance_map"} | _row(*times)


def measure_compounds(shape: str, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Return what a boundary term with a given map and learned weights add, forward and backward.

    Three rows: Dice + focal + boundary over Dice + focal; the three over Dice alone; the three with learned weights
    over the same with fixed ones.
    """
    logits, labels = make_batch(SHAPES[shape], seed)
    target = {"label": labels, "distance": signed_distance(labels, SHAPES[shape][1], 1.0)}
    dice = DiceLoss(softmax=True)
    regions = [dice, FocalLoss(use_softmax=True)]
    three = [*regions, BoundaryLoss(softmax=True)]

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], float]:
        def run() -> None:
            logits.grad = None
            loss(logits, target).backward()

        return lambda: _milliseconds(run)

    pairs = {
        "term": (CompoundLoss(three), CompoundLoss(regions), "ours, Dice + focal"),
        "three": (CompoundLoss(three), dice, "ours, Dice alone"),
        "learned": (CompoundLoss(three, learnable=True), CompoundLoss(three), "ours, fixed weights"),
    }
    return [
        {"what": what, "shape": shape, "baseline": name} | _row(*in_turn(step(ours), step(baseline), repeats=repeats))
        for what, (ours, baseline, name) in pairs.items()
    ]


def measure_epoch(dataset_dir: Path, repeats: int) -> dict[str, Any]:
    """Return the time of a cached epoch of the hippocampus bundle with Dice and boundary loss, and with Dice alone.

    Args:
        dataset_dir: the task's data, or phantoms of it.
        repeats: counted epochs of each.
    """
    dice = {"type": "dice", "include_background": False, "batch": True}
    boundary = {"type": "boundary", "include_background": False}
    both = {"type": "compound", "components": [dice, boundary]}
    ours, baseline = _Epoch(dataset_dir, both, CONFIGS / "precomputed_maps.json"), _Epoch(dataset_dir, dice)
    times = in_turn(lambda: _milliseconds(ours), lambda: _milliseconds(baseline), repeats=repeats)
    return {"what": "epoch", "cases": ours.cases, "baseline": "ours, Dice alone"} | _row(*times)


class _Epoch:
    """One epoch of a bundle's training, without its handlers."""

    def __init__(self, dataset_dir: Path, loss_config: Mapping[str, Any], *overlays: Path) -> None:
        files = [str(BUNDLE / "configs" / "train.json"), *map(str, overlays)]
        workflow = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset_dir), loss_config=loss_config)
        workflow.initialize()
        get = workflow.parser.get_parsed_content
        self._loader, self._network, self._loss = get("train#dataloader"), get("network"), get("loss")
        self._optimizer, self._prepare, self._device = get("optimizer"), get("prepare_batch"), get("device")
        self.cases = len(self._loader.dataset)

    def __call__(self) -> None:
        for batch in self._loader:
            image, target = self._prepare(batch, self._device)
            self._optimizer.zero_grad()
            self._loss(self._network(image), target).backward()
            self._optimizer.step()


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _row(ours: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, baseline, strict=True)]
    return {
        "repeats": len(ratios),
        "ours_ms": quantiles(ours),
        "baseline_ms": quantiles(baseline),
        "ratio": quantiles(ratios),
    }
