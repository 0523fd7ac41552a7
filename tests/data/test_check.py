# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The check of a dataset: it passes what is well, and finds each fault with its case, file and reason."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import struct
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
from monai_losses_ext.errors import UserError

REAL_DATA = Path(os.environ.get("TASK04_DIR", "Task04_Hippocampus"))
CASE = "phantom_001"
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


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


def patch(folder: Path, part: str, offset: int, form: str, *values: float) -> None:
    """Change bytes of the header of a file of the second case."""
    path = folder / part / f"{CASE}.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(f"<{form}", content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


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
    "4-D label": (
        lambda f: rewrite(f, "labelsTr", lambda v, a: (np.stack([v, v], -1), a)),
        "labelsTr",
        "has 2 channels; it must have one",
    ),
    "image NaN place": (
        lambda f: patch(f, "imagesTr", 280, "f", np.nan),
        "imagesTr",
        "affine with values that are NaN",
    ),
    "label zero place": (lambda f: patch(f, "labelsTr", 280, "12f", *[0] * 12), "labelsTr", "voxel edges of 0 x 0 x 0"),
    "absurd header": (lambda f: patch(f, "labelsTr", 42, "3h", *[32767] * 3), "labelsTr", "is cut off: its header"),
    "color": (lambda f: rewrite(f, "labelsTr", lambda v, a: (np.zeros(v.shape, RGB), a)), "labelsTr", "color image"),
    "complex": (lambda f: rewrite(f, "imagesTr", lambda v, a: (v.astype("c8"), a)), "imagesTr", "complex voxels"),
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


def edit_index(folder: Path, **values: object) -> None:
    """Change keys of ``dataset.json``; None takes one away."""
    index = json.loads((folder / "dataset.json").read_text())
    index.update(values)
    text = json.dumps({key: value for key, value in index.items() if value is not None})
    (folder / "dataset.json").write_text(text)


@pytest.mark.parametrize("name", ["Hippocampus", "hippocampus"])  # as the Decathlon's own file says it
def test_task_is_told_by_the_folder_or_the_index_or_must_be_given(folder: Path, name: str) -> None:
    """Where dataset.json has no labels of its own."""
    edit_index(folder, phantoms=None, name="?", labels=None)
    assert check_dataset(folder).task == TASKS["Task04_Hippocampus"]
    folder = folder.rename(folder.with_name("mine"))
    with pytest.raises(UserError, match="dataset.json: must tell what the dataset holds, .* or --task must be given"):
        check_dataset(folder)
    assert check_dataset(folder, "Task04_Hippocampus").problems == []
    edit_index(folder, name=name)
    assert check_dataset(folder).task == TASKS["Task04_Hippocampus"]


