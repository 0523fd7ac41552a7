# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a file as a training does: the voxels and the place of MONAI's reader, or one reason why not."""

from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from monai_losses_ext.data.volume import Volume, file_fault, place_note, read

PLACE = np.array([[0.0, -2.0, 0.0, 5.0], [1.5, 0.0, 0.0, -7.0], [0.0, 0.0, 3.0, 11.0], [0.0, 0.0, 0.0, 1.0]])
SHAPE = (5, 6, 7)


def image(kind: type = nib.Nifti1Image, dtype: Any = np.int16, shape: tuple[int, ...] = SHAPE) -> Any:
    """Return an image whose sform and qform are both PLACE."""
    made = kind(np.arange(np.prod(shape)).reshape(shape).astype(dtype), PLACE)
    made.set_sform(PLACE, 1)
    made.set_qform(PLACE, 1)
    return made


def both_forms(sform: np.ndarray, qform: np.ndarray, zooms: tuple[float, ...]) -> Any:
    made = image()
    made.set_qform(qform, 1)
    made.set_sform(sform, 1)
    made.header.set_zooms(zooms)
    return made


def scaled() -> Any:
    made = image()
    made.header.set_slope_inter(0.5, 3)
    return made


def big_endian() -> Any:
    made = image()
    return nib.Nifti1Image(np.asarray(made.dataobj).astype(">i2"), PLACE, made.header.as_byteswapped(">"))


