# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_losses_ext.benchmark``: measure speed and memory, see :mod:`monai_losses_ext.benchmark.command`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from monai_losses_ext.errors import UserError
from monai_losses_ext.extras import need


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; without the packages of its extra that is 1, with one line."""
    try:
        need("benchmark", "bundles")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from monai_losses_ext.benchmark import command  # needs the extra

    return command.main(argv)


if __name__ == "__main__":
    sys.exit(main())
