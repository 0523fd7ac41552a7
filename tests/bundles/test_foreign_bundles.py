# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Overlays on bundles that are not this project's, written as the model zoo writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

OVERLAYS = Path(__file__).parents[2] / "configs"
# Two of the zoo's ways: classes of a label map with a softmax, and overlapping regions with a sigmoid.
KINDS: dict[str, dict[str, Any]] = {
    "classes": {
        "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "lambda_ce": 0.5, "batch": True},
        "label": [{"_target_": "EnsureChannelFirstd", "keys": ["image", "label"]}],
        "out_channels": 3,
    },
    "regions": {
        "loss": {"_target_": "DiceLoss", "smooth_nr": 0, "smooth_dr": 1e-5, "sigmoid": True, "squared_pred": True},
        "label": [
            {"_target_": "EnsureChannelFirstd", "keys": ["image", "label"]},
            {"_target_": "Lambdad", "keys": "label", "func": "$lambda x: torch.cat([x > 0, x > 1]).float()"},
        ],
        "out_channels": 2,
    },
}


def zoo_bundle(folder: Path, kind: str, dataset: Path) -> Path:
    """Write a small ``train.json`` in the zoo's conventions."""
    parts = KINDS[kind]
    cases = json.loads((dataset / "dataset.json").read_text())["training"]
    config = {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": str(folder),
        "device": "$torch.device('cpu')",
        "cases": [{key: str(dataset / path) for key, path in case.items()} for case in cases[:2]],
        "network_def": {
            "_target_": "SegResNet",
            "in_channels": 1,
            "out_channels": parts["out_channels"],
            "init_filters": 8,
            "blocks_down": [1, 1],
            "blocks_up": [1],
        },
        "network": "$@network_def.to(@device)",
        "loss": parts["loss"],
        "optimizer": {
            "_target_": "torch.optim.Adam",
            "params": "$@network.parameters()",
            "lr": 0.001,
            "weight_decay": 1e-5,
        },
        "train": {
            "preprocessing": {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "LoadImaged", "keys": ["image", "label"]},
                    *parts["label"],
                    {"_target_": "CenterSpatialCropd", "keys": ["image", "label"], "roi_size": [16, 16, 16]},
                    {"_target_": "NormalizeIntensityd", "keys": "image"},
                ],
            },
            "dataset": {"_target_": "Dataset", "data": "@cases", "transform": "@train#preprocessing"},
            "dataloader": {"_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 2},
            "handlers": [{"_target_": "StatsHandler", "name": "train", "tag_name": "train_loss"}],
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": 3,
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "loss_function": "@loss",
                "optimizer": "@optimizer",
                "train_handlers": "@train#handlers",
            },
        },
        "run": ["$@train#trainer.run()"],
    }
    path = folder / "configs" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_by_an_overlay(kind: str, dataset: Path, tmp_path: Path) -> None:
    track = tmp_path / "track.json"
    tracker = {"_target_": "monai_losses_ext.handlers.LossTracker", "loss": "@loss", "optimizer": "@optimizer"}
    track.write_text(json.dumps({"+train#handlers": [tracker]}))
    overlay = OVERLAYS / "losses" / "compound_learnable.json"
    files = [str(zoo_bundle(tmp_path, kind, dataset)), str(overlay), str(track)]
    workflow = ConfigWorkflow(files, logging_file=False)
    workflow.initialize()
    get = workflow.parser.get_parsed_content
    loss, before = get("loss"), get("loss").get_weights()
    first = [parameter.detach().clone() for parameter in get("network").parameters()]
    workflow.run()

    flags = KINDS[kind]["loss"]
    assert [part.activation for part in loss.losses] == ["sigmoid" if "sigmoid" in flags else "softmax"] * 3
    assert loss.losses[0].batch is flags.get("batch", False)
    assert loss.losses[0].squared_pred is flags.get("squared_pred", False)
    assert before == {name: pytest.approx(w) for name, w in {"dice": 0.5, "focal": 0.3, "boundary": 0.2}.items()}
    after = loss.get_weights()
    assert sum(after.values()) == pytest.approx(1)
    assert all(after[name] != before[name] for name in before)
    assert any(not torch.equal(a, b) for a, b in zip(first, get("network").parameters(), strict=True))
    metrics = get("train#trainer").state.metrics
    assert {"loss", "loss_boundary", "weight_boundary", "lr", "lr_1"} <= set(metrics)
    groups = get("optimizer").param_groups
    assert [group["weight_decay"] for group in groups] == [1e-5, 0.0]


def test_an_optimizer_without_the_weights_is_one_line(dataset: Path, tmp_path: Path) -> None:
    overlay = json.loads((OVERLAYS / "losses" / "compound_learnable.json").read_text())
    del overlay["optimizer#params"]
    tracker = {"_target_": "monai_losses_ext.handlers.LossTracker", "loss": "@loss", "optimizer": "@optimizer"}
    (tmp_path / "loss.json").write_text(json.dumps({**overlay, "+train#handlers": [tracker]}))
    files = [str(zoo_bundle(tmp_path, "classes", dataset)), str(tmp_path / "loss.json")]
    workflow = ConfigWorkflow(files, logging_file=False)
    workflow.initialize()
    with pytest.raises(SystemExit, match="^error: optimizer: must train the weights that the loss learns") as caught:
        workflow.run()
    assert "\n" not in str(caught.value)
