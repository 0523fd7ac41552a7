# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic cases (phantoms) of a task, in the Decathlon's layout: for trying out software, not for medicine.

What a task's phantoms look like is the ``phantom`` part of its row in ``tasks.json``. Lengths there are in millimeters
from the middle of the volume, x to the right, y to the front, z up; intensities are one value per channel, for CT in
Hounsfield units:

- ``shape_jitter``: voxels by which the size of a volume differs from the typical one;
- ``pose``: how far a case is turned (``rotation_deg``), scaled (``scale``), moved (``shift_mm``) and bent
  (``bend_mm`` over lengths of ``bend_scale_mm``), and whether left and right are swapped at random (``mirror``);
- ``background``: ``tissues`` (intensities) that alternate over lengths of ``scale_mm``;
- ``structures``, painted one over another, see :mod:`monai_losses_ext.data.canvas`;
- ``contrast_jitter``: deviation of each intensity from case to case; ``noise``: its deviation; ``bias``: strength of
  the smooth brightness field; ``gain``: range from which a scanner's factor is drawn, evenly in its logarithm. CT is
  calibrated: it has neither;
- ``stripped``: true where all that no structure covers was set to zero, as brain extraction does.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_losses_ext.extras import need

need("synthetic cases", "bundles", "nibabel")

import nibabel as nib
import numpy as np

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.data.canvas import Canvas
from monai_losses_ext.data.shapes import Array, rotation, smooth_field, voxel_grid
from monai_losses_ext.data.tasks import Task, get_task
from monai_losses_ext.errors import fail

BIAS_SCALE_MM = 40.0  # coil shading varies slowly
STORED_AS = ("RAS", "LPS", "LAS")  # axis orders that scanners write
LEAST_VOXELS = 16  # per axis of a miniature: enough for a network's downsampling, and for every structure to show
LARGE = 2**20  # voxels from which single precision is used: four-fold less than a CT of the chest would need otherwise


