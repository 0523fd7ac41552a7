# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A bad case ends a run with one line, wherever it turns up: filling a cache, in an epoch, in a worker, on disk."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandFlipd
from warm import warm_python

from monai_losses_ext.cli import main
from monai_losses_ext.data.bad_case import CaseError
from monai_losses_ext.data.check_case import CheckCased
from monai_losses_ext.data.dataset import read_cases, training_cases, validation_cases
from monai_losses_ext.data.loader import CaseLoader
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.seeded import SeededCacheDataset, SeededPersistentDataset
from monai_losses_ext.errors import UserError

REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "bundles" / "msd_hippocampus_mri_segmentation" / "configs" / "train.json"
NETWORK = (
    "{'_target_': 'UNet', 'spatial_dims': 3, 'in_channels': 1, 'out_channels': 3, 'channels': [4, 8], 'strides': [2]}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_phantoms("Task04_Hippocampus", tmp_path / "Task04_Hippocampus", n_cases=5, scale=0.1)


def transform(*more: Any) -> Compose:
    """Return what a bundle does with a case first."""
    keys = ["image", "label"]
    load = [LoadImaged(keys, image_only=True), EnsureChannelFirstd(keys), CheckCased(num_classes=3, channels=1)]
    return Compose([*load, *more, RandFlipd(keys, prob=0.5, spatial_axis=0)])


def cut_off(path: str) -> str:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    return "cannot be read"


def with_seven(path: str) -> str:
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(np.where(np.asarray(volume.dataobj) == 2, 7, 0).astype(np.uint8), volume.affine), path)
    return "outside 0..2, the task's labels: 7"


def with_nan(path: str) -> str:
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(np.where(volume.get_fdata() > 1e9, 0, np.nan), volume.affine), path)
    return "voxels that are NaN or infinite"


def smaller(path: str) -> str:
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj)[1:], volume.affine), path)
    return "has the shape 15 x 16 x 16; the image has 16 x 16 x 16"


SPOIL = {"image": [cut_off, with_nan], "label": [cut_off, with_seven, smaller]}
FAULTS = [(key, spoil) for key, ways in SPOIL.items() for spoil in ways]


@pytest.mark.parametrize(("key", "spoil"), FAULTS)
def test_error_names_the_case_the_file_the_fault_and_the_check(folder: Path, key: str, spoil: Any) -> None:
    cases = read_cases(folder)
    what = spoil(cases[3][key])
    dataset = SeededCacheDataset(cases, transform(), cache_rate=0.0)
    assert dataset[2]["image"].shape == (1, 16, 16, 16)
    with pytest.raises(CaseError) as caught:
        dataset[3]
    text = str(caught.value)
    assert text.startswith(f"case phantom_003: {cases[3][key]} ")
    assert what in text
    assert text.endswith(f"data check --dataset_dir {folder}")
    assert "\n" not in text


