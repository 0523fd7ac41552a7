# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One pass over the volume gives the sums that every loss is made of; one more pass gives the gradient."""

from __future__ import annotations

from monai_losses_ext.sums.api import BACKENDS, voxel_sums
from monai_losses_ext.sums.target import Target

__all__ = ["BACKENDS", "Target", "voxel_sums"]
