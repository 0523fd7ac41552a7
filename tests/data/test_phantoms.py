# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms: reproducible files in the Decathlon's layout that look like the task, are learnable and not trivial."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import voxel_sizes
from scipy.ndimage import label as connected_components

from monai_losses_ext.data.dataset import read_cases
from monai_losses_ext.data.phantoms import make_case, make_phantoms, phantom_origin
from monai_losses_ext.data.tasks import TASKS, Task, get_task

TASK = get_task("Task04_Hippocampus")
N = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(TASK.name, tmp_path_factory.mktemp("phantoms") / "data", n_cases=N, seed=1)


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Image and label of every case, brought into the order right, front, up by nibabel."""
    loaded = [(nib.load(case["image"]), nib.load(case["label"])) for case in read_cases(folder)]
    return [(nib.as_closest_canonical(image), nib.as_closest_canonical(label)) for image, label in loaded]


def with_phantom(task: Task, **changes: Any) -> Task:
    return dataclasses.replace(task, phantom={**task.phantom, **changes})


def test_dataset_json_says_what_these_cases_are(folder: Path) -> None:
    index = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert "Synthetic" in index["name"]
    assert "no patient" in index["description"]
    assert index["licence"] == "CC0-1.0"
    assert index["labels"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert index["modality"] == {"0": "T1-weighted MRI"}
    assert index["numTraining"] == len(index["training"]) == N


def test_files_have_the_types_spacing_and_affine_of_a_scan(folder: Path) -> None:
    orders = set()
    for case in read_cases(folder):
        image, label = nib.load(case["image"]), nib.load(case["label"])
        assert image.get_data_dtype() == np.float32
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert np.allclose(image.header.get_zooms(), TASK.typical_spacing_mm, atol=1e-5)
        assert not np.allclose(image.affine, np.diag([*TASK.typical_spacing_mm, 1]))
        orders.add(nib.aff2axcodes(image.affine))
    assert len(orders) > 1  # so that a pipeline that ignores the orientation is found out


def test_shape_and_size_are_those_of_the_real_data(cases: list[Any]) -> None:
    shapes = np.array([image.shape for image, _ in cases])
    assert np.abs(np.median(shapes, axis=0) - TASK.typical_shape).max() <= 3
    for value in (1, 2):  # the real cases have 1000 to 2100 voxels of each
        volumes = [np.count_nonzero(label.get_fdata() == value) for _, label in cases]
        assert 900 < np.median(volumes) < 2000
        assert min(volumes) > 500


def test_every_label_is_one_piece_and_anterior_lies_in_front(cases: list[Any]) -> None:
    for _, label in cases:
        values = label.get_fdata()
        assert set(np.unique(values)) == {0, 1, 2}
        assert connected_components(values > 0, np.ones((3, 3, 3)))[1] == 1
        front = [np.argwhere(values == value)[:, 1].mean() for value in (1, 2)]
        assert front[0] > front[1] + 5


def test_left_and_right_both_occur(cases: list[Any]) -> None:
    towards_right = [
        np.subtract(*(np.argwhere(label.get_fdata() == v)[:, 0].mean() for v in (1, 2))) for _, label in cases
    ]
    assert min(towards_right) < -1
    assert max(towards_right) > 1


def test_scanners_differ_by_orders_of_magnitude(cases: list[Any]) -> None:
    medians = [np.median(image.get_fdata()) for image, _ in cases]
    assert max(medians) / min(medians) > 30
    assert all(image.get_fdata().min() >= 0 for image, _ in cases)


def test_no_threshold_finds_the_structure(cases: list[Any]) -> None:
    """The best window of intensities, chosen with the label in hand, stays far from a segmentation."""
    for image, label in cases:
        values, inside = image.get_fdata(), label.get_fdata() > 0
        windows = [np.percentile(values[inside], [low, 100 - low]) for low in (1, 5, 10, 20, 30)]
        found = [(values >= low) & (values <= high) for low, high in windows]
        dice = [2 * np.count_nonzero(f & inside) / (f.sum() + inside.sum()) for f in found]
        assert max(dice) < 0.6


def test_case_depends_on_seed_and_number_alone(tmp_path: Path, folder: Path) -> None:
    fewer = make_phantoms(TASK.name, tmp_path / "fewer", n_cases=2, seed=1)
    other = make_phantoms(TASK.name, tmp_path / "other", n_cases=2, seed=2)
    for part in ("imagesTr", "labelsTr"):
        for path in sorted((fewer / part).iterdir()):
            assert path.read_bytes() == (folder / part / path.name).read_bytes()
            assert path.read_bytes() != (other / part / path.name).read_bytes()
    assert not np.array_equal(make_case(TASK, 1, 0)[0], make_case(TASK, 1, 1)[0])


def test_origin_tells_sets_of_phantoms_apart(tmp_path: Path, folder: Path) -> None:
    origin = phantom_origin(folder)
    assert origin is not None
    assert (origin["task"], origin["cases"], origin["seed"]) == (TASK.name, N, 1)
    louder = make_phantoms(with_phantom(TASK, noise=0.5), tmp_path / "louder", n_cases=1, seed=1)
    assert phantom_origin(louder) != phantom_origin(make_phantoms(TASK, tmp_path / "as_is", n_cases=1, seed=1))
    (louder / "dataset.json").write_text("{}")
    assert phantom_origin(louder) is None
    assert phantom_origin(tmp_path) is None


def test_another_dataset_is_never_written_over(tmp_path: Path) -> None:
    index = tmp_path / "dataset.json"
    index.write_text('{"name": "mine"}')
    with pytest.raises(
        ValueError, match="out: must be a new folder or one with phantoms, not one with another dataset"
    ):
        make_phantoms(TASK, tmp_path, n_cases=1)
    assert index.read_text() == '{"name": "mine"}'
    assert not (tmp_path / "imagesTr").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "Task4"}, "task: must be one of"),
        ({"n_cases": 0}, "cases: must be a number of at least 1; got 0"),
        ({"seed": -1}, "seed: must be a number of at least 0; got -1"),
        ({"scale": 0}, "scale: must be a number above 0 and at most 1; got 0"),
        ({"scale": 1.5}, "scale: must be a number above 0 and at most 1; got 1.5"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_phantoms(**{"task": TASK.name, "out_dir": tmp_path / "x", "n_cases": 1, **arguments})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_has_phantoms_with_all_its_labels(task: Task) -> None:
    image, label, affine = make_case(task, seed=0, i=0, scale=0.1)
    assert image.ndim == 3 + (len(task.channels) > 1)
    assert image.shape[:3] == label.shape
    assert set(np.unique(label)) == set(range(len(task.labels)))
    assert np.allclose(voxel_sizes(affine), task.typical_spacing_mm)


def test_known_phantoms_never_change() -> None:
    """Published results stand on them: what changes them changes the benchmark."""
    image, label, _ = make_case(TASK, 1, 3)
    numbers = np.random.default_rng(0).integers(0, image.size, 4)
    assert image.shape == (36, 50, 35)
    assert np.bincount(label.ravel()).tolist() == [60833, 1183, 984]
    assert image.ravel()[numbers].tolist() == pytest.approx([55.132, 6.94, 15.938, 4.607], abs=0.001)


def test_miniature_shows_the_whole_anatomy_at_the_tasks_voxel_size(tmp_path: Path) -> None:
    task = get_task("Task09_Spleen")
    (image, label, affine), (_, half, _) = (make_case(task, 0, 0, scale) for scale in (0.1, 0.25))
    assert image.shape == label.shape == (51, 51, 16)  # 9 slices would be too few
    assert np.abs(np.subtract(half.shape, (128, 128, 22))).max() <= 1
    assert np.allclose(voxel_sizes(affine), task.typical_spacing_mm)
    assert (label > 0).mean() == pytest.approx((half > 0).mean(), rel=0.4)
    origins = [phantom_origin(make_phantoms(task, tmp_path / str(s), 1, scale=s)) for s in (0.1, 0.11)]
    assert origins[0] != origins[1]


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.modality == "CT"])
def test_ct_is_in_hounsfield_units_and_the_organs_lie_in_the_tasks_window(name: str) -> None:
    task = TASKS[name]
    image, label, _ = make_case(task, 0, 0, 0.2)
    assert image.dtype == np.int16
    assert np.percentile(image, 5) == pytest.approx(-1000, abs=60)  # air
    low, high = task.intensity["low"], task.intensity["high"]
    for value in range(1, len(task.labels)):
        assert low < np.median(image[label == value]) < high


def test_sequences_of_the_brain_differ_and_the_skull_is_stripped() -> None:
    image, label, _ = make_case(get_task("Task01_BrainTumour"), 0, 0, 0.4)
    means = {value: image[label == value].mean(axis=0) for value in range(4)}
    flair, t1, t1gd, t2 = range(4)
    assert means[1].argmax() in (flair, t2)  # oedema
    assert means[3].argmax() == t1gd  # enhancing tumour
    assert means[1][flair] > 1.5 * means[1][t1]
    assert 0.5 < (image == 0).all(axis=-1).mean() < 0.95
    assert not label[(image == 0).all(axis=-1)].any()


def test_large_volumes_are_painted_in_blocks_as_small_ones_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("Task08_HepaticVessel")
    at_once = make_case(task, 2, 0, 0.15)
    monkeypatch.setattr("monai_losses_ext.data.canvas.BLOCK", 500)
    monkeypatch.setattr("monai_losses_ext.data.canvas.STRIDE", 1)
    in_blocks = make_case(task, 2, 0, 0.15)
    assert np.array_equal(at_once[1], in_blocks[1])
    assert np.abs(at_once[0].astype(int) - in_blocks[0]).max() <= 1


def ct_with_lesions() -> Task:
    """Return a made-up task: two channels, thick slices, and lesions in an organ, described by its row alone."""
    plain = {"rotation_deg": 0, "scale": 0, "shift_mm": 0, "bend_mm": 0, "bend_scale_mm": 10, "mirror": False}
    organ = {"shape": "ellipsoid", "center": [0, 0, 0], "radii": [20, 15, 18], "labels": [1], "intensity": [60, 5]}
    organ["name"] = "organ"
    lesion = {"shape": "ellipsoid", "center": [0, 0, 0], "radii": [4, 4, 4], "labels": [2], "intensity": [20, 50]}
    return dataclasses.replace(
        TASK,
        modality="CT",
        channels=("CT", "PET"),
        labels=("background", "organ", "lesion"),
        typical_shape=(64, 64, 16),
        typical_spacing_mm=(1.0, 1.0, 4.0),
        training=dataclasses.replace(TASK.training, network_def={"in_channels": 2, "out_channels": 3}),
        phantom={
            "shape_jitter": 0,
            "pose": plain,
            "background": {"tissues": [[-100, 1], [40, 2]], "scale_mm": 12},
            "structures": [organ, {**lesion, "inside": "organ", "count": [2, 4]}],
            "contrast_jitter": 0.0,
            "noise": 2.0,
            "bias": 0.0,
            "gain": [1, 1],
        },
    )


def test_a_row_describes_other_tasks_too() -> None:
    image, label, _ = make_case(ct_with_lesions(), seed=0, i=0)
    assert image.shape == (64, 64, 16, 2)
    assert image.min() < -50
    assert np.allclose([image[label == 1][:, c].mean() for c in (0, 1)], [60, 5], atol=3)
    assert np.allclose([image[label == 2][:, c].mean() for c in (0, 1)], [20, 50], atol=8)  # small: blurred rims
    organ_mm3 = np.count_nonzero(label > 0) * 4
    assert organ_mm3 == pytest.approx(4 / 3 * np.pi * 20 * 15 * 18, rel=0.1)
