# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses against each other on real data: the same bundle, budget and seed, judged on cases that training never saw."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_losses_ext.benchmark.quality import measure_quality

CONFIGS = Path(__file__).parents[2] / "configs"
REGIONS = [
    {"type": "dice", "weight": 0.5, "include_background": False, "batch": True},
    {"type": "focal", "weight": 0.3, "gamma": 2.0},
]
BOUNDARY = {"type": "boundary", "weight": 0.2, "include_background": False}
LEARNED = {"type": "compound", "components": [*REGIONS, BOUNDARY], "learnable_weights": True}


@dataclass(frozen=True)
class Run:
    """A training: overlays of ``configs/`` and what is set on the command line."""

    title: str
    overlays: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


RUNS = {
    "dice_ce": Run("dice + cross-entropy"),
    "dice_focal_boundary": Run(
        "dice + focal + boundary, rebalance", ("precomputed_maps.json", "losses/dice_focal_boundary.json")
    ),
    "learned": Run("dice + focal + boundary, learned weights", ("precomputed_maps.json",), {"loss_config": LEARNED}),
}


def measure_losses(bundle: Path, dataset_dir: Path, folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Train a bundle with each loss of ``RUNS`` and return how its last network does on the held-out cases.

    Args:
        bundle: the bundle's folder.
        dataset_dir: its data.
        folder: a folder per training goes here; a training that is complete there already is not run again.
        epochs: of each training.
    """
    rows = []
    for name, run in RUNS.items():
        root = folder / name
        files = [str(bundle / "configs" / "train.json"), *(str(CONFIGS / overlay) for overlay in run.overlays)]
        options = {"epochs": epochs, "val_interval": max(1, epochs // 3), **run.options}
        arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        if not _is_trained(root, epochs):
            command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(files)]
            command += ["--bundle_root", str(root), "--dataset_dir", str(dataset_dir.resolve()), *arguments]
            subprocess.run(command, check=True)
        rows.append(
            {
                "loss": run.title,
                **measure_quality(bundle, dataset_dir, root, "model_final.pt"),
                "command": " ".join(
                    ["monai.bundle run, configs", ", ".join(["train.json", *run.overlays]), *arguments]
                ),
                **_first_and_last(root / "output" / "curves.csv"),
            }
        )
    return rows


def _is_trained(root: Path, epochs: int) -> bool:
    """Tell whether a folder holds a complete training of that length; its last network is written at its end."""
    config = root / "output" / "train_config.json"
    return (root / "models" / "model_final.pt").is_file() and json.loads(config.read_text())["epochs"] == epochs


def _first_and_last(curves: Path) -> dict[str, Any]:
    """Return the terms and weights of the first and the last epoch."""
    with open(curves, newline="") as file:
        epochs = list(csv.DictReader(file))
    kept = [name for name in epochs[0] if name.startswith(("loss", "weight_"))]
    first, last = ({name: round(float(epoch[name]), 4) for name in kept} for epoch in (epochs[0], epochs[-1]))
    return {"first_epoch": first, "last_epoch": last}


def losses_table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, and the terms and weights at both ends of the trainings."""
    lines = ["| loss | Dice | NSD at 1 mm | NSD at 1 mm, by voxels | HD95, mm | minutes |", "|---|---|---|---|---|---|"]
    for row in rows:
        mean = row["metrics"]["mean"]
        numbers = f"{mean['dice']:.4f} | {mean['nsd']:.4f} | {mean['nsd_voxelwise']:.4f} | {mean['hd95']:.3f}"
        lines.append(f"| {row['loss']} | {numbers} | {row['minutes']:.1f} |")
    lines += ["", "| loss | | first epoch | last epoch |", "|---|---|---|---|"]
    for row in rows:
        for name, first in row["first_epoch"].items():
            lines.append(f"| {row['loss']} | `{name}` | {first:.4f} | {row['last_epoch'][name]:.4f} |")
    return "\n".join(lines) + "\n"
