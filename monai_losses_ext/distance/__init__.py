# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Exact Euclidean distances, and the signed distance maps of label maps."""

from __future__ import annotations

from monai_losses_ext.distance.euclidean import BACKENDS
from monai_losses_ext.distance.signed import ABSENT, CONVENTIONS, signed_distance
from monai_losses_ext.distance.voxel_size import voxel_size

__all__ = ["ABSENT", "BACKENDS", "CONVENTIONS", "signed_distance", "voxel_size"]
