# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a case was annotated for and how much its voxels count: from dataset.json to the channels of a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate

from monai_losses_ext.cli import main
from monai_losses_ext.data.check import check_dataset
from monai_losses_ext.data.check_case import CheckCased, LoadWeightd
from monai_losses_ext.data.dataset import DatasetError, annotated_cases, read_cases, training_cases, validation_cases
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.seeded import file_hash
from monai_losses_ext.errors import UserError

LABELS = {"0": "background", "1": "anterior", "2": "posterior"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms("Task04_Hippocampus", tmp_path_factory.mktemp("data") / "good", n_cases=4, scale=0.1)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "mine"))


def edit(folder: Path, cases: dict[int, dict[str, Any]], **values: Any) -> Path:
    """Add keys to cases of ``dataset.json``, and change its own; None takes one away."""
    index = json.loads((folder / "dataset.json").read_text()) | values
    for i, keys in cases.items():
        index["training"][i] |= keys
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    return folder


def channels(folder: Path, *args: Any, **kwargs: Any) -> list[list[bool]]:
    return [case["annotated"].tolist() for case in annotated_cases(folder, *args, **kwargs)]


def write_weight(folder: Path, i: int, value: Any) -> dict[str, str]:
    """Write a weight file of a case, a number everywhere or an array; return the case's key."""
    label = nib.load(folder / "labelsTr" / f"phantom_{i:03d}.nii.gz")
    voxels = np.broadcast_to(np.asarray(value, np.float32), label.shape) if np.ndim(value) == 0 else value
    nib.save(nib.Nifti1Image(np.array(voxels, np.float32), label.affine), folder / f"weight_{i}.nii.gz")
    return {"weight": f"weight_{i}.nii.gz"}


def test_every_case_has_its_channels_or_none_has(folder: Path) -> None:
    assert all(case.keys() == {"image", "label"} for case in annotated_cases(folder, LABELS))
    edit(folder, {1: {"annotated": [1]}, 2: {"annotated": [0, 2]}})
    full, anterior, posterior = [True, True, True], [True, True, False], [True, False, True]
    assert channels(folder, LABELS) == channels(folder) == [full, anterior, posterior, full]
    for cases in (training_cases(folder, 0.5, 0, LABELS, None), validation_cases(folder, 0.5, 0, LABELS)):
        assert list_data_collate([{"annotated": case["annotated"]} for case in cases])["annotated"].shape == (2, 3)
    by_image = {case["image"]: case["annotated"].tolist() for case in training_cases(folder, 0.5)}
    assert by_image.items() <= {c["image"]: c["annotated"].tolist() for c in annotated_cases(folder)}.items()


def test_merged_classes_and_regions_count_where_all_their_labels_do(folder: Path) -> None:
    names = {"0": "background", "17": "left", "53": "right", "99": "lesion"}
    edit(folder, {0: {"annotated": [17]}, 1: {"annotated": [53, 17]}, 2: {"annotated": [99]}}, labels=names)
    merged = {"17": 1, "53": 1, "99": 2}
    two = {"0": "background", "1": "hippocampus", "2": "lesion"}
    assert channels(folder, two, merged) == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
        [True, True, True],
    ]
    # 17 alone is a class of the same number as the label 1, which there is not
    assert channels(folder, {**two, "3": "right"}, {"17": 1, "99": 2, "53": 3})[0] == [True, True, False, False]
    # the last merged into the background, or marked as unknown
    assert channels(folder, {"0": "b", "1": "hippocampus"}, {"17": 1, "53": 1, "99": 0})[1:3] == [
        [True, True],
        [True, False],
    ]
    assert channels(folder, regions=[[17, 53, 99], [17, 53], [99]]) == [
        [False, False, False],
        [False, True, False],
        [False, False, True],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must list the labels that the case was annotated for, as [1, 2]; got []."),
        (1, "must list the labels that the case was annotated for, as [1, 2]; got 1."),
        (None, "must list the labels that the case was annotated for, as [1, 2]; got None."),
        (["1"], "must list the labels that the case was annotated for, as [1, 2]; got ['1']."),
        ([True], "must list the labels that the case was annotated for, as [1, 2]; got [True]."),
        ([1, 7], "must list labels of the files, which are 0, 1, 2; got 7."),
    ],
)
def test_what_is_no_list_of_labels_is_one_line_that_names_the_case(folder: Path, value: Any, message: str) -> None:
    edit(folder, {2: {"annotated": value}})
    for read in (read_cases, training_cases):
        with pytest.raises(DatasetError) as caught:
            read(folder)
        assert str(caught.value) == f"dataset.json: case phantom_002: annotated: {message}"
    (problem,) = check_dataset(folder).problems
    assert problem == ("phantom_002", "dataset.json", f"annotated: {message}")


def test_labels_that_nothing_names(folder: Path) -> None:
    """The classes are the labels; where a label_map changes them, dataset.json must name them."""
    edit(folder, {0: {"annotated": [2]}}, labels=None)
    assert channels(folder, LABELS)[0] == [True, False, True]
    with pytest.raises(UserError, match="dataset.json: labels: must name the labels where cases say"):
        training_cases(folder)
    with pytest.raises(UserError, match="dataset.json: labels: must name the labels of the files where a label_map"):
        training_cases(folder, 0.2, 0, LABELS, {"2": 1})
    edit(folder, {0: {"annotated": [3]}})
    with pytest.raises(DatasetError, match="must list labels of the files, which are 1, 2; got 3"):
        training_cases(folder, 0.2, 0, LABELS)


