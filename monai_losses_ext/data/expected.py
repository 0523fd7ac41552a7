# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a dataset is to hold: channels and classes, of the Decathlon's task or of the dataset's own ``dataset.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_losses_ext.data.dataset import read_index
from monai_losses_ext.data.faults import Rules, as_json, make_rules
from monai_losses_ext.data.labels import LabelMap, named_labels, whole_map
from monai_losses_ext.data.tasks import TASKS, Task, get_task
from monai_losses_ext.errors import fail


@dataclass(frozen=True)
class Expected:
    """What the cases of a dataset are to have."""

    name: str
    classes: Mapping[int, str]  # names, background included
    rules: Rules
    warnings: Sequence[str] = ()  # what is odd about dataset.json
    problems: Sequence[str] = ()  # what of dataset.json no training can do with
    task: Task | None = None  # whose row says it; None where dataset.json does


def expected(
    folder: Path,
    task: str | None = None,
    ignore_label: int | Sequence[int] | None = None,
    label_map: LabelMap | None = None,
) -> Expected:
    """Return what a dataset is to hold.

    Args:
        folder: of the dataset.
        task: the Decathlon's task whose row counts; None for the folder's own ``dataset.json`` (``labels``, and
            ``modality`` or ``channel_names``), or, where that says neither, for the task that the folder is named
            after.
        ignore_label: value, or values, of voxels that nobody labeled.
        label_map: value in the label files to class.

    Raises:
        UserError: one line, where nothing tells what the dataset holds, or what tells it cannot be right.
    """
    index = read_index(folder)
    row = get_task(task) if task else _task_of(folder, index)
    own = None if task else _own(index)
    if own is None:
        if row is None:
            rule = "must tell what the dataset holds, with 'labels' and 'modality', or --task must be given"
            raise fail("dataset.json", rule, f"neither in {folder}", f" A task is one of {', '.join(TASKS)}.")
        classes = dict(enumerate(row.labels))
        rules = make_rules(len(row.channels), len(classes), ignore_label, label_map)
        return Expected(row.name, classes, rules, _odd_number(index), (), row)
    return _of_index(folder, index, own, row, ignore_label, whole_map(label_map))


def _of_index(
    folder: Path,
    index: Mapping[str, Any],
    own: tuple[int, dict[int, str]],
    row: Task | None,
    ignore_label: int | Sequence[int] | None,
    label_map: dict[int, int],
) -> Expected:
    """Return what ``dataset.json`` tells; the task that it is named after counts where the two agree in number."""
    channels, labels = own
    warnings, problems = _odd_number(index), []
    name = row.name if row else str(index.get("name") or folder.name)
    if row and (channels, len(labels)) != (len(row.channels), len(row.labels)):
        row = None
    if not label_map and sorted(labels) != list(range(len(labels))):
        label_map = {old: new for new, old in enumerate(sorted(labels)) if old != new}
        shown = ", ".join(map(str, sorted(labels)))
        problems = [f"numbers its labels {shown}; a training needs 0, 1, ...: --label_map '{as_json(label_map)}'"]
    classes: dict[int, str] = {}
    for old, label in labels.items():
        new = label_map.get(old, old)
        classes[new] = f"{classes[new]}, {label}" if new in classes else label
    classes = dict(sorted(classes.items()))
    rules = make_rules(channels, max(classes) + 1, ignore_label, label_map)
    return Expected(name, classes, rules, warnings, problems, row)


def _own(index: Mapping[str, Any]) -> tuple[int, dict[int, str]] | None:
    """Return the number of channels and the labels that ``dataset.json`` tells; None where it tells neither."""
    channels = index.get("modality", index.get("channel_names"))
    if index.get("labels") is None or channels is None:
        return None
    if not isinstance(channels, (Mapping, list)) or not channels:
        raise fail("dataset.json: modality", 'must name each channel, as {"0": "MRI"}', channels)
    return len(channels), named_labels(index) or {}


def _odd_number(index: Mapping[str, Any]) -> list[str]:
    told, listed = index.get("numTraining"), index.get("training")
    if told is None or not isinstance(listed, list) or told == len(listed):
        return []
    return [f"dataset.json says numTraining {told}, and lists {len(listed)} cases"]


def _task_of(folder: Path, index: Mapping[str, Any]) -> Task | None:
    """Return the Decathlon's task that a folder's name or its ``dataset.json`` tells."""
    phantoms = index.get("phantoms")
    told = [folder.name, phantoms.get("task") if isinstance(phantoms, dict) else None, index.get("name")]
    for name in told:
        for task in TASKS.values():  # the Decathlon's own files say Hippocampus for Task04_Hippocampus
            if isinstance(name, str) and name.lower() in (task.name.lower(), task.name.split("_", 1)[1].lower()):
                return task
    return None
