# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a case, and a check of a whole dataset before a training meets it."""

from __future__ import annotations

import json
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from monai_losses_ext.extras import need

need("the check of a dataset", "bundles", "nibabel", "tqdm")

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

from monai_losses_ext.data.dataset import Case, case_names, listed_cases
from monai_losses_ext.data.shapes import Array
from monai_losses_ext.data.tasks import TASKS, Task, get_task

READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, ImageFileError)  # what nibabel raises for a broken file
SHOWN = 5  # of a long list
ROUNDING = 1e-3  # what a label may lack to a whole number: a scale in the file's header leaves it a hair off


class Problem(NamedTuple):
    """A fault that would break a training or spoil it."""

    case: str
    file: str  # relative to the dataset
    what: str


@dataclass
class Report:
    """What a check of a dataset found."""

    task: Task
    cases: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the images that could be read
    spacings: list[tuple[float, ...]] = field(default_factory=list)  # mm
    absent: dict[int, list[str]] = field(default_factory=dict)  # label value to the cases without it

    def table(self) -> str:
        """Return the problems as a table with case, file and problem."""
        rows = [("case", "file", "problem"), *self.problems]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)

    def summary(self) -> str:
        """Return cases, shapes, spacings and labels, and a warning for each label that some cases lack."""
        lines = [f"{self.task.name}: {len(self.cases)} cases"]
        for name, values in (("shape (voxels)", self.shapes), ("spacing (mm)", self.spacings)):
            if values:
                low, middle, high = (_by(how(values, axis=0)) for how in (np.min, np.median, np.max))
                lines.append(f"{name}: median {middle}, from {low} to {high}")
        for value, cases in sorted(self.absent.items()):
            label = f"label {value} ({self.task.labels[value]})"
            lines.append(f"warning: {label} is absent in {len(cases)} of {len(self.cases)} cases: {shortened(cases)}")
        return "\n".join(lines)


