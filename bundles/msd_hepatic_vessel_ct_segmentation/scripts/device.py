# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The device of a run, checked before anything is built."""

from __future__ import annotations

from typing import Any

import torch

from .errors import UserError


def check_device(device: Any) -> None:
    """Check that this machine has a device.

    Raises:
        UserError: if it has not.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device: must be cpu, cuda, cuda:0 or the like; got {str(device)!r}.") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        if (wanted.index or 0) >= count:
            has = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "none with CUDA"
            raise UserError(f"device: must be one that this machine has, which is {has}; got {str(device)!r}.")
