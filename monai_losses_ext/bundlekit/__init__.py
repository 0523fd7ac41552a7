# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The MONAI bundles of the Decathlon's tasks: one template, one row of facts per task."""

from __future__ import annotations

from .render import check, render

__all__ = ["check", "render"]
