# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Signed distance maps against brute force, and the properties that define them."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import BoundaryLoss as MonaiBoundaryLoss

from monai_losses_ext import distance


def where_installed(backend):
    return pytest.param(
        backend, marks=pytest.mark.skipif(not importlib.util.find_spec(backend), reason="not installed")
    )


BACKENDS = ["scipy", where_installed("numba"), where_installed("triton")]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
HAS_GPU = torch.cuda.is_available()


def signed_distance(target, *args, backend="auto", **kwargs):
    """Call the package's function; for Triton on the GPU, and in its interpreter where there is none."""
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    return distance.signed_distance(target.to(device), *args, backend=backend, **kwargs).cpu()


@st.composite
def label_maps(draw):
    """Labels ``[1, 1, *S]``, the number of classes and the voxel size."""
    num_classes = draw(st.integers(2, 4))
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(0, num_classes, shape, generator=generator)
    if draw(st.booleans()):  # blobs rather than noise
        labels = labels.where(torch.rand(shape, generator=generator) < 0.2, 0)
    spacing = draw(st.lists(st.floats(0.2, 6), min_size=len(shape), max_size=len(shape)))
    return labels[None, None], num_classes, spacing


@every_backend
@settings(max_examples=150, deadline=None)
@given(case=label_maps())
def test_equals_brute_force(backend, case):
    labels, num_classes, spacing = case
    maps = signed_distance(labels, num_classes, spacing, backend=backend)
    half_diagonal = math.hypot(*(n * mm for n, mm in zip(labels.shape[2:], spacing, strict=True))) / 2
    for c in range(num_classes):
        expected = torch.tensor(oracles.signed_distance((labels[0, 0] == c).tolist(), spacing))
        expected = expected.clamp(-half_diagonal if expected.isinf().any() else -math.inf)
        expected = torch.where(expected == math.inf, half_diagonal, expected)
        assert torch.allclose(maps[0, c].flatten(), expected, rtol=0, atol=1e-4)


@every_backend
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [0.7, 0.3])
def test_is_exact_along_a_long_axis(backend, axis, spacing):
    shape, size = [3, 3, 3], [1.0, 1.0, 1.0]
    length = 700 if backend != "triton" or HAS_GPU else 150  # the interpreter is slow
    shape[axis], size[axis] = length, spacing
    labels = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    labels.movedim(axis + 2, 2)[:, :, 0] = 1
    maps = signed_distance(labels, 2, size, backend=backend)
    expected = spacing * torch.arange(1, length, dtype=torch.float64)
    assert torch.allclose(maps[0, 1].movedim(axis, 0)[1:, 1, 1].double(), expected, rtol=0, atol=1e-4)
    line = signed_distance(labels.movedim(axis + 2, 4)[..., 1, 1, :], 2, spacing, backend=backend)
    assert torch.allclose(line[0, 1, 1:].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", [where_installed("numba")])
@pytest.mark.parametrize("shape", [(150, 3, 70), (2, 90, 130), (65, 120), (300,)])
@pytest.mark.parametrize("density", [0.002, 0.02, 0.3])
def test_far_and_near_in_lines_longer_than_a_search_goes(backend, shape, density):
    labels = torch.randint(1, 4, (1, 1, *shape)).where(torch.rand(1, 1, *shape) < density, 0)
    labels.view(-1)[:4] = torch.arange(4)
    labels[0, 0][..., : shape[-1] // 2] += (labels[0, 0][..., : shape[-1] // 2] == 0).int() * 3  # a large label
    spacing = [0.7, 3.0, 1.3][: len(shape)]
    expected = signed_distance(labels, 4, spacing, backend="scipy")
    maps = signed_distance(labels, 4, spacing, backend=backend)
    assert torch.allclose(maps, expected, rtol=1e-6, atol=1e-5)
    torch.set_num_threads(1)
    assert torch.equal(signed_distance(labels, 4, spacing, backend=backend), maps)


@every_backend
@settings(max_examples=50, deadline=None)
@given(case=label_maps())
def test_masks_give_what_labels_give(backend, case):
    labels, num_classes, spacing = case
    masks = torch.cat([labels == c for c in range(num_classes)], 1)
    expected = signed_distance(labels, num_classes, spacing, backend=backend)
    assert torch.allclose(signed_distance(masks, None, spacing, backend=backend), expected, atol=1e-4)
    assert torch.allclose(signed_distance(0.2 + 0.6 * masks, None, spacing, backend=backend), expected, atol=1e-4)


@every_backend
@settings(max_examples=50, deadline=None)
@given(case=label_maps())
def test_changes_sign_when_inside_and_outside_are_exchanged(backend, case):
    labels, _, spacing = case
    mask = labels == 1
    maps = signed_distance(torch.cat([mask, ~mask], 1), None, spacing, backend=backend)
    assert torch.equal(maps[:, 0], -maps[:, 1])


@every_backend
@pytest.mark.parametrize("spacing", [0.5, 1.0, 3.0, (0.5, 3.0, 1.0)])
def test_is_negative_inside_and_positive_outside(backend, spacing):
    labels = torch.zeros(1, 1, 9, 10, 11, dtype=torch.uint8)
    labels[..., 2:6, 3:5, 4:9] = 1
    labels[..., 7, 7, 7] = 2  # a single voxel
    maps = signed_distance(labels, 3, spacing, backend=backend)
    for c in range(3):
        inside = labels[0, 0] == c
        assert (maps[0, c][inside] < 0).all() and (maps[0, c][~inside] > 0).all()
    smallest = min(spacing) if isinstance(spacing, tuple) else spacing
    assert maps.abs().min().item() == pytest.approx(smallest)


@every_backend
def test_overlapping_masks(backend):
    masks = torch.zeros(1, 2, 8, 8)
    masks[:, 0, 2:7, 2:7] = 1
    masks[:, 1, 3:5, 3:5] = 1
    maps = signed_distance(masks, backend=backend)
    for c in range(2):
        assert torch.equal(maps[:, c : c + 1], signed_distance(masks[:, c : c + 1], backend=backend))


@every_backend
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.int64, torch.float16, torch.float32],
)
def test_label_dtypes_and_samples_of_their_own_spacing(backend, dtype):
    labels = torch.randint(0, 3, (3, 1, 6, 5))
    spacing = [[1.0, 2.0], [0.5, 0.5], [3.0, 0.7]]
    maps = signed_distance(labels.to(dtype), 3, spacing, backend=backend)
    for b in range(3):
        alone = signed_distance(labels[b : b + 1], 3, spacing[b], backend=backend)
        assert torch.equal(maps[b : b + 1], alone)