@pytest.mark.parametrize("place", ["imagesTr", "", "a/b"])
@pytest.mark.parametrize("told", [True, False])
def test_command_that_finds_every_bad_case_can_be_pasted(
    folder: Path, tmp_path: Path, place: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder with blanks, wherever in it the image lies; with the task, where dataset.json tells no labels."""
    folder = folder.rename(tmp_path / "my own $DATA")
    (folder / place).mkdir(parents=True, exist_ok=True)
    for i, case in enumerate(read_cases(folder)):
        Path(case["image"]).rename(folder / place / f"{i}.nii.gz")
    index = [
        {"image": f"{place}/{i}.nii.gz".lstrip("/"), "label": f"labelsTr/phantom_{i:03d}.nii.gz"} for i in range(5)
    ]
    labels = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a", "2": "b"}} if told else {}
    (folder / "dataset.json").write_text(json.dumps({"training": index, **labels}))
    cases = read_cases(folder)
    with_nan(cases[3]["image"])
    with pytest.raises(CaseError) as caught:
        SeededCacheDataset(cases, transform(), cache_rate=0.0)[3]
    command = str(caught.value).split("To find every such case: ")[1]
    assert command.endswith(" --task TASK") == (not told)
    words = shlex.split(command.replace("TASK", "Task04_Hippocampus"))
    assert words[:3] == ["python", "-m", "monai_losses_ext"]
    assert main(words[3:]) == 1
    printed = capsys.readouterr()
    assert "NaN or infinite" in printed.out
    assert "1 problems in 1 of 5 cases" in printed.err


def test_command_asks_for_the_task_where_the_training_has_other_classes(folder: Path) -> None:
    """Its dataset.json knows a third label, which the bundle that is trained does not."""
    index = json.loads((folder / "dataset.json").read_text())
    index["labels"] = {"0": "background", "1": "a", "2": "b", "3": "c"}
    (folder / "dataset.json").write_text(json.dumps(index))
    cases = read_cases(folder)
    with_seven(cases[3]["label"])
    with pytest.raises(CaseError, match=r" --task TASK$"):
        SeededCacheDataset(cases, transform(), cache_rate=0.0)[3]


def test_label_of_a_scale_a_hair_off_one_is_read_as_whole_numbers(folder: Path) -> None:
    case = read_cases(folder)[0]
    volume = nib.load(case["label"])
    expected = np.asarray(volume.dataobj)
    nib.save(nib.Nifti1Image(expected.astype(np.float32) * np.float32(1.0000002), volume.affine), case["label"])
    label = SeededCacheDataset([case], transform(), cache_rate=0.0)[0]["label"]
    assert label.unique().tolist() == [0, 1, 2]
    assert sorted(np.asarray(label).ravel()) == sorted(expected.ravel())


@pytest.mark.parametrize("num_workers", [None, 2])
def test_cache_that_meets_a_bad_case_stops_the_run(folder: Path, num_workers: int | None) -> None:
    cases = read_cases(folder)
    with_seven(cases[3]["label"])
    with pytest.raises(CaseError, match=r"^case phantom_003: .*labels: 7\. .*\. To find[^\n]*$"):
        SeededCacheDataset(cases, transform(), cache_rate=1.0, num_workers=num_workers, progress=False)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_loader_that_meets_a_bad_case_stops_the_run(folder: Path, num_workers: int, on_disk: bool) -> None:
    cases = read_cases(folder)
    cut_off(cases[3]["image"])
    cache = folder.parent / "cache"
    dataset = (
        SeededPersistentDataset(cases, transform(), cache)
        if on_disk
        else SeededCacheDataset(cases, transform(), cache_rate=0.0)
    )
    loader = CaseLoader(dataset, batch_size=1, num_workers=num_workers)
    assert len(loader) == 5
    with pytest.raises(CaseError, match=r"^case phantom_003: [^\n]* cannot be read[^\n]*$"):
        list(loader)
    if on_disk:  # nothing of the bad case is kept
        assert len(list(cache.glob("*.pt"))) <= 4


def test_file_that_vanished_is_named(folder: Path) -> None:
    cases = read_cases(folder)
    dataset = SeededPersistentDataset(cases, transform(), folder.parent / "cache")
    Path(cases[0]["label"]).unlink()
    with pytest.raises(CaseError, match=r"labelsTr/phantom_000\.nii\.gz is absent"):
        dataset[0]


def test_an_error_that_no_file_is_to_blame_for_is_left_alone(folder: Path) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("a bug in a transform")

    dataset = SeededCacheDataset(read_cases(folder), transform(broken), cache_rate=0.0)
    with pytest.raises(RuntimeError) as caught:
        dataset[0]
    assert isinstance(caught.value.__cause__, KeyError)


def test_case_without_foreground_is_trained_on(folder: Path) -> None:
    cases = read_cases(folder)
    volume = nib.load(cases[0]["label"])
    nib.save(nib.Nifti1Image(np.zeros(volume.shape, np.uint8), volume.affine), cases[0]["label"])
    assert not SeededCacheDataset(cases, transform(), cache_rate=0.0)[0]["label"].any()


HEADERS = {
    "dims of 32767": (42, "3h", 32767, 32767, 32767),
    "unknown data type": (70, "h", 9999),
    "9000 axes": (40, "h", 9000),
    "voxels before the file": (108, "f", -1.0),
    "affine of zeros": (280, "12f", *[0.0] * 12),
    "affine with NaN": (280, "f", np.nan),
    "affine with infinity": (292, "f", np.inf),
}


@pytest.mark.parametrize("fault", HEADERS)
@pytest.mark.parametrize("key", ["image", "label"])
def test_header_that_cannot_be_is_one_line(folder: Path, fault: str, key: str) -> None:
    offset, form, *values = HEADERS[fault]
    case = read_cases(folder)[3]
    content = bytearray(gzip.decompress(Path(case[key]).read_bytes()))
    struct.pack_into(f"<{form}", content, offset, *values)
    Path(case[key]).write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(CaseError, match=rf"^case phantom_003: {case[key]} [^\n]+$"):
        SeededCacheDataset([case], transform(), cache_rate=0.0)[0]


def test_flipped_bit_is_found_by_the_checksum(folder: Path) -> None:
    """In the checksum itself, so that every voxel is as it was and nothing but the sum tells of it."""
    case = read_cases(folder)[3]
    content = bytearray(Path(case["image"]).read_bytes())
    content[-6] ^= 1
    Path(case["image"]).write_bytes(bytes(content))
    nib.load(case["image"]).get_fdata()
    with pytest.raises(CaseError, match=r"^case phantom_003: [^\n]*CRC check failed"):
        SeededCacheDataset([case], transform(), cache_rate=0.0)[0]


@pytest.mark.parametrize(("dtype", "what"), [("complex64", "complex voxels"), ("rgb", "color image")])
@pytest.mark.parametrize("key", ["image", "label"])
def test_voxels_that_are_no_numbers_are_one_line(folder: Path, dtype: str, what: str, key: str) -> None:
    case = read_cases(folder)[3]
    volume = nib.load(case[key])
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    voxels = np.zeros(volume.shape, rgb if dtype == "rgb" else dtype)
    nib.save(nib.Nifti1Image(voxels, volume.affine), case[key])
    with pytest.raises(CaseError, match=rf"^case phantom_003: {case[key]} [^\n]*{what}[^\n]*$"):
        SeededCacheDataset([case], transform(), cache_rate=0.0)[0]


def test_label_is_mapped_and_unknown_voxels_are_let_through(folder: Path) -> None:
    case = read_cases(folder)[0]
    volume = nib.load(case["label"])
    before = np.asarray(volume.dataobj).copy()
    ids = np.array([0, 17, 53], np.int16)[before]
    ids[0, 0, :2] = 255, 54
    nib.save(nib.Nifti1Image(ids, volume.affine), case["label"])
    keys = ["image", "label"]
    load = [LoadImaged(keys, image_only=True), EnsureChannelFirstd(keys)]

    def label(**settings: Any) -> np.ndarray:
        check = CheckCased(num_classes=3, channels=1, **settings)
        return np.asarray(SeededCacheDataset([case], Compose([*load, check]), cache_rate=0.0)[0]["label"][0])

    expected = before.copy()
    expected[0, 0, :2] = 255, 2
    mapped = label(ignore_label=255, label_map={"17": 1, 53: 2, "54": 2})
    np.testing.assert_array_equal(mapped, expected)
    with pytest.raises(CaseError, match=r"outside 0\.\.2, the task's labels: 54\. .*--ignore_label -1 255 --label_map"):
        label(ignore_label=[255, -1], label_map={"17": 1, "53": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore_label": "unknown"}, "ignore_label: must be a whole number"),
        ({"ignore_label": 0.5}, "ignore_label: must be a whole number"),
        ({"label_map": {"a": 1}}, "label_map: must map values of the label files to classes"),
        ({"label_map": [1, 2]}, "label_map: must map values of the label files to classes"),
        ({"label_map": {"17": 3}}, "label_map: must map to classes, which are 0 to 2"),
    ],
)
def test_setting_that_cannot_be_right_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CheckCased(num_classes=3, channels=1, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_transform_that_refuses_a_case_names_it(folder: Path, num_workers: int) -> None:
    """Some transform of the user's, which knows nothing of files."""

    def refuse(case: Any) -> Any:
        raise UserError("distance: must have voxels that are not flat; got 0 mm.")

    dataset = SeededCacheDataset(read_cases(folder), transform(refuse), cache_rate=0.0)
    with pytest.raises(UserError, match=r"^case phantom_000: distance: must have voxels [^\n]*0 mm\.$"):
        list(CaseLoader(dataset, batch_size=1, num_workers=num_workers))


def test_worker_that_the_system_ended_is_one_line(folder: Path) -> None:
    def end(case: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    dataset = SeededCacheDataset(read_cases(folder), transform(end), cache_rate=0.0)
    with pytest.raises(UserError, match=r"^num_workers: must be fewer[^\n]*want of memory; got 1\.$"):
        list(CaseLoader(dataset, batch_size=1, num_workers=1))


def run(root: Path, folder: Path, *options: str, configs: str = str(TRAIN)) -> subprocess.CompletedProcess[str]:
    """Run the bundle as a user does."""
    arguments = ["run", "--config_file", configs, "--bundle_root", str(root), "--dataset_dir", str(folder)]
    arguments += ["--network_def", NETWORK, "--patch_size", "[16,16,16]", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    return warm_python().run("monai.bundle", arguments, root, environment, timeout=300)


def stops_with_one_line(done: subprocess.CompletedProcess[str], case: dict[str, str], key: str) -> None:
    """Check exit status and message."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert Path(case["image"]).name.removesuffix(".nii.gz") in line
    assert case[key] in line
    assert "data check --dataset_dir" in line


def statuses(root: Path) -> dict[str, str]:
    """Return the status of each run in a bundle's MLflow store by what it does, the newest of each."""
    client = MlflowClient(f"sqlite:///{root}/output/mlruns.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return {run.info.run_name.split("_")[0]: run.info.status for run in runs}


def test_bad_case_of_a_cached_training_writes_no_model(folder: Path, tmp_path: Path) -> None:
    case = training_cases(folder)[0]
    with_nan(case["image"])
    stops_with_one_line(run(tmp_path, folder), case, "image")
    assert not list(tmp_path.rglob("*.pt"))


def test_bad_case_in_a_later_epoch_leaves_the_earlier_checkpoints(folder: Path, tmp_path: Path) -> None:
    """Validated in epoch 2 only, and read in a worker: the former run and this one's state of before stay whole."""
    options = ["--cache_rate", "0.0", "--num_workers", "1", "--val_interval", "2", "--epochs", "2"]
    assert run(tmp_path, folder, *options).returncode == 0
    (former,) = (tmp_path / "output").glob("train_*")
    before = {path.name: path.read_bytes() for path in former.iterdir() if path.is_file()}
    assert {"model.pt", "model_final.pt", "training_state.pt"} <= set(before)
    case = validation_cases(folder)[0]
    cut_off(case["label"])
    done = run(tmp_path, folder, *options, "--run_name", "broken")
    stops_with_one_line(done, case, "label")
    assert statuses(tmp_path) == {"train": "FINISHED", "broken": "FAILED"}
    assert {path.name: path.read_bytes() for path in former.iterdir() if path.is_file()} == before
    assert torch.load(tmp_path / "output" / "broken" / "training_state.pt", weights_only=False)
    done = run(tmp_path, folder, configs=f"['{TRAIN}','{TRAIN.with_name('evaluate.json')}']")
    stops_with_one_line(done, case, "label")
    assert statuses(tmp_path) == {"train": "FINISHED", "broken": "FAILED", "evaluate": "FAILED"}
