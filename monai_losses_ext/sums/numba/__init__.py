# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The voxel sums on a CPU, by kernels that numba compiles (extra ``fast``)."""

from __future__ import annotations

from monai_losses_ext.sums.numba.launch import TERMS, backward, forward, supports

__all__ = ["TERMS", "backward", "forward", "supports"]
