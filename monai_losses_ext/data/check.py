# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A check of a whole dataset before a training meets it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from monai_losses_ext.extras import need

need("the check of a dataset", "bundles", "nibabel", "tqdm")

import numpy as np
from tqdm import tqdm

from monai_losses_ext.data.dataset import FILES, WEIGHT, Case, case_names, listed_cases, read_index
from monai_losses_ext.data.expected import Expected, expected
from monai_losses_ext.data.faults import Fault, Rules, by, classes_of, faults, remedy, shortened
from monai_losses_ext.data.labels import (
    ANNOTATED,
    LabelMap,
    annotated_channels,
    check_annotated,
    class_sources,
    named_labels,
)
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
    annotated: dict[int, int] | None = None  # class to the number of cases annotated for it; None: all are for all
    not_annotated: dict[int, list[str]] = field(default_factory=dict)  # class to the cases that hold it all the same
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
            number = len(self.cases) if self.annotated is None else self.annotated[value]
            lines.append(
                f"warning: {self._label(value)} is absent in {len(cases)} of {number} cases: {shortened(cases)}"
            )
        for value, cases in sorted(self.not_annotated.items()):
            others = len(self.cases) - (self.annotated or {})[value]
            lines.append(
                f"warning: {self._label(value)} is there in {len(cases)} of {others} cases that were not annotated for "
                f"it, and counts as background: {shortened(cases)}"
            )
        return lines

    def _label(self, value: int) -> str:
        return f"label {value} ({self.expected.classes.get(value, '?')})"

    def summary(self) -> str:
        """Return cases, shapes, spacings, how many cases were annotated for each class, and the warnings."""
        lines = [f"{self.expected.name}: {len(self.cases)} cases"]
        for name, values in (("shape (voxels)", self.shapes), ("spacing (mm)", self.spacings)):
            if values:
                low, middle, high = (by(how(values, axis=0)) for how in (np.min, np.median, np.max))
                lines.append(f"{name}: median {middle}, from {low} to {high}")
        for value, number in sorted((self.annotated or {}).items()):
            lines.append(f"{self._label(value)}: {number} of {len(self.cases)} cases are annotated for it")
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
    annotated = _annotated(cases, names, folder, report)
    for case in tqdm(cases, desc="check", unit="case", disable=None if progress else True):
        name = names[case["image"]]
        report.cases.append(name)
        for fault in _faults_of_files(case, name, folder, report, annotated[case["image"]]):
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


def _annotated(cases: list[Case], names: dict[str, str], folder: Path, report: CheckReport) -> dict[str, set[int]]:
    """Return the foreground classes that each case was annotated for, by image; note in the report what is wrong."""
    rules, foreground = report.expected.rules, [value for value in report.expected.classes if value != 0]
    if not any(ANNOTATED in case for case in cases):
        return {case["image"]: set(foreground) for case in cases}
    named = named_labels(read_index(folder))
    sources = class_sources(named, rules.num_classes, rules.label_map)
    known = frozenset().union(*sources) if named is None else named
    found = {}
    for case in cases:
        labels = case.get(ANNOTATED)
        try:
            if ANNOTATED in case:
                check_annotated(labels, known)
        except UserError as error:
            report.problems.append(Problem(names[case["image"]], "dataset.json", str(error)))
            labels = None
        channels = annotated_channels(labels, sources)
        found[case["image"]] = {value for value in foreground if channels[value]}
    report.annotated = {value: sum(value in classes for classes in found.values()) for value in foreground}
    return found


def _faults_of_files(
    case: Case, name: str, folder: Path, report: CheckReport, annotated: Collection[int]
) -> list[Fault]:
    """Return what is wrong with a case's files, and note in the report what is right."""
    volumes, unusable = {}, []
    for key in (key for key in FILES if key in case):
        volume = read(case[key])
        if isinstance(volume, str):
            unusable.append(Fault(key, volume))
        else:
            volumes[key] = volume
            if volume.note:
                report.notes.append(f"{os.path.relpath(case[key], folder)} ({volume.note})")
    if "image" not in volumes or "label" not in volumes:
        return unusable
    image = volumes["image"]
    if image.voxels.ndim in (3, 4):
        report.shapes.append(image.voxels.shape[:3])
        report.spacings.append(tuple(float(mm) for mm in np.linalg.norm(image.affine[:3, :3], axis=0)))
    volumes = {key: _channel_first(volume) for key, volume in volumes.items()}
    found = unusable + list(faults(volumes["image"], volumes["label"], report.expected.rules, volumes.get(WEIGHT)))
    if not any(fault.key == "label" for fault in found):
        found += _faults_of_classes(volumes["label"].voxels, name, report, annotated)
    return found


def _faults_of_classes(label: Array, name: str, report: CheckReport, annotated: Collection[int]) -> list[Fault]:
    """Return a fault for a label without any class; note in the report which it lacks, and which should not be there.

    Args:
        label: values as they are in the file.
        name: of the case.
        report: to note it in.
        annotated: the classes that the case was annotated for.
    """
    classes = classes_of(label, report.expected.rules)
    present = {value for value in report.expected.classes if value != 0 and (classes == value).any()}
    for value in present.difference(annotated):
        report.not_annotated.setdefault(value, []).append(f"{name} ({int((classes == value).sum())} voxels)")
    if not present.intersection(annotated):
        return [Fault("label", "has no foreground")]
    for value in sorted(set(annotated) - present):
        report.absent.setdefault(value, []).append(name)
    return []


def _channel_first(volume: Volume) -> Volume:
    voxels = volume.voxels
    return volume._replace(voxels=np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
