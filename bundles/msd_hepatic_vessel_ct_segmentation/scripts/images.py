# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The images of a folder, one after another: those that can be segmented, and why the others cannot."""

from __future__ import annotations

import glob
import gzip
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset, list_data_collate
from monai.transforms import MapTransform
from nibabel.imageglobals import logger
from tqdm import tqdm

from .errors import UserError
from .runs import check_path, flag

ENDINGS = (".nii", ".nii.gz")
LARGEST_RATIO = 1032  # deflate cannot compress better
CHUNK = 1 << 20  # bytes


class ImageError(ValueError):
    """Why an image cannot be segmented; continues a sentence that begins with its file."""


class ImageLoader:
    """Iterates over a dataset's images in batches of one, and passes over those that cannot be segmented.

    It has no length, as an evaluator otherwise begins anew to reach it.

    Args:
        dataset: whose data are ``{"image": path}``, and whose transform makes the network's input of one.
        channels: that an image must have.
    """

    def __init__(self, dataset: Dataset, channels: int) -> None:
        self.dataset, self.channels = dataset, channels
        self.others: dict[str, str] = {}  # file to why it is not segmented
        self.current = ""  # the file whose batch was given last

    def __iter__(self) -> Iterator[Any]:
        files = [case["image"] for case in self.dataset.data]
        self.others = same_names(files)
        for i, file in enumerate(tqdm(files, desc="inference", unit="image", disable=None)):
            if file in self.others:
                continue
            try:
                check_file(file, self.channels)
                prepared = self.dataset[i]
            except Exception as error:
                self.others[file] = _reason(error)
                continue
            self.current = file
            yield list_data_collate([prepared])

    def pass_over(self, reason: str) -> None:
        """Count the image whose batch was given last among those that are not segmented."""
        self.others[self.current] = reason

    def say_others(self) -> None:
        """Name the images that are not segmented with their reasons, each on a line of stderr."""
        for file, reason in self.others.items():
            print(f"not segmented: {file} {reason}.", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Name the images that were not segmented; several with their reasons, each on a line of stderr.

        Raises:
            UserError: if there are any.
        """
        number = f"dataset_dir: {len(self.others)} of {len(self.dataset)} images were not segmented"
        reasons = set(self.others.values())
        if len(reasons) == 1:
            each = "each of them " if len(self.others) > 1 else ""
            raise UserError(f"{number}: {', '.join(self.others)} {each}{reasons.pop()}.")
        for file, reason in self.others.items():
            print(f"not segmented: {file} {reason}.", file=sys.stderr, flush=True)
        if reasons:
            raise UserError(f"{number}, for the reasons above: {', '.join(self.others)}")


class CheckImaged(MapTransform):
    """Stop at an image with NaN or infinite voxels, of which a network would make nothing but background.

    Args:
        keys: of the images.
        nan_to_num: replace them instead: NaN by 0, and infinite values by the image's least or greatest other value.
    """

    def __init__(self, keys: Any, nan_to_num: Any = False) -> None:
        super().__init__(keys)
        self.nan_to_num = flag("nan_to_num", nan_to_num)

    def __call__(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return the case with finite voxels."""
        case = dict(data)
        for key in self.key_iterator(case):
            finite = case[key].isfinite()
            broken = finite.numel() - int(finite.sum())
            if broken and not self.nan_to_num:
                raise ImageError(
                    f"has {broken} voxels that are NaN or infinite; mend it, or give --nan_to_num true: NaN becomes 0, "
                    "infinite values become the image's extremes"
                )
            if broken:
                known = case[key][finite] if finite.any() else torch.zeros(1)
                case[key] = case[key].nan_to_num(0.0, float(known.max()), float(known.min()))
        return case


def find_images(dataset_dir: str) -> list[dict[str, str]]:
    """Return the NIfTI files in a folder as a dataset's data, sorted."""
    folder = glob.escape(os.path.expanduser(str(dataset_dir)))
    return [{"image": file} for file in sorted(file for end in ENDINGS for file in glob.glob(f"{folder}/*{end}"))]


def check_images(dataset_dir: str, data: list[Any]) -> None:
    """Check that there is something to segment.

    Raises:
        UserError: if there is not, or the path cannot be one.
    """
    check_path("dataset_dir", dataset_dir)
    if not data:
        raise UserError(
            f"dataset_dir: there are no images (*.nii, *.nii.gz) in {dataset_dir}. Give --dataset_dir, the folder that "
            "holds them."
        )


def same_names(files: list[str]) -> dict[str, str]:
    """Return the files whose segmentations would have one name, each with what is to be done."""
    both = [file for file in files if f"{file}.gz" in files]
    reason = "and {} would be segmented into the same file; leave one of them in the folder"
    return {name: reason.format(other) for file in both for name, other in ((file, f"{file}.gz"), (f"{file}.gz", file))}


def check_file(path: str, channels: int) -> None:
    """Check the header of a file, and that it is whole: of a ``.gz`` its checksum too. No volume is kept.

    Raises:
        ImageError: if it cannot be segmented.
    """
    logger.disabled = True  # NiBabel logs what it raises too
    try:
        image = nib.load(path)
        _check_header(image, channels)
        size = int(image.dataobj.offset) + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
        packed = path.endswith(".gz")
        if size > os.path.getsize(path) * (LARGEST_RATIO if packed else 1) or (packed and size > _unpacked_size(path)):
            raise ImageError("is cut off: its header tells of more voxels than the file has")
    except ImageError:
        raise
    except Exception as error:  # a broken file makes NiBabel raise almost anything
        detail = " ".join(str(error).replace(path, "").split()) or type(error).__name__
        raise ImageError(f"cannot be read: it is cut off, damaged or no NIfTI file ({detail[:120]})") from None
    finally:
        logger.disabled = False


def _check_header(image: Any, channels: int) -> None:
    kind, shape = image.get_data_dtype(), image.shape
    if kind.fields:
        raise ImageError("is a color image (RGB); the network takes gray values, or colors as channels")
    if kind.kind == "c":
        raise ImageError("has complex voxels, whose imaginary part would be dropped; convert it to magnitudes")
    along = f"channels along a fourth axis ({channels})" if channels > 1 else "1 channel"
    if (*shape, 1)[3:] not in [(channels,), (channels, 1)] or min(shape) < 1:
        raise ImageError(f"must be 3-D with {along}; its shape is {' x '.join(map(str, shape))}")
    affine = image.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-18:  # mm^3, of a voxel
        raise ImageError("has an affine that is singular, NaN or infinite: nothing tells where it lies")


def _unpacked_size(path: str) -> int:
    """Return the bytes in a ``.gz``, read to its end, where the checksum is."""
    size = 0
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
    return size


def _reason(error: BaseException) -> str:
    """Return why an image cannot be segmented; MONAI wraps what a transform raises."""
    while error.__cause__ is not None and not isinstance(error, ImageError):
        error = error.__cause__
    if isinstance(error, ImageError):
        return str(error)
    detail = " ".join(str(error).split())[:120]
    return f"cannot be prepared ({type(error).__name__}{': ' if detail else ''}{detail})"
