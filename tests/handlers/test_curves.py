# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""CurvePicture on a real training with validation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image as png
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import nn

from monai_losses_ext.handlers import CurvePicture, LossTracker, SegmentationReport, curves
from monai_losses_ext.handlers.curves import draw_curves, group_names, named_curves, value_range


def test_table_and_picture_of_a_training(tmp_path: Path, store: Any) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = nn.MSELoss()
    data = [{"image": torch.rand(1, 6, 6), "label": torch.ones(1, 6, 6)} for _ in range(3)]
    report = SegmentationReport({"1": "a"}, spacing=[1, 1], metrics=["dice"])
    validator = SupervisedEvaluator(torch.device("cpu"), DataLoader(Dataset(data)), network, val_handlers=[report])
    picture = tmp_path / "new" / "curves.png"
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        4,
        DataLoader(Dataset(data)),
        network,
        optimizer,
        loss,
        train_handlers=[
            CurvePicture(picture, validator),
            ValidationHandler(2, validator),
            LossTracker(loss, optimizer),
            store.handler(artifacts=[str(picture), str(picture.with_suffix(".csv"))], close_on_complete=True),
        ],
    )
    trainer.run()

    with open(picture.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert {int(row["epoch"]): float(row["loss"]) for row in rows} == pytest.approx(store.history("loss"))
    assert [row["val_mean_dice"] != "" for row in rows] == [False, True, False, True]
    assert float(rows[3]["val_mean_dice"]) == validator.state.metrics["mean_dice"]
    assert store.artifacts() == ["curves.csv", "curves.png"]
    assert png.imread(picture).shape[1] > 1000


def test_each_name_has_its_panel() -> None:
    panels = group_names(
        ["loss", "loss_dice", "weight_dice", "lr", "lr_1", "val_mean_dice", "hd95_a", "nsd_a", "speed"]
    )
    assert list(panels.values()) == [
        ["loss", "loss_dice"],
        ["val_mean_dice"],
        ["nsd_a"],
        ["hd95_a"],
        ["weight_dice"],
        ["lr", "lr_1"],
        ["speed"],
    ]


@pytest.mark.parametrize(
    "history",
    [{}, {1: {"loss": float("nan")}}, {1: {"loss": 1.0}, 2: {"loss": float("inf"), "val_dice_a": 0.5}}],
)
def test_little_or_broken_history_is_drawn(history: dict[int, dict[str, float]], tmp_path: Path) -> None:
    draw_curves(history, tmp_path / "curves.png")
    assert png.imread(tmp_path / "curves.png").size


def test_axes_do_not_blow_up_small_differences() -> None:
    assert value_range([0.708, 0.71, 0.712], "val_mean_dice") == (-0.03, 1.03)
    assert value_range([0.5, 0.5], "weight_dice") == (-0.03, 1.03)
    assert value_range([1.0, 1.01], "loss") == (0.0, pytest.approx(1.0605))
    low, high = value_range([-1.0, float("nan"), 3.0], "loss")
    assert low < -1.0
    assert high > 3.0


def test_of_many_classes_the_extremes_are_named() -> None:
    last = {"val_mean_dice": 0.5} | {f"val_dice_{i}": i / 118 for i in range(118)}
    named = named_curves(last)
    assert named[0] == "val_mean_dice"
    assert {"val_dice_0", "val_dice_117"} < set(named)
    assert len(named) <= 10
    few = [f"val_dice_{i}" for i in range(10)]
    assert named_curves(dict.fromkeys(few, 0.1)) == few


def test_curves_of_many_classes_keep_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = {e: {"val_mean_dice": 0.5, **{f"val_dice_{i}": i / 41 for i in range(41)}} for e in (1, 2)}
    widths = []

    class Spied(curves.Figure):  # type: ignore[misc, name-defined]
        def savefig(self, *arguments: Any, **keywords: Any) -> None:
            super().savefig(*arguments, **keywords)
            box = self.axes[0].get_window_extent()
            widths.append((box.width / self.bbox.width, box.height / self.bbox.height))

    monkeypatch.setattr(curves, "Figure", Spied)
    draw_curves(history, tmp_path / "curves.png")
    assert min(widths[0]) > 0.5
