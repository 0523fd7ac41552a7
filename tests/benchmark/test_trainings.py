# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A training that is reported is the one whose command is reported."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from monai_losses_ext.benchmark import losses, quality
from monai_losses_ext.data.phantoms import make_phantoms

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "msd_hippocampus_mri_segmentation"
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [2, 4],
    "strides": [2],
}
LEARNED = {"type": "compound", "components": [{"type": "dice"}, {"type": "focal"}], "learnable_weights": True}
WITH_GAMMA = {**LEARNED, "components": [{"type": "dice"}, {"type": "focal", "gamma": 2.0}]}  # the default, spelt out
SMALL = losses.Run("small", (), {"loss_config": LEARNED, "network_def": NETWORK, "patch_size": [16, 16, 16]})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_phantoms("Task04_Hippocampus", tmp_path_factory.mktemp("data"), n_cases=2, scale=0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset):
    """A folder with a real training of one epoch, and the command that is reported for it."""
    root = tmp_path_factory.mktemp("output") / "train_small"
    return root, losses.train(BUNDLE, dataset, root, SMALL, 1)


def written(root):
    return (root / "model_final.pt").stat().st_mtime_ns


def test_the_same_training_is_not_run_again(trained, dataset):
    root, command = trained
    before = written(root)
    assert losses.train(BUNDLE, dataset, root, SMALL, 1) == command
    assert written(root) == before
    config = json.loads((root / "train_config.json").read_text())
    assert command == (
        f"monai.bundle run, configs train.json --epochs 1 --val_interval 1 --loss_config {config['loss_config']} "
        f"--network_def {config['network_def']} --patch_size [16, 16, 16]"
    )


def is_trained(root, dataset, run=SMALL, epochs=1):
    return losses._is_trained(root, *losses.command_of(BUNDLE, run, epochs), dataset)


@pytest.mark.parametrize(
    ("change", "epochs"),
    [
        ({"options": {**SMALL.options, "loss_config": WITH_GAMMA}}, 1),
        ({"options": {**SMALL.options, "seed": 1}}, 1),
        ({"overlays": ("precomputed_maps.json",)}, 1),
        ({}, 2),
    ],
    ids=["loss_config", "seed", "overlay", "epochs"],
)
def test_another_training_is_not_taken_for_it(trained, dataset, change, epochs):
    assert is_trained(trained[0], dataset)
    assert not is_trained(trained[0], dataset, dataclasses.replace(SMALL, **change), epochs)


def test_other_data_of_the_same_name(trained, dataset, tmp_path):
    assert not is_trained(trained[0], tmp_path / dataset.name)


def test_a_training_that_crashed_is_not_taken_for_one(trained, dataset, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(trained[0], root)
    assert is_trained(root, dataset)
    (root / "finished.json").unlink()  # written when all else is
    assert not is_trained(root, dataset)


def test_quality_refuses_a_training_by_another_command(trained, dataset, tmp_path):
    bundle = tmp_path / BUNDLE.name
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "train.json").write_text((BUNDLE / "configs" / "train.json").read_text())
    with pytest.raises(ValueError, match="^bundle: must have been trained to the end; got "):
        quality.measure_quality(bundle, dataset)
    (bundle / "output").symlink_to(trained[0].parent)
    with pytest.raises(ValueError, match=r"^bundle: must have been trained by .* --epochs 1; got another .*") as caught:
        quality.measure_quality(bundle, dataset)
    assert all(key in str(caught.value) for key in ("loss_config", "network_def", "patch_size", "val_interval"))
    assert "output_dir" not in str(caught.value)


def test_committed_commands_are_those_of_their_configs():
    rows = json.loads((ROOT / "docs" / "benchmarks" / "hippocampus_losses.json").read_text())["losses"]
    for row in rows:
        assert f"--epochs {row['epochs']} " in row["command"]
        if "--loss_config" in row["command"]:
            assert row["command"].endswith(f"--loss_config {row['loss_config']}")
    assert any("--loss_config" in row["command"] for row in rows)
