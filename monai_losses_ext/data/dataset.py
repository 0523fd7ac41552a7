# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a dataset in the Decathlon's layout, and splitting it into training and validation cases.

The layout is a folder with ``dataset.json``, ``imagesTr/`` and ``labelsTr/``; ``dataset.json`` lists the cases. Beside
``image`` and ``label``, a case may have ``weight``, a file with how much each voxel counts, and ``annotated``, the
labels that it was annotated for.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.labels import (
    ANNOTATED,
    LabelMap,
    annotated_channels,
    check_annotated,
    class_sources,
    named_labels,
    whole_map,
)
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.errors import UserError, fail

WEIGHT = "weight"
FILES = ("image", "label", WEIGHT)
Case = dict[str, Any]

THREE_WAYS = (
    "Three ways to get data: (1) synthetic cases: python -m monai_losses_ext data phantoms --task {task} --out DIR; "
    "(2) the Medical Segmentation Decathlon: python -m monai_losses_ext data download --task {task} --out DIR; "
    "(3) a folder of your own with dataset.json, imagesTr/ and labelsTr/."
)


class DatasetError(UserError):
    """A dataset folder that cannot be used. The message is one line: the folder, what is wrong, how to get data."""


def read_cases(dataset_dir: str | os.PathLike[str], section: str = "training") -> list[Case]:
    """Read the list of cases of a dataset and check that every file of it is there.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        section: list to read, ``training`` in the Decathlon's layout.

    Returns:
        ``{"image": path, "label": path}`` per case, absolute, in the file's order; with ``weight``, a path, and
        ``annotated``, a list of labels in the files, where the case has them.

    Raises:
        DatasetError: if the folder, ``dataset.json``, the section or a listed file is absent or cannot be read, an
            image is listed twice, or a case was annotated for what is no label.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    cases = listed_cases(folder, section)
    if any(ANNOTATED in case for case in cases):
        _check_annotated(cases, named_labels(read_index(folder)))
    absent = [path for case in cases for path in case_files(case) if not os.path.isfile(path)]
    if absent:
        more = f" and {len(absent) - 1} more listed files are" if len(absent) > 1 else " is"
        raise _error(folder, f"{os.path.relpath(absent[0], folder)}{more} absent")
    return cases


def listed_cases(folder: Path, section: str = "training") -> list[Case]:
    """Return what :func:`read_cases` does, neither looking for the files nor at the labels; ``folder`` is absolute.

    Raises:
        DatasetError: if the folder, ``dataset.json`` or the section is absent or cannot be read, or an image is listed
            twice.
    """
    entries = read_index(folder).get(section)
    if not isinstance(entries, list) or not entries:
        raise _error(folder, f"dataset.json lists no cases under {section!r}")
    cases = [_case(folder, section, i, entry) for i, entry in enumerate(entries)]
    image, times = Counter(case["image"] for case in cases).most_common(1)[0]
    if times > 1:  # it could be trained on and validated with
        raise _error(folder, f"dataset.json lists {os.path.relpath(image, folder)} {times} times under {section!r}")
    return cases


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a dataset's ``dataset.json``; ``folder`` is absolute.

    Raises:
        DatasetError: if the folder or ``dataset.json`` is absent, or no JSON object.
    """
    if not folder.is_dir():
        raise _error(folder, "there is no such folder")
    if not (folder / "dataset.json").is_file():
        raise _error(folder, "there is no dataset.json in it")
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8-sig"))  # Windows puts a mark before it
    except (OSError, ValueError, RecursionError) as error:
        raise _error(folder, f"dataset.json cannot be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def case_files(case: Mapping[str, Any]) -> list[str]:
    """Return the paths of a case's files."""
    return [case[key] for key in FILES if isinstance(case.get(key), str)]


def case_names(files: Iterable[str]) -> dict[str, str]:
    """Return a name for each file of a case, no two alike, to show to a reader.

    It is the file's own, without folder and ``.nii.gz``. Of files that share that (``p1/image.nii.gz`` and
    ``p2/image.nii.gz``), it is the path from the folder that holds them all.
    """
    names = {file: re.sub(r"(\.nii)?(\.gz)?$", "", os.path.basename(file)) for file in files}
    shared = {name for name, times in Counter(names.values()).items() if times > 1}
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in names]) if shared else ""
    return {file: os.path.relpath(file, folder) if name in shared else name for file, name in names.items()}