def check_dataset(dataset_dir: str | os.PathLike[str], task: str | None = None, progress: bool = False) -> Report:
    """Read every case of a dataset, one at a time, and find what would break a training.

    Args:
        dataset_dir: folder in the Decathlon's layout.
        task: the task's name; None where the folder's name or its ``dataset.json`` tells it.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        The problems, and a summary of the cases.

    Raises:
        ValueError: if the list of cases cannot be read or the task is not known; one line.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    cases = listed_cases(folder)
    report = Report(get_task(task) if task else _task_of(folder))
    names = case_names(case["image"] for case in cases)
    for case in tqdm(cases, desc="check", unit="case", disable=None if progress else True):
        name = names[case["image"]]
        report.cases.append(name)
        for key, what in _faults_of_files(case, name, report):
            report.problems.append(Problem(name, os.path.relpath(case[key], folder), what))
    return report


def check_command(case: Case) -> str:
    """Return the command that checks the dataset of a case; ``DIR`` and ``TASK`` stand for what is not known."""
    folder = next((folder for folder in Path(case["image"]).parents if (folder / "dataset.json").is_file()), None)
    command = f"python -m monai_losses_ext data check --dataset_dir {shlex.quote(str(folder)) if folder else 'DIR'}"
    try:
        if folder:
            _task_of(folder)
    except (ValueError, AttributeError):
        command += " --task TASK"
    return command


def read(path: str | os.PathLike[str]) -> tuple[Array, Array] | str:
    """Return the voxels of a NIfTI file as they are stored and its affine, or in words why it cannot be read."""
    if not os.path.isfile(path):
        return "is absent"
    try:
        volume = nib.load(path)
        return np.asanyarray(volume.dataobj), volume.affine
    except READ_ERRORS as error:
        reason = " ".join(str(error).replace(str(path), "").split())
        return f"cannot be read, as if it were cut off or no NIfTI file ({reason or type(error).__name__})"


def faults(
    image: Array, label: Array, affines: tuple[Array, Array], task_size: tuple[int, int]
) -> Iterator[tuple[str, str]]:
    """Give what is wrong with a case in memory, as pairs of ``image`` or ``label`` and what is wrong.

    Args:
        image: [C, *S].
        label: [1, *S].
        affines: of image and label, [4, 4].
        task_size: number of channels and number of labels, background included.
    """
    channels, n_labels = task_size
    if image.ndim != 4:
        yield "image", f"must be 3-D, with channels along a fourth axis; its shape is {_by(image.shape[1:])}"
        return
    if len(image) != channels:
        yield "image", f"has {len(image)} channels; the task has {channels}"
    if np.issubdtype(image.dtype, np.floating):
        broken = image.size - int(np.count_nonzero(np.isfinite(image)))
        if broken:
            yield "image", f"has {broken} voxels that are NaN or infinite"
    if len(label) != 1:
        yield "label", f"has {len(label)} channels; it must have one, of whole numbers"
    if label.shape[1:] != image.shape[1:]:
        yield "label", f"has the shape {_by(label.shape[1:])}; the image has {_by(image.shape[1:])}"
    else:
        away = _displacement_mm(label.shape[1:], *affines)
        if away > 0.5 * float(np.linalg.norm(affines[0][:3, :3], axis=0).min()):
            yield "label", f"lies up to {away:.3g} mm from the image: their affines differ"
    wrong = _wrong_values(label, n_labels)
    if wrong is not None:
        yield "label", wrong


def shortened(items: Iterable[Any]) -> str:
    """Return the first few items of a list in words."""
    names = [str(item) for item in items]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _faults_of_files(case: Case, name: str, report: Report) -> Iterator[tuple[str, str]]:
    """Give what is wrong with a case's files, and note in the report what is right."""
    volumes = {key: read(case[key]) for key in ("image", "label")}
    yield from ((key, volume) for key, volume in volumes.items() if isinstance(volume, str))
    if isinstance(volumes["image"], str) or isinstance(volumes["label"], str):
        return
    (image, affine), (label, label_affine) = volumes["image"], volumes["label"]
    if image.ndim in (3, 4):
        report.shapes.append(image.shape[:3])
        report.spacings.append(tuple(float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0)))
    image = np.moveaxis(image, -1, 0) if image.ndim == 4 else image[None]
    label = np.moveaxis(label, -1, 0) if label.ndim == 4 and label.shape[-1] == 1 else label[None]
    task = report.task
    found = list(faults(image, label, (affine, label_affine), (len(task.channels), len(task.labels))))
    yield from found
    if any(key == "label" for key, _ in found):
        return
    label = np.round(label)
    absent = [value for value in range(1, len(task.labels)) if not (label == value).any()]
    if len(absent) == len(task.labels) - 1:
        yield "label", "has no foreground"
        return
    for value in absent:
        report.absent.setdefault(value, []).append(name)


def _wrong_values(label: Array, n_labels: int) -> str | None:
    """Return what is wrong with a label's values."""
    whole = np.issubdtype(label.dtype, np.integer) or label.dtype == bool
    if not whole:
        broken = ~(abs(label - np.round(label)) <= ROUNDING)  # true for NaN too
        if broken.any():
            values = shortened(np.unique(label[broken]))
            return f"has values that are no whole numbers: {values}"
    label = np.round(label)
    outside = (label < 0) | (label >= n_labels)
    if outside.any():
        values = shortened(f"{value:.0f}" for value in np.unique(label[outside]))
        return f"has values outside 0..{n_labels - 1}, the task's labels: {values}"
    return None


def _displacement_mm(shape: tuple[int, ...], one: Array, other: Array) -> float:
    """Return how far apart two affines put a corner of the volume, at most."""
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in shape), indexing="ij")).reshape(len(shape), -1)
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())


def _task_of(folder: Path) -> Task:
    """Return the task that a folder's name or its ``dataset.json`` tells."""
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    phantoms = content.get("phantoms")
    told = [folder.name, phantoms.get("task") if isinstance(phantoms, dict) else None, content.get("name")]
    for name in told:
        for task in TASKS.values():  # the Decathlon's own files say Hippocampus for Task04_Hippocampus
            if isinstance(name, str) and name.lower() in (task.name.lower(), task.name.split("_", 1)[1].lower()):
                return task
    raise ValueError(
        f"task: must be given with --task, since neither the folder's name nor dataset.json tells it; one of "
        f"{', '.join(TASKS)}."
    )


def _by(sizes: Iterable[float]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
