# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The rows of tasks.json: what is in them fits together, and a wrong row is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_losses_ext.data.tasks import TASKS, TASKS_FILE, Task, get_task, read_tasks

WINDOW = {"rule": "window", "low": -100, "high": 200, "mean": 50, "std": 40}


def write_row(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a tasks file with the hippocampus's row, changed."""
    rows = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    row = next(row for row in rows if row["name"] == "Task04_Hippocampus")
    change(row)
    path = folder / "tasks.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_network_takes_the_patch_and_returns_a_channel_per_label(task: Task) -> None:
    with torch.device("meta"):  # shapes without numbers, so that no patch is too large
        network = ConfigParser({"network": task.training.network_def}).get_parsed_content("network")
        logits = network(torch.zeros(1, len(task.channels), *task.training.patch_size))
    assert logits.shape == (1, len(task.labels), *task.training.patch_size)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_published_results_name_the_tasks_own_labels(task: Task) -> None:
    for result in task.published_results:
        assert result["source"]
        assert set(result["dice"]) <= set(task.labels)
        assert all(0 < dice < 1 for dice in result["dice"].values())
        assert result["dice"] or 0 < result["mean_dice"] < 1  # of sources that give no more


# Of each task's dataset.json: labeled and test cases, channels, labels; of Antonelli et al. (2022): tolerance in mm.
FACTS = {
    "Task01_BrainTumour": (484, 266, 4, "edema, non-enhancing tumor, enhancing tumour", 5),
    "Task02_Heart": (20, 10, 1, "left atrium", 4),
    "Task03_Liver": (131, 70, 1, "liver, cancer", 7),
    "Task04_Hippocampus": (260, 130, 1, "anterior, posterior", 1),
    "Task05_Prostate": (32, 16, 2, "PZ, TZ", 4),
    "Task06_Lung": (63, 32, 1, "cancer", 2),
    "Task07_Pancreas": (281, 139, 1, "pancreas, cancer", 5),
    "Task08_HepaticVessel": (303, 140, 1, "Vessel, Tumour", 3),
    "Task09_Spleen": (41, 20, 1, "spleen", 3),
    "Task10_Colon": (126, 64, 1, "colon cancer primaries", 4),
}


def test_rows_have_the_facts_of_the_decathlon() -> None:
    assert list(TASKS) == list(FACTS)
    for name, (n_training, n_test, n_channels, labels, tolerance) in FACTS.items():
        task = TASKS[name]
        assert (task.n_training, task.n_test, len(task.channels)) == (n_training, n_test, n_channels)
        assert ", ".join(task.labels) == f"background, {labels}"
        assert task.nsd_tolerance_mm == tolerance
        assert task.license == "CC BY-SA 4.0"


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_turns_stay_in_the_plane_of_flat_voxels(task: Task) -> None:
    """Rotations are of voxels: across the planes of voxels that are twice as high as wide, one would shear."""
    spacing = task.training.spacing_mm or task.typical_spacing_mm
    if spacing[2] > 1.8 * spacing[0]:
        assert task.training.rotate_range_rad[:2] == (0, 0)
    assert task.training.rotate_range_rad[2] > 0


def test_unknown_task_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"task: must be one of .* got 'Task04_Hipocampus'\. Did you mean 'Task04_Hip"):
        get_task("Task04_Hipocampus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(modalty="MRI"), r"got 'modalty'\. Did you mean 'modality'\?"),
        (lambda row: row.pop("license"), "none for license"),
        (lambda row: row["training"].update(epoch=3), r"got 'epoch'\. Did you mean 'epochs'\?"),
        (lambda row: row["training"].pop("patch_size"), "none for patch_size"),
        (lambda row: row["training"].update(epochs=0), "epochs: must be .* of at least 1; got 0"),
        (lambda row: row["training"].update(epochs="many"), "epochs: must be .* got 'many'"),
        (lambda row: row["training"].update(cache_rate=20), "cache_rate: must be .* between 0 and 1; got 20"),
        (lambda row: row.update(references="a book"), "references: must be .* got 'a book'"),
        (lambda row: row.pop("training"), "none for training"),
        (lambda row: row.update(metrics=["dice", "recal"]), r"metrics: must be .* got 'recal'\. Did you mean 'recall'"),
        (lambda row: row.update(metrics=["nsd"]), r"metrics: must have dice, the bundle's key metric; got \('nsd',\)"),
        (lambda row: row.update(metrics="dice"), "metrics: must be a list of text; got 'dice'"),
        (lambda row: row["training"].update(patch_size=[40, 40]), r"patch_size: must have one value per axis \(3\)"),
        (lambda row: row["training"].update(spacing_mm=[1.0, 1.0]), r"spacing_mm: must have one value per axis \(3\)"),
        (lambda row: row["training"].update(spacing_mm=[1.0, 1.0, 0.0]), "spacing_mm: must be above 0"),
        (lambda row: row["training"].update(cache_on_disk="yes"), "cache_on_disk: must be true or false; got 'yes'"),
        (lambda row: row["training"].update(flip_axes=[3]), "flip_axes: must be axes between 0 and 2"),
        (
            lambda row: row["training"]["network_def"].update(out_channels=2),
            "network_def out_channels: must be 3; got 2",
        ),
        (lambda row: row["channels"].append("T2"), "network_def in_channels: must be 2; got 1"),
        (lambda row: row.update(labels=["anterior", "posterior", "other"]), "labels: must be 'background' and then"),
        (lambda row: row.update(labels=["background", "body", "body"]), "labels: must be 'background' and then"),
        (lambda row: row.update(intensity={"rule": "zscore"}), r"intensity rule: .* Did you mean 'z_score'\?"),
        (
            lambda row: row.update(intensity={"rule": "window", "low": 0}),
            "intensity: must have the keys high, low, mean",
        ),
        (lambda row: row.update(intensity={**WINDOW, "std": 0}), "intensity: std: must be a number above 0; got 0"),
        (lambda row: row.update(intensity={**WINDOW, "low": "-100"}), "intensity: low: must be a number; got '-100'"),
        (lambda row: row.update(intensity={**WINDOW, "low": 200}), "intensity: low: must be below high; got 200"),
        (lambda row: row.update(labels=["background", 1, 2]), "labels: must be a list of text; got"),
        (lambda row: row.update(n_test=-3), "n_test: must be a whole number of at least 0; got -3"),
        (
            lambda row: row.update(typical_shape=[0, 0, 0]),
            "typical_shape: must be a list of whole numbers of at least 1",
        ),
        (lambda row: row.update(typical_spacing_mm=["a", 1, 1]), "typical_spacing_mm: must be a list of numbers; got"),
        (lambda row: row["training"].update(patch_size=[33, 48, 32]), r"patch_size: must be multiples of \[8, 8, 8\]"),
        (lambda row: row["training"].update(patch_size=[32.0, 48, 32]), "patch_size: must be a list of whole numbers"),
        (
            lambda row: row["training"]["network_def"].update(strides=[1, 2, 0]),
            "strides: must be whole numbers above 0",
        ),
        (lambda row: row["training"].update(loss_config="dise"), r"loss: type: .* got 'dise'\. Did you mean 'dice'\?"),
        (lambda row: row["training"]["optimizer"].pop("lr"), "optimizer: must have lr"),
        (lambda row: row["published_results"][0].pop("source"), "published_results: .* got 'none for source'"),
        (lambda row: row.update(phantom={}), "phantom: fields: must all be given; got 'none for background, bias"),
        (lambda row: row["phantom"].update(noize=1), r"phantom: field: .* got 'noize'\. Did you mean 'noise'\?"),
        (lambda row: row["phantom"]["pose"].update(mirror=2), "phantom: pose: mirror: must be true or false; got 2"),
        (lambda row: row["phantom"]["structures"][1].update(raddi=1), r"structure 1: field: .* Did you mean 'radii'\?"),
        (lambda row: row["phantom"]["structures"][0].pop("points"), "structure 0: points: must be given for .* tube"),
        (lambda row: row["phantom"]["structures"][0].update(inside="organ"), "structure 0: inside: .* got 'organ'"),
        (lambda row: row["phantom"].update(gain=[2, 1]), r"phantom: gain: must be \[least, most\]; got \[2, 1\]"),
    ],
)
def test_wrong_row_is_a_one_line_error_that_names_the_row_and_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_tasks(write_row(tmp_path, change))
    assert str(caught.value).startswith("tasks.json, Task04_Hippocampus: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('["Task04"]', "tasks.json, row 0: row: must be an object; got 'Task04'."),
        ("{}", "tasks.json: rows: must be a list; got {}."),
        ("[", "tasks.json: Expecting value: line 1 column 2 (char 1)"),
    ],
)
def test_file_that_holds_no_rows_is_a_one_line_error(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "tasks.json").write_text(rows, encoding="utf-8")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        read_tasks(tmp_path / "tasks.json")
    assert str(caught.value) == message