def split_cases(cases: list[Case], validation_fraction: float = 0.2, seed: int = 0) -> tuple[list[Case], list[Case]]:
    """Split cases into training and validation by name and seed alone.

    The cases are sorted by the file name of their image, those that share it by its path, and shuffled by
    ``random.Random(seed)``; the first ``round(validation_fraction * n)`` of them, at least one, are the validation
    cases. So neither the order in ``dataset.json`` nor the folder's place matters.

    Args:
        cases: at least two cases, as :func:`read_cases` gives them.
        validation_fraction: share that is held out, between 0 and 1.
        seed: picks the split.

    Returns:
        ``(training, validation)``, each sorted by name.

    Raises:
        ValueError: for fewer than two cases, or a fraction outside 0..1.
    """
    number("validation_fraction", validation_fraction, Limits(minimum=0, maximum=1))
    if len(cases) < 2:
        raise fail("cases", "must be at least two, to train on some and validate on others", len(cases))
    ordered = sorted(cases, key=_by_name)
    shuffled = random.Random(seed).sample(ordered, len(ordered))
    n_validation = min(max(1, round(validation_fraction * len(cases))), len(cases) - 1)
    return sorted(shuffled[n_validation:], key=_by_name), sorted(shuffled[:n_validation], key=_by_name)


def annotated_cases(
    dataset_dir: str | os.PathLike[str],
    labels: Mapping[Any, str] | None = None,
    label_map: LabelMap | None = None,
    regions: Sequence[Sequence[int]] | None = None,
) -> list[Case]:
    """Return what :func:`read_cases` does, with ``annotated`` and ``weight`` in every case or in none.

    Where any case of the dataset says what it was annotated for, every case gets ``annotated`` as the loss takes it: an
    array [C] of true and false, all true for a case that does not say. Where any has a ``weight``, every case has that
    key; None stands for a weight of 1.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        labels: the network's classes, background included; default those that ``dataset.json`` names.
        label_map: label in the files to class. A class of several labels is annotated where all of them are.
        regions: the labels in the files that each channel is made of, for a network with a sigmoid whose channels are
            regions, in place of classes. A region is annotated where all of its labels are.

    Raises:
        UserError: one line; see :func:`read_cases`, and where nothing tells which labels there are.
    """
    cases = read_cases(dataset_dir)
    if any(WEIGHT in case for case in cases):
        cases = [{WEIGHT: None, **case} for case in cases]
    if any(ANNOTATED in case for case in cases):
        named = named_labels(read_index(Path(dataset_dir).expanduser().absolute()))
        sources = regions or _class_sources(named, labels, label_map)
        _check_annotated(cases, named or frozenset().union(*sources))
        cases = [{**case, ANNOTATED: annotated_channels(case.get(ANNOTATED), sources)} for case in cases]
    return cases


def training_cases(
    dataset_dir: str | os.PathLike[str], validation_fraction: float = 0.2, seed: int = 0, *args: Any, **kwargs: Any
) -> list[Case]:
    """Return the cases of a dataset to train on: :func:`annotated_cases`, then :func:`split_cases`.

    Args:
        dataset_dir: folder that holds ``dataset.json``.
        validation_fraction: share that is held out.
        seed: picks the split.
        args: ``labels``, ``label_map`` and ``regions`` of :func:`annotated_cases`.
        kwargs: the same by name.
    """
    return split_cases(annotated_cases(dataset_dir, *args, **kwargs), validation_fraction, seed)[0]


