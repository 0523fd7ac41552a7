# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How much of a dataset each class takes, counted once and kept, and the class weights that follow from it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_losses_ext.extras import need

need("the statistics of a dataset", "bundles", "nibabel", "tqdm")

import numpy as np
from tqdm import tqdm

from monai_losses_ext.data.check import check_command
from monai_losses_ext.data.dataset import Case, annotated_cases, case_names, dataset_fingerprint
from monai_losses_ext.data.expected import expected
from monai_losses_ext.data.faults import Rules, classes_of, faults_of_values, make_rules
from monai_losses_ext.data.labels import ANNOTATED, LabelMap
from monai_losses_ext.data.shapes import Array
from monai_losses_ext.data.volume import read
from monai_losses_ext.errors import UserError, fail

FILE = "statistics.json"  # beside dataset.json
MM3_PER_ML = 1000.0
# What statistics can be of that does not fit, in words.
OTHERS = {
    "dataset_fingerprint": "those of other cases or files",
    "classes": "those of another number of classes",
    "label_map": "those of another label_map",
    "ignore_label": "those of another ignore_label",
}
COLUMNS = {
    "class": "{}",
    "name": "{}",
    "cases_annotated": "{}",
    "cases_present": "{}",
    "voxels": "{}",
    "voxel_share": "{:.4%}",
    "mean_volume_ml": "{:.4g}",
    "volume_share": "{:.4%}",
    "balanced_weight": "{:.4g}",
}