@pytest.mark.parametrize(
    "labels", [{"0": "background", "1": "a", "2": "b", "3": "c"}, {"background": 0, "a": 1, "b": 2, "c": 3}]
)
@pytest.mark.parametrize("channels", [{"modality": {"0": "MRI"}}, {"modality": None, "channel_names": {"0": "MRI"}}])
def test_folder_is_checked_by_its_own_index(
    folder: Path, labels: dict[str, object], channels: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Even in a folder that is named after a task; --task means the task's row."""
    edit_index(folder, phantoms=None, name="Mine", labels=labels, **channels)
    rewrite(folder, "labelsTr", with_voxels(3))
    report = check_dataset(folder)
    assert (report.task, report.problems) == (None, [])
    assert dict(report.expected.classes) == {0: "background", 1: "a", 2: "b", 3: "c"}
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 0
    assert "warning: label 3 (c) is absent in 2 of 3 cases" in capsys.readouterr().out
    (problem,) = check_dataset(folder, "Task04_Hippocampus").problems
    assert "outside 0..2, the task's labels: 3" in problem.what
    edit_index(folder, modality={"0": "MRI", "1": "MRI"}, channel_names=None)
    assert [problem.what for problem in check_dataset(folder).problems] == ["has 1 channels; the task has 2"] * 3


def test_labels_with_gaps_are_all_told_with_a_map_that_mends_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids as FreeSurfer has them: the map that is printed, given back, makes the folder fit."""
    ids = [0, 17, 53]
    for path in (folder / "labelsTr").iterdir():
        volume = nib.load(path)
        nib.save(nib.Nifti1Image(np.array(ids, np.int16)[np.asarray(volume.dataobj)], volume.affine), path)
    rewrite(folder, "labelsTr", with_voxels(1035))
    command = ["data", "check", "--dataset_dir", str(folder)]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "outside 0..2, the task's labels: 17, 53\n" in printed
    assert "outside 0..2, the task's labels: 17, 53, 1035\n" in printed
    told = """--label_map '{"17": 1, "53": 2, "1035": 0}'"""
    assert printed.count(told) == 1
    assert main([*command, *shlex.split(told)]) == 0
    assert main([*command, "--label_map", '{"17": 1, "53": 2}', "--ignore_label", "1035"]) == 0
    assert main([*command, "--label_map", "{'17': 1, '53': 2}"]) == 1
    capsys.readouterr()
    for wrong in ("{", "[1, 2]", '{"17": "liver"}', '{"17": 3}'):
        assert main([*command, "--task", "Task04_Hippocampus", "--label_map", wrong]) == 1
        assert capsys.readouterr().err.startswith("error: label_map: must ")


def test_many_values_are_told_as_ranges_and_very_many_as_one(folder: Path) -> None:
    def numbered(n: int) -> list[str]:
        rewrite(folder, "labelsTr", lambda v, a: ((np.arange(v.size).reshape(v.shape) % n).astype(np.int16), a))
        return [problem.what for problem in check_dataset(folder).problems]

    assert numbered(40) == ["has values outside 0..2, the task's labels: 3 to 39"]
    assert numbered(3000) == ["has values outside 0..2, the task's labels: 2997 values from 3 to 2999"]


def test_index_that_numbers_its_labels_with_gaps_is_a_problem_that_hides_no_case(folder: Path) -> None:
    edit_index(folder, labels={"0": "background", "2": "a", "5": "b"}, name="Mine", phantoms=None)
    for path in (folder / "labelsTr").iterdir():
        volume = nib.load(path)
        nib.save(nib.Nifti1Image(np.array([0, 2, 5], np.uint8)[np.asarray(volume.dataobj)], volume.affine), path)
    rewrite(folder, "labelsTr", with_voxels(7))
    first, second = check_dataset(folder).problems
    assert first[1:] == (
        "dataset.json",
        """numbers its labels 0, 2, 5; a training needs 0, 1, ...: --label_map '{"2": 1, "5": 2}'""",
    )
    assert second.case == CASE
    assert "outside 0..2, the task's labels: 7" in second.what
    (only,) = check_dataset(folder, label_map={"2": 1, "5": 2}).problems
    assert only == second


@pytest.mark.parametrize("value", [255, -1])
def test_unknown_voxels_are_no_problem_once_they_are_named(folder: Path, value: int) -> None:
    rewrite(folder, "labelsTr", with_voxels(value))
    (problem,) = check_dataset(folder).problems
    assert f"labels: {value}" in problem.what
    report = check_dataset(folder, ignore_label=value)
    assert (report.problems, report.absent) == ([], {})
    command = ["data", "check", "--dataset_dir", str(folder), "--ignore_label", str(value)]
    assert main(command) == 0
    rewrite(folder, "labelsTr", lambda voxels, affine: (np.full_like(voxels, value), affine))
    (problem,) = check_dataset(folder, ignore_label=[7, value]).problems
    assert problem.what == "has no foreground"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ["background", "a"]}, "dataset.json: labels: must name each value"),
        ({"labels": {}}, "dataset.json: labels: must name each value"),
        ({"labels": {"a": "b"}}, "dataset.json: labels: must name each value"),
        ({"modality": "MRI"}, "dataset.json: modality: must name each channel"),
    ],
)
def test_index_that_cannot_be_right_is_one_line(folder: Path, values: dict[str, object], message: str) -> None:
    edit_index(folder, **values)
    with pytest.raises(UserError, match=message) as caught:
        check_dataset(folder)
    assert "\n" not in str(caught.value)


def test_number_of_cases_that_differs_from_the_list_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_index(folder, numTraining=260)
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 0
    assert "warning: dataset.json says numTraining 260, and lists 3 cases" in capsys.readouterr().out


def test_place_is_the_trainings_and_forms_that_disagree_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The label's qform alone has the header's voxel size, so MONAI reads it; NiBabel's affine would be the image's."""
    path = folder / "labelsTr" / f"{CASE}.nii.gz"
    volume = nib.load(path)
    larger = volume.affine @ np.diag([1.5, 1.5, 1.5, 1])
    image = nib.load(folder / "imagesTr" / f"{CASE}.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), larger), folder / "imagesTr" / f"{CASE}.nii.gz")
    assert len(check_dataset(folder).problems) == 1  # 1.5 mm beside 1 mm
    volume.set_qform(volume.affine, 1)
    volume.set_sform(larger, 1)
    nib.save(volume, path)
    np.testing.assert_allclose(nib.load(path).affine, larger)
    (problem,) = check_dataset(folder).problems
    apart = 7.5 * np.sqrt(3)
    away = f"lies up to {apart:.3g} mm from the image: their affines differ; of the label, sform and qform disagree by "
    assert problem.what == f"{away}{apart:.3g} mm, and MONAI reads the qform"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), folder / "imagesTr" / f"{CASE}.nii.gz")
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 0
    assert f"labelsTr/{CASE}.nii.gz (sform and qform disagree by {apart:.3g} mm" in capsys.readouterr().out


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