SHIFTED = PLACE + 30 * np.eye(4, k=3)
LARGER = PLACE @ np.diag([2.0, 2.0, 2.0, 1.0])
READABLE = {
    "plain": image,
    "NIfTI-2": lambda: image(nib.Nifti2Image),
    "float": lambda: image(dtype=np.float32),
    "big-endian": big_endian,
    "scaled": scaled,
    "channels": lambda: image(shape=(5, 6, 7, 2)),
    "sform moved": lambda: both_forms(SHIFTED, PLACE, (1.5, 2, 3)),
    "sform of another voxel size": lambda: both_forms(LARGER, PLACE, (1.5, 2, 3)),
    "both of another voxel size": lambda: both_forms(LARGER, PLACE, (3, 4, 6)),
    "neither of that voxel size": lambda: both_forms(LARGER, PLACE, (1, 1, 1)),
}


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_voxels_and_place_are_those_of_monais_reader(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    nib.save(READABLE[kind](), path)
    seen = LoadImage(image_only=True)(path)
    volume = read(path)
    assert isinstance(volume, Volume), volume
    np.testing.assert_array_equal(volume.voxels.astype(np.float32), seen.as_tensor().numpy())
    np.testing.assert_allclose(volume.affine, seen.affine.numpy(), atol=1e-6)
    assert file_fault(path) is None
    assert place_note(path) == volume.note


def test_forms_that_disagree_are_told_with_the_millimeters_and_the_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    notes = {}
    for kind in READABLE:
        nib.save(READABLE[kind](), path)
        notes[kind] = place_note(path)
    assert notes.pop("sform moved") == "sform and qform disagree by 30 mm, and MONAI reads the sform"
    far = np.linalg.norm([5 * 2, 4 * 1.5, 6 * 3])  # the last corner, which is twice as far
    of_size = notes.pop("sform of another voxel size")
    assert of_size == f"sform and qform disagree by {far:.3g} mm, and MONAI reads the qform"
    assert "sform and qform disagree" in notes.pop("neither of that voxel size")
    assert set(notes.values()) == {""}


def test_place_that_the_reader_takes_from_elsewhere_is_told(tmp_path: Path) -> None:
    """A qform that the header says is none is read where the voxel size is its own and not the sform's."""
    made = both_forms(LARGER, PLACE, (1.5, 2, 3))
    made.header["qform_code"] = 0
    nib.save(made, tmp_path / "x.nii")
    np.testing.assert_allclose(LoadImage(image_only=True)(tmp_path / "x.nii").affine.numpy(), PLACE, atol=1e-5)
    assert "from where its affine puts it" in place_note(tmp_path / "x.nii")


def patched(offset: int, form: str, *values: float) -> bytes:
    content = bytearray(image().to_bytes())
    struct.pack_into(f"<{form}", content, offset, *values)
    return bytes(content)


BROKEN = {
    "dims": (patched(42, "3h", 32767, 32767, 32767), "is cut off: its header gives 70362301"),
    "data type": (patched(70, "h", 9999), "cannot be read: .*9999"),
    "binary": (patched(70, "2h", 1, 1), "cannot be read: "),
    "9000 axes": (patched(40, "h", 9000), "cannot be read: "),
    "no axes": (patched(40, "h", 0), "has no voxels"),
    "negative size": (patched(42, "h", -5), "has no voxels"),
    "no size": (patched(42, "h", 0), "has no voxels"),
    "offset -1": (patched(108, "f", -1), "cannot be read: "),
    "offset NaN": (patched(108, "f", np.nan), "cannot be read: "),
    "offset beyond": (patched(108, "f", 1e30), "is cut off"),
    "affine of zeros": (patched(280, "12f", *[0] * 12), "voxel edges of 0 x 0 x 0 mm"),
    "affine with NaN": (patched(280, "f", np.nan), "an affine with values that are NaN or infinite"),
    "affine with infinity": (patched(292, "f", -np.inf), "an affine with values that are NaN or infinite"),
    "affine in a plane": (patched(280, "12f", 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 2, 0), "singular affine"),
    "another magic": (patched(344, "4s", b"xxxx"), "cannot be read: "),
    "text": (b"not an image", "cannot be read: "),
    "nothing": (b"", "cannot be read: "),
    "half": (image().to_bytes()[:500], "is cut off"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_broken_file_is_one_reason_and_takes_no_memory(
    tmp_path: Path, fault: str, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, reason = BROKEN[fault]
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    tracemalloc.start()
    told = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(told, str)
    assert "\n" not in told
    assert re.search(reason, told), told
    assert file_fault(path) == told
    assert peak < 20e6
    assert capfd.readouterr() == ("", "")  # NiBabel would log it


def test_content_shorter_than_the_header_says_takes_no_more_memory_than_there_is(tmp_path: Path) -> None:
    """A header of 0.4 GB in a file that could hold as much, were it zeros."""
    content = patched(42, "3h", 700, 700, 400) + np.random.default_rng(0).bytes(500_000)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content))
    tracemalloc.start()
    told = read(tmp_path / "x.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "is cut off" in str(told)
    assert peak < 20e6


@pytest.mark.parametrize("place", ["checksum", "length", "end"])
def test_damage_that_leaves_every_voxel_is_found(tmp_path: Path, place: str) -> None:
    path = tmp_path / "x.nii.gz"
    voxels = np.random.default_rng(0).normal(size=(20, 20, 20))
    nib.save(nib.Nifti1Image(voxels, PLACE), path)
    content = bytearray(path.read_bytes())
    if place == "end":
        del content[-4:]
    else:
        content[-6 if place == "checksum" else -2] ^= 1
    path.write_bytes(bytes(content))
    np.testing.assert_array_equal(nib.load(path).get_fdata(), voxels)
    assert "cannot be read" in str(read(path))


def test_file_that_was_mended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    path.write_bytes(b"")
    assert file_fault(path) is not None
    nib.save(image(), path)
    assert file_fault(path) is None
    path.unlink()
    assert file_fault(path) == "is absent"
    assert read(tmp_path) == "is no file"


@pytest.mark.parametrize(("dtype", "what"), [("c8", "complex"), ([("R", "u1"), ("G", "u1"), ("B", "u1")], "color")])
def test_voxels_that_are_no_numbers_are_refused_by_name(tmp_path: Path, dtype: Any, what: str) -> None:
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype), PLACE), tmp_path / "x.nii.gz")
    assert what in str(read(tmp_path / "x.nii.gz"))


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(np.zeros(SHAPE, np.float32), PLACE), tmp_path / "x.mgz")
    assert read(tmp_path / "x.mgz") == "is no NIfTI file but MGH"
