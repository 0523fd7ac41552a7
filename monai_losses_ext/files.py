# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Folders that a run writes to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def why_unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Make a folder, and return why it cannot be written to, or None where it can."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return str(error.strerror)
    return None
