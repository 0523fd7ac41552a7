# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Reading a NIfTI file as a training reads it, or saying in a few words why it cannot be used.

MONAI's reader decides where a volume lies: it takes the qform in place of the sform where the header's voxel size
agrees with the qform alone. Headers are checked before voxels are read, so that an absurd one costs no memory.
"""

from __future__ import annotations

import gzip
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data.utils import correct_nifti_header_if_necessary
from nibabel.imageglobals import logger
from nibabel.nifti1 import Nifti1Pair

from monai_losses_ext.data.shapes import Array

LARGEST_RATIO = 1032  # deflate cannot compress better
CHUNK = 1 << 20  # bytes
LEAST_EDGE_MM = 1e-6
LEAST_VOLUME = 1e-6  # of a voxel with unit edges: less, and its edges lie in one plane
FORMS_MAY_DIFFER = 0.1  # of a voxel's shortest edge: what rounding and quaternions leave between sform and qform

FORMS = ("sform", "qform")

Path = str | os.PathLike[str]


class Volume(NamedTuple):
    """A volume in memory and its place."""

    voxels: Array
    affine: Array  # [4, 4], in mm
    note: str = ""  # what to know where its place is in doubt


class _UnusableError(Exception):
    """Why a file cannot be used; continues a sentence that begins with the file."""


def read(path: Path) -> Volume | str:
    """Return the voxels of a NIfTI file, channels last, and their place as MONAI's reader sees it.

    Args:
        path: ``*.nii`` or ``*.nii.gz``. Of the latter the checksum is compared, which neither NiBabel nor MONAI does.

    Returns:
        The volume; or why a training cannot use the file, in words that continue "<file> ...".
    """
    try:
        with _silent():
            image = _load(path)
            affine, note = _place(image)
            if _is_gzip(path):
                image = type(image).from_stream(io.BytesIO(_unpacked(path, image, keep=True)))
            return Volume(np.asanyarray(image.dataobj), affine, note)
    except Exception as error:
        return _reason(error, path)


def file_fault(path: Path) -> str | None:
    """Return why a training cannot use a file, as :func:`read` does, without keeping its voxels; None if it can."""
    try:
        stat = os.stat(path)
    except OSError:
        return "is absent"
    return _file_fault(str(path), stat.st_size, stat.st_mtime_ns)


def place_note(path: Path) -> str:
    """Return what to know of the place of a file that can be used, or nothing: its sform and qform may disagree."""
    with _silent():
        return _place(nib.load(path))[1]


def affine_fault(affine: Array) -> str | None:
    """Return what is wrong with an affine [4, 4], or None.

    Its numbers must be finite, and its columns the edges of a voxel: longer than nothing, and not in one plane.
    """
    if not np.isfinite(affine).all():
        return "has an affine with values that are NaN or infinite"
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if (edges < LEAST_EDGE_MM).any():
        return f"has an affine with voxel edges of {' x '.join(f'{edge:.4g}' for edge in edges)} mm"
    if abs(np.linalg.det(affine[:3, :3] / edges)) < LEAST_VOLUME:
        return "has a singular affine: the edges of its voxels lie in one plane"
    return None


def displacement_mm(shape: tuple[int, ...], one: Array, other: Array) -> float:
    """Return how far apart two affines put a corner of a volume, at most."""
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in shape), indexing="ij")).reshape(len(shape), -1)
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())


@cache  # a case that is not cached is loaded again in each epoch
def _file_fault(path: str, size: int, modified_ns: int) -> str | None:
    try:
        with _silent():
            image = _load(path)
            if _is_gzip(path):
                _unpacked(path, image, keep=False)
            _place(image)
    except Exception as error:
        return _reason(error, path)
    return None


def _load(path: Path) -> Any:
    """Return NiBabel's image of a file whose header is sound and whose size fits it; no voxels are read."""
    if not os.path.isfile(path):
        raise _UnusableError("is no file" if os.path.exists(path) else "is absent")
    image = nib.load(path)
    if not isinstance(image, Nifti1Pair):
        raise _UnusableError(f"is no NIfTI file but {type(image).__name__.removesuffix('Image')}")
    kind = image.get_data_dtype()
    if kind.fields:
        raise _UnusableError(
            "is a color image (RGB); a training needs one number per voxel. Convert it to gray values, or its colors "
            "to channels along a fourth axis"
        )
    if kind.kind == "c":
        raise _UnusableError("has complex voxels, whose imaginary part would be dropped. Convert it to magnitudes")
    if any(n < 1 for n in image.shape) or not image.shape:
        raise _UnusableError(f"has no voxels: its header gives the shape {image.shape}")
    room = os.path.getsize(path) * (LARGEST_RATIO if _is_gzip(path) else 1)
    if _size(image) > room:
        raise _UnusableError(f"is cut off: its header gives {_size(image)} bytes, more than the file can hold")
    if what := affine_fault(image.affine):
        raise _UnusableError(what)
    return image


def _unpacked(path: Path, image: Any, keep: bool) -> bytes:
    """Return the content that the header tells of, or nothing; read to the end, where the checksum is."""
    size, kept, count = _size(image), [], 0
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK):
            if keep and count < size:
                kept.append(chunk)
            count += len(chunk)
    if count < size:
        raise _UnusableError(f"is cut off: its header gives {size} bytes, and it has {count}")
    return b"".join(kept)


def _size(image: Any) -> int:
    """Return the bytes of a NIfTI file without compression, as its header tells them."""
    return int(image.dataobj.offset) + math.prod(map(int, image.shape)) * int(image.get_data_dtype().itemsize)


def _is_gzip(path: Path) -> bool:
    return os.fspath(path).lower().endswith(".gz")


def _place(image: Any) -> tuple[Array, str]:
    """Return where MONAI's reader sees an image, and what to know where its sform and qform disagree."""
    told, coded = np.array(image.affine), [name for name in FORMS if image.header[f"{name}_code"]]
    forms = {"sform": image.get_sform(), "qform": image.get_qform()} if len(coded) == 2 else {}
    affine: Array = np.array(correct_nifti_header_if_necessary(image).affine)  # which changes the image's header
    if what := affine_fault(affine):
        raise _UnusableError(what)
    if len(image.shape) < 3:
        return affine, ""
    shape, most = image.shape[:3], FORMS_MAY_DIFFER * float(np.linalg.norm(affine[:3, :3], axis=0).min())
    apart = displacement_mm(shape, forms["sform"], forms["qform"]) if forms else 0.0
    if not apart <= most:
        read = min(forms, key=lambda name: displacement_mm(shape, affine, forms[name]))
        return affine, f"sform and qform disagree by {apart:.3g} mm, and MONAI reads the {read}"
    away = displacement_mm(shape, affine, told)
    if away > most:
        return (
            affine,
            f"MONAI reads it {away:.3g} mm from where its affine puts it, as the voxel size is another",
        )
    return affine, ""


@contextmanager
def _silent() -> Iterator[None]:
    """Keep NiBabel from logging what it raises too."""
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, _UnusableError):
        return str(error)
    detail = " ".join(str(error).replace(os.fspath(path), "").split()) or type(error).__name__
    return f"cannot be read: it is cut off, damaged or no NIfTI file ({detail[:120]})"
