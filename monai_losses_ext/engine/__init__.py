# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a bundle's training and evaluation call while they run: checks of what the user gave, the config itself."""

from __future__ import annotations

from .config import RunningConfig
from .options import check_data, check_processes

__all__ = ["RunningConfig", "check_data", "check_processes"]
