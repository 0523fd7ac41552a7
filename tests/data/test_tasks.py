# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The rows of tasks.json: what is in them fits together, and a wrong row is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_losses_ext.data.tasks import TASKS, TASKS_FILE, Task, get_task, read_tasks


def write_row(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a tasks file with the first real row, changed."""
    row = copy.deepcopy(json.loads(TASKS_FILE.read_text(encoding="utf-8"))[0])
    change(row)
    path = folder / "tasks.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_network_takes_the_patch_and_returns_a_channel_per_label(task: Task) -> None:
    network = ConfigParser({"network": task.training.network_def}).get_parsed_content("network")
    with torch.no_grad():
        logits = network(torch.zeros(1, len(task.channels), *task.training.patch_size))
    assert logits.shape == (1, len(task.labels), *task.training.patch_size)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_published_results_name_the_tasks_own_labels(task: Task) -> None:
    for result in task.published_results:
        assert result["source"]
        assert set(result["dice"]) <= set(task.labels)
        assert all(0 < dice < 1 for dice in result["dice"].values())


def test_hippocampus_row_has_the_facts_of_the_decathlon() -> None:
    task = get_task("Task04_Hippocampus")
    assert task.labels == ("background", "anterior", "posterior")
    assert (task.n_training, task.n_test) == (260, 130)
    assert task.nsd_tolerance_mm == 1.0
    assert task.licence == "CC BY-SA 4.0"


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
