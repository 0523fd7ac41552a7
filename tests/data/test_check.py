# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The check of a dataset: it passes what is well, and finds each fault with its case, file and reason."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_losses_ext.cli import main
from monai_losses_ext.data.check import check_dataset
from monai_losses_ext.data.dataset import DatasetError, read_cases
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import TASKS, Task

REAL_DATA = Path(os.environ.get("TASK04_DIR", "Task04_Hippocampus"))
CASE = "phantom_001"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms("Task04_Hippocampus", tmp_path_factory.mktemp("data") / "good", n_cases=3, scale=0.1)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "Task04_Hippocampus"))


def rewrite(folder: Path, part: str, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Rewrite a file of the second case, with its voxels and affine changed."""
    path = folder / part / f"{CASE}.nii.gz"
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(*change(np.array(volume.dataobj), volume.affine)), path)


def with_voxels(value: float, n: int = 2) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return a change that sets n voxels to a value."""

    def change(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        voxels = voxels.astype(np.float32)
        voxels[:n, 0, 0] = value
        return voxels, affine

    return change


def cut_off(folder: Path) -> None:
    path = folder / "imagesTr" / f"{CASE}.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def moved(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return voxels, affine @ np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1.0]])


FAULTS = {
    "cut off": (cut_off, "imagesTr", "cannot be read"),
    "no NIfTI": (lambda f: (f / "labelsTr" / f"{CASE}.nii.gz").write_text("x"), "labelsTr", "cannot be read"),
    "absent": (lambda f: (f / "labelsTr" / f"{CASE}.nii.gz").unlink(), "labelsTr", "is absent"),
    "NaN": (lambda f: rewrite(f, "imagesTr", with_voxels(np.nan)), "imagesTr", "2 voxels that are NaN or infinite"),
    "infinite": (lambda f: rewrite(f, "imagesTr", with_voxels(-np.inf, 1)), "imagesTr", "1 voxels that are NaN"),
    "channels": (
        lambda f: rewrite(f, "imagesTr", lambda v, a: (np.stack([v, v], -1), a)),
        "imagesTr",
        "has 2 channels; the task has 1",
    ),
    "shape": (
        lambda f: rewrite(f, "labelsTr", lambda v, a: (v[:, :, 1:], a)),
        "labelsTr",
        "has the shape 16 x 16 x 15; the image has 16 x 16 x 16",
    ),
    "2-D": (lambda f: rewrite(f, "imagesTr", lambda v, a: (v[0], a)), "imagesTr", "must be 3-D, with"),
    "5-D": (
        lambda f: rewrite(f, "imagesTr", lambda v, a: (np.stack([v, v], -1)[..., None, :], a)),
        "imagesTr",
        "must be 3-D, with channels along a fourth axis; its shape is 16 x 16 x 16 x 1 x 2",
    ),
    "affine": (lambda f: rewrite(f, "labelsTr", moved), "labelsTr", "lies up to 5 mm from the image"),
    "value": (lambda f: rewrite(f, "labelsTr", with_voxels(7)), "labelsTr", "outside 0..2, the task's labels: 7"),
    "negative": (lambda f: rewrite(f, "labelsTr", with_voxels(-1)), "labelsTr", "outside 0..2, the task's labels: -1"),
    "fraction": (lambda f: rewrite(f, "labelsTr", with_voxels(0.5)), "labelsTr", "no whole numbers: 0.5"),
    "small fraction": (
        lambda f: rewrite(f, "labelsTr", with_voxels(1.0625)),
        "labelsTr",
        "no whole numbers: 1.0625",
    ),
    "NaN label": (lambda f: rewrite(f, "labelsTr", with_voxels(np.nan)), "labelsTr", "no whole numbers: nan"),
    "empty": (lambda f: rewrite(f, "labelsTr", lambda v, a: (v * 0, a)), "labelsTr", "has no foreground"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_with_its_case_and_file(folder: Path, fault: str) -> None:
    spoil, part, what = FAULTS[fault]
    spoil(folder)
    (problem,) = check_dataset(folder).problems
    assert problem[:2] == (CASE, f"{part}/{CASE}.nii.gz")
    assert what in problem.what
    assert "\n" not in problem.what


def test_all_faults_are_listed_and_the_status_is_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    cut_off(folder)
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("is absent") == 3
    assert printed.out.count("cannot be read") == 1
    assert "4 problems in 3 of 3 cases" in printed.err
    assert printed.err.count("\n") == 1


def test_a_good_dataset_is_summed_up(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--dataset_dir", str(good)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Task04_Hippocampus: 3 cases",
        "shape (voxels): median 16 x 16 x 16, from 16 x 16 x 16 to 16 x 16 x 16",
        "spacing (mm): median 1 x 1 x 1, from 1 x 1 x 1 to 1 x 1 x 1",
    ]


def test_an_absent_label_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, "labelsTr", lambda voxels, affine: (np.minimum(voxels, 1), affine))
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 0
    assert f"warning: label 2 (posterior) is absent in 1 of 3 cases: {CASE}" in capsys.readouterr().out


def test_a_shift_of_less_than_half_a_voxel_is_none(folder: Path) -> None:
    rewrite(folder, "labelsTr", lambda voxels, affine: (voxels, affine + np.eye(4, k=3) * 0.4))
    assert check_dataset(folder).problems == []


def test_a_scale_a_hair_off_one_is_none(folder: Path) -> None:
    scale_labels(folder, 1.0000001)
    assert nib.load(folder / "labelsTr" / f"{CASE}.nii.gz").get_fdata().max() > 2
    report = check_dataset(folder)
    assert (report.problems, report.absent) == ([], {})
    scale_labels(folder, 1.01)
    (problem,) = check_dataset(folder).problems
    assert "no whole numbers: 1.0" in problem.what  # the value, not a rounded one


def scale_labels(folder: Path, slope: float) -> None:
    """Write a label as scanners' software does: whole numbers, and in the header what to multiply them by."""
    path = folder / "labelsTr" / f"{CASE}.nii.gz"
    volume = nib.load(path)
    content = bytearray(nib.Nifti1Image(np.rint(volume.get_fdata()).astype(np.int16), volume.affine).to_bytes())
    content[112:116] = np.float32(slope).tobytes()  # scl_slope
    path.write_bytes(gzip.compress(content))


def test_cases_that_share_a_file_name_are_told_apart(folder: Path) -> None:
    cases = []
    for i, case in enumerate(read_cases(folder)):
        (folder / f"p{i}").mkdir()
        moved_to = {key: Path(case[key]).rename(folder / f"p{i}" / f"{key}.nii.gz") for key in ("image", "label")}
        cases.append({key: str(path) for key, path in moved_to.items()})
    (folder / "dataset.json").write_text(json.dumps({"training": cases}))
    report = check_dataset(folder)
    assert report.problems == []
    assert report.cases == [f"p{i}/image.nii.gz" for i in range(3)]


def test_folder_without_cases_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatasetError, match=r"there is no dataset\.json in it"):
        check_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    assert main(["data", "check", "--dataset_dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["Hippocampus", "hippocampus"])  # as the Decathlon's own file says it
def test_task_is_told_by_the_folder_or_the_index_or_must_be_given(folder: Path, name: str) -> None:
    index = json.loads((folder / "dataset.json").read_text())
    del index["phantoms"]
    (folder / "dataset.json").write_text(json.dumps({**index, "name": "?"}))
    assert check_dataset(folder).task.name == "Task04_Hippocampus"
    folder = folder.rename(folder.with_name("mine"))
    with pytest.raises(ValueError, match="task: must be given"):
        check_dataset(folder)
    assert check_dataset(folder, "Task04_Hippocampus").problems == []
    (folder / "dataset.json").write_text(json.dumps({**index, "name": name}))
    assert check_dataset(folder).task.name == "Task04_Hippocampus"


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_tasks_phantoms_pass_and_hold_what_its_row_says(task: Task, tmp_path: Path) -> None:
    folder = make_phantoms(task, tmp_path, n_cases=4, seed=3, scale=0.1)
    report = check_dataset(folder)
    assert report.task == task
    assert report.problems == []
    assert max(map(len, report.absent.values()), default=0) <= 2
    for spacing, shape in zip(report.spacings, report.shapes, strict=True):
        assert sorted(spacing) == pytest.approx(sorted(task.typical_spacing_mm), abs=1e-4)
        assert min(shape) >= 16
    for case in read_cases(folder):
        image = nib.load(case["image"])
        assert image.shape[3:] == ((len(task.channels),) if len(task.channels) > 1 else ())


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="MSD's Task04_Hippocampus is not here (TASK04_DIR says where)")
def test_real_hippocampus_passes() -> None:
    report = check_dataset(REAL_DATA)
    assert report.problems == []
    assert report.absent == {}
