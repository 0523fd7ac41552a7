# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The share of a bundle's training step that its loss takes, with our loss and with MONAI's.

Measured from the moment when the logits are there to the moment when their gradient is: the loss's forward and
backward, and nothing of the network's. On a GPU by the GPU's own clock, within the step as it runs.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import monai.losses as theirs
import torch
from monai.bundle import ConfigWorkflow

from monai_losses_ext import get_loss
from monai_losses_ext.benchmark.cases import PARITY_SIDE, LossFunction, LossSum, Pair, make_batch
from monai_losses_ext.benchmark.speed import check_parity, in_turn, quantiles
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.shipped import own_scripts

BUNDLES = Path(__file__).parents[2] / "bundles"
STEP_TASKS = ("Task04_Hippocampus", "Task09_Spleen")
N_PHANTOMS = 3  # one is kept for validation


def measure_steps(task: str, device: str, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Return a row per loss: milliseconds of a step, of the loss within it, and its share, for ours and for MONAI's.

    Network, optimizer, patch and batch are the bundle's; the batch is made by its own transforms from phantoms.

    Args:
        task: name of the task's row.
        device: ``cuda`` (mixed precision, as the bundle trains there) or ``cpu`` (float32).
        repeats: counted steps with each loss, at least 2.
        seed: of the phantoms, the batch and the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        step = _Step(task, device, seed, Path(folder))
    rows = []
    for name, pair in _pairs(step.loss_config).items():
        num_classes = len(TASKS[task].labels)
        check_parity(pair, *make_batch((2, num_classes, *[PARITY_SIDE] * 3), seed))
        times = in_turn(partial(step.time, pair.ours), partial(step.time, pair.baseline), repeats=repeats)
        sides = {
            side: _summary(side_times) for side, side_times in zip(("ours", pair.baseline_name), times, strict=True)
        }
        rows.append({"task": task, "loss": name, "batch": step.shape, "repeats": repeats, "sides": sides})
    return rows


def _pairs(loss_config: dict[str, Any]) -> dict[str, Pair]:
    """Return the bundle's own loss, and Dice + focal with the same flags, beside what MONAI has for them."""
    dice = {"include_background": False, "batch": True}
    flags = {**dice, "softmax": True, "to_onehot_y": True}
    focal = theirs.FocalLoss(use_softmax=True, to_onehot_y=True)
    ours = {
        "type": "compound",
        "components": [{"type": "dice", "weight": 1.0, **dice}, {"type": "focal", "weight": 1.0}],
    }
    return {
        "dice_ce": Pair(get_loss(loss_config), theirs.DiceCELoss(**flags), "MONAI DiceCELoss"),
        "dice_focal": Pair(get_loss(ours), LossSum(theirs.DiceLoss(**flags), focal), "MONAI DiceLoss + FocalLoss"),
    }


class _Step:
    """One training step of a bundle, on one batch, as MONAI's SupervisedTrainer takes it."""

    def __init__(self, task: str, device: str, seed: int, folder: Path) -> None:
        data = make_phantoms(task, folder / task, N_PHANTOMS, seed)
        options = {"seed": seed, "num_workers": 0, "output_dir": str(folder / "output")}
        bundle = BUNDLES / TASKS[task].bundle
        with own_scripts(bundle):
            self._build(bundle, device, dataset_dir=str(data), **options)

    def _build(self, bundle: Path, device: str, **options: Any) -> None:
        config = str(bundle / "configs" / "train.json")
        workflow = ConfigWorkflow(config, logging_file=False, device=device, **options)
        workflow.initialize()
        get = workflow.parser.get_parsed_content
        self.loss_config = get("loss_config")
        self._device, self._is_mixed = torch.device(device), get("amp")
        self._network, self._optimizer = get("network").train(), get("optimizer")
        self._scaler = torch.amp.GradScaler(device, enabled=self._is_mixed)
        batch = next(iter(get("train#dataloader")))
        self._image, self._label = get("prepare_batch")(batch, self._device)
        self.shape = list(self._image.shape)

    def time(self, loss: LossFunction) -> tuple[float, float]:
        """Take a step with a loss and return the milliseconds that the loss took, and the whole step."""
        clock = _Clock(self._device)
        self._optimizer.zero_grad()
        with torch.autocast(self._device.type, enabled=self._is_mixed):
            logits = self._network(self._image)
            clock.mark()
            value = loss(logits, self._label)
        (gradient,) = torch.autograd.grad(self._scaler.scale(value), logits)
        clock.mark()
        logits.backward(gradient)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        before, within, after = clock.milliseconds()
        return within, before + within + after


class _Clock:
    """The milliseconds between marks, the making and the reading of the clock included."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []
        if self._is_cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Note the time, on a GPU that at which it gets here; nothing waits for it."""
        if self._is_cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Return the time from each mark to the next, and from the last to now."""
        self.mark()
        pairs = list(pairwise(self._marks))
        if not self._is_cuda:
            return [1e3 * (end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def _summary(times: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    loss, step = zip(*times, strict=True)
    share = quantiles([a / b for a, b in times])
    return {"step_ms": quantiles(step), "loss_ms": quantiles(loss), "share": share}