def dataset_statistics(
    dataset_dir: str | os.PathLike[str],
    task: str | None = None,
    ignore_label: int | Sequence[int] | None = None,
    label_map: LabelMap | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Count the voxels of each class in the labels of a dataset, one case at a time.

    A class is counted in the cases that were annotated for it, alone. Where a case has voxels of a class that it was
    not annotated for, they are background, as they are for the losses. Voxels of ``ignore_label`` do not count.

    Args:
        dataset_dir: folder in the Decathlon's layout.
        task: see :func:`monai_losses_ext.data.check.check_dataset`.
        ignore_label: value, or values, of voxels that nobody labeled, as the bundle has it.
        label_map: value in the label files to class, as the bundle has it.
        progress: show a progress bar on stderr, if that is a terminal.

    Returns:
        ``classes``, a list with, for each class, ``cases_annotated`` and ``cases_present``; ``voxels`` and
        ``mean_volume_ml``, the sum and the mean over the cases that were annotated for it; ``voxel_share`` and
        ``volume_share``, its share of these cases; and ``balanced_weight``, which is proportional to
        ``1 / voxel_share``, with a mean of 1 over the classes that have voxels, and 0 for others. And what the numbers
        belong to: ``dataset_fingerprint``, ``label_map``, ``ignore_label``.

    Raises:
        UserError: one line, for a dataset or a label that cannot be read.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    told = expected(folder, task, ignore_label, label_map)
    if told.problems:
        raise UserError(f"dataset.json: {told.problems[0]}")
    rules = told.rules
    names = {value: told.classes.get(value, "?") for value in range(rules.num_classes)}
    cases = annotated_cases(folder, labels=names, label_map=rules.label_map)
    shown = case_names(case["image"] for case in cases)
    annotated = np.array([case.get(ANNOTATED, np.ones(len(names), dtype=bool)) for case in cases])
    counts, voxel_ml = np.zeros(annotated.shape, dtype=np.int64), np.zeros(len(cases))
    for i, case in enumerate(tqdm(cases, desc="statistics", unit="case", disable=None if progress else True)):
        counts[i], voxel_ml[i] = _counted(case, shown[case["image"]], rules)
    counts[:, 0] += np.where(annotated, 0, counts).sum(1)
    counts[~annotated] = 0
    rows = _rows(counts, voxel_ml, annotated)
    return {
        **dataset_fingerprint(folder),
        **_meaning(rules),
        "classes": [
            {"class": value, "name": name, **row} for (value, name), row in zip(names.items(), rows, strict=True)
        ],
    }


def write_statistics(statistics: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write statistics as JSON.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise fail("out", f"must be a file that can be written ({error.strerror})", str(path)) from None


def statistics_table(statistics: Mapping[str, Any]) -> str:
    """Return the classes of statistics as a table."""
    rows = [[name.replace("_", " ") for name in COLUMNS]]
    rows += [[form.format(row[name]) for name, form in COLUMNS.items()] for row in statistics["classes"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def balanced_weights(
    dataset_dir: str | os.PathLike[str],
    labels: Mapping[Any, str],
    label_map: LabelMap | None = None,
    ignore_label: int | Sequence[int] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> list[float]:
    """Return the balanced class weights of a dataset from its stored statistics; see :func:`dataset_statistics`.

    Args:
        dataset_dir: folder in the Decathlon's layout.
        labels: the network's classes, background included.
        label_map: value in the label files to class.
        ignore_label: value, or values, of voxels that nobody labeled.
        path: of the statistics; default ``statistics.json`` in the folder.

    Raises:
        UserError: one line with the command that makes the statistics, where there are none, or those that there are
            belong to other cases or other classes.
    """
    default = Path(dataset_dir).expanduser() / FILE
    file = Path(path or default)
    rules = make_rules(1, len(labels), ignore_label, label_map)
    command = f"python -m monai_losses_ext data statistics --dataset_dir {shlex.quote(str(dataset_dir))}"
    command += rules.options() + (f" --out {shlex.quote(str(file))}" if file != default else "")
    if not file.is_file():
        raise fail("statistics", f"must be made first, with: {command}", f"no file {file}")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        weights = [float(row["balanced_weight"]) for row in stored["classes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise fail("statistics", f"must be a file of this command: {command}", f"{file} ({error})") from None
    belongs = {**dataset_fingerprint(dataset_dir), **_meaning(rules), "classes": len(weights)}
    found = {**{key: stored.get(key) for key in belongs}, "classes": len(labels)}
    for key in ("dataset_fingerprint", "classes", "label_map", "ignore_label"):
        if belongs.get(key) != found.get(key):
            raise fail(
                "statistics", f"must be of this dataset and these labels; make them with: {command}", OTHERS[key]
            )
    return weights


def _meaning(rules: Rules) -> dict[str, Any]:
    """Return what says which class a value is, as JSON has it."""
    label_map = {str(old): new for old, new in sorted(rules.label_map.items())}
    return {"label_map": label_map, "ignore_label": sorted(rules.ignore_label)}


def _counted(case: Case, name: str, rules: Rules) -> tuple[Array, float]:
    """Return the number of voxels of each class in a case's label, [C], and the volume of a voxel in ml."""
    label = read(case["label"])
    what = (
        label if isinstance(label, str) else next((fault.what for fault in faults_of_values(label.voxels, rules)), "")
    )
    if isinstance(label, str) or what:
        raise UserError(f"case {name}: {case['label']} {what}. To find every such case: {check_command(case, rules)}")
    classes = classes_of(label.voxels, rules)
    counted = classes[~np.isin(classes, list(rules.ignore_label))].astype(np.int64)
    edges = label.affine[:3, :3]
    return np.bincount(counted, minlength=rules.num_classes), abs(float(np.linalg.det(edges))) / MM3_PER_ML


def _rows(counts: Array, voxel_ml: Array, annotated: Array) -> list[dict[str, Any]]:
    """Return the numbers of each class.

    Args:
        counts: voxels of each case and class, [N, C].
        voxel_ml: volume of a voxel of each case, [N].
        annotated: the classes that each case was annotated for, [N, C].
    """
    rows = []
    for value in range(counts.shape[1]):
        cases = annotated[:, value]
        of_class, of_all = counts[cases, value], counts[cases].sum(1)
        ml, all_ml = of_class @ voxel_ml[cases], of_all @ voxel_ml[cases]
        rows.append(
            {
                "cases_annotated": int(cases.sum()),
                "cases_present": int((of_class > 0).sum()),
                "voxels": int(of_class.sum()),
                "voxel_share": _quotient(of_class.sum(), of_all.sum()),
                "mean_volume_ml": _quotient(ml, cases.sum()),
                "volume_share": _quotient(ml, all_ml),
            }
        )
    inverse = np.array([_quotient(1.0, row["voxel_share"]) for row in rows])
    weights = inverse * _quotient(int(np.count_nonzero(inverse)), inverse.sum())
    return [{**row, "balanced_weight": float(weight)} for row, weight in zip(rows, weights, strict=True)]


def _quotient(part: float, whole: float) -> float:
    """Return a quotient, 0 where there is nothing to divide by."""
    return float(part / whole) if whole else 0.0
