# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The voxel sums on CUDA: one kernel reads the logits once, one more reads them again and writes the gradient.

Each program of a kernel holds all classes of a block of voxels. It leaves its sums, float32, in a row of its own, and
the rows are added up in float64: no atomics, so the same input gives the same bits. The formulas are those of
``sums/terms.py``, through derivatives with respect to the logarithm of the probabilities. Terms, exponents, the
activation and the kind of target are known when a kernel is compiled, so that what is not asked for costs nothing.

Nothing here waits for the GPU, so labels are not checked: one out of range, or no whole number, is no class.
"""

from __future__ import annotations

from monai_losses_ext.sums.triton.launch import TERMS, backward, forward, supports

__all__ = ["TERMS", "backward", "forward", "supports"]
