# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses for MONAI: correct, one pass over the volume, wired into bundles."""
