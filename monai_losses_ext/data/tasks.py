# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The tasks of the Medical Segmentation Decathlon: one row of facts each, in ``tasks.json``.

The row is the only place that knows a task. The bundle template, the phantoms and the data checks all read it, so a new
task is a new row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from monai_losses_ext.data.patch import check_patch
from monai_losses_ext.data.rows import (
    Count,
    NotNegative,
    Number,
    Positive,
    Result,
    Share,
    Window,
    ZScore,
    check_names,
    check_object,
    check_phantom,
)
from monai_losses_ext.errors import UserError, fail, one_of
from monai_losses_ext.losses.factory import get_loss
from monai_losses_ext.metrics.names import ALL_METRICS

TASKS_FILE = Path(__file__).with_name("tasks.json")

EVALUATED = tuple(name for name in ALL_METRICS if name != "cldice")  # which is for tubes, slow, and needs an extra
INTENSITY_RULES: dict[str, Any] = {"z_score": ZScore, "window": Window}


@dataclass(frozen=True)
class Training:
    """How a task is trained; every value can be overridden on the bundle's command line."""

    network_def: dict[str, Any]  # MONAI config of the network
    loss_config: str | dict[str, Any]  # what get_loss takes
    optimizer: dict[str, Any]  # MONAI config without the parameters; its "lr" is the peak of the schedule
    warmup_fraction: Share  # share of the training in which the learning rate rises to its peak
    epochs: Count
    val_interval: Count  # epochs between validations
    batch_size: Count  # cases per step
    spacing_mm: Sequence[float] | None  # voxel size that images are resampled to; None: as stored
    patch_size: Sequence[Count]  # voxels; a multiple of the product of the network's strides
    patches_per_case: Count  # so a step has batch_size * patches_per_case patches
    flip_axes: Sequence[int]  # spatial axes (in RAS) that may be mirrored without changing what the labels mean
    rotate_range_rad: Sequence[NotNegative]  # per axis, drawn from -r..r
    zoom_range: Sequence[Share]  # per axis, drawn from 1-z..1+z
    translate_range_voxels: Sequence[Number]  # per axis, drawn from -t..t
    inference_overlap: Share  # of neighboring sliding windows, 0..1
    cache_on_disk: bool  # the task is large: prepared cases are kept on disk, predictions stitched in the CPU's memory
    cache_rate: Share  # share of the cases kept in memory, 0..1
    memory_gb: Positive  # what a step needs in float32, see bundlekit/memory.py


@dataclass(frozen=True)
class Task:
    """The facts of one task. Lengths are in millimeters; ``labels[i]`` is the name of the label value i."""

    name: str  # as MSD names its folder
    bundle: str  # name of the bundle
    title: str
    description: str
    modality: str  # "MRI" or "CT"
    channels: Sequence[str]
    labels: Sequence[str]
    n_training: Count  # labeled cases in MSD's release
    n_test: Number
    typical_shape: Sequence[Count]  # median, voxels
    typical_spacing_mm: Sequence[float]  # median
    nsd_tolerance_mm: Positive  # boundary tolerance of the surface Dice
    source: str
    license: str
    license_url: str
    references: Sequence[str]
    published_results: Sequence[dict[str, Any]]
    intensity: dict[str, Any]  # see INTENSITY_RULES
    training: Training
    phantom: dict[str, Any]  # see rows.py and phantoms.py
    authors: str = ""  # of the bundle, where it is not one of the Decathlon's
    metrics: Sequence[str] = EVALUATED  # what an evaluation reports

    __optional_keys__ = frozenset({"authors", "metrics"})


