# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlays of ``configs/`` on a bundle, trained for an epoch or two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from monai_losses_ext.losses import boundary

OVERLAYS = Path(__file__).parents[2] / "configs"
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [2, 4],
    "strides": [2],
}


def overlaid(bundle: Path, dataset: Path, out: Path, *overlays: str | Path, **overrides: Any) -> ConfigWorkflow:
    """Return the training of a bundle with overlays, small and in a folder of its own."""
    root = out / "bundle"
    shutil.copytree(bundle, root)
    files = [str(root / "configs" / "train.json"), *(str(OVERLAYS / overlay) for overlay in overlays)]
    small = {"network_def": NETWORK, "patch_size": [16, 16, 16], "epochs": 2, "device": "cpu", **overrides}
    workflow = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset), **small)
    workflow.initialize()
    return workflow


def test_boundary_with_precomputed_maps_and_a_schedule(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recompute(*_: Any) -> None:
        raise AssertionError("the map was computed in the loss")

    monkeypatch.setattr(boundary, "signed_distance", recompute)
    overlays = ("precomputed_maps.json", "losses/dice_focal_boundary.json")
    workflow = overlaid(bundle, dataset, tmp_path, *overlays)
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["weight_boundary"] == pytest.approx(0.02)
    assert metrics["weight_dice"] + metrics["weight_focal"] == pytest.approx(0.98)
    assert metrics["loss_boundary"] > 0
    case = workflow.parser.get_parsed_content("train#dataset")[0][0]
    assert case["distance"].shape == (3, 16, 16, 16) and isinstance(case["image"], torch.Tensor)
    written = sorted(path.name for path in (tmp_path / "bundle" / "models").glob("*.pt"))
    assert written == ["model.pt", "model_final.pt", "training_state.pt"]


def test_boundary_computed_in_the_loss(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "losses/dice_focal_boundary.json", epochs=1)
    workflow.run()
    assert workflow.parser.get_parsed_content("train#trainer").state.metrics["loss_boundary"] > 0


def test_maps_are_of_no_use_to_other_losses_and_do_no_harm(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "precomputed_maps.json", epochs=1)
    workflow.run()
    assert "loss_boundary" not in workflow.parser.get_parsed_content("train#trainer").state.metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_config": "dice"}, "error: schedules: must be of a compound loss; got 'DiceLoss'."),
        ({"loss_config": "dice_ce"}, "error: weights: must be one of dice, ce; got "),
        ({"train#handlers#-1#schedules#step": 2}, "error: schedule: rebalance: step: must be a number"),
        ({"train#handlers#-1#schedules#type": "rebalanc"}, "error: schedule: type: must be one of constant, linear"),
    ],
)
def test_a_wrong_schedule_is_one_line(
    bundle: Path, dataset: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "losses/dice_focal_boundary.json")
    last = len(workflow.parser.get("train#handlers")) - 1
    for name, value in overrides.items():
        workflow.parser[name.replace("-1", str(last))] = value
    with pytest.raises(SystemExit) as caught:
        workflow.run()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_missing_maps_are_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    prepare = {"_target_": "monai_losses_ext.engine.prepare_batch_with_distance", "_mode_": "callable"}
    workflow = overlaid(bundle, dataset, tmp_path, prepare_batch=prepare)
    with pytest.raises(SystemExit, match="^error: .* Add monai_losses_ext.transforms.SignedDistanceMapd") as caught:
        workflow.run()
    assert "\n" not in str(caught.value)


def test_learned_weights_with_precomputed_maps(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    overlays = ("precomputed_maps.json", "losses/compound_learnable.json")
    workflow = overlaid(bundle, dataset, tmp_path, *overlays)
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    weights = [metrics[f"weight_{name}"] for name in ("dice", "focal", "boundary")]
    assert sum(weights) == pytest.approx(1)
    assert weights != pytest.approx([0.5, 0.3, 0.2], abs=1e-4)


def test_learned_weights_are_one_flag_away(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, epochs=1, **{"loss_config#learnable_weights": True})
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["weight_dice"] + metrics["weight_cross_entropy"] == pytest.approx(1)
    assert metrics["weight_dice"] != 0.5
