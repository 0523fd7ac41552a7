# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the bundle's configs call where an expression would be too long: plain Python, with MONAI alone.

Configs name these functions in full, as ``{"_target_": "scripts.runs.begin_run", ...}``: MONAI puts the bundle's folder
on ``sys.path`` when a workflow runs, and such a name is looked up only then. To resolve such an entry without running a
workflow, put the folder there first: ``sys.path.insert(1, "path/of/the/bundle")``.

Every bundle calls its folder ``scripts``, so each bundle needs a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import UserError


def bundle_root() -> str:
    """Return the bundle's folder, absolute.

    Raises:
        UserError: if these scripts are those of another bundle than the one that runs.
    """
    own = Path(__file__).resolve().parents[1]
    running = Path(sys.path[1]).resolve()  # where MONAI puts the bundle that runs
    if running != own and (running / "scripts" / "__init__.py").is_file():
        raise UserError(
            f"bundle: the scripts of {own} are in the way of those of {running}. Run each bundle in a process of its "
            "own, and not from within another bundle's folder."
        )
    return str(own)


def configs_folder() -> str:
    """Return the folder of the bundle's config files, absolute."""
    return str(Path(__file__).resolve().parents[1] / "configs")