def check_task(task: Task) -> None:
    """Check that what a row says fits together.

    ``render``, ``check`` and the tests do it, and no import: a row of the package changes with its source alone.

    Raises:
        UserError: one line, with the field.
    """
    check_object(Task, vars(task))
    check_object(Training, vars(task.training), "training: ")
    one_of("modality", task.modality, ("MRI", "CT"))
    if task.labels[:1] != ("background",) or len(set(task.labels)) < max(2, len(task.labels)):
        raise fail("labels", "must be 'background' and then one unique name per label value", task.labels)
    rule = one_of("intensity rule", task.intensity.get("rule"), INTENSITY_RULES)
    keys = sorted(INTENSITY_RULES[rule].__annotations__)
    if sorted(task.intensity) != keys:
        raise fail("intensity", f"must have the keys {', '.join(keys)}", task.intensity)
    check_object(INTENSITY_RULES[rule], task.intensity, "intensity: ")
    if rule == "window" and task.intensity["low"] >= task.intensity["high"]:
        raise fail("intensity: low", "must be below high", task.intensity["low"])
    for name in task.metrics:
        one_of("metrics", name, ALL_METRICS)
    if "dice" not in task.metrics:
        raise fail("metrics", "must have dice, the bundle's key metric", task.metrics)
    for result in task.published_results:
        check_object(Result, result, "published_results: ")
    _check_axes(task)
    _check_network(task)
    check_phantom(task.phantom)
    get_loss(task.training.loss_config)


def _check_axes(task: Task) -> None:
    """Check that everything that is given per axis is given for each of the task's axes."""
    n_axes = len(task.typical_shape)
    per_axis = {"typical_spacing_mm": task.typical_spacing_mm}
    for name in ("patch_size", "rotate_range_rad", "zoom_range", "translate_range_voxels"):
        per_axis[name] = getattr(task.training, name)
    if task.training.spacing_mm is not None:
        per_axis["spacing_mm"] = task.training.spacing_mm
    for name, values in per_axis.items():
        if len(values) != n_axes:
            raise fail(name, f"must have one value per axis ({n_axes})", values)
    spacings = (*task.typical_spacing_mm, *(task.training.spacing_mm or ()))
    if any(mm <= 0 for mm in spacings):
        raise fail("spacing_mm", "must be above 0", spacings)
    if any(axis not in range(n_axes) for axis in task.training.flip_axes):
        raise fail("flip_axes", f"must be axes between 0 and {n_axes - 1}", task.training.flip_axes)


def _check_network(task: Task) -> None:
    """Check that the network has the task's channels and labels and takes the patch, and what the README reads."""
    for key in ("_target_", "lr"):
        if key not in task.training.optimizer:
            raise fail("optimizer", f"must have {key}", task.training.optimizer)
    for key, names in (("in_channels", task.channels), ("out_channels", task.labels)):
        if task.training.network_def.get(key) != len(names):
            raise fail(f"network_def {key}", f"must be {len(names)}", task.training.network_def.get(key))
    network_def = task.training.network_def
    check_patch(task.training.patch_size, network_def.get("strides", []), network_def)


Row = TypeVar("Row", Task, Training)


def read_tasks(path: str | Path = TASKS_FILE, check: bool = True) -> dict[str, Task]:
    """Read the rows of a tasks file.

    Args:
        path: JSON file, a list of rows.
        check: whether to check what the fields hold, too, and not their names alone.

    Returns:
        The tasks by name, in the file's order.

    Raises:
        UserError: one line that names the file, the row and the field that is wrong.
    """
    tasks: dict[str, Task] = {}
    where = Path(path).name
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise fail("rows", "must be a list", rows)
        for i, row in enumerate(rows):
            named = isinstance(row, dict) and "name" in row
            where = f"{Path(path).name}, {row['name'] if named else f'row {i}'}"
            task = _build(Task, row)
            if check:
                check_task(task)
            for key in ("name", "bundle"):
                if getattr(task, key) in [getattr(other, key) for other in tasks.values()]:
                    raise fail(key, "must be of one row alone", getattr(task, key))
            tasks[task.name] = task
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    return tasks


def _build(cls: type[Row], values: Any, where: str = "") -> Row:
    """Make a row's dataclass of a JSON object: exactly its fields, lists as tuples."""
    check_names(cls, values, where)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if "training" in fields:
        fields["training"] = _build(Training, fields["training"], "training: ")
    return cls(**fields)


class _Rows(Mapping[str, Task]):
    """The package's tasks by name. They are read when one is first asked for: an import reads nothing."""

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        return read_tasks(check=False)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


TASKS = _Rows()


def get_task(name: str) -> Task:
    """Return the task called ``name``, such as ``Task04_Hippocampus``.

    Raises:
        UserError: if there is none, with the names there are and the nearest one.
    """
    return TASKS[one_of("task", name, TASKS)]