@pytest.mark.parametrize("key", ["name", "bundle"])
def test_two_rows_of_one_name_are_refused(tmp_path: Path, key: str) -> None:
    first, second, *_ = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    (tmp_path / "tasks.json").write_text(json.dumps([first, {**second, key: first[key]}]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{key}: must be of one row alone; got '{first[key]}'"):
        read_tasks(tmp_path / "tasks.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"modality"', '"modalty"', r"field: .* got 'modalty'\. Did you mean 'modality'\?"),
        ('"warmup_fraction": 0.05', '"warmup_fraction": 5', "training: warmup_fraction: must be .* got 5"),
    ],
)
def test_wrong_row_of_the_package_ends_render_and_check_in_one_line_and_no_import(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    package = Path(shutil.copytree(TASKS_FILE.parents[1], tmp_path / "monai_losses_ext"))
    text = TASKS_FILE.read_text(encoding="utf-8")
    assert old in text
    (package / "data" / "tasks.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    (tmp_path / "bundles" / "msd_heart_mri_segmentation").mkdir(parents=True)
    script = """
import sys
from monai_losses_ext.cli import main
import monai_losses_ext.data.tasks, monai_losses_ext.data.check, monai_losses_ext.data.seeded
print("imported")
for action in ("render", "check"):
    print(main(["bundles", action]))
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["imported", "1", "1"], done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(rf"error: tasks\.json, Task01_BrainTumour: {message}", line)


def test_a_new_task_is_a_new_row(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row.update(name="Task11_Made_Up", modality="CT", channels=["CT", "PET"], labels=["background", "organ"])
        row.update(intensity={"rule": "window", "low": -100, "high": 200, "mean": 50, "std": 40})
        row["training"]["network_def"].update(in_channels=2, out_channels=2)

    task = read_tasks(write_row(tmp_path, change))["Task11_Made_Up"]
    assert task.channels == ("CT", "PET")
    assert task.intensity["high"] == 200
