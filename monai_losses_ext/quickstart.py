# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The quick start: synthetic cases, a training and an evaluation through ``monai.bundle run``, and where to look."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.tasks import get_task
from monai_losses_ext.errors import UserError
from monai_losses_ext.extras import need
from monai_losses_ext.shipped import shipped_folder

TASK = "Task04_Hippocampus"
SEED = 0
# Small enough for a few minutes on two CPU cores.
CASES = 60
EPOCHS = 17
VALIDATIONS = 4  # points of the curve that shows Dice


def quickstart(
    out: str | Path | None = None, epochs: int = EPOCHS, cases: int = CASES, bundles: str | Path | None = None
) -> Path:
    """Train and evaluate the hippocampus bundle on synthetic cases, and print the results and where they are.

    Phantoms that an earlier quick start made are used again; every training has a folder of its own.

    Args:
        out: folder for phantoms and results; default ``~/.cache/monai_losses_ext/quickstart``.
        epochs: length of the training.
        cases: number of synthetic cases; a fifth of them is held out of the training, for the evaluation.
        bundles: folder of the project's bundles; default those that come with the package.

    Returns:
        The folder with the results.

    Raises:
        UserError: for a wrong number, if there are no bundles, or without the packages of the extra ``bundles``.
        RuntimeError: if a step failed; the message names the command, whose own messages stand above it.
    """
    need("quickstart", "bundles")
    number("epochs", epochs, Limits(minimum=1))
    number("cases", cases, Limits(minimum=2))
    configs = _configs_folder(bundles)
    folder = Path(out).expanduser().absolute() if out else cache_dir() / "quickstart"
    results = _new_folder(folder)
    print(f"[1/3] {cases} synthetic cases in the manner of {TASK}: no medical data")
    dataset_dir = _phantoms(folder / "phantoms", cases)
    overrides = ["--dataset_dir", str(dataset_dir), "--output_dir", str(results)]
    interval = max(1, epochs // VALIDATIONS)
    print(f"[2/3] Training, {epochs} epochs, validated every {interval}")
    length = ["--epochs", str(epochs), "--val_interval", str(interval)]
    _run_bundle(str(configs / "train.json"), [*overrides, "--run_name", "train", *length])
    print("[3/3] Evaluation on the cases that were held out")
    _run_bundle(
        str([str(configs / "train.json"), str(configs / "evaluate.json")]), [*overrides, "--run_name", "evaluate"]
    )
    _print_report(results)
    return results


def cache_dir() -> Path:
    """Return the user's cache folder of this package; ``XDG_CACHE_HOME`` moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "monai_losses_ext"


def _configs_folder(bundles: str | Path | None) -> Path:
    """Return the folder of the bundle's configs."""
    root = Path(bundles).expanduser().absolute() if bundles else shipped_folder("bundles")
    configs = root / get_task(TASK).bundle / "configs"
    if not (configs / "train.json").is_file():
        raise UserError(f"bundles: must be a folder with {get_task(TASK).bundle}; got {root}.")
    return configs


def _new_folder(folder: Path) -> Path:
    """Make and return a folder for this training, named by the time; a second one in the same second gets a number."""
    name = time.strftime("run_%Y%m%d_%H%M%S")
    taken = len(list(folder.glob(f"{name}*")))
    results = folder / (f"{name}_{taken + 1}" if taken else name)
    results.mkdir(parents=True)
    return results


def _phantoms(folder: Path, cases: int) -> Path:
    """Return a folder with the phantoms, which are made unless they are there already."""
    from monai_losses_ext.data.phantoms import make_phantoms, phantom_origin, phantom_recipe  # needs the extra

    if phantom_origin(folder) == phantom_recipe(get_task(TASK), cases, SEED):
        print(f"      found in {folder}")
    else:
        print(f"      writing to {make_phantoms(TASK, folder, cases, SEED)}")
    return folder


def _run_bundle(config_file: str, overrides: list[str]) -> None:
    """Run a bundle as a user would, with what it prints going to the terminal.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config_file, *overrides]
    shown = " ".join(f'"{part}"' if "'" in part else shlex.quote(part) for part in command)
    print(f"      {shown}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RuntimeError(f"exit status {status} (its messages are above) of: {shown}")


def _print_report(results: Path) -> None:
    """Print the means of the evaluation and the places of everything that was written."""
    with open(results / "evaluate" / "evaluation.csv", newline="") as file:
        means = [row for row in csv.DictReader(file) if row["case"] == "mean"]
    print(f"\n{'held-out cases, mean':24}{'Dice':>8}{'NSD':>8}{'HD95 (mm)':>12}")
    for row in means:
        print(f"{row['class']:24}{float(row['dice']):8.3f}{float(row['nsd']):8.3f}{float(row['hd95']):12.2f}")
    print(f"\nResults   {results}")
    for what, pattern in (("Pictures", "*/*.png"), ("Table", "*/*.csv"), ("Weights", "train/model*.pt")):
        for path in sorted(results.glob(pattern)):
            print(f"{what:10}{path}")
    store = os.environ.get("MLFLOW_TRACKING_URI") or _store(results)
    print(f"{'MLflow':10}{store}")
    print(f"{'':10}to browse it: {shlex.join([sys.executable, '-m', 'mlflow', 'ui', '--backend-store-uri', store])}")


def _store(results: Path) -> str:
    """Return the address of the MLflow store that the runs of a folder share, with what it reads otherwise escaped."""
    return f"sqlite:///{results / 'mlruns.db'}".replace("%", "%25").replace("?", "%3F")