def validation_cases(
    dataset_dir: str | os.PathLike[str], validation_fraction: float = 0.2, seed: int = 0, *args: Any, **kwargs: Any
) -> list[Case]:
    """Return the cases of a dataset that are held out, as :func:`training_cases` does, but without weights."""
    held_out = split_cases(annotated_cases(dataset_dir, *args, **kwargs), validation_fraction, seed)[1]
    return [{key: value for key, value in case.items() if key != WEIGHT} for case in held_out]


def weight_keys(dataset_dir: str | os.PathLike[str]) -> list[str]:
    """Return ``["weight"]`` for a dataset in which a case has weights of its voxels, else ``[]``."""
    cases = listed_cases(Path(dataset_dir).expanduser().absolute())
    return [WEIGHT] if any(WEIGHT in case for case in cases) else []


def dataset_fingerprint(dataset_dir: str | os.PathLike[str]) -> dict[str, str]:
    """Return what tells one data set from another without reading its volumes.

    Args:
        dataset_dir: folder in the Decathlon's layout.

    Returns:
        ``dataset``, the folder's name; ``dataset_cases``, the number of cases to train on and validate with;
        ``dataset_fingerprint``, 16 hexadecimal digits of a SHA-256 over ``dataset.json`` and the names and sizes in
        bytes of the files that it lists. Empty where the folder cannot be read.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    try:
        cases = listed_cases(folder)
        digest = hashlib.sha256((folder / "dataset.json").read_bytes())
        for path in sorted(path for case in cases for path in case_files(case)):
            digest.update(f"\n{os.path.relpath(path, folder)} {os.path.getsize(path)}".encode())
    except (OSError, ValueError):
        return {}
    return {"dataset": folder.name, "dataset_cases": str(len(cases)), "dataset_fingerprint": digest.hexdigest()[:16]}


def _class_sources(
    named: Mapping[int, str] | None, labels: Mapping[Any, str] | None, label_map: LabelMap | None
) -> Sequence[frozenset[int]]:
    """Return the labels in the files that each class is made of; see :func:`annotated_cases`."""
    if labels is not None:
        return class_sources(named, len(labels), label_map)
    if named is None:
        rule = f"must name the labels where cases say what they are {ANNOTATED} for"
        raise fail("dataset.json: labels", rule, "none")
    classes = whole_map(label_map)
    return class_sources(named, 1 + max(classes.get(old, old) for old in named), label_map)


def _check_annotated(cases: list[Case], known: Iterable[int] | None) -> None:
    names = case_names(case["image"] for case in cases)
    for case in cases:
        if ANNOTATED in case:
            try:
                check_annotated(case[ANNOTATED], None if known is None else set(known))
            except UserError as error:
                raise DatasetError(f"dataset.json: case {names[case['image']]}: {error}") from None


def _by_name(case: Case) -> tuple[str, str]:
    return os.path.basename(case["image"]), case["image"]


def _case(folder: Path, section: str, i: int, entry: object) -> Case:
    """Turn one entry of ``dataset.json`` into absolute paths."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
        raise _error(folder, f"case {i} under {section!r} in dataset.json has no 'image' and 'label' paths")
    if WEIGHT in entry and not isinstance(entry[WEIGHT], str):
        raise _error(folder, f"case {i} under {section!r} in dataset.json has a 'weight' that is no path")
    case = {key: _path(folder, entry[key]) for key in FILES if key in entry}
    return case | {key: entry[key] for key in (ANNOTATED,) if key in entry}


def _path(folder: Path, entry: str) -> str:
    r"""Return an absolute path; an entry that was written on Windows has ``\\`` in place of ``/``."""
    path = os.path.normpath(folder / entry)
    return path if "\\" not in entry or os.path.exists(path) else os.path.normpath(folder / entry.replace("\\", "/"))


def _error(folder: Path, what: str) -> DatasetError:
    """Build the one-line error; the task is guessed from the folder's name, as MSD names its folders."""
    task = folder.name if folder.name in TASKS else "TASK"
    return DatasetError(f"dataset_dir: {folder}: {what}. {THREE_WAYS.format(task=task)}")
