# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The losses, and the table of their names that the factory, the benchmark and the contract tests read."""

from __future__ import annotations

from torch import nn

from monai_losses_ext.losses.boundary import BoundaryLoss
from monai_losses_ext.losses.calibration import L1ACELoss
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.losses.cross_entropy import CrossEntropyLoss
from monai_losses_ext.losses.deep_supervision import DeepSupervisionLoss
from monai_losses_ext.losses.dice import DiceLoss, JaccardLoss, LogCoshDiceLoss
from monai_losses_ext.losses.dice_compound import DiceCELoss, DiceFocalLoss
from monai_losses_ext.losses.focal import FocalLoss
from monai_losses_ext.losses.generalized_dice import GeneralizedDiceLoss
from monai_losses_ext.losses.hausdorff import HausdorffDTLoss, LogHausdorffDTLoss
from monai_losses_ext.losses.mcc import MCCLoss
from monai_losses_ext.losses.poly import Poly1Loss
from monai_losses_ext.losses.regions import BlobLoss, CCDiceLoss
from monai_losses_ext.losses.skeleton import SkeletonRecallLoss
from monai_losses_ext.losses.tversky import FocalTverskyLoss, TverskyLoss
from monai_losses_ext.losses.unified_focal import UnifiedFocalLoss

LOSSES: dict[str, type[nn.Module]] = {
    "dice": DiceLoss,
    "cross_entropy": CrossEntropyLoss,
    "focal": FocalLoss,
    "tversky": TverskyLoss,
    "focal_tversky": FocalTverskyLoss,
    "boundary": BoundaryLoss,
    "jaccard": JaccardLoss,
    "generalized_dice": GeneralizedDiceLoss,
    "log_cosh_dice": LogCoshDiceLoss,
    "mcc": MCCLoss,
    "poly1": Poly1Loss,
    "unified_focal": UnifiedFocalLoss,
    "l1_ace": L1ACELoss,
    "cc_dice": CCDiceLoss,
    "blob": BlobLoss,
    "skeleton_recall": SkeletonRecallLoss,
    "dice_ce": DiceCELoss,
    "dice_focal": DiceFocalLoss,
    "compound": CompoundLoss,
}
# MONAI's own, by name in a config like the others.
MONAI_LOSSES: dict[str, type[nn.Module]] = {
    "hausdorff_dt": HausdorffDTLoss,
    "log_hausdorff_dt": LogHausdorffDTLoss,
}

__all__ = [
    "LOSSES",
    "MONAI_LOSSES",
    "BlobLoss",
    "BoundaryLoss",
    "CCDiceLoss",
    "CompoundLoss",
    "CrossEntropyLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "HausdorffDTLoss",
    "JaccardLoss",
    "L1ACELoss",
    "LogCoshDiceLoss",
    "LogHausdorffDTLoss",
    "MCCLoss",
    "Poly1Loss",
    "SkeletonRecallLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
]
