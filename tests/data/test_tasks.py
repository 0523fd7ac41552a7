# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The rows of tasks.json: what is in them fits together, and a wrong row is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_losses_ext.data.tasks import TASKS, TASKS_FILE, Task, get_task, read_tasks


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


# Of each task's dataset.json: labelled and test cases, channels, labels; of Antonelli et al. (2022): tolerance in mm.
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
        assert task.licence == "CC BY-SA 4.0"


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
        (lambda row: row.pop("licence"), "none for licence"),
        (lambda row: row["training"].update(epoch=3), r"got 'epoch'\. Did you mean 'epochs'\?"),
        (lambda row: row["training"].pop("patch_size"), "none for patch_size"),
        (lambda row: row["training"].update(epochs=0), "epochs: must be .* of at least 1; got 0"),
        (lambda row: row["training"].update(epochs="many"), "epochs: must be .* got 'many'"),
        (lambda row: row["training"].update(cache_rate=20), "cache_rate: must be .* between 0 and 1; got 20"),
        (lambda row: row.update(references="a book"), "references: must be .* got 'a book'"),
        (lambda row: row.pop("training"), "none for training"),
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
    ],
)
def test_wrong_row_is_a_one_line_error_that_names_the_row_and_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_tasks(write_row(tmp_path, change))
    assert str(caught.value).startswith("tasks.json, Task04_Hippocampus: ")
    assert "\n" not in str(caught.value)


def test_a_new_task_is_a_new_row(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row.update(name="Task11_Made_Up", modality="CT", channels=["CT", "PET"], labels=["background", "organ"])
        row.update(intensity={"rule": "window", "low": -100, "high": 200, "mean": 50, "std": 40})
        row["training"]["network_def"].update(in_channels=2, out_channels=2)

    task = read_tasks(write_row(tmp_path, change))["Task11_Made_Up"]
    assert task.channels == ("CT", "PET")
    assert task.intensity["high"] == 200
