# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a loss needs besides the label and is a function of it alone: regions around components, skeletons, weights."""

from __future__ import annotations

from monai_losses_ext.maps.regions import regions_of
from monai_losses_ext.maps.skeleton import skeleton_of
from monai_losses_ext.maps.weights import border_weights, inverse_frequency, voxel_weights

__all__ = ["border_weights", "inverse_frequency", "regions_of", "skeleton_of", "voxel_weights"]
