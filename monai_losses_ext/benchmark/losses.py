# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses against each other on real data: the same bundle, budget and seed, judged on cases that training never saw."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_losses_ext.benchmark.quality import differing_keys, evaluate_training, started_and_ended, stored_config
from monai_losses_ext.errors import fail
from monai_losses_ext.shipped import shipped_folder

REGIONS = [
    {"type": "dice", "weight": 0.5, "include_background": False, "batch": True},
    {"type": "focal", "weight": 0.3},
]
BOUNDARY = {"type": "boundary", "weight": 0.2, "include_background": False}
LEARNED = {"type": "compound", "components": [*REGIONS, BOUNDARY], "learnable_weights": True}
# As in the overlay that schedules the weights, but the background does not count, as in the bundle's own loss.
SCHEDULED = {
    "type": "compound",
    "components": [
        {**part, "weight": weight} for part, weight in zip([*REGIONS, BOUNDARY], (0.5, 0.5, 0.0), strict=True)
    ],
}


@dataclass(frozen=True)
class Run:
    """A training: overlays of ``configs/`` and what is set on the command line."""

    title: str
    overlays: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


RUNS = {
    "dice_ce": Run("dice + cross-entropy"),
    "dice_focal_boundary": Run(
        "dice + focal + boundary, rebalance",
        ("precomputed_maps.json", "losses/dice_focal_boundary.json"),
        {"loss_config": SCHEDULED},
    ),
    "learned": Run("dice + focal + boundary, learned weights", ("precomputed_maps.json",), {"loss_config": LEARNED}),
}


def measure_losses(bundle: Path, dataset_dir: Path, folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Train a bundle with each loss of ``RUNS`` and return how its last network does on the held-out cases.

    Args:
        bundle: the bundle's folder.
        dataset_dir: its data.
        folder: a folder per training goes here; one that is complete there already, by the same configs, data and
            options, is not run again.
        epochs: of each training.
    """
    rows = []
    for name, run in RUNS.items():
        root = folder / name
        command = train(bundle, dataset_dir, root, run, epochs)
        measured = evaluate_training(bundle, dataset_dir, root, "model_final.pt")
        ends = _first_and_last(root / "curves.csv")
        rows.append({"loss": run.title, "command": command, **measured, **ends})
    return rows


def train(bundle: Path, dataset_dir: Path, root: Path, run: Run, epochs: int) -> str:
    """Train a bundle unless this very training is complete in ``root``, and return the command of what is there.

    Args:
        bundle: the bundle's folder.
        dataset_dir: its data.
        root: where the training goes.
        run: its overlays and options.
        epochs: its length.

    Raises:
        UserError: where the folder holds another training.
    """
    files, options = command_of(bundle, run, epochs)
    if not _is_trained(root, files, options, dataset_dir):
        if root.exists():
            rule = "must be another one, since nothing is overwritten: it holds another training, or half of one"
            raise fail("--folder", rule, str(root))
        command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
        command += ["--config_file", str([str(path) for path in files])]
        command += ["--output_dir", str(root.parent), "--run_name", root.name]
        command += ["--dataset_dir", str(dataset_dir.resolve()), *_words(options)]
        subprocess.run(command, check=True)
    config = stored_config(root)
    words = _words({key: config[key] for key in options})
    return " ".join(["monai.bundle run, configs", ", ".join(["train.json", *run.overlays]), *words])


def command_of(bundle: Path, run: Run, epochs: int) -> tuple[list[Path], dict[str, Any]]:
    """Return the config files and the options of a training's command."""
    files = [bundle / "configs" / "train.json", *(shipped_folder("configs") / overlay for overlay in run.overlays)]
    return files, {"epochs": epochs, "val_interval": max(1, epochs // 3), **run.options}


def _words(options: Mapping[str, Any]) -> list[str]:
    """Return options as the words of a command line."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def _is_trained(root: Path, files: Sequence[Path], options: Mapping[str, Any], dataset_dir: Path) -> bool:
    """Tell whether a folder holds a complete training by these configs, options and data."""
    try:
        config = stored_config(root)
        started_and_ended(root)
    except ValueError:
        return False
    return not differing_keys(config, files, options, dataset_dir)


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
