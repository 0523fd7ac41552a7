# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Segmentation losses for MONAI: correct, one pass over the volume, wired into bundles."""

from __future__ import annotations

import sys
from types import ModuleType

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


def _leave_bare_names_to_monai() -> None:
    """Keep our classes from being found by a bare ``"_target_": "DiceLoss"``, which means MONAI's.

    MONAI looks for a bare name in what ``dir`` lists of every loaded module whose name starts with "monai", and warns
    where there are two. So a module that defines a name that MONAI has too does not list it. It can be imported as
    ever, and found by its full path.
    """
    modules = {name: module for name, module in list(sys.modules.items()) if isinstance(module, ModuleType)}
    theirs = {name for key, module in modules.items() if key.startswith("monai.") for name in vars(module)}
    for key, module in modules.items():
        if key.startswith(f"{__name__}."):
            shared = {name for name in theirs & vars(module).keys() if _is_defined_in(module, name)}
            listed = sorted(vars(module).keys() - shared)
            if shared:
                vars(module)["__dir__"] = lambda listed=listed: listed


def _is_defined_in(module: ModuleType, name: str) -> bool:
    return getattr(vars(module)[name], "__module__", None) == module.__name__


_leave_bare_names_to_monai()
