# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Shapes against closed forms, and the random fields' mean, deviation and smoothness."""

from __future__ import annotations

import numpy as np
import pytest

from monai_losses_ext.data.shapes import ellipsoid, rotation, smooth_field, tube, voxel_grid


def test_grid_is_in_millimeters_around_the_middle() -> None:
    grid = voxel_grid((3, 4, 2), (1.0, 0.5, 4.0))
    assert grid.shape == (3, 3, 4, 2)
    assert np.allclose(grid.mean(axis=(1, 2, 3)), 0)
    assert np.allclose(grid[:, 0, 0, 0], [-1, -0.75, -2])


def test_sphere_is_exact_and_ellipsoid_has_its_volume() -> None:
    grid = voxel_grid((41, 41, 41), (1.0, 1.0, 1.0))
    center = np.array([1.0, -2.0, 0.5])
    distance = np.linalg.norm(grid - center[:, None, None, None], axis=0) - 7
    assert np.allclose(ellipsoid(grid, center, np.array([7.0, 7.0, 7.0])), distance)
    inside = np.count_nonzero(ellipsoid(grid, center, np.array([12.0, 8.0, 5.0])) < 0)
    assert inside == pytest.approx(4 / 3 * np.pi * 12 * 8 * 5, rel=0.02)


def test_straight_tube_is_a_capsule_and_knows_the_position_along_it() -> None:
    grid = voxel_grid((31, 61, 31), (1.0, 1.0, 1.0))
    distance, position = tube(grid, np.array([[0.0, -20, 0], [0, 5, 0], [0, 20, 0]]), np.array([4.0, 4.0, 4.0]))
    nearest_on_axis = np.clip(grid[1], -20, 20)
    capsule = np.sqrt(grid[0] ** 2 + (grid[1] - nearest_on_axis) ** 2 + grid[2] ** 2) - 4
    assert np.abs(distance - capsule)[np.abs(capsule) < 2].max() < 0.1  # a row of spheres: slightly scalloped
    assert np.abs(position - (nearest_on_axis + 20) / 40).max() < 0.02


def test_tube_widens_along_its_axis() -> None:
    grid = voxel_grid((31, 41, 31), (1.0, 1.0, 1.0))
    distance, _ = tube(grid, np.array([[0.0, -12, 0], [0, 12, 0]]), np.array([2.0, 8.0]))
    areas = [np.count_nonzero(distance[:, 20 + y] < 0) for y in (-10, 0, 10)]
    assert areas[0] < areas[1] < areas[2]
    assert areas[1] == pytest.approx(np.pi * 5**2, rel=0.15)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0)])
@pytest.mark.parametrize("scale", [3.0, 10.0])
def test_field_is_standardised_and_smooth_at_its_scale(spacing: tuple[float, ...], scale: float) -> None:
    field = smooth_field(np.random.default_rng(0), (60, 50, 20), spacing, scale)
    assert field.shape == (60, 50, 20)
    assert field.mean() == pytest.approx(0, abs=1e-9)
    assert field.std() == pytest.approx(1)
    step = np.abs(np.diff(field, axis=0)).mean()
    assert 0.1 < step * scale / spacing[0] < 2  # changes by about its deviation over its scale


def test_rotation_is_one_and_stays_within_its_angle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = rotation(rng, 10)
        assert np.allclose(matrix @ matrix.T, np.eye(3))
        assert np.linalg.det(matrix) == pytest.approx(1)
        angle = np.degrees(np.arccos((np.trace(matrix) - 1) / 2))
        assert angle <= 10 * np.sqrt(3) + 1e-6  # three turns of at most 10 degrees
    assert np.allclose(rotation(rng, 0), np.eye(3))