def make_phantoms(task: str | Task, out_dir: str | Path, n_cases: int = 40, seed: int = 0, scale: float = 1.0) -> Path:
    """Write synthetic cases of a task as NIfTI files in the Decathlon's layout.

    Case i depends on the task, the seed and i only: more cases leave the first ones as they were.

    Args:
        task: the task or its name.
        out_dir: folder to write to; it is made if absent. Phantoms in it are overwritten.
        n_cases: number of cases, at least 1.
        seed: at least 0; another seed gives other cases.
        scale: below 1 for miniatures, above 0: the anatomy on that share of the voxels per axis, but at least
            ``LEAST_VOXELS``. The voxel size is the task's all the same, so a miniature is as anisotropic as the task.

    Returns:
        The folder.

    Raises:
        ValueError: for an unknown task, a wrong number, or a folder that holds another dataset.
    """
    task = get_task(task) if isinstance(task, str) else task
    number("cases", n_cases, Limits(minimum=1))
    number("seed", seed, Limits(minimum=0))
    number("scale", scale, Limits(above=0, maximum=1))
    out_dir = Path(out_dir).expanduser()
    index = out_dir / "dataset.json"
    if index.exists() and phantom_origin(out_dir) is None:
        raise fail("out", "must be a new folder or one with phantoms, not one with another dataset", str(out_dir))
    index.unlink(missing_ok=True)  # written last, so that a folder with an index is complete
    for folder in ("imagesTr", "labelsTr"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    names = [f"phantom_{i:03d}.nii.gz" for i in range(n_cases)]
    for i, name in enumerate(names):
        image, label, affine = make_case(task, seed, i, scale)
        nib.save(nib.Nifti1Image(image, affine), out_dir / "imagesTr" / name)
        nib.save(nib.Nifti1Image(label, affine), out_dir / "labelsTr" / name)
    index.write_text(json.dumps(_index(task, names, seed, scale), indent=2) + "\n", encoding="utf-8")
    return out_dir


def phantom_recipe(task: Task, n_cases: int, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Return what tells one set of phantoms from another; ``row`` changes when the task's row does."""
    look = json.dumps([task.typical_shape, task.typical_spacing_mm, task.modality, task.phantom])
    recipe = {"task": task.name, "cases": n_cases, "seed": seed, "row": zlib.crc32(look.encode())}
    return recipe if scale == 1 else {**recipe, "scale": scale}


def phantom_origin(dataset_dir: str | Path) -> dict[str, Any] | None:
    """Return the :func:`phantom_recipe` of a folder of phantoms; None if it holds no (complete) phantoms."""
    try:
        content = json.loads((Path(dataset_dir) / "dataset.json").read_text(encoding="utf-8"))
        return dict(content["phantoms"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_case(task: Task, seed: int, i: int, scale: float = 1.0) -> tuple[Array, Array, Array]:
    """Make case i of a task; ``scale`` as in :func:`make_phantoms`.

    Returns:
        image [*S] or, with several channels, [*S, C] as MSD stores it: float32, or for CT int16 Hounsfield units;
        label, uint8 [*S]; affine [4, 4].
    """
    rng = np.random.default_rng([seed, i, zlib.crc32(task.name.encode())])
    plan = task.phantom
    jitter = rng.integers(-plan["shape_jitter"], plan["shape_jitter"] + 1, 3)
    typical = [min(n, max(LEAST_VOXELS, round(scale * n))) for n in task.typical_shape]
    shape = tuple(int(n + round(scale * d)) for n, d in zip(typical, jitter, strict=True))
    # A miniature is painted as what it shows, the whole anatomy on few voxels, and stored with the task's voxel size.
    pitch = tuple(step * n / m for step, n, m in zip(task.typical_spacing_mm, task.typical_shape, typical, strict=True))
    canvas = Canvas(rng, _posed_grid(rng, plan["pose"], shape, pitch), pitch, plan)
    for structure in plan["structures"]:
        least, most = structure.get("count", (1, 1))
        for _ in range(rng.integers(least, most + 1)):
            canvas.paint(structure)
    image = _scanned(rng, canvas.image, pitch, task)
    if plan.get("stripped"):
        image[:, canvas.owner == 0] = 0
    affine = _affine(rng, shape, task.typical_spacing_mm)
    return _stored(rng, image, canvas.label, affine)


def _posed_grid(
    rng: np.random.Generator, pose: dict[str, Any], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> Array:
    """Return the voxels' positions in the anatomy: moved, turned, scaled, mirrored and bent."""
    dtype = np.float32 if np.prod(shape) > LARGE else np.float64
    shift = rng.uniform(-1, 1, 3) * pose["shift_mm"]
    matrix = rotation(rng, pose["rotation_deg"]) * (1 + rng.uniform(-1, 1, (1, 3)) * pose["scale"])
    if pose["mirror"] and rng.random() < 0.5:
        matrix[:, 0] *= -1
    grid = voxel_grid(shape, spacing, dtype) - shift.astype(dtype)[:, None, None, None]
    grid = np.einsum("ij,j...->i...", matrix.astype(dtype), grid)
    for axis in grid:
        axis += pose["bend_mm"] * smooth_field(rng, shape, spacing, pose["bend_scale_mm"], dtype)
    return grid


def _scanned(rng: np.random.Generator, image: Array, spacing: tuple[float, ...], task: Task) -> Array:
    """Return the image [C, *S] as a scanner gives it: brightness field, noise, and the scanner's own range."""
    plan = task.phantom

    def noise() -> Array:
        return rng.standard_normal(image.shape, dtype=image.dtype) * plan["noise"]

    if task.modality == "CT":
        image = image + noise()
        return np.clip(np.rint(image, out=image), -1024, 3071).astype(np.int16)  # the range of a CT scanner
    shading = np.exp(plan["bias"] * smooth_field(rng, image.shape[1:], spacing, BIAS_SCALE_MM, image.dtype))
    noisy = np.hypot(image * shading + noise(), noise())  # a magnitude image: two receivers' noise, never negative
    low, high = np.log(plan["gain"])
    return (noisy * np.exp(rng.uniform(low, high))).astype(np.float32)


def _affine(rng: np.random.Generator, shape: tuple[int, ...], spacing: Sequence[float]) -> Array:
    """Return an affine with the spacing, slightly oblique, and with the volume somewhere near the world's origin."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng, 5) @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-30, 30, 3) - affine[:3, :3] @ (np.asarray(shape) / 2)
    return affine


def _stored(rng: np.random.Generator, image: Array, label: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Return image, label and affine with the axes in one of the orders that scanners write."""
    codes = STORED_AS[rng.integers(len(STORED_AS))]
    order = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(np.moveaxis(image, 0, -1), order)
    stored_label = nib.orientations.apply_orientation(label, order)
    affine = affine @ nib.orientations.inv_ornt_aff(order, label.shape)
    return stored[..., 0] if stored.shape[-1] == 1 else stored, stored_label, affine


def _index(task: Task, names: list[str], seed: int, scale: float) -> dict[str, Any]:
    """Return the content of ``dataset.json``, which says what these cases are."""
    return {
        "name": f"Synthetic phantoms for {task.name}",
        "description": "Synthetic images made by monai_losses_ext. They show no patient and serve no medical purpose.",
        "reference": "python -m monai_losses_ext data phantoms",
        "licence": "CC0-1.0",
        "release": f"seed {seed}",
        "tensorImageSize": "3D" if len(task.channels) == 1 else "4D",
        "modality": {str(i): channel for i, channel in enumerate(task.channels)},
        "labels": {str(i): label for i, label in enumerate(task.labels)},
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
        "phantoms": phantom_recipe(task, len(names), seed, scale),
    }
