# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trained bundle reaches on the cases it never saw, as the JSON that its README is rendered from."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_losses_ext.data.dataset import training_cases
from monai_losses_ext.errors import UserError, fail

METRICS = ("dice", "nsd", "hd95")
MARK = "finished.json"  # what a training that came to its end leaves in its folder
# Keys of a training's config that say where its files lie and what is run around it, not what is trained.
AROUND = {"_meta_", "imports", "bundle_root", "dataset_dir", "output_dir", "run_name", "initialize", "run", "finalize"}


def measure_quality(bundle: Path, dataset_dir: Path) -> dict[str, Any]:
    """Evaluate the best weights of a bundle's newest finished training, with the command that trained it.

    Args:
        bundle: the bundle's folder.
        dataset_dir: the dataset it was trained on.

    Raises:
        UserError: where the bundle has not been trained, or not by that command.
    """
    finished = sorted((bundle / "output").glob(f"train_*/{MARK}"), key=lambda path: path.stat().st_mtime_ns)
    if not finished:
        raise fail("bundle", "must have been trained to the end", f"no finished run in {bundle / 'output'}")
    root = finished[-1].parent
    config = stored_config(root)
    epochs = config["epochs"]
    train = f"python -m monai.bundle run --config_file bundles/{bundle.name}/configs/train.json"
    command = f"{train} --dataset_dir DIR/{dataset_dir.name} --epochs {epochs}"
    if others := differing_keys(config, [bundle / "configs" / "train.json"], {"epochs": epochs}, dataset_dir):
        raise UserError(f"bundle: must have been trained by {command}; got another {', '.join(others)}.")
    return {"command": command, **evaluate_training(bundle, dataset_dir, root, "model.pt")}


def stored_config(root: Path) -> dict[str, Any]:
    """Return the config of the training that left its files in a folder, as it was run.

    Raises:
        UserError: where there is none.
    """
    path = root / "train_config.json"
    if not path.is_file():
        raise UserError(f"bundle: must have been trained; got no {path}.")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def differing_keys(
    config: Mapping[str, Any], files: Sequence[Path], options: Mapping[str, Any], dataset_dir: Path
) -> list[str]:
    """Return the keys in which a stored config differs from what a command trains; nothing if it was that command.

    Args:
        config: see :func:`stored_config`.
        files: the command's config files.
        options: what else it sets.
        dataset_dir: its data.
    """
    parser = ConfigParser()
    parser.read_config([str(path) for path in files])
    parser.update(dict(options))
    parser.parse()  # spells references as a running config does
    expected = json.loads(json.dumps(parser.get(), default=str))
    keys = [key for key in {**expected, **config} if key not in AROUND and expected.get(key) != config.get(key)]
    is_same_data = Path(config["dataset_dir"]).resolve() == dataset_dir.resolve()
    return keys if is_same_data else ["dataset_dir", *keys]


def evaluate_training(bundle: Path, dataset_dir: Path, root: Path, checkpoint: str) -> dict[str, Any]:
    """Return what a training reached on the held-out cases, and how long it took.

    NSD is measured twice: on sub-voxel surfaces, as the Decathlon did, and voxel by voxel, as MONAI does by default.

    Args:
        bundle: the bundle's folder.
        dataset_dir: the dataset it was trained on.
        root: the training's folder.
        checkpoint: which of its models.

    Raises:
        UserError: where there is no such training.
    """
    config, weights = stored_config(root), root / checkpoint
    if not weights.is_file():
        raise UserError(f"bundle: must have been trained; got no {weights}.")
    if str(config.get("resume")).lower() == "true":
        raise UserError(f"bundle: the training in {root} was resumed, so how long it took is not known.")
    started, ended = started_and_ended(root)
    means = _evaluate(bundle, dataset_dir, weights, use_subvoxels=True)
    voxelwise = _evaluate(bundle, dataset_dir, weights, use_subvoxels=False)
    for name, values in means["metrics"].items():
        values["nsd_voxelwise"] = voxelwise["metrics"][name]["nsd"]
    return {
        "minutes": round((ended - started) / 60, 1),
        "epochs": config["epochs"],
        "seed": config["seed"],
        "split_seed": config["split_seed"],
        "loss_config": config["loss_config"],
        "checkpoint": checkpoint,
        "n_training": len(training_cases(dataset_dir, config["validation_fraction"], config["split_seed"])),
        "n_validation": means["cases"],
        "metrics": means["metrics"],
    }


def started_and_ended(root: Path) -> tuple[float, float]:
    """Return when a training started and ended, in seconds of the clock.

    The config is written as the training starts, the mark as it ends.

    Raises:
        UserError: for a training that did not come to its end.
    """
    config, mark = root / "train_config.json", root / MARK
    if not mark.is_file():
        raise UserError(f"bundle: its training must have come to its end; got no {mark}.")
    return config.stat().st_mtime, mark.stat().st_mtime


def _evaluate(bundle: Path, dataset_dir: Path, weights: Path, use_subvoxels: bool) -> dict[str, Any]:
    """Run the bundle's own evaluation and return the means of its table."""
    configs = [str(bundle / "configs" / name) for name in ("train.json", "evaluate.json")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(configs)]
        command += ["--dataset_dir", str(dataset_dir.resolve()), "--ckpt_path", str(weights)]
        command += ["--output_dir", folder, "--run_name", "evaluate"]
        command += ["--validate::report::use_subvoxels", str(use_subvoxels)]
        subprocess.run(command, check=True)
        with open(Path(folder) / "evaluate" / "evaluation.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    means = {
        row["class"]: {metric: round(float(row[metric]), 4) for metric in METRICS}
        for row in rows
        if row["case"] == "mean"
    }
    means["mean"] = means.pop("all")
    return {"cases": len({row["case"] for row in rows} - {"mean"}), "metrics": means}
