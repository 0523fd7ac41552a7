# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Overlays on bundles that are not this project's, written as the model zoo writes them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles.helpers import only_run, user_error
from monai.bundle import ConfigWorkflow

from monai_losses_ext.losses.factory import BY_NAME

OVERLAYS = Path(__file__).parents[2] / "configs"
LOSSES = sorted((OVERLAYS / "losses").glob("*.json"))
FIRST = {"_target_": "EnsureChannelFirstd", "keys": ["image", "label"]}
SEGRESNET = {"_target_": "SegResNet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
UNET = {"_target_": "UNet", "spatial_dims": 3, "channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "batch"}


def relabeled(expression: str) -> list[dict[str, Any]]:
    """Return the transforms that make the labels what an expression says."""
    return [FIRST, {"_target_": "Lambdad", "keys": "label", "func": f"$lambda x: {expression}"}]


# The zoo's ways: classes of a label map with a softmax, overlapping regions with a sigmoid, one structure with either.
KINDS: dict[str, dict[str, Any]] = {
    "classes": {
        "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "lambda_ce": 0.5, "batch": True},
        "label": [FIRST],
        "network": {**SEGRESNET, "out_channels": 3},
    },
    "classes without background": {
        "loss": {"_target_": "DiceFocalLoss", "to_onehot_y": True, "softmax": True, "include_background": False},
        "label": [FIRST],
        "network": {**UNET, "out_channels": 3},
    },
    "classes, generalized dice": {
        "loss": {"_target_": "GeneralizedDiceLoss", "to_onehot_y": True, "softmax": True, "w_type": "simple"},
        "label": [FIRST],
        "network": {**UNET, "out_channels": 3},
    },
    "two channels": {
        "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True},
        "label": relabeled("x > 0"),
        "network": {**UNET, "out_channels": 2},
    },
    "one channel": {
        "loss": {"_target_": "GeneralizedDiceFocalLoss", "sigmoid": True, "lambda_gdl": 0.5, "gamma": 1.0},
        "label": relabeled("(x > 0).float()"),
        "network": {**UNET, "out_channels": 1},
    },
    "regions": {
        "loss": {"_target_": "DiceLoss", "smooth_nr": 0, "smooth_dr": 1e-5, "sigmoid": True, "squared_pred": True},
        "label": relabeled("torch.cat([x > 0, x > 1]).float()"),
        "network": {**SEGRESNET, "out_channels": 2},
    },
    "regions of BraTS": {
        "loss": {
            "_target_": "DiceLoss",
            "smooth_nr": 0,
            "smooth_dr": 1e-5,
            "squared_pred": True,
            "to_onehot_y": False,
            "sigmoid": True,
        },
        "label": [
            {"_target_": "MapLabelValued", "keys": "label", "orig_labels": [0, 1, 2], "target_labels": [0, 2, 4]},
            {"_target_": "ConvertToMultiChannelBasedOnBratsClassesd", "keys": "label"},
            {"_target_": "CastToTyped", "keys": "label", "dtype": "$torch.float32"},  # MONAI's loss refuses bool
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
        ],
        "network": {**SEGRESNET, "out_channels": 3},
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
        "network_def": {**parts["network"], "in_channels": 1},
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
                    {"_target_": "EnsureTyped", "keys": ["image", "label"]},
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
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config))
    return path


def trained(folder: Path, kind: str, dataset: Path, *overlays: Path, **overrides: Any) -> ConfigWorkflow:
    """Return a bundle's finished training, with overlays; it must have moved the network."""
    files = [str(zoo_bundle(folder, kind, dataset)), *map(str, overlays)]
    workflow = ConfigWorkflow(files, logging_file=False, **overrides)
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    workflow.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    return workflow


@pytest.mark.parametrize("kind", KINDS)
def test_bundle_trains_by_itself(kind: str, dataset: Path, tmp_path: Path) -> None:
    workflow = trained(tmp_path, kind, dataset, **{"train#trainer#max_epochs": 1})
    assert type(workflow.parser.get_parsed_content("loss")).__module__.startswith("monai.losses.")


@pytest.mark.parametrize("overlay", LOSSES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_overlay_trains_unedited(kind: str, overlay: Path, dataset: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # the volumes are too small to share
    workflow = trained(tmp_path, kind, dataset, overlay, **{"train#trainer#max_epochs": 1})
    loss = workflow.parser.get_parsed_content("loss")
    config = json.loads(overlay.read_text())["loss_config"]
    assert type(loss) is BY_NAME[config["type"]]
    flags = KINDS[kind]["loss"]
    value = workflow.parser.get_parsed_content("train#trainer").state.output[0]["loss"]
    assert value > 0
    for part in getattr(loss, "losses", [loss]):
        assert activation(part) == ("sigmoid" if "sigmoid" in flags else "softmax")
        takes = inspect.signature(type(part)).parameters
        for name in {"include_background", "batch", "squared_pred"} & set(takes) & set(flags):
            if name not in overlay.read_text():  # which would win
                assert getattr(part, name) is flags[name]


def test_schedule_of_an_overlay_runs(dataset: Path, tmp_path: Path) -> None:
    workflow = trained(tmp_path, "regions", dataset, OVERLAYS / "losses" / "dice_focal_boundary.json")
    weights = workflow.parser.get_parsed_content("loss").get_weights()
    assert weights == {name: pytest.approx(w) for name, w in {"dice": 0.485, "focal": 0.485, "boundary": 0.03}.items()}


@pytest.mark.parametrize("order", [0, 1])
def test_schedule_runs_on_ranks_whose_handlers_are_cut_off(dataset: Path, tmp_path: Path, order: int) -> None:
    """The zoo's multi_gpu_train.json does so on every rank but the first, before or after the overlay."""
    (tmp_path / "multi_gpu_train.json").write_text('{"train#trainer#train_handlers": "$@train#handlers[:-1]"}')
    overlays = [tmp_path / "multi_gpu_train.json"]
    overlays.insert(order, OVERLAYS / "losses" / "dice_focal_boundary.json")
    workflow = trained(tmp_path / "bundle", "classes", dataset, *overlays)
    assert workflow.parser.get_parsed_content("loss").get_weights()["boundary"] == pytest.approx(0.03)


def test_a_bundle_that_calls_its_loss_lossfn_needs_one_edit(dataset: Path, tmp_path: Path) -> None:
    path = zoo_bundle(tmp_path, "classes", dataset)
    path.write_text(path.read_text().replace('"loss":', '"lossfn":').replace('"@loss"', '"@lossfn"'))
    overlay = tmp_path / "tversky.json"
    text = (OVERLAYS / "losses" / "tversky.json").read_text()
    overlay.write_text(text.replace('"loss#', '"lossfn#').replace('"+loss"', '"+lossfn"'))
    workflow = ConfigWorkflow([str(path), str(overlay)], logging_file=False)
    workflow.initialize()
    workflow.run()
    loss = workflow.parser.get_parsed_content("lossfn")
    assert [type(loss), loss.beta, loss.batch] == [BY_NAME["tversky"], 0.7, True]
    assert workflow.parser.get_parsed_content("train#trainer").loss_function is loss


def test_tracking_and_mixed_precision(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MONAI's own switch, whose names the overlay sets."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{tmp_path}/runs.db"
    overlays = [OVERLAYS / name for name in ("tracking.json", "mixed_precision.json")]
    workflow = trained(tmp_path, "classes", dataset, *overlays, tracking="mlflow", tracking_uri=store)
    assert workflow.parser.get_parsed_content("train#trainer").amp is True
    run = only_run(store, json.loads(overlays[0].read_text())["experiment_name"])
    assert set(run.history("train_loss")) == {1, 2, 3}


def activation(loss: Any) -> str:
    """Return the activation of our losses, or of those that are MONAI's."""
    return getattr(loss, "activation", None) or ("sigmoid" if loss.sigmoid else "softmax")


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
    assert user_error(workflow.run).startswith("optimizer: must train the weights that the loss learns")


@pytest.mark.parametrize(("loss", "alpha"), [("FocalLoss", 0.25), ("TverskyLoss", 0.3)])
def test_flags_of_the_same_name_are_kept_and_those_of_the_overlay_win(
    dataset: Path, tmp_path: Path, loss: str, alpha: float
) -> None:
    """By the name alone: a Tversky loss's alpha too, until a loss_config says otherwise."""
    file = zoo_bundle(tmp_path, "classes", dataset)
    config = json.loads(file.read_text())
    config["loss"] = {"_target_": loss, "to_onehot_y": True, "softmax": True, "alpha": alpha, "gamma": 1.0}
    file.write_text(json.dumps(config))

    def focal(**overrides: Any) -> Any:
        workflow = ConfigWorkflow([str(file), str(OVERLAYS / "losses" / "focal.json")], logging_file=False, **overrides)
        workflow.initialize()
        return workflow.parser.get_parsed_content("loss")

    assert (focal().alpha, focal().gamma) == (alpha, 2.0)  # the overlay sets gamma
    assert (focal(loss_config="focal").alpha, focal(loss_config="focal").gamma) == (alpha, 1.0)
    assert focal(loss_config={"type": "focal", "alpha": None}).alpha is None
