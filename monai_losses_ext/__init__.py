# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses for MONAI: correct, one pass over the volume, wired into bundles."""

from __future__ import annotations

from monai_losses_ext.losses import (
    CompoundLoss,
    CrossEntropyLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    FocalTverskyLoss,
    TverskyLoss,
)
from monai_losses_ext.losses.factory import get_loss

__version__ = "0.1.0"

__all__ = [
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "TverskyLoss",
    "__version__",
    "get_loss",
]
