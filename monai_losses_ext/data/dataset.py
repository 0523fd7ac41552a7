# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a dataset in the Decathlon's layout, and splitting it into training and validation cases.

The layout is a folder with ``dataset.json``, ``imagesTr/`` and ``labelsTr/``; ``dataset.json`` lists the cases.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.errors import UserError, fail

Case = dict[str, str]

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
        ``{"image": path, "label": path}`` per case, absolute, in the file's order.

    Raises:
        DatasetError: if the folder, ``dataset.json``, the section or a listed file is absent or cannot be read, or an
            image is listed twice.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    cases = listed_cases(folder, section)
    absent = [path for case in cases for path in case.values() if not os.path.isfile(path)]
    if absent:
        more = f" and {len(absent) - 1} more listed files are" if len(absent) > 1 else " is"
        raise _error(folder, f"{os.path.relpath(absent[0], folder)}{more} absent")
    return cases


def listed_cases(folder: Path, section: str = "training") -> list[Case]:
    """Return what :func:`read_cases` does without looking for the files; ``folder`` is absolute.

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


def training_cases(dataset_dir: str | os.PathLike[str], validation_fraction: float = 0.2, seed: int = 0) -> list[Case]:
    """Return the cases of a dataset to train on: :func:`read_cases`, then :func:`split_cases`."""
    return split_cases(read_cases(dataset_dir), validation_fraction, seed)[0]


def validation_cases(
    dataset_dir: str | os.PathLike[str], validation_fraction: float = 0.2, seed: int = 0
) -> list[Case]:
    """Return the cases of a dataset that are held out: :func:`read_cases`, then :func:`split_cases`."""
    return split_cases(read_cases(dataset_dir), validation_fraction, seed)[1]


def _by_name(case: Case) -> tuple[str, str]:
    return os.path.basename(case["image"]), case["image"]


def _case(folder: Path, section: str, i: int, entry: object) -> Case:
    """Turn one entry of ``dataset.json`` into absolute paths."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
        raise _error(folder, f"case {i} under {section!r} in dataset.json has no 'image' and 'label' paths")
    return {key: _path(folder, entry[key]) for key in ("image", "label")}


def _path(folder: Path, entry: str) -> str:
    r"""Return an absolute path; an entry that was written on Windows has ``\\`` in place of ``/``."""
    path = os.path.normpath(folder / entry)
    return path if "\\" not in entry or os.path.exists(path) else os.path.normpath(folder / entry.replace("\\", "/"))


def _error(folder: Path, what: str) -> DatasetError:
    """Build the one-line error; the task is guessed from the folder's name, as MSD names its folders."""
    task = folder.name if folder.name in TASKS else "TASK"
    return DatasetError(f"dataset_dir: {folder}: {what}. {THREE_WAYS.format(task=task)}")
