# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses for MONAI: correct, one pass over the volume, wired into bundles."""

from __future__ import annotations

# MONAI looks for a bare name such as "DiceLoss" in every loaded module whose name starts with "monai", ours included,
# in the order in which they were loaded. With MONAI first, a bare name in a config means MONAI's class, as ever.
import monai  # noqa: F401

from monai_losses_ext.losses import (
    BoundaryLoss,
    CompoundLoss,
    CrossEntropyLoss,
    DeepSupervisionLoss,
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
    "BoundaryLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "TverskyLoss",
    "__version__",
    "get_loss",
]
