# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Train, evaluate and infer through ``python -m monai.bundle run``, and look at what is on the disk afterwards."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles.helpers import bundle_run, only_run, only_run_folder

NETWORK = (
    "{'_target_': 'UNet', 'spatial_dims': 3, 'in_channels': 1, 'out_channels': 3, 'channels': [4, 8], 'strides': [2]}"
)
EPOCHS = 3
MLFLOW_PARTS = {"mlruns", "mlruns.db"}
# Runs MONAI's command line with this package out of reach, and fails if anything of it was loaded all the same.
MONAI_ALONE = """
import runpy, sys
sys.modules["monai_losses_ext"] = None
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
assert not [name for name in sys.modules if name.startswith("monai_losses_ext.")]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bundle: Path, dataset: Path) -> SimpleNamespace:
    """Train, evaluate and infer once, started in an empty folder, with every output under ``root``."""
    configs = bundle / "configs"
    root, cwd = tmp_path_factory.mktemp("bundle_root"), tmp_path_factory.mktemp("elsewhere")
    common = ["--bundle_root", str(root), "--network_def", NETWORK, "--patch_size", "[16,16,16]"]
    train, evaluate = str(configs / "train.json"), f"['{configs / 'train.json'}','{configs / 'evaluate.json'}']"
    data = ["--dataset_dir", str(dataset)]
    bundle_run(cwd, train, *common, *data, "--epochs", str(EPOCHS), "--val_interval", "2", "--optimizer#lr", "0.02")
    elsewhere = f"sqlite:///{tmp_path_factory.mktemp('store')}/runs.db"
    said = bundle_run(cwd, evaluate, *common, *data, store=elsewhere)
    images = ["--dataset_dir", str(dataset / "imagesTr")]
    bundle_run(cwd, str(configs / "inference.json"), *common, *images, python=("-c", MONAI_ALONE))
    runs = {"train": only_run(f"sqlite:///{root}/output/mlruns.db"), "evaluate": only_run(elsewhere)}
    folder, evaluation = (only_run_folder(root / "output", kind) for kind in ("train", "evaluate"))
    return SimpleNamespace(root=root, cwd=cwd, folder=folder, evaluation=evaluation, said=said, **runs)


def test_outputs_land_in_the_folder_of_their_run(run: SimpleNamespace) -> None:
    assert list(run.cwd.iterdir()) == []
    assert [path.name for path in run.root.iterdir()] == ["output"]
    assert {path.name for path in (run.root / "output").iterdir()} == MLFLOW_PARTS | {
        run.folder.name,
        run.evaluation.name,
        "predictions",
    }
    weights = {"model.pt", "model_final.pt", "training_state.pt", "finished.json"}
    pictures = {"curves.png", "curves.csv", "predictions.png", "train_config.json"}
    assert {path.name for path in run.folder.iterdir()} == weights | pictures
    tables = {"evaluate_config.json", "evaluation.csv", "evaluation.png"}
    assert {path.name for path in run.evaluation.iterdir()} == tables


def test_evaluation_says_whose_weights_it_takes(run: SimpleNamespace) -> None:
    assert run.said.count(f"weights: {run.folder / 'model.pt'}") == 1


def test_weights_are_bare_state_dicts(run: SimpleNamespace) -> None:
    for name in ("model.pt", "model_final.pt"):
        weights = torch.load(run.folder / name, weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        assert any(key.startswith("model.") for key in weights)  # the UNet's own first module


def test_training_is_one_finished_run(run: SimpleNamespace) -> None:
    assert run.train.run.info.status == "FINISHED"
    assert run.train.run.info.run_name.startswith("train_dice_cross_entropy_")
    assert run.train.run.info.run_name == run.folder.name
    for metric in ("loss", "lr"):
        assert set(run.train.history(metric)) == set(range(1, EPOCHS + 1))
    for metric in ("mean_dice", "dice_anterior", "dice_posterior"):
        assert set(run.train.history(metric)) == {2, 3}  # the interval, and the last epoch
    assert run.train.artifacts() == {"train_config.json", "curves.png", "predictions.png"}


def test_evaluation_is_a_finished_run_in_the_store_of_the_environment(run: SimpleNamespace) -> None:
    assert run.evaluate.run.info.status == "FINISHED"
    assert run.evaluate.run.info.run_name.startswith("evaluate_")
    assert {"mean_dice", "mean_nsd", "mean_hd95", "nsd_anterior"} <= set(run.evaluate.run.data.metrics)
    assert run.evaluate.artifacts() == {"evaluate_config.json", "evaluation.csv", "evaluation.png"}


def test_learning_rate_warms_up_and_falls(run: SimpleNamespace) -> None:
    rates = run.train.history("lr")
    assert 0.02 > rates[1] > rates[2] > rates[3] > 0


def test_config_is_kept_as_it_was_run(run: SimpleNamespace) -> None:
    config = json.loads((run.folder / "train_config.json").read_text())
    assert config["epochs"] == EPOCHS
    assert config["optimizer"]["lr"] == 0.02
    assert config["network_def"]["channels"] == [4, 8]
    overlaid = json.loads((run.evaluation / "evaluate_config.json").read_text())
    assert overlaid["validate"]["dataset"]["cache_rate"] == 0


def test_best_weights_evaluate_to_the_best_validation_dice(run: SimpleNamespace) -> None:
    best = max(run.train.history("mean_dice").values())
    assert list(run.evaluate.history("mean_dice").values()) == [pytest.approx(best, abs=1e-6)]


def test_inference_keeps_shape_and_affine(run: SimpleNamespace, dataset: Path) -> None:
    images = sorted((dataset / "imagesTr").iterdir())
    written = run.root / "output" / "predictions"
    assert len(list(written.iterdir())) == len(images)
    assert len({nib.load(path).shape for path in images}) > 1
    for path in images:
        image, label = nib.load(path), nib.load(written / path.name.replace(".nii.gz", "_seg.nii.gz"))
        assert label.shape == image.shape
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-5)
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}


def test_report_agrees_with_the_label_files_of_inference(run: SimpleNamespace, dataset: Path) -> None:
    """Dice by NumPy from the files: the evaluation is in native space, on the untouched label."""
    with open(run.evaluation / "evaluation.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] != "mean"]
    assert len(rows) == 2  # one held-out case, two classes
    for value, row in enumerate(rows, start=1):
        reference = np.asarray(nib.load(dataset / "labelsTr" / f"{row['case']}.nii.gz").dataobj) == value
        name = f"{row['case']}_seg.nii.gz"
        prediction = np.asarray(nib.load(run.root / "output" / "predictions" / name).dataobj) == value
        dice = 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-5)
    assert any(float(row["dice"]) > 0 for row in rows)


def test_wrong_folder_is_one_clear_line_and_a_failure(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bundle_run(tmp_path, str(bundle / "configs" / "train.json"), "--dataset_dir", str(tmp_path / "absent"))
    assert caught.value.returncode == 1
    assert "Traceback" not in caught.value.stderr + caught.value.stdout
    lines = [line for line in caught.value.stderr.splitlines() if str(tmp_path / "absent") in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: dataset_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kept", "what"), [(0.5, "cannot be read"), (0.0, "cannot be read")])
def test_inference_names_the_image_that_is_cut_off(
    run: SimpleNamespace, bundle: Path, dataset: Path, tmp_path: Path, kept: float, what: str
) -> None:
    """With MONAI alone, and after all others were segmented."""
    images = Path(shutil.copytree(dataset / "imagesTr", tmp_path / "images"))
    bad = images / "case_2.nii.gz"
    bad.write_bytes(bad.read_bytes()[: int(kept * bad.stat().st_size)])
    options = ["--network_def", NETWORK, "--patch_size", "[16,16,16]", "--dataset_dir", str(images)]
    places = ["--output_dir", str(tmp_path / "predictions"), "--ckpt_path", str(run.folder / "model.pt")]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bundle_run(tmp_path, str(bundle / "configs" / "inference.json"), *options, *places, python=("-c", MONAI_ALONE))
    assert caught.value.returncode == 1
    assert "Traceback" not in caught.value.stderr + caught.value.stdout
    (line,) = [line for line in caught.value.stderr.splitlines() if line.startswith("error:")]
    assert str(bad) in line
    assert what in line
    assert len(list((tmp_path / "predictions").iterdir())) == len(list(images.iterdir())) - 1
