# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Transforms that make what a loss needs besides the label, and carry it from the whole volume to the loss."""

from __future__ import annotations

from monai_losses_ext.transforms.batch import UnpackLabeld, prepare_batch, prepare_batch_with_distance
from monai_losses_ext.transforms.distance import SignedDistanceMapd
from monai_losses_ext.transforms.label_maps import RegionMapd, SkeletonMapd
from monai_losses_ext.transforms.weights import BoundaryWeightMapd, ClassBalanceMapd

__all__ = [
    "BoundaryWeightMapd",
    "ClassBalanceMapd",
    "RegionMapd",
    "SignedDistanceMapd",
    "SkeletonMapd",
    "UnpackLabeld",
    "prepare_batch",
    "prepare_batch_with_distance",
]
