# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Shapes and random fields that synthetic cases are built from. All lengths are in millimeters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

TUBE_SAMPLES = 40  # spheres per tube: neighbors then overlap by more than 9/10 at any sensible length


def ellipsoid(grid: Array, center: Array, radii: Array) -> Array:
    """Return the approximate signed distance to an ellipsoid, negative inside (exact for a sphere).

    Args:
        grid: positions [3, *S].
        center: [3].
        radii: half axes [3].
    """
    offset = (grid - _column(center, grid)) / _column(radii, grid)
    return (np.sqrt((offset**2).sum(axis=0)) - 1) * float(np.min(radii))


def tube(grid: Array, points: Array, radii: Array) -> tuple[Array, Array]:
    """Return the signed distance to a bent tube of varying radius, and the position along its axis.

    Args:
        grid: positions [3, *S].
        points: control points of the axis [K, 3].
        radii: radius at each of them [K].

    Returns:
        distance [*S], negative inside; position [*S] from 0 at the first point to 1 at the last.
    """
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
    squares = (grid**2).sum(axis=0)
    distance = np.full(squares.shape, np.inf, grid.dtype)
    position = np.zeros(squares.shape, grid.dtype)
    for t in np.linspace(0, 1, TUBE_SAMPLES):
        center = np.array([np.interp(t, along, points[:, axis]) for axis in range(3)], grid.dtype)
        # |grid - center|^2, multiplied out: a third of the time of subtracting first
        to_center = np.sqrt(np.maximum(squares - 2 * np.tensordot(center, grid, 1) + center @ center, 0))
        to_sphere = to_center - float(np.interp(t, along, radii))
        closer = to_sphere < distance
        distance[closer] = to_sphere[closer]
        position[closer] = t
    return distance, position


def voxel_grid(shape: tuple[int, ...], spacing: tuple[float, ...], dtype: DTypeLike = np.float64) -> Array:
    """Return the position of every voxel center, [3, *S], with the origin in the middle of the volume."""
    axes = [((np.arange(n) - (n - 1) / 2) * step).astype(dtype) for n, step in zip(shape, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def smooth_field(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    scale: float,
    dtype: DTypeLike = np.float64,
) -> Array:
    """Return a smooth random field [*S] of mean 0 and deviation 1 that varies over lengths of about ``scale``.

    It is a cubic B-spline with independent normal coefficients, one every ``scale``.
    """
    bases = [_spline_basis(np.arange(n) * step / scale).astype(dtype) for n, step in zip(shape, spacing, strict=True)]
    field = rng.standard_normal([basis.shape[1] for basis in bases]).astype(dtype)
    for basis in bases:  # each turn consumes the first axis and appends the fine one
        field = np.tensordot(field, basis, axes=(0, 1))
    field -= field.mean()
    field /= max(float(field.std()), 1e-6)
    return field


def rotation(rng: np.random.Generator, max_degrees: float) -> Array:
    """Return a rotation matrix [3, 3]: turns about x, y and z by angles drawn from within ``max_degrees``."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-max_degrees, max_degrees, 3))):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix


def _spline_basis(positions: Array) -> Array:
    """Return the cubic B-spline weights [n, k] of positions [n] >= 0 on k knots with unit distance from -1 on."""
    knots = np.arange(-1, int(positions[-1]) + 3)
    away = np.abs(positions[:, None] - knots)
    near = 2 / 3 - away**2 + away**3 / 2
    return np.where(away < 1, near, np.clip(2 - away, 0, None) ** 3 / 6)


def _column(vector: Array, grid: Array) -> Array:
    return np.asarray(vector, dtype=grid.dtype)[:, None, None, None]
