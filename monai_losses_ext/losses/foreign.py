# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What is known of losses that are not of this package: their sign, and what they take their input for."""

from __future__ import annotations

from collections.abc import Callable

import monai.losses
from torch import nn

from monai_losses_ext.losses.base import VoxelLoss
from monai_losses_ext.losses.hausdorff import HausdorffDTLoss

# Losses that know no sign of their own, and are never negative for probabilities and labels, with their default alpha
# and no more smoothing above than below.
NON_NEGATIVE = (
    HausdorffDTLoss,
    monai.losses.DiceLoss,
    monai.losses.GeneralizedDiceLoss,
    monai.losses.GeneralizedWassersteinDiceLoss,
    monai.losses.DiceCELoss,
    monai.losses.DiceFocalLoss,
    monai.losses.GeneralizedDiceFocalLoss,
    monai.losses.FocalLoss,
    monai.losses.TverskyLoss,
    monai.losses.HausdorffDTLoss,
    monai.losses.SoftclDiceLoss,
    monai.losses.SoftDiceclDiceLoss,
    nn.CrossEntropyLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
)
# torch's own, which take the softmax or the sigmoid of their input without being told.
SOFTMAX, SIGMOID = (nn.CrossEntropyLoss,), (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)


def is_non_negative(loss: nn.Module) -> bool:
    """Tell whether the loss says that it is never negative, or is known to be so."""
    said = getattr(loss, "non_negative", None)
    return said if isinstance(said, bool) else isinstance(loss, NON_NEGATIVE) and not smooths_above(loss)


def smooths_above(loss: nn.Module) -> bool:
    """Tell whether an overlap loss, or one within, falls below 0 for a class that neither side holds."""
    return any(getattr(part, "smooth_nr", 0) > getattr(part, "smooth_dr", 0) for part in loss.modules())


def activation(loss: nn.Module) -> str | None:
    """Return what a loss makes probabilities with: softmax, sigmoid or none; None where that is not known.

    Losses of this package know it, MONAI's have flags for it, torch's have it fixed.
    """
    if isinstance(loss, VoxelLoss):
        return loss.activation if loss.other_act is None else _name(loss.other_act)
    if isinstance(loss, SOFTMAX):
        return "softmax"
    if isinstance(loss, SIGMOID):
        return "sigmoid"
    if not any(kind.__module__.startswith("monai.losses") for kind in type(loss).__mro__):
        return None
    other_act = getattr(loss, "other_act", None)
    if other_act is not None:
        return _name(other_act)
    if hasattr(loss, "use_softmax"):  # MONAI's focal loss: one of the two, always
        return "softmax" if loss.use_softmax else "sigmoid"
    if not hasattr(loss, "softmax") or not hasattr(loss, "sigmoid"):
        return None
    return "softmax" if loss.softmax else "sigmoid" if loss.sigmoid else "none"


def _name(other_act: Callable[..., object]) -> str:
    return f"other_act {getattr(other_act, '__name__', repr(other_act))}"
