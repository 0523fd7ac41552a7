# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Prepared cases on disk: random numbers by seed, epoch and case; nothing stale is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropd, ScaleIntensityRanged

from monai_losses_ext.data.seeded import SeededCacheDataset, SeededPersistentDataset


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, str]]:
    made = []
    for i in range(2):
        path = tmp_path / f"case_{i}.nii.gz"
        volume = np.random.default_rng(i).normal(size=(9, 8, 7)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.diag([0.5, 1, 2, 1])), path)
        made.append({"image": str(path)})
    return made


def steps(a_max: float = 3.0) -> Compose:
    prepare = [LoadImaged("image"), EnsureChannelFirstd("image"), ScaleIntensityRanged("image", -3, a_max, 0, 1)]
    return Compose([*prepare, RandSpatialCropd("image", [4, 4, 4], random_size=False)])


def test_equals_the_cache_in_memory_in_every_epoch(cases: list[dict[str, str]], tmp_path: Path) -> None:
    memory = SeededCacheDataset(cases, steps(), seed=3, progress=False)
    for _ in range(2):  # prepared now, then read from the disk
        disk = SeededPersistentDataset(cases, steps(), tmp_path / "cache", seed=3)
        for epoch in (1, 2):
            memory.set_epoch(epoch)
            disk.set_epoch(epoch)
            for i in (1, 0):
                assert torch.equal(disk[i]["image"], memory[i]["image"])
                assert torch.equal(disk[i]["image"].affine, memory[i]["image"].affine)  # the voxel size is not lost
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_changed_transforms_and_changed_files_are_prepared_anew(cases: list[dict[str, str]], tmp_path: Path) -> None:
    def first(**change: Any) -> torch.Tensor:
        return SeededPersistentDataset(cases[:1], steps(**change), tmp_path / "cache")[0]["image"]

    before = first()
    assert not torch.equal(first(a_max=1.0), before)
    assert torch.equal(first(), before)
    path = cases[0]["image"]
    nib.save(nib.Nifti1Image(np.zeros((9, 8, 7), np.float32), np.eye(4)), path)
    os.utime(path, ns=(0, 0))
    assert torch.equal(first(), torch.full((1, 4, 4, 4), 0.5))


@pytest.mark.parametrize("package", ["monai", "torch"])
def test_another_version_prepares_anew(
    cases: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    SeededPersistentDataset(cases[:1], steps(), tmp_path / "cache")[0]
    monkeypatch.setattr(f"{package}.__version__", "99.0")
    SeededPersistentDataset(cases[:1], steps(), tmp_path / "cache")[0]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_other_settings_left_is_told_with_a_command_that_deletes_it(
    cases: list[dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "a cache"
    for case in range(2):
        SeededPersistentDataset(cases, steps(a_max=1.0), cache)[case]
    SeededPersistentDataset(cases[:1], steps(a_max=1.0), cache)
    assert not caplog.messages
    SeededPersistentDataset(cases, steps(), cache)[0]
    (message,) = caplog.messages
    assert message.startswith("cache_dir: 2 prepared cases of other settings take 0.0 GiB. To delete them: find ")
    subprocess.run(message.split("To delete them: ")[1], shell=True, check=True, timeout=60)
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    SeededPersistentDataset(cases, steps(), cache)[0]
    assert kept.stat().st_mtime_ns == before
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kept_share", [0.0, 0.5])
def test_a_file_that_was_cut_short_is_made_again(
    cases: list[dict[str, str]], tmp_path: Path, kept_share: float
) -> None:
    before = SeededPersistentDataset(cases[:1], steps(), tmp_path / "cache")[0]["image"]
    (file,) = (tmp_path / "cache").iterdir()
    size = file.stat().st_size
    os.truncate(file, int(kept_share * size))
    assert torch.equal(SeededPersistentDataset(cases[:1], steps(), tmp_path / "cache")[0]["image"], before)
    assert file.stat().st_size == size


def test_another_process_finds_what_was_prepared(cases: list[dict[str, str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    SeededPersistentDataset(cases[:1], steps(), cache)[0]
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_seeded import steps, SeededPersistentDataset\n"
        f"SeededPersistentDataset({cases[:1]!r}, steps(), {str(cache)!r})[0]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("cache_dir", [None, False])
def test_no_folder_keeps_nothing(cases: list[dict[str, str]], tmp_path: Path, cache_dir: bool | None) -> None:
    before = set(tmp_path.iterdir())
    assert SeededPersistentDataset(cases, steps(), cache_dir)[0]["image"].shape == (1, 4, 4, 4)
    assert set(tmp_path.iterdir()) == before
