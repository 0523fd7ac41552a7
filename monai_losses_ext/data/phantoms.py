# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic cases (phantoms) of a task, in the Decathlon's layout: for trying out software, not for medicine.

What a task's phantoms look like is the ``phantom`` part of its row in ``tasks.json``. Lengths there are in millimetres
from the middle of the volume, x to the right, y to the front, z up; intensities are one value per channel:

- ``shape_jitter``: voxels by which the size of a volume differs from the typical one;
- ``pose``: how far a case is turned (``rotation_deg``), scaled (``scale``), moved (``shift_mm``) and bent
  (``bend_mm`` over lengths of ``bend_scale_mm``), and whether left and right are swapped at random (``mirror``);
- ``background``: ``tissues`` (intensities) that alternate over lengths of ``scale_mm``;
- ``structures``, painted one over another: ``shape`` is ``tube`` (``points``, ``radii``) or ``ellipsoid`` (``centre``,
  ``radii``); ``labels`` (none: the structure is only a distractor; several: the tube is divided among them at
  ``cuts``, shares of its length, which vary by ``cut_jitter``); ``intensity``; ``rim`` around it, like ``background``
  and ``width_mm`` wide; ``count`` [least, most]; ``spread_mm``, by which each copy is moved; ``inside``, a label in
  which each copy is centred (a lesion in its organ);
- ``contrast_jitter``: deviation of each intensity from case to case; ``noise``: its deviation; ``bias``: strength of
  the smooth brightness field; ``gain``: range from which a scanner's factor is drawn, evenly in its logarithm.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_losses_ext._checks import Limits, fail, number
from monai_losses_ext.data.shapes import Array, ellipsoid, rotation, smooth_field, tube, voxel_grid
from monai_losses_ext.data.tasks import Task, get_task

BIAS_SCALE_MM = 40.0  # coil shading varies slowly
STORED_AS = ("RAS", "LPS", "LAS")  # axis orders that scanners write


