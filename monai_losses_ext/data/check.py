# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A check of a whole dataset before a training meets it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from monai_losses_ext.extras import need

need("the check of a dataset", "bundles", "nibabel", "tqdm")

import numpy as np
from tqdm import tqdm

from monai_losses_ext.data.dataset import Case, case_names, listed_cases
from monai_losses_ext.data.expected import Expected, expected
from monai_losses_ext.data.faults import Fault, LabelMap, Rules, by, classes_of, faults, remedy, shortened
from monai_losses_ext.data.shapes import Array
from monai_losses_ext.data.tasks import Task
from monai_losses_ext.data.volume import Volume, read
from monai_losses_ext.errors import UserError


class Problem(NamedTuple):
    """A fault that would break a training or spoil it."""

    case: str  # "" for one of the whole dataset
    file: str  # relative to the dataset
    what: str


@dataclass
class CheckReport:
    """What a check of a dataset found."""

    expected: Expected
    cases: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of the images that could be read
    spacings: list[tuple[float, ...]] = field(default_factory=list)  # mm
    absent: dict[int, list[str]] = field(default_factory=dict)  # class to the cases without it
    unknown_values: set[int] = field(default_factory=set)  # of labels, that are no classes
    notes: list[str] = field(default_factory=list)  # files whose place is in doubt

    @property
    def task(self) -> Task | None:
        """The Decathlon's task that the dataset was checked as; None where its own ``dataset.json`` counts."""
        return self.expected.task

    def table(self) -> str:
        """Return the problems as a table with case, file and problem, and what to do about unknown label values."""
        rows = [("case", "file", "problem"), *self.problems]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows]
        if self.unknown_values:
            lines.append(f"{remedy(self.unknown_values, self.expected.rules)}.")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Return what is odd and breaks no training, a line each."""
        lines = [f"warning: {what}" for what in self.expected.warnings]
        if self.notes:
            lines.append(f"warning: {len(self.notes)} files have two places: {shortened(self.notes)}")
        for value, cases in sorted(self.absent.items()):
            label = f"label {value} ({self.expected.classes.get(value, '?')})"
            lines.append(f"warning: {label} is absent in {len(cases)} of {len(self.cases)} cases: {shortened(cases)}")
        return lines

    def summary(self) -> str:
        """Return cases, shapes, spacings, and the warnings."""
        lines = [f"{self.expected.name}: {len(self.cases)} cases"]
        for name, values in (("shape (voxels)", self.shapes), ("spacing (mm)", self.spacings)):
            if values:
                low, middle, high = (by(how(values, axis=0)) for how in (np.min, np.median, np.max))
                lines.append(f"{name}: median {middle}, from {low} to {high}")
        return "\n".join([*lines, *self.warnings()])


def check_dataset(
    dataset_dir: str | os.PathLike[str],
    task: str | None = None,
    progress: bool = False,
    ignore_label: int | Sequence[int] | None = None,
    label_map: LabelMap | None = None,
) -> CheckReport:
    """Read every case of a dataset, one at a time, and find what would break a training.

    A volume lies where MONAI's reader, and so a training, sees it: see :mod:`monai_losses_ext.data.volume`.

    Args:
        dataset_dir: folder in the Decathlon's layout.
        task: the Decathlon's task whose channels and labels count; None for those of the folder's own
            ``dataset.json``, or of the task that it is named after.
        progress: show a progress bar on stderr, if that is a terminal.
        ignore_label: value, or values, of voxels that nobody labeled, as the bundle has it.
        label_map: value in the label files to class, as the bundle has it.

    Returns:
        The problems, and a summary of the cases.

    Raises:
        UserError: if the list of cases cannot be read or nothing tells what they hold; one line.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    cases = listed_cases(folder)
    report = CheckReport(expected(folder, task, ignore_label, label_map))
    report.problems += [Problem("", "dataset.json", what) for what in report.expected.problems]
    names = case_names(case["image"] for case in cases)
    for case in tqdm(cases, desc="check", unit="case", disable=None if progress else True):
        name = names[case["image"]]
        report.cases.append(name)
        for fault in _faults_of_files(case, name, folder, report):
            report.problems.append(Problem(name, os.path.relpath(case[fault.key], folder), fault.what))
            report.unknown_values |= fault.values
    return report


def check_command(case: Case, rules: Rules | None = None) -> str:
    """Return the command that checks the dataset of a case as a training does.

    Args:
        case: with its files' paths.
        rules: the training's; None where they are not known.

    Returns:
        A line for a shell, in which ``DIR`` and ``TASK`` stand for what is not known.
    """
    folder = next((folder for folder in Path(case["image"]).parents if (folder / "dataset.json").is_file()), None)
    command = f"python -m monai_losses_ext data check --dataset_dir {shlex.quote(str(folder)) if folder else 'DIR'}"
    if rules is not None:
        command += rules.options()
    try:
        told = expected(folder, label_map=rules.label_map if rules else None).rules if folder else None
    except UserError:
        told = None
    if folder and (
        told is None or (rules and (told.channels, told.num_classes) != (rules.channels, rules.num_classes))
    ):
        command += " --task TASK"
    return command


def _faults_of_files(case: Case, name: str, folder: Path, report: CheckReport) -> list[Fault]:
    """Return what is wrong with a case's files, and note in the report what is right."""
    image, label = read(case["image"]), read(case["label"])
    unusable = [Fault(key, what) for key, what in (("image", image), ("label", label)) if isinstance(what, str)]
    if isinstance(image, str) or isinstance(label, str):
        return unusable
    for key, volume in (("image", image), ("label", label)):
        if volume.note:
            report.notes.append(f"{os.path.relpath(case[key], folder)} ({volume.note})")
    if image.voxels.ndim in (3, 4):
        report.shapes.append(image.voxels.shape[:3])
        report.spacings.append(tuple(float(mm) for mm in np.linalg.norm(image.affine[:3, :3], axis=0)))
    image, label = _channel_first(image), _channel_first(label)
    found = list(faults(image, label, report.expected.rules))
    if not any(fault.key == "label" for fault in found):
        found += _without_foreground(label.voxels, name, report)
    return found


def _without_foreground(label: Array, name: str, report: CheckReport) -> list[Fault]:
    """Return a fault for a label without any class; note in the report which classes it lacks."""
    classes = classes_of(label, report.expected.rules)
    foreground = [value for value in report.expected.classes if value != 0]
    absent = [value for value in foreground if not (classes == value).any()]
    if len(absent) == len(foreground):
        return [Fault("label", "has no foreground")]
    for value in absent:
        report.absent.setdefault(value, []).append(name)
    return []


def _channel_first(volume: Volume) -> Volume:
    voxels = volume.voxels
    return volume._replace(voxels=np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