@every_backend
def test_a_value_that_is_no_class_lies_outside_of_all(backend):
    labels = torch.tensor([[[0, 0, 1, 255, 255]]])
    assert signed_distance(labels, 2, backend=backend)[0].tolist() == [[-2, -1, 1, 2, 3], [2, 1, -1, 1, 2]]
    assert signed_distance(labels.float() - 1, 2, backend=backend)[0, 0].tolist() == [2, 1, -1, 1, 2]
    for dtype, num_classes in ((torch.int8, 130), (torch.uint8, 300)):  # more classes than the dtype can hold
        maps = signed_distance(labels.clamp(max=2).to(dtype), num_classes, backend=backend)
        assert maps[0, 1].tolist() == [2, 1, -1, 1, 2] and (maps[0, 3:] == 2.5).all()


@every_backend
def test_absent_and_full_classes(backend):
    labels = torch.zeros(1, 1, 3, 4)
    assert signed_distance(labels, 2, spacing=2.0, backend=backend)[0].unique(dim=-1).tolist() == [
        [[-5.0]] * 3,
        [[5.0]] * 3,
    ]
    assert signed_distance(labels, 2, absent="zero", backend=backend).count_nonzero() == 0


@every_backend
def test_without_background_its_channel_is_zero(backend):
    labels = torch.randint(0, 3, (1, 1, 5, 5))
    maps = signed_distance(labels, 3, include_background=False, backend=backend)
    assert maps[:, 0].count_nonzero() == 0
    assert torch.equal(maps[:, 1:], signed_distance(labels, 3, backend=backend)[:, 1:])


@every_backend
def test_kervadecs_convention_is_monais(backend):
    labels = torch.zeros(2, 1, 8, 9, 7)
    labels[:, :, 2:5, 3:8, 2:6] = 1
    labels[1, :, 6] = 2
    masks = torch.cat([labels == c for c in range(4)], 1).float()
    maps = signed_distance(masks, convention="kervadec", absent="zero", backend=backend)
    assert torch.allclose(maps, MonaiBoundaryLoss().compute_distance_map(masks), atol=1e-5)
    fine = signed_distance(labels[:1], 2, spacing=0.5, convention="kervadec", backend=backend)
    assert fine[0, 1][labels[0, 0] == 1].max() == 0.5  # the published formula at 0.5 mm: positive inside


def test_errors_are_one_line():
    labels = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"^absent: must be one of far, zero; got 'fat'\. Did you mean 'far'\?$"):
        signed_distance(labels, 2, absent="fat")
    with pytest.raises(ValueError, match=r"^convention: must be one of signed, kervadec; got"):
        signed_distance(labels, 2, convention="monai")
    with pytest.raises(ValueError, match=r"^distance backend: must be one of auto, numba, scipy, triton; got"):
        signed_distance(labels, 2, backend="numpy")
    for spacing in (0.0, -1.0, [1.0, 1.0, 1.0], math.nan, math.inf, "1", [[1.0, 1.0], [1.0]]):
        with pytest.raises(ValueError, match=r"^spacing: must be a number above 0"):
            signed_distance(labels, 2, spacing=spacing)
    for broken in (0.9999, math.nan):  # cut down to a whole number, it would be another class
        with pytest.raises(ValueError, match=r"^target: index labels must be whole numbers; got .*interpolation"):
            signed_distance(torch.tensor([[[0.0, broken, 1.0]]]), 2)
    for num_classes in ("2", 2.0, -1, 0, True):
        with pytest.raises(
            ValueError, match=rf"^num_classes: must be a whole number of at least 1 .* got {num_classes!r}"
        ):
            signed_distance(labels, num_classes)
    assert torch.equal(signed_distance(labels, np.int64(2)), signed_distance(labels, 2))
    with pytest.raises(ValueError, match=r"^target: must be a tensor; got array\("):
        distance.signed_distance(labels.numpy(), 2)
    with pytest.raises(ValueError, match=r"^target: index labels must be \[B, 1, \*S\]; got \[1, 2, 4\]"):
        signed_distance(torch.zeros(1, 2, 4), 2)
    with pytest.raises(ValueError, match=r"^target: must be \[B, C, \*S\] with 1 to 3 spatial axes"):
        signed_distance(torch.zeros(1, 2))