def make_phantoms(task: str | Task, out_dir: str | Path, n_cases: int = 40, seed: int = 0) -> Path:
    """Write synthetic cases of a task as NIfTI files in the Decathlon's layout.

    Case i depends on the task, the seed and i only: more cases leave the first ones as they were.

    Args:
        task: the task or its name.
        out_dir: folder to write to; it is made if absent. Phantoms in it are overwritten.
        n_cases: number of cases, at least 1.
        seed: at least 0; another seed gives other cases.

    Returns:
        The folder.

    Raises:
        ValueError: for an unknown task, a wrong number, or a folder that holds another dataset.
    """
    task = get_task(task) if isinstance(task, str) else task
    number("cases", n_cases, Limits(minimum=1))
    number("seed", seed, Limits(minimum=0))
    out_dir = Path(out_dir).expanduser()
    index = out_dir / "dataset.json"
    if index.exists() and phantom_origin(out_dir) is None:
        raise fail("out", "must be a new folder or one with phantoms, not one with another dataset", str(out_dir))
    index.unlink(missing_ok=True)  # written last, so that a folder with an index is complete
    for folder in ("imagesTr", "labelsTr"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    names = [f"phantom_{i:03d}.nii.gz" for i in range(n_cases)]
    for i, name in enumerate(names):
        image, label, affine = make_case(task, seed, i)
        nib.save(nib.Nifti1Image(image, affine), out_dir / "imagesTr" / name)
        nib.save(nib.Nifti1Image(label, affine), out_dir / "labelsTr" / name)
    index.write_text(json.dumps(_index(task, names, seed), indent=2) + "\n", encoding="utf-8")
    return out_dir


def phantom_recipe(task: Task, n_cases: int, seed: int) -> dict[str, Any]:
    """Return what tells one set of phantoms from another; ``row`` changes when the task's row does."""
    look = json.dumps([task.typical_shape, task.typical_spacing_mm, task.modality, task.phantom])
    return {"task": task.name, "cases": n_cases, "seed": seed, "row": zlib.crc32(look.encode())}


def phantom_origin(dataset_dir: str | Path) -> dict[str, Any] | None:
    """Return the :func:`phantom_recipe` of a folder of phantoms; None if it holds no (complete) phantoms."""
    try:
        content = json.loads((Path(dataset_dir) / "dataset.json").read_text(encoding="utf-8"))
        return dict(content["phantoms"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_case(task: Task, seed: int, i: int) -> tuple[Array, Array, Array]:
    """Make case i of a task.

    Returns:
        image, float32 [*S] or, with several channels, [*S, C] as MSD stores it; label, uint8 [*S]; affine [4, 4].
    """
    rng = np.random.default_rng([seed, i, zlib.crc32(task.name.encode())])
    plan = task.phantom
    jitter = rng.integers(-plan["shape_jitter"], plan["shape_jitter"] + 1, 3)
    shape = tuple(int(n + d) for n, d in zip(task.typical_shape, jitter, strict=True))
    spacing = task.typical_spacing_mm
    canvas = _Canvas(rng, _posed_grid(rng, plan["pose"], shape, spacing), spacing, plan)
    for structure in plan["structures"]:
        least, most = structure.get("count", (1, 1))
        for _ in range(rng.integers(least, most + 1)):
            canvas.paint(structure)
    image = _scanned(rng, canvas.image, spacing, task)
    affine = _affine(rng, shape, spacing)
    return _stored(rng, image, canvas.label, affine)


class _Canvas:
    """The image [C, *S] and label [*S] of one case, on which structures are painted one over another."""

    def __init__(self, rng: np.random.Generator, grid: Array, spacing: tuple[float, ...], plan: dict[str, Any]) -> None:
        self.rng, self.grid, self.spacing = rng, grid, spacing
        self.contrast_jitter = plan["contrast_jitter"]
        self.image = self._tissues(plan["background"])
        self.label = np.zeros(grid.shape[1:], dtype=np.uint8)

    def paint(self, structure: dict[str, Any]) -> None:
        """Paint one copy of a structure: its rim, its body, and its labels."""
        distance, position = self._distance(structure)
        if "rim" in structure:
            self._blend(distance - structure["rim"]["width_mm"], self._tissues(structure["rim"]))
        self._blend(distance, self._jittered(structure["intensity"])[:, None, None, None])
        if structure.get("labels"):
            cuts = np.asarray(structure.get("cuts", ()), dtype=float)
            cuts = cuts + self.rng.uniform(-1, 1, cuts.shape) * structure.get("cut_jitter", 0.0)
            inside = distance < 0
            self.label[inside] = np.asarray(structure["labels"])[np.searchsorted(cuts, position[inside])]

    def _distance(self, structure: dict[str, Any]) -> tuple[Array, Array]:
        """Return the signed distance to a randomly placed copy, and the position along it (0 for an ellipsoid)."""
        move = self.rng.uniform(-1, 1, 3) * structure.get("spread_mm", 0.0)
        if "inside" in structure:
            voxels = np.argwhere(self.label == structure["inside"])
            if len(voxels):
                move = move + self.grid[(slice(None), *voxels[self.rng.integers(len(voxels))])]
        radii = np.asarray(structure["radii"], dtype=float)
        if structure["shape"] == "tube":
            return tube(self.grid, np.asarray(structure["points"], dtype=float) + move, radii)
        distance = ellipsoid(self.grid, np.asarray(structure["centre"], dtype=float) + move, radii)
        return distance, np.zeros_like(distance)

    def _blend(self, distance: Array, values: Array) -> None:
        """Mix ``values`` in where ``distance`` is negative, with an edge of one voxel in plane (partial volume)."""
        share = np.clip(0.5 - distance / min(self.spacing), 0, 1)
        self.image = self.image * (1 - share) + values * share

    def _tissues(self, spec: dict[str, Any]) -> Array:
        """Return an image [C, *S] in which the tissues of ``spec`` alternate, with equal shares and soft edges."""
        tissues = np.stack([self._jittered(tissue) for tissue in spec["tissues"]])
        field = smooth_field(self.rng, self.grid.shape[1:], self.spacing, spec["scale_mm"])
        rank = np.clip((np.tanh(0.8 * field) + 1) / 2 * len(tissues) - 0.5, 0, len(tissues) - 1)
        low = np.floor(rank)
        level = low + np.clip(2 * (rank - low) - 0.5, 0, 1)  # plateaus with ramps between them
        return np.stack([np.interp(level, range(len(tissues)), channel) for channel in tissues.T])

    def _jittered(self, intensity: list[float]) -> Array:
        values = np.asarray(intensity, dtype=float)
        return values + self.rng.normal(0, 1, values.shape) * self.contrast_jitter


def _posed_grid(
    rng: np.random.Generator, pose: dict[str, Any], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> Array:
    """Return the voxels' positions in the anatomy: moved, turned, scaled, mirrored and bent."""
    grid = voxel_grid(shape, spacing)
    shift = rng.uniform(-1, 1, 3) * pose["shift_mm"]
    matrix = rotation(rng, pose["rotation_deg"]) * (1 + rng.uniform(-1, 1, (1, 3)) * pose["scale"])
    if pose["mirror"] and rng.random() < 0.5:
        matrix[:, 0] *= -1
    posed = np.einsum("ij,j...->i...", matrix, grid - shift[:, None, None, None])
    bends = [smooth_field(rng, shape, spacing, pose["bend_scale_mm"]) for _ in range(3)]
    return posed + pose["bend_mm"] * np.stack(bends)


def _scanned(rng: np.random.Generator, image: Array, spacing: tuple[float, ...], task: Task) -> Array:
    """Return the image [C, *S] as a scanner gives it: brightness field, noise, and the scanner's own range."""
    plan = task.phantom
    shading = np.exp(plan["bias"] * smooth_field(rng, image.shape[1:], spacing, BIAS_SCALE_MM))
    noisy = image * shading + rng.normal(0, plan["noise"], image.shape)
    if task.modality == "MRI":  # a magnitude image: the noise of two receivers, never negative
        noisy = np.hypot(noisy, rng.normal(0, plan["noise"], image.shape))
    low, high = np.log(plan["gain"])
    return noisy * np.exp(rng.uniform(low, high))


def _affine(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Array:
    """Return an affine with the spacing, slightly oblique, and with the volume somewhere near the world's origin."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(rng, 5) @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-30, 30, 3) - affine[:3, :3] @ (np.asarray(shape) / 2)
    return affine


def _stored(rng: np.random.Generator, image: Array, label: Array, affine: Array) -> tuple[Array, Array, Array]:
    """Return image, label and affine with the axes in one of the orders that scanners write."""
    codes = STORED_AS[rng.integers(len(STORED_AS))]
    order = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(np.moveaxis(image, 0, -1).astype(np.float32), order)
    stored_label = nib.orientations.apply_orientation(label, order)
    affine = affine @ nib.orientations.inv_ornt_aff(order, label.shape)
    return stored[..., 0] if stored.shape[-1] == 1 else stored, stored_label, affine


def _index(task: Task, names: list[str], seed: int) -> dict[str, Any]:
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
        "phantoms": phantom_recipe(task, len(names), seed),
    }
