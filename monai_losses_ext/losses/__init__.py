# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The losses, and the table of their names that the factory, the benchmark and the contract tests read."""

from __future__ import annotations

from torch import nn

from monai_losses_ext.losses.compound import CompoundLoss, DiceCELoss, DiceFocalLoss
from monai_losses_ext.losses.cross_entropy import CrossEntropyLoss
from monai_losses_ext.losses.dice import DiceLoss
from monai_losses_ext.losses.focal import FocalLoss
from monai_losses_ext.losses.tversky import FocalTverskyLoss, TverskyLoss

LOSSES: dict[str, type[nn.Module]] = {
    "dice": DiceLoss,
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "tversky": TverskyLoss,
    "focal_tversky": FocalTverskyLoss,
    "dice_ce": DiceCELoss,
    "dice_focal": DiceFocalLoss,
    "compound": CompoundLoss,
}

__all__ = [
    "LOSSES",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "TverskyLoss",
]
