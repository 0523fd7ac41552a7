# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_losses_ext``: see :mod:`monai_losses_ext.cli`."""

from __future__ import annotations

import sys

from monai_losses_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