def test_weights_are_files_or_none_and_for_training_alone(folder: Path) -> None:
    edit(folder, {1: write_weight(folder, 1, 3.0)})
    assert [case.get("weight") for case in read_cases(folder)] == [None, str(folder / "weight_1.nii.gz"), None, None]
    assert all("weight" in case for case in training_cases(folder))
    assert not any("weight" in case for case in validation_cases(folder))
    edit(folder, {2: {"weight": 3}})
    with pytest.raises(DatasetError, match="case 2 under 'training' in dataset.json has a 'weight' that is no path"):
        read_cases(folder)
    edit(folder, {2: {"weight": "absent.nii.gz"}})
    with pytest.raises(DatasetError, match=r"absent\.nii\.gz is absent"):
        read_cases(folder)


def test_weight_is_loaded_with_its_label_or_1(folder: Path) -> None:
    shape = nib.load(folder / "labelsTr" / "phantom_001.nii.gz").shape
    ramp = np.random.default_rng(0).random(shape).astype(np.float32)
    edit(folder, {1: write_weight(folder, 1, ramp)})
    path = annotated_cases(folder)[1]["weight"]
    label = MetaTensor(torch.zeros(1, *shape), affine=torch.as_tensor(nib.load(path).affine))
    image = MetaTensor(torch.rand(1, *shape), affine=label.affine)
    check = CheckCased(num_classes=3, channels=1)
    for weight, expected in ((path, torch.from_numpy(ramp)[None]), (None, torch.ones(1, *shape))):
        case = check(LoadWeightd()({"image": image, "label": label, "weight": weight}))
        assert torch.equal(case["weight"].as_tensor(), expected)
        assert torch.equal(case["weight"].affine, label.affine)
    assert LoadWeightd()({"label": label}) == {"label": label}


def test_check_counts_annotated_cases_and_finds_what_should_not_be_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, {0: {"annotated": [1]}, 1: {"annotated": [1]}})
    for i in (1, 2):
        path = folder / "labelsTr" / f"phantom_00{i}.nii.gz"
        volume = nib.load(path)
        values = np.where(np.asarray(volume.dataobj) == 2, 0, np.asarray(volume.dataobj))
        nib.save(nib.Nifti1Image(values, volume.affine), path)
    n = int((np.asarray(nib.load(folder / "labelsTr" / "phantom_000.nii.gz").dataobj) == 2).sum())
    assert main(["data", "check", "--dataset_dir", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == [
        "label 1 (anterior): 4 of 4 cases are annotated for it",
        "label 2 (posterior): 2 of 4 cases are annotated for it",
        "warning: label 2 (posterior) is absent in 1 of 2 cases: phantom_002",
        "warning: label 2 (posterior) is there in 1 of 2 cases that were not annotated for it, and counts as "
        f"background: phantom_000 ({n} voxels)",
    ]
    edit(folder, {1: {"annotated": [2]}})
    (problem,) = check_dataset(folder).problems
    assert problem == ("phantom_001", "labelsTr/phantom_001.nii.gz", "has no foreground")


FAULTS = {
    "negative": (lambda shape: np.full(shape, -0.5), r"has \d+ voxels below 0, down to -0.5"),
    "NaN": (lambda shape: np.full(shape, np.nan), r"has \d+ voxels that are NaN or infinite"),
    "shape": (lambda shape: np.ones((shape[0] - 1, *shape[1:])), r"has the shape 15 x .*; the image has 16 x "),
    "channels": (lambda shape: np.ones((*shape, 2)), "has 2 channels; it must have one"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_what_is_wrong_with_a_weight(folder: Path, fault: str) -> None:
    spoil, what = FAULTS[fault]
    shape = nib.load(folder / "labelsTr" / "phantom_001.nii.gz").shape
    edit(folder, {0: write_weight(folder, 0, 2.0), 1: write_weight(folder, 1, spoil(shape))})
    (problem,) = check_dataset(folder).problems
    assert problem[:2] == ("phantom_001", "weight_1.nii.gz")
    assert re.match(what, problem.what)


def test_check_finds_weights_that_are_absent_broken_or_elsewhere(folder: Path) -> None:
    edit(folder, {i: write_weight(folder, i, 1.0) for i in range(4)})
    (folder / "weight_0.nii.gz").unlink()
    (folder / "weight_1.nii.gz").write_text("x")
    volume = nib.load(folder / "weight_2.nii.gz")
    moved = volume.affine + 5 * np.eye(4, k=3)
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj), moved), folder / "weight_2.nii.gz")
    absent, broken, elsewhere = check_dataset(folder).problems
    assert (absent.file, absent.what) == ("weight_0.nii.gz", "is absent")
    assert (broken.file, broken.what[:14]) == ("weight_1.nii.gz", "cannot be read")
    assert (elsewhere.file, elsewhere.what[:12]) == ("weight_2.nii.gz", "lies up to 5")


def test_prepared_cases_on_disk_are_not_those_of_other_annotations(folder: Path) -> None:
    plain = annotated_cases(folder)[0]
    edit(folder, {0: {"annotated": [1]}})
    one = annotated_cases(folder)[0]
    edit(folder, {0: {"annotated": [2]}})
    other = annotated_cases(folder)[0]
    assert len({file_hash(case) for case in (plain, one, other)}) == 3
    assert file_hash(other) == file_hash(annotated_cases(folder)[0])
    weighted = {**plain, "weight": None}
    assert file_hash(weighted) != file_hash(plain)
