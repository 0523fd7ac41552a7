# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The loss's share of a training step, taken with a bundle's own network and batch."""

from __future__ import annotations

import json
import time

import pytest
import torch

from monai_losses_ext.benchmark import command, report, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_small_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr("monai_losses_ext.benchmark.speed.WARM_UP_SECONDS", 0)
    out = tmp_path / "step.json"
    arguments = ["step", "--device", DEVICE, "--tasks", "Task04_Hippocampus", "--repeats", "2", "--out", str(out)]
    assert command.main(arguments) == 0
    result = json.loads(out.read_text())
    assert [row["loss"] for row in result["step"]] == ["dice_ce", "dice_focal"]
    assert [row["batch"] for row in result["step"]] == [[2, 1, 32, 48, 32]] * 2
    table = report.step_table(result)
    for row in result["step"]:
        assert next(iter(row["sides"])) == "ours" and len(row["sides"]) == 2
        for name, side in row["sides"].items():
            assert side["loss_ms"]["p20"] > 0 and side["loss_ms"]["p80"] < side["step_ms"]["p80"]
            assert 0 < side["share"]["p20"] <= side["share"]["p80"] < 1
            assert f"| {row['loss']}, {name} |" in table


class Slow(torch.autograd.Function):
    """A sum whose backward takes 200 ms of the CPU."""

    @staticmethod
    def forward(ctx, logits):
        ctx.shape = logits.shape
        return logits.sum()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.2)
        return grad.expand(ctx.shape)


@pytest.mark.skipif(DEVICE == "cuda", reason="waits on the CPU, whose clock a GPU's step does not go by")
def test_forward_and_backward_of_the_loss_count_and_the_networks_do_not(tmp_path):
    bundle_step = step._Step("Task04_Hippocampus", "cpu", 0, tmp_path)
    before = [parameter.clone() for parameter in bundle_step._network.parameters()]

    def slow(logits, labels):
        time.sleep(0.1)
        return Slow.apply(logits)

    loss_ms, step_ms = bundle_step.time(slow)
    assert 300 <= loss_ms < step_ms
    loss_ms, step_ms = bundle_step.time(lambda logits, labels: logits.sum())
    assert loss_ms < 0.3 * step_ms
    assert any(not torch.equal(a, b) for a, b in zip(before, bundle_step._network.parameters(), strict=True))
