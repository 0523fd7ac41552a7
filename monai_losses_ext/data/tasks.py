# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The tasks of the Medical Segmentation Decathlon: one row of facts each, in ``tasks.json``.

The row is the only place that knows a task. The bundle template, the phantoms and the data checks all read it, so a new
task is a new row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
    check_object,
    check_phantom,
)
from monai_losses_ext.errors import fail, one_of
from monai_losses_ext.losses.factory import get_loss

TASKS_FILE = Path(__file__).with_name("tasks.json")

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
    inference_overlap: Share  # of neighbouring sliding windows, 0..1
    cache_on_disk: bool  # the task is large: prepared cases are kept on disk, predictions stitched in the CPU's memory
    cache_rate: Share  # share of the cases kept in memory, 0..1
    memory_gb: Positive  # what a step needs in float32, see bundlekit/memory.py


@dataclass(frozen=True)
class Task:
    """The facts of one task. Lengths are in millimetres; ``labels[i]`` is the name of the label value i."""

    name: str  # as MSD names its folder
    bundle: str  # name of the bundle
    title: str
    description: str
    modality: str  # "MRI" or "CT"
    channels: Sequence[str]
    labels: Sequence[str]
    n_training: Count  # labelled cases in MSD's release
    n_test: Number
    typical_shape: Sequence[Count]  # median, voxels
    typical_spacing_mm: Sequence[float]  # median
    nsd_tolerance_mm: Positive  # boundary tolerance of the surface Dice
    source: str
    licence: str
    licence_url: str
    references: Sequence[str]
    published_results: Sequence[dict[str, Any]]
    intensity: dict[str, Any]  # see INTENSITY_RULES
    training: Training
    phantom: dict[str, Any]  # see rows.py and phantoms.py

    def __post_init__(self) -> None:
        one_of("modality", self.modality, ("MRI", "CT"))
        if self.labels[:1] != ("background",) or len(set(self.labels)) < max(2, len(self.labels)):
            raise fail("labels", "must be 'background' and then one unique name per label value", self.labels)
        rule = one_of("intensity rule", self.intensity.get("rule"), INTENSITY_RULES)
        keys = sorted(INTENSITY_RULES[rule].__annotations__)
        if sorted(self.intensity) != keys:
            raise fail("intensity", f"must have the keys {', '.join(keys)}", self.intensity)
        check_object(INTENSITY_RULES[rule], self.intensity, "intensity: ")
        if rule == "window" and self.intensity["low"] >= self.intensity["high"]:
            raise fail("intensity: low", "must be below high", self.intensity["low"])
        for result in self.published_results:
            check_object(Result, result, "published_results: ")
        self._check_axes()
        self._check_network()
        check_phantom(self.phantom)
        get_loss(self.training.loss_config)

    def _check_axes(self) -> None:
        """Check that everything that is given per axis is given for each of the task's axes."""
        n_axes = len(self.typical_shape)
        per_axis = {"typical_spacing_mm": self.typical_spacing_mm}
        for name in ("patch_size", "rotate_range_rad", "zoom_range", "translate_range_voxels"):
            per_axis[name] = getattr(self.training, name)
        if self.training.spacing_mm is not None:
            per_axis["spacing_mm"] = self.training.spacing_mm
        for name, values in per_axis.items():
            if len(values) != n_axes:
                raise fail(name, f"must have one value per axis ({n_axes})", values)
        spacings = (*self.typical_spacing_mm, *(self.training.spacing_mm or ()))
        if any(mm <= 0 for mm in spacings):
            raise fail("spacing_mm", "must be above 0", spacings)
        if any(axis not in range(n_axes) for axis in self.training.flip_axes):
            raise fail("flip_axes", f"must be axes between 0 and {n_axes - 1}", self.training.flip_axes)

    def _check_network(self) -> None:
        """Check that the network has the task's channels and labels and takes the patch, and what the README reads."""
        for key in ("_target_", "lr"):
            if key not in self.training.optimizer:
                raise fail("optimizer", f"must have {key}", self.training.optimizer)
        for key, names in (("in_channels", self.channels), ("out_channels", self.labels)):
            if self.training.network_def.get(key) != len(names):
                raise fail(f"network_def {key}", f"must be {len(names)}", self.training.network_def.get(key))
        network_def = self.training.network_def
        check_patch(self.training.patch_size, network_def.get("strides", []), network_def)


Row = TypeVar("Row", Task, Training)


def read_tasks(path: str | Path = TASKS_FILE) -> dict[str, Task]:
    """Read the rows of a tasks file.

    Args:
        path: JSON file, a list of rows.

    Returns:
        The tasks by name, in the file's order.

    Raises:
        ValueError: one line that names the file, the row and the field that is wrong.
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
            for key in ("name", "bundle"):
                if getattr(task, key) in [getattr(other, key) for other in tasks.values()]:
                    raise fail(key, "must be of one row alone", getattr(task, key))
            tasks[task.name] = task
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return tasks


def _build(cls: type[Row], values: Any, where: str = "") -> Row:
    """Make a row's dataclass of a JSON object: exactly its fields, of the right types, lists as tuples."""
    if isinstance(values, dict) and cls is Task and "training" in values:
        values = {**values, "training": _build(Training, values["training"], "training: ")}
    check_object(cls, values, where)
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return cls(**fields)


def get_task(name: str) -> Task:
    """Return the task called ``name``, such as ``Task04_Hippocampus``.

    Raises:
        ValueError: if there is none, with the names there are and the nearest one.
    """
    return TASKS[one_of("task", name, TASKS)]


try:
    TASKS = read_tasks()
except ValueError as wrong_row:  # every command and every run of a bundle imports this: one line, no traceback
    raise SystemExit(f"error: {wrong_row}") from None
