# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference: what can be segmented is, onto files that lie on their images as these lie; all others are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles.helpers import on_path, user_error
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_losses_ext.bundlekit.render import render_task
from monai_losses_ext.data.tasks import TASKS, Task

NETWORK = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}
AFFINE = np.array([[0, -1.5, 0, 10], [-1, 0, 0.2, 20], [0, 0, 2, -30], [0, 0, 0, 1.0]])
MONAI_ALONE = """
import runpy, sys
sys.modules["monai_losses_ext"] = None
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
assert not [name for name in sys.modules if name.startswith("monai_losses_ext.")]
"""


def voxels(shape: tuple[int, ...] = (17, 18, 19)) -> np.ndarray:
    """Return noise of which the network, that finds what is above the mean, makes labels 0 and 1."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def above_mean(data: np.ndarray) -> np.ndarray:
    """Return what the network finds: zeros are left out of the mean, and stay zero."""
    return (data != 0) & (data > data[data != 0].mean())


def write_weights(path: Path, broken: float | None = None) -> Path:
    """Save weights that find what is above an image's mean: label 1."""
    weight = torch.zeros(3, 1, 1, 1, 1)
    weight[1] = 1
    bias = torch.tensor([0, 0, -99.0])
    if broken is not None:
        bias[2] = broken
    torch.save({"weight": weight, "bias": bias}, path)
    return path


def save(path: Path, data: np.ndarray, kind: type = nib.Nifti1Image, **header: Any) -> None:
    image = kind(data, AFFINE)
    image.set_sform(AFFINE, 4)
    image.set_qform(np.diag([1.0, 1.5, 2.0, 1.0]), 2)  # another place than the sform's, as some scanners write it
    image.header.set_xyzt_units("mm", "sec")
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)


def big_endian(path: Path) -> None:
    header = nib.Nifti1Image(voxels(), AFFINE).header.as_byteswapped(">")
    nib.save(nib.Nifti1Image(voxels().astype(">f4"), AFFINE, header), path)


GOOD = {
    "a.nii.gz": lambda path: save(path, voxels()),
    "one_slice.nii.gz": lambda path: save(path, voxels((17, 18, 1))),
    "one_channel.nii": lambda path: save(path, voxels((17, 18, 19, 1))),
    "nifti2.nii.gz": lambda path: save(path, voxels(), nib.Nifti2Image),
    "integers.nii.gz": lambda path: save(path, (1000 * voxels()).astype(np.int16), cal_max=900, descrip=b"MPRAGE"),
    "big_endian.nii.gz": big_endian,
}


def with_value(value: float) -> np.ndarray:
    data = voxels()
    data[1, 2, 3] = value
    return data


