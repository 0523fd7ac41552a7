# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentations as files that lie on their images: the same shape, place and units."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import Transform

from .errors import UserError
from .images import ImageError
from .runs import check_path, make_folder

POSTFIX = "_seg"
MOST_OFF_MM = 1e-2  # what resampling there and back leaves of the place


class SaveSegmentationd(Transform):
    """Save ``pred`` as ``<image>_seg.nii.gz``, with the header of its ``image``.

    So the file has the image's shape (its axes of length 1, too), its affine, sform and qform with their codes, and its
    units. A fourth axis of channels is left out. Voxels are stored in one byte, or two for more than 256 classes.

    Args:
        output_dir: folder to write to.

    Raises:
        ImageError: if the segmentation does not lie on its image.
        UserError: if the file cannot be written.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir).expanduser()

    def __call__(self, data: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """Save a case's label map [1, *S]; return the case."""
        source, pred = data["image"].meta["filename_or_obj"], data["pred"]
        image = nib.load(source)
        shape = image.shape if len(image.shape) < 4 or image.shape[3] == 1 else image.shape[:3]
        off = np.abs(np.asarray(pred.affine) - np.asarray(data["image"].meta["original_affine"])).max()
        if tuple(pred.shape[1:]) != image.shape[:3] or off > MOST_OFF_MM:
            raise ImageError("has a segmentation that does not lie on it; postprocessing must bring it back")
        header = image.header.copy()
        header.extensions.clear()  # they tell of the image's voxels
        voxels = np.asarray(pred[0].cpu()).reshape(shape)
        header.set_data_dtype(np.uint8 if voxels.max() < 256 else np.uint16)
        header.set_slope_inter(1, 0)
        header["cal_max"] = header["cal_min"] = header["vox_offset"] = 0
        _write(
            type(image)(voxels.astype(header.get_data_dtype()), None, header),
            self.output_dir / segmentation_name(source),
        )
        return data


def segmentation_name(image: str) -> str:
    """Return the file name of an image's segmentation."""
    name = os.path.basename(image)
    return f"{name.removesuffix('.gz').removesuffix('.nii')}{POSTFIX}.nii.gz"


def check_output(output_dir: str) -> None:
    """Make the folder of the segmentations, and check that it can be written to.

    Raises:
        UserError: if it cannot.
    """
    check_path("output_dir", output_dir)
    make_folder(os.path.expanduser(output_dir))


def _write(image: Any, path: Path) -> None:
    """Write a file as a whole: what a full disk or a killed run leaves has another name."""
    unfinished = path.with_name(f".{path.name}")
    try:
        nib.save(image, unfinished)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"output_dir: {path} cannot be written ({error.strerror}).") from None
