# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The size of a voxel: along the axes of the volume, in the patient's space, and never one that cannot be."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, Rotate90
from scipy.spatial.transform import Rotation

from monai_losses_ext import BoundaryLoss
from monai_losses_ext.distance import voxel_size
from monai_losses_ext.distance.voxel_size import _warn_about_edges
from monai_losses_ext.handlers.evaluation import SegmentationReport
from monai_losses_ext.metrics import class_metrics


@pytest.fixture(autouse=True)
def _not_warned_yet():
    _warn_about_edges.cache_clear()


def affine_of(*columns):
    affine = np.eye(4)
    affine[:3, : len(columns)] = np.transpose(columns)
    return affine


# A coronal slice: its axes are the patient's first and third.
CORONAL = affine_of((1.0, 0, 0), (0, 0, 5.0), (0, 3.0, 0))


def test_the_lengths_of_the_columns_in_any_orientation():
    rotation = Rotation.from_euler("xyz", [20, -70, 130], degrees=True).as_matrix()
    affine = affine_of(*(rotation * [0.7, 0.7, 3.5]).T)
    assert voxel_size(affine, 3) == pytest.approx([0.7, 0.7, 3.5])
    assert voxel_size(torch.as_tensor(affine), 2) == pytest.approx([0.7, 0.7])
    batch = voxel_size(torch.as_tensor(np.stack([affine, CORONAL])), 3)
    assert batch[0] == pytest.approx([0.7, 0.7, 3.5]) and batch[1] == [1, 5, 3]
    assert voxel_size(CORONAL, 1) == [1]


def test_a_coronal_slice_keeps_its_voxel_size():
    assert voxel_size(MetaTensor(torch.zeros(1, 9, 9), affine=CORONAL), 2) == [1, 5]


def test_what_is_no_affine_has_no_size():
    assert voxel_size(None, 3) is None
    for shape in ((4,), (1, 4, 4), (1, 1, 8, 8), (3, 4), (1, 1)):
        assert voxel_size(torch.zeros(shape), 2) is None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([(2.0, 0, 0), (0, 0, 0), (0, 0, 3.0)], [2, 1, 3]),
        ([(2.0, 0, 0), (0, 3.7e-33, 0), (0, 0, 3.0)], [2, 1, 3]),
        ([(2.0, 0, 0), (0, math.nan, 0), (0, 0, 3.0)], [2, 1, 3]),
        ([(2.0, 0, 0), (0, math.inf, 0), (0, 0, 3.0)], [2, 1, 3]),
        ([(2.0, 0, 0), (4.0, 1e-5, 0), (0, 0, 3.0)], [2, 1, 3]),
        ([(math.nan,) * 3] * 3, [1, 1, 1]),
        # A sheared grid is one: its edges are long, and not dependent.
        ([(2.0, 0, 0), (1.0, 1.0, 0), (0, 0, 1e-3)], [2, math.sqrt(2), 1e-3]),
    ],
)
def test_an_edge_that_cannot_be_one_counts_a_millimeter_with_one_warning(columns, expected):
    affine = affine_of(*columns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert voxel_size(affine, 3) == pytest.approx(expected)
    told = ["counts as 1 mm" in str(warning.message) for warning in caught]
    assert told == ([] if expected[1] == math.sqrt(2) else [True])


def test_the_affine_that_monai_makes_degenerate():
    labels = torch.zeros(12, 12, 12)
    labels[3:9, 4:8, 2:7] = 1
    label = Rotate90(k=1, spatial_axes=(0, 2))(EnsureChannelFirst(channel_dim="no_channel")(MetaTensor(labels)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert voxel_size(label, 3) == [1, 1, 1]
        logits = torch.randn(1, 2, 12, 12, 12)
        found = BoundaryLoss(softmax=True)(logits, label.unsqueeze(0))
        assert found.item() == pytest.approx(BoundaryLoss(softmax=True, spacing=1)(logits, label[None]).item())


def test_distances_of_a_slice_are_in_millimeters():
    reference = torch.zeros(1, 24, 24)
    reference[:, 4:12, 4:12] = 1
    prediction = reference.roll(2, dims=2)  # two voxels along z, of 5 mm
    sizes = voxel_size(MetaTensor(reference, affine=CORONAL), 2)
    masks = prediction[0] == 1, reference[0] == 1
    found = class_metrics(*masks, sizes, 9.0, ["hd95", "nsd"], use_subvoxels=True)
    assert found["hd95"] == pytest.approx(10)
    wide = class_metrics(*masks, sizes, 10.5, ["hd95", "nsd"], use_subvoxels=True)
    assert found["nsd"] < 0.95 and wide["nsd"] == 1


def test_the_evaluation_measures_a_slice_in_millimeters():
    from types import SimpleNamespace

    reference = torch.zeros(1, 24, 24)
    reference[:, 4:12, 4:12] = 1
    output = {"pred": reference.roll(2, dims=2), "label": MetaTensor(reference, affine=CORONAL)}
    metrics = SegmentationReport({1: "organ"}, tolerance_mm=9.0)
    engine = SimpleNamespace(state=SimpleNamespace(output=[output], iteration=1, epoch_length=9))
    metrics._start(engine)
    metrics._measure(engine)
    assert metrics.rows[0]["hd95"] == pytest.approx(10) and metrics.rows[0]["nsd"] < 0.95