def damaged(path: Path, change: Any) -> None:
    save(path, voxels())
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
OTHERS = {
    "b_nan.nii.gz": (lambda path: save(path, with_value(np.nan)), "has 1 voxels that are NaN or infinite; mend it, or"),
    "c_inf.nii.gz": (lambda path: save(path, with_value(-np.inf)), "give --nan_to_num true"),
    "d_channels.nii.gz": (
        lambda path: save(path, voxels((9, 8, 7, 2))),
        "must be 3-D with 1 channel; its shape is 9 x",
    ),
    "e_plane.nii.gz": (lambda path: save(path, voxels((9, 8))), "must be 3-D with 1 channel; its shape is 9 x 8"),
    "e_5d.nii.gz": (lambda path: save(path, voxels((9, 8, 7, 2, 1))), "must be 3-D with 1 channel"),
    "f_rgb.nii.gz": (lambda path: save(path, np.zeros((9, 8, 7), RGB)), "is a color image"),
    "g_complex.nii.gz": (lambda path: save(path, voxels().astype("c8")), "has complex voxels"),
    "h_half.nii.gz": (lambda path: damaged(path, lambda c: c.__delitem__(slice(len(c) // 2, None))), "cannot be read"),
    "i_bit.nii.gz": (lambda path: damaged(path, lambda c: c.__setitem__(-6, c[-6] ^ 1)), "CRC check failed"),
    "j_text.nii": (lambda path: path.write_text("no image"), "cannot be read"),
    "k_dims.nii": (lambda path: damaged(path, lambda c: c.__setitem__(slice(42, 48), b"\xff\x7f" * 3)), "is cut off"),
    "l_type.nii": (lambda path: damaged(path, lambda c: c.__setitem__(slice(70, 72), b"\xff\x7f")), "cannot be read"),
    "m_place.nii": (
        lambda path: damaged(path, lambda c: c.__setitem__(slice(280, 328), bytes(48))),
        "an affine that is",
    ),
    "n.nii": (lambda path: save(path, voxels()), "n.nii.gz would be segmented into the same file; leave one"),
    "n.nii.gz": (lambda path: save(path, voxels()), "n.nii would be segmented into the same file; leave one"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> SimpleNamespace:
    """Segment, with MONAI alone, a folder of good and bad images whose name is a pattern of file names."""
    folder = tmp_path_factory.mktemp("inference")
    images = folder / "br[1]*"
    images.mkdir()
    for name, write in GOOD.items():
        write(images / name)
    for name, (write, _) in OTHERS.items():
        write(images / name)
    options = {
        "dataset_dir": "~/br[1]*",
        "output_dir": "~/out",
        "ckpt_path": str(write_weights(folder / "model.pt")),
        "network_def": str(NETWORK),
        "patch_size": "[16,16,16]",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-W", "ignore", "-c", MONAI_ALONE, "run", "--config_file"]
    environment = {**os.environ, "PYTHONPATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(bundle / "configs" / "inference.json"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return SimpleNamespace(folder=folder, images=images, out=folder / "out", done=done)


def test_what_can_be_segmented_is_and_nothing_else_is_written(run: SimpleNamespace) -> None:
    names = {f"{name.split('.')[0]}_seg.nii.gz" for name in GOOD}
    assert {path.name for path in run.out.iterdir()} == names, run.done.stderr
    others = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")}  # caches of libraries
    assert others == {"br[1]*", "out", "model.pt"}


def test_all_others_are_named_at_the_end_each_with_its_reason(run: SimpleNamespace) -> None:
    assert run.done.returncode == 1
    assert "Traceback" not in run.done.stderr + run.done.stdout
    *_, last = run.done.stderr.splitlines()
    assert last.startswith(f"error: dataset_dir: {len(OTHERS)} of {len(OTHERS) + len(GOOD)} images were not segmented")
    told = [line for line in run.done.stderr.splitlines() if line.startswith("not segmented: ")]
    assert len(told) == len(OTHERS)
    for name, (_, reason) in OTHERS.items():
        (line,) = [line for line in told if line.startswith(f"not segmented: {run.images / name} ")]
        assert reason in line
        assert str(run.images / name) in last
    assert not [name for name in GOOD if name in last]


@pytest.mark.parametrize("name", GOOD)
def test_segmentation_has_the_header_of_its_image(run: SimpleNamespace, name: str) -> None:
    image, label = nib.load(run.images / name), nib.load(run.out / f"{name.split('.')[0]}_seg.nii.gz")
    assert type(label) is type(image)
    assert label.shape == image.shape
    assert label.get_data_dtype() == np.uint8
    for form in ("get_sform", "get_qform"):
        (ours, our_code), (theirs, their_code) = (getattr(i, form)(coded=True) for i in (label, image))
        assert our_code == their_code
        np.testing.assert_array_equal(ours, theirs)
    for key in ("xyzt_units", "descrip", "pixdim"):
        np.testing.assert_array_equal(label.header[key], image.header[key])
    assert label.header["cal_max"] == 0  # of the image's gray values
    data = np.asarray(image.dataobj, float)
    np.testing.assert_array_equal(np.asarray(label.dataobj), above_mean(data))


def workflow(bundle: Path, **overrides: Any) -> ConfigWorkflow:
    on_path(bundle)
    given = {"network_def": NETWORK, "patch_size": [16, 16, 16], "device": "cpu", **overrides}
    config = str(bundle / "configs" / "inference.json")
    made = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **given)
    made.initialize()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two images and the network's weights."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.nii.gz", voxels())
    write_weights(tmp_path / "model.pt")
    return tmp_path


def places(folder: Path) -> dict[str, str]:
    names = {"dataset_dir": "images", "output_dir": "out", "ckpt_path": "model.pt"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.mark.parametrize("word", ["true", True])
def test_broken_voxels_are_replaced_where_the_user_says_so(bundle: Path, folder: Path, word: Any) -> None:
    data = voxels()
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    save(folder / "images" / "a.nii.gz", data)
    save(folder / "images" / "b.nii.gz", np.full_like(data, np.nan))
    workflow(bundle, nan_to_num=word, **places(folder)).run()
    label = np.asarray(nib.load(folder / "out" / "a_seg.nii.gz").dataobj)
    known = data[np.isfinite(data)]
    replaced = np.nan_to_num(data, nan=0, posinf=known.max(), neginf=known.min())
    np.testing.assert_array_equal(label, above_mean(replaced))
    assert label[0, 0, :3].tolist() == [0, 1, 0]
    assert not np.asarray(nib.load(folder / "out" / "b_seg.nii.gz").dataobj).any()


def test_one_image_alone_is_named_in_the_error_with_its_reason(bundle: Path, folder: Path) -> None:
    bad = folder / "images" / "a.nii.gz"
    save(bad, with_value(np.nan))
    message = user_error(workflow(bundle, **places(folder)).run)
    assert message.startswith(f"dataset_dir: 1 of 2 images were not segmented: {bad} has 1 voxels that are NaN")
    assert [path.name for path in (folder / "out").iterdir()] == ["b_seg.nii.gz"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bundle: Path, folder: Path, value: float) -> None:
    write_weights(folder / "model.pt", broken=value)
    message = user_error(workflow(bundle, **places(folder)).run)
    assert message.startswith(
        f"ckpt_path: the weights in {folder / 'model.pt'} are NaN or infinite in 1 of 2 parameters"
    )
    assert "first in bias" in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"weight": torch.zeros(2, 1, 1, 1, 1), "bias": torch.zeros(3)},
            "weight is (2, 1, 1, 1, 1) there and (3, 1, 1, 1",
        ),
        ({"weight": torch.zeros(3, 1, 1, 1, 1)}, "bias is absent there and (3,) in network_def"),
        ({"model": {"a": torch.zeros(1)}}, "are of another network: weight is absent"),
        ([1.0], "must hold a state_dict; it holds a list"),
        (
            {"epoch": 3, "weight": torch.zeros(3, 1, 1, 1, 1), "bias": torch.zeros(3)},
            "must hold weights alone; its entry epoch is of type int",
        ),
    ],
)
def test_weights_of_another_network_are_refused(bundle: Path, folder: Path, weights: Any, message: str) -> None:
    torch.save(weights, folder / "model.pt")
    assert message in user_error(workflow(bundle, **places(folder)).run)


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02"])
def test_file_of_no_weights_is_refused(bundle: Path, folder: Path, content: bytes) -> None:
    (folder / "model.pt").write_bytes(content)
    assert "is not a file of weights" in user_error(workflow(bundle, **places(folder)).run)


def test_weights_may_lie_in_a_checkpoint(bundle: Path, folder: Path) -> None:
    torch.save({"model": torch.load(folder / "model.pt")}, folder / "model.pt")
    workflow(bundle, **places(folder)).run()
    assert len(list((folder / "out").iterdir())) == 2


def test_full_disk_leaves_no_half_of_a_file(bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    made = workflow(bundle, **places(folder))
    monkeypatch.setattr(nib, "save", full)
    message = user_error(made.run)
    assert message == f"output_dir: {folder / 'out' / 'a_seg.nii.gz'} cannot be written (No space left on device)."
    assert list((folder / "out").iterdir()) == []


def test_image_too_large_for_the_memory_is_passed_over(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workflow(bundle, **places(folder))
    infer, calls = made.evaluator.inferer, []

    def full_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return infer(*args, **kwargs)

    monkeypatch.setattr(made.evaluator, "inferer", full_once)
    message = user_error(made.run)
    assert f"1 of 2 images were not segmented: {folder / 'images' / 'a.nii.gz'} is too large for the mem" in message
    assert [path.name for path in (folder / "out").iterdir()] == ["b_seg.nii.gz"]


def test_segmentation_that_does_not_lie_on_its_image_is_passed_over(bundle: Path, folder: Path) -> None:
    made = workflow(bundle, **places(folder))
    infer = made.evaluator.inferer
    made.evaluator.inferer = lambda *args, **kwargs: infer(*args, **kwargs)[..., 1:]
    message = user_error(made.run)
    assert "2 of 2 images were not segmented" in message
    assert list((folder / "out").iterdir()) == []


def test_images_passed_over_are_named_when_a_run_ends_early(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "images" / "a.nii.gz"
    save(bad, with_value(np.nan))
    made = workflow(bundle, **places(folder))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    assert user_error(made.run).startswith("output_dir: ")
    assert f"not segmented: {bad} has 1 voxels that are NaN" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["dataset_dir", "output_dir", "ckpt_path"])
def test_path_that_monai_does_not_hand_on_as_typed_is_refused(bundle: Path, folder: Path, option: str) -> None:
    given = {**places(folder), option: str(folder / "a#b")}
    assert user_error(workflow(bundle, **given).run).startswith(f"{option}: must be a path without '#' or '::'")
    assert not (folder / "a::b").exists()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_images_are_prepared_as_validation_prepares_them(task: Task) -> None:
    files = render_task(task)
    train, inference = (json.loads(files[f"{task.bundle}/configs/{name}.json"]) for name in ("train", "inference"))
    own = ("CheckCased", "CheckImaged")
    validation, steps = (
        [step for step in config["preprocessing"]["transforms"] if step["_target_"].split(".")[-1] not in own]
        for config in (train["validate"], inference)
    )
    assert len(steps) >= 5
    assert [{**step, "keys": "image"} for step in validation] == steps


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_config_is_read_outside_of_a_workflow_and_has_no_programs(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "inference.json"
    path.write_text(render_task(task)[f"{task.bundle}/configs/inference.json"])
    parser = ConfigParser()
    parser.read_config(str(path))
    assert parser.get_parsed_content("patch_size") == list(task.training.patch_size)
    texts = list(strings(json.loads(path.read_text())))
    assert max(len(text) for text in texts if text.startswith("$")) <= 100


def strings(value: Any) -> Iterator[str]:
    """Give every text in a config."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def test_empty_folder_is_one_line(bundle: Path, folder: Path) -> None:
    shutil.rmtree(folder / "images")
    assert "there are no images (*.nii, *.nii.gz) in" in user_error(workflow(bundle, **places(folder)).run)
