# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The image and label of a synthetic case, on which structures are painted one over another.

A structure is an object of a row's ``phantom`` with these entries:

- ``shape``: ``tube`` (``points``, ``radii``) or ``ellipsoid`` (``center``, ``radii``);
- ``labels``: none for what is only a distractor; several divide a tube at ``cuts``, shares of its length, which vary by
  ``cut_jitter``; ``intensity``; ``rim`` around it, of ``tissues`` that alternate over ``scale_mm``, ``width_mm`` wide;
- ``count`` [least, most] copies, each moved by up to ``spread_mm`` along each axis, its radii times a factor from
  ``size`` [least, most];
- ``name``, by which another one is placed: ``inside`` a structure, in a random voxel of it that no other covers, and
  with ``clip`` painted only there (a lesion in its organ); ``around`` a structure, where its last copy was painted and
  with its size (the shells of a tumour).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from monai_losses_ext.data.shapes import Array, ellipsoid, smooth_field, tube

BLOCK = 2**21  # voxels that are painted at a time, which bounds the memory
STRIDE = 4  # voxels between those that are looked at to find where a structure lies


class Canvas:
    """The image [C, *S] and label [*S] of one case.

    Args:
        rng: source of all that varies.
        grid: position of every voxel in the anatomy [3, *S], in millimeters.
        spacing: distance of neighboring voxels in it.
        plan: the row's ``phantom``.
    """

    def __init__(self, rng: np.random.Generator, grid: Array, spacing: tuple[float, ...], plan: dict[str, Any]) -> None:
        self.rng, self.grid, self.spacing = rng, grid, spacing
        self.contrast_jitter = plan["contrast_jitter"]
        self.image = self._tissues(plan["background"])
        self.label = np.zeros(grid.shape[1:], dtype=np.uint8)
        self.names = sorted({s["name"] for s in plan["structures"] if "name" in s})
        self.owner = np.zeros(grid.shape[1:] if self.names else (0,) * 3, dtype=np.uint8)  # 0: nothing; see _number
        self.copies: dict[str, tuple[Array, float]] = {}  # move and size of the last copy of each

    def paint(self, structure: dict[str, Any]) -> None:
        """Paint one copy of a structure: its rim, its body, and its labels."""
        structure = self._place(structure)
        rim = self._tissues(structure["rim"]) if "rim" in structure else None
        width = structure["rim"]["width_mm"] if rim is not None else 0.0
        values = self._jittered(structure["intensity"])[:, None, None, None]
        cuts = np.asarray(structure.get("cuts", ()), dtype=float)
        cuts = cuts + self.rng.uniform(-1, 1, cuts.shape) * structure.get("cut_jitter", 0.0)
        name = structure.get("name")
        for block in self._blocks(structure, width):
            distance, position = self._distance(self.grid[(slice(None), *block)], structure)
            if structure.get("clip"):
                distance = np.where(self.owner[block] == self._number(structure["inside"]), distance, np.inf)
            if rim is not None:
                self._blend(block, distance - width, rim[(slice(None), *block)])
            self._blend(block, distance, values)
            inside = distance < 0
            if structure.get("labels"):
                labels = np.asarray(structure["labels"], dtype=np.uint8)
                self.label[block][inside] = labels[np.searchsorted(cuts, position[inside])]
            if self.names:
                self.owner[block][inside] = self._number(name)

    def _number(self, name: str | None) -> int:
        return 1 + (len(self.names) if name is None else self.names.index(name))

    def _place(self, structure: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a structure, where it goes and as large as it is to be."""
        move, size = self.rng.uniform(-1, 1, 3) * structure.get("spread_mm", 0.0), 1.0
        if "around" in structure:
            there, size = self.copies[structure["around"]]
            move = move + there
        if "inside" in structure:
            voxels = np.flatnonzero(self.owner == self._number(structure["inside"]))
            if len(voxels):
                voxel = np.unravel_index(voxels[self.rng.integers(len(voxels))], self.owner.shape)
                move = move + self.grid[(slice(None), *voxel)]
        if "size" in structure:
            size *= self.rng.uniform(*structure["size"])
        if "name" in structure:
            self.copies[structure["name"]] = move, size
        # No structure may fall between the voxels of a miniature.
        least = 0.6 * max(self.spacing) if structure["shape"] == "tube" else 0.9 * np.asarray(self.spacing)
        points = np.atleast_2d(structure["points"] if structure["shape"] == "tube" else structure["center"])
        return {**structure, "points": points + move, "radii": np.maximum(size * np.asarray(structure["radii"]), least)}

    def _distance(self, grid: Array, structure: dict[str, Any]) -> tuple[Array, Array]:
        """Return the signed distance to a placed structure, and the position along it (0 for an ellipsoid)."""
        if structure["shape"] == "tube":
            return tube(grid, structure["points"], structure["radii"])
        distance = ellipsoid(grid, structure["points"][0], structure["radii"])
        return distance, np.zeros_like(distance)

    def _blocks(self, structure: dict[str, Any], width: float) -> Iterator[tuple[slice, ...]]:
        """Give the blocks of the volume in which a copy and its rim can lie."""
        box = self._box(structure, width)
        area = int(np.prod([part.stop - part.start for part in box[1:]]))
        step = max(1, BLOCK // max(1, area))
        for start in range(box[0].start, box[0].stop, step):
            yield (slice(start, min(start + step, box[0].stop)), *box[1:])

    def _box(self, structure: dict[str, Any], width: float) -> tuple[slice, ...]:
        """Return a box around a copy and its rim, found on a coarser grid."""
        shape = self.grid.shape[1:]
        points, radii = structure["points"], structure["radii"]
        reach = radii.max() if structure["shape"] == "tube" else radii
        # Positions differ between neighbors by the spacing, and by a bit more where the anatomy is scaled and bent.
        reach = reach + width + max(self.spacing) + 1.5 * (STRIDE - 1) * float(np.linalg.norm(self.spacing))
        coarse = self.grid[:, ::STRIDE, ::STRIDE, ::STRIDE]
        low, high = (points.min(0) - reach)[:, None, None, None], (points.max(0) + reach)[:, None, None, None]
        near = np.argwhere(((coarse > low) & (coarse < high)).all(0))
        if not len(near):
            return tuple(slice(0, 0) for _ in shape)
        first, last = near.min(0) * STRIDE, (near.max(0) + 1) * STRIDE
        return tuple(slice(int(a), min(int(b), n)) for a, b, n in zip(first, last, shape, strict=True))

    def _blend(self, block: tuple[slice, ...], distance: Array, values: Array) -> None:
        """Mix ``values`` in where ``distance`` is negative, with an edge of one voxel in plane (partial volume)."""
        share = np.clip(0.5 - distance / min(self.spacing), 0, 1)
        part = (slice(None), *block)
        self.image[part] = self.image[part] * (1 - share) + values * share

    def _tissues(self, spec: dict[str, Any]) -> Array:
        """Return an image [C, *S] in which the tissues of ``spec`` alternate, with equal shares and soft edges."""
        tissues = np.stack([self._jittered(tissue) for tissue in spec["tissues"]])
        shape, dtype = self.grid.shape[1:], self.grid.dtype
        if len(tissues) == 1:
            return np.broadcast_to(tissues[0][:, None, None, None], (tissues.shape[1], *shape)).astype(dtype)
        field = smooth_field(self.rng, shape, self.spacing, spec["scale_mm"], dtype)
        rank = np.clip((np.tanh(0.8 * field) + 1) / 2 * len(tissues) - 0.5, 0, len(tissues) - 1)
        low = np.floor(rank)
        level = low + np.clip(2 * (rank - low) - 0.5, 0, 1)  # plateaus with ramps between them
        return np.stack([np.interp(level, range(len(tissues)), channel).astype(dtype) for channel in tissues.T])

    def _jittered(self, intensity: list[float]) -> Array:
        values = np.asarray(intensity, dtype=float)
        return (values + self.rng.normal(0, 1, values.shape) * self.contrast_jitter).astype(self.grid.dtype)
