# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trained bundle reaches on the cases it never saw, as the JSON that its README is rendered from."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METRICS = ("dice", "nsd", "hd95")


def measure_quality(
    bundle: Path, dataset_dir: Path, root: Path | None = None, checkpoint: str = "model.pt"
) -> dict[str, Any]:
    """Evaluate a bundle that has been trained here and return its results with how they came about.

    NSD is measured twice: on sub-voxel surfaces, as the Decathlon did, and voxel by voxel, as MONAI does by default.

    Args:
        bundle: the bundle's folder.
        dataset_dir: the dataset it was trained on.
        root: where the training left ``models/`` and ``output/train_config.json``, if not in the bundle.
        checkpoint: which of its models.

    Raises:
        ValueError: where the bundle has not been trained.
    """
    root = bundle if root is None else root
    config_path, weights = root / "output" / "train_config.json", root / "models" / checkpoint
    for path in (config_path, weights):
        if not path.is_file():
            raise ValueError(f"bundle: must have been trained; got no {path}.")
    config = json.loads(config_path.read_text())
    if str(config.get("resume")).lower() == "true":
        raise ValueError(f"bundle: the training in {root} was resumed, so how long it took is not known.")
    final = root / "models" / "model_final.pt"
    means = _evaluate(bundle, dataset_dir, weights, use_subvoxels=True)
    voxelwise = _evaluate(bundle, dataset_dir, weights, use_subvoxels=False)
    for name, values in means["metrics"].items():
        values["nsd_voxelwise"] = voxelwise["metrics"][name]["nsd"]
    train = f"python -m monai.bundle run --config_file bundles/{bundle.name}/configs/train.json"
    return {
        "command": f"{train} --dataset_dir DIR/{dataset_dir.name} --epochs {config['epochs']}",
        # The config is written as the training starts, the last checkpoint as it ends.
        "minutes": round((final.stat().st_mtime - config_path.stat().st_mtime) / 60, 1),
        "epochs": config["epochs"],
        "seed": config["seed"],
        "split_seed": config["split_seed"],
        "loss_config": config["loss_config"],
        "checkpoint": checkpoint,
        "n_validation": means["cases"],
        "metrics": means["metrics"],
    }


def _evaluate(bundle: Path, dataset_dir: Path, weights: Path, use_subvoxels: bool) -> dict[str, Any]:
    """Run the bundle's own evaluation and return the means of its table."""
    configs = [str(bundle / "configs" / name) for name in ("train.json", "evaluate.json")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(configs)]
        command += ["--dataset_dir", str(dataset_dir.resolve()), "--ckpt_path", str(weights), "--output_dir", folder]
        command += ["--validate::handlers::1::use_subvoxels", str(use_subvoxels)]
        subprocess.run(command, check=True)
        with open(Path(folder) / "evaluation.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    means = {
        row["class"]: {metric: round(float(row[metric]), 4) for metric in METRICS}
        for row in rows
        if row["case"] == "mean"
    }
    means["mean"] = means.pop("all")
    return {"cases": len({row["case"] for row in rows} - {"mean"}), "metrics": means}
