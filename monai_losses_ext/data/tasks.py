# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The tasks of the Medical Segmentation Decathlon: one row of facts each, in ``tasks.json``.

The row is the only place that knows a task. The bundle template, the phantoms and the data checks all read it, so a new
task is a new row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from monai_losses_ext._checks import Limits, check_arguments, fail, nearest, one_of

TASKS_FILE = Path(__file__).with_name("tasks.json")

Count = Annotated[int, Limits(minimum=1)]
Share = Annotated[float, Limits(minimum=0, maximum=1)]
Positive = Annotated[float, Limits(above=0)]

# What the intensity rule of a row may say, and the keys that go with it.
INTENSITY_RULES: dict[str, frozenset[str]] = {
    "z_score": frozenset({"rule", "nonzero"}),  # zero mean, unit deviation of each case and channel (MRI)
    "window": frozenset({"rule", "low", "high", "mean", "std"}),  # clip to [low, high], then a fixed z-score (CT, HU)
}


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
    spacing_mm: tuple[float, ...] | None  # voxel size that images are resampled to; None: as stored
    patch_size: tuple[int, ...]  # voxels
    patches_per_case: Count  # so a step has batch_size * patches_per_case patches
    flip_axes: tuple[int, ...]  # spatial axes (in RAS) that may be mirrored without changing what the labels mean
    rotate_range_rad: tuple[float, ...]  # per axis, drawn from -r..r
    zoom_range: tuple[float, ...]  # per axis, drawn from 1-z..1+z
    translate_range_voxels: tuple[int, ...]  # per axis, drawn from -t..t
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
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    n_training: Count  # labelled cases in MSD's release
    n_test: int
    typical_shape: tuple[int, ...]  # median, voxels
    typical_spacing_mm: tuple[float, ...]  # median
    nsd_tolerance_mm: Positive  # boundary tolerance of the surface Dice
    source: str
    licence: str
    licence_url: str
    references: tuple[str, ...]
    published_results: tuple[dict[str, Any], ...]
    intensity: dict[str, Any]  # see INTENSITY_RULES
    training: Training
    phantom: dict[str, Any]  # see phantoms.py

    def __post_init__(self) -> None:
        one_of("modality", self.modality, ("MRI", "CT"))
        if self.labels[:1] != ("background",) or len(set(self.labels)) < max(2, len(self.labels)):
            raise fail("labels", "must be 'background' and then one unique name per label value", self.labels)
        rule = one_of("intensity rule", self.intensity.get("rule"), INTENSITY_RULES)
        if set(self.intensity) != INTENSITY_RULES[rule]:
            raise fail("intensity", f"must have the keys {', '.join(sorted(INTENSITY_RULES[rule]))}", self.intensity)
        self._check_axes()
        self._check_network()

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
        """Check that the network has the task's channels and labels."""
        for key, names in (("in_channels", self.channels), ("out_channels", self.labels)):
            if self.training.network_def.get(key) != len(names):
                raise fail(f"network_def {key}", f"must be {len(names)}", self.training.network_def.get(key))


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
    for i, row in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        name = row.get("name", f"row {i}")
        try:
            if "training" in row:
                row["training"] = _build(Training, row["training"])
            tasks[name] = _build(Task, row)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}, {name}: {error}") from error
    return tasks


def _build(cls: type[Row], values: dict[str, Any]) -> Row:
    """Make a row's dataclass of a JSON object: exactly its fields, of the right types, lists as tuples."""
    known = [field.name for field in fields(cls)]
    for name in values:
        if name not in known:
            raise fail("field", "must be one that a row knows", name, nearest(name, known))
    missing = [name for name in known if name not in values]
    if missing:
        raise fail("fields", "must all be given", f"none for {', '.join(missing)}")
    converted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    check_arguments(cls, converted)
    return cls(**converted)


TASKS = read_tasks()


def get_task(name: str) -> Task:
    """Return the task called ``name``, such as ``Task04_Hippocampus``.

    Raises:
        ValueError: if there is none, with the names there are and the nearest one.
    """
    return TASKS[one_of("task", name, TASKS)]


def stride_product(strides: Sequence[int | Sequence[int]], n_axes: int) -> list[int]:
    """Return the factor by which a network with ``strides`` shrinks each axis: its patch must be a multiple of it."""
    product = [1] * n_axes
    for stride in strides:
        per_axis = [stride] * n_axes if isinstance(stride, int) else stride
        product = [n * step for n, step in zip(product, per_axis, strict=True)]
    return product
