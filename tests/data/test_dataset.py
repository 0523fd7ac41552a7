# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a dataset folder: the right cases in the right order, one clear error otherwise, and a split by name."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from monai_losses_ext.data.dataset import (
    DatasetError,
    case_names,
    read_cases,
    split_cases,
    training_cases,
    validation_cases,
)

PARTS = {"image": "imagesTr", "label": "labelsTr"}
REAL_DATA = Path(os.environ.get("TASK04_DIR", "Task04_Hippocampus"))


def write_dataset(folder: Path, names: list[str], index: Any = None) -> Path:
    """Write a folder whose files exist (empty: nothing here reads them) and are listed in the order of ``names``."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
        for name in names:
            (folder / part / name).touch()
    entries = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    content = {"training": entries} if index is None else index
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_cases_are_absolute_paths_in_the_order_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", ["b.nii.gz", "a.nii.gz"])
    monkeypatch.chdir(tmp_path)
    assert read_cases("data") == [
        {"image": str(tmp_path / "data/imagesTr" / name), "label": str(tmp_path / "data/labelsTr" / name)}
        for name in ("b.nii.gz", "a.nii.gz")
    ]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no such folder"),
        (lambda folder: (folder / "dataset.json").unlink(), "there is no dataset.json in it"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "dataset.json cannot be read as JSON"),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "lists no cases under 'training'"),
        (lambda folder: (folder / "dataset.json").write_text('{"training": []}'), "lists no cases under 'training'"),
        (
            lambda folder: (folder / "dataset.json").write_text('{"training": ["x"]}'),
            "case 0 .* no 'image' and 'label'",
        ),
        (lambda folder: (folder / "labelsTr/b.nii.gz").unlink(), "labelsTr/b.nii.gz is absent"),
        (
            lambda folder: (folder / "dataset.json").write_text(
                json.dumps({"training": [{"image": f"{at}imagesTr/a.nii.gz", "label": "x"} for at in ("", "./", "")]})
            ),
            "lists imagesTr/a.nii.gz 3 times under 'training'",
        ),
        (
            lambda folder: [path.unlink() for path in (folder / "imagesTr").iterdir()],
            "imagesTr/a.nii.gz and 1 more listed files are absent",
        ),
    ],
)
def test_unusable_folder_is_one_line_with_the_folder_the_fault_and_the_three_ways(
    tmp_path: Path, break_it: Any, message: str
) -> None:
    folder = write_dataset(tmp_path / "Task04_Hippocampus", ["a.nii.gz", "b.nii.gz"])
    break_it(folder)
    with pytest.raises(DatasetError, match=message) as caught:
        read_cases(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    ways = (
        "data phantoms --task Task04_Hippocampus --out",
        "data download --task Task04_Hippocampus --out",
        "a folder of your own with dataset.json",
    )
    assert all(way in text for way in ways)


def test_index_as_windows_writes_it(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", ["a.nii.gz"])
    entry = {"image": ".\\imagesTr\\a.nii.gz", "label": "labelsTr\\a.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({"training": [entry]}), encoding="utf-8-sig")
    assert read_cases(folder) == [{key: str(folder / part / "a.nii.gz") for key, part in PARTS.items()}]


def test_error_names_the_section_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="lists no cases under 'validation'"):
        read_cases(write_dataset(tmp_path / "data", ["a.nii.gz"]), section="validation")


def test_split_is_a_partition_of_the_size_asked_for() -> None:
    cases = [{"image": f"/x/case_{i:03d}.nii.gz", "label": ""} for i in range(208)]
    training, validation = split_cases(cases, 0.2, seed=3)
    assert (len(training), len(validation)) == (166, 42)
    assert sorted(c["image"] for c in training + validation) == [c["image"] for c in cases]


def test_split_depends_on_names_and_seed_alone() -> None:
    cases = [{"image": f"/x/case_{i:03d}.nii.gz", "label": ""} for i in range(30)]
    moved = [{"image": case["image"].replace("/x/", "/another/folder/"), "label": "y"} for case in cases]
    random.Random(5).shuffle(moved)

    def names(cases: list[dict[str, str]]) -> list[str]:
        return [os.path.basename(case["image"]) for case in cases]

    assert names(split_cases(moved, seed=1)[1]) == names(split_cases(cases, seed=1)[1])
    assert names(split_cases(cases, seed=2)[1]) != names(split_cases(cases, seed=1)[1])


def test_split_of_images_that_share_a_file_name_depends_on_their_folders() -> None:
    cases = [{"image": f"/x/p{i:02d}/image.nii.gz", "label": f"/x/p{i:02d}/label.nii.gz"} for i in range(30)]
    for seed in range(3):
        shuffled = random.Random(seed).sample(cases, 30)
        assert split_cases(shuffled, seed=1) == split_cases(cases, seed=1)
    assert split_cases(cases, seed=2) != split_cases(cases, seed=1)


def test_names_of_cases_are_their_files_or_where_these_repeat_their_paths() -> None:
    assert case_names(["/x/a.nii.gz", "/y/b.nii", "/x/a.nii.gz"]) == {"/x/a.nii.gz": "a", "/y/b.nii": "b"}
    files = ["/x/p1/image.nii.gz", "/x/p2/image.nii.gz", "/x/p2/other.nii.gz", "/x/p2/image.nii"]
    names = ["p1/image.nii.gz", "p2/image.nii.gz", "other", "p2/image.nii"]
    assert list(case_names(files).values()) == names


def test_split_of_known_cases_never_changes() -> None:
    """Published results stand on this split: a change of the rule is a change of the benchmark."""
    cases = [{"image": f"case_{i}.nii.gz", "label": ""} for i in range(10)]
    held_out = ["case_0.nii.gz", "case_6.nii.gz", "case_9.nii.gz"]
    assert [case["image"] for case in split_cases(cases, 0.3, seed=0)[1]] == held_out


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, (3, 1)), (0.5, (2, 2)), (1.0, (1, 3))])
def test_split_always_leaves_a_case_on_either_side(fraction: float, expected: tuple[int, int]) -> None:
    cases = [{"image": f"{i}.nii.gz", "label": ""} for i in range(4)]
    training, validation = split_cases(cases, fraction)
    assert (len(training), len(validation)) == expected


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_cases_to_split(n: int) -> None:
    with pytest.raises(ValueError, match=f"cases: must be at least two.* got {n}"):
        split_cases([{"image": "a", "label": "b"}] * n)


def test_fraction_outside_0_to_1() -> None:
    with pytest.raises(ValueError, match="validation_fraction: must be a number between 0 and 1; got 20"):
        split_cases([{"image": "a", "label": "b"}] * 3, 20)


def test_training_and_validation_cases_are_the_split_of_the_folder(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [f"{i}.nii.gz" for i in range(10)])
    assert (training_cases(folder, 0.3, 4), validation_cases(folder, 0.3, 4)) == split_cases(read_cases(folder), 0.3, 4)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="MSD's Task04_Hippocampus is not here (TASK04_DIR says where)")
def test_real_hippocampus_cases_are_all_there() -> None:
    cases = read_cases(REAL_DATA)
    index = json.loads((REAL_DATA / "dataset.json").read_text(encoding="utf-8"))
    assert len(cases) == index["numTraining"]
    assert all(os.path.isfile(case["label"]) for case in cases)
