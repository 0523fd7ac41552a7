# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The packages that the core does without, by the extra that installs them; one line where one is missing.

The core is the losses, their sums, the distance maps and the transforms. It needs torch, MONAI, NumPy and SciPy alone.
"""

from __future__ import annotations

from importlib.util import find_spec

from monai_losses_ext.errors import UserError

# extra -> name in an import -> name in the package index, as setup.cfg has them.
EXTRAS: dict[str, dict[str, str]] = {
    "bundles": {
        "ignite": "pytorch-ignite",
        "mlflow": "mlflow",
        "nibabel": "nibabel",
        "matplotlib": "matplotlib",
        "tqdm": "tqdm",
        "fire": "fire",
        "jinja2": "jinja2",
        "yaml": "PyYAML",
    },
    "fast": {"numba": "numba"},
    "compare": {"optuna": "optuna"},
    "maps": {"skimage": "scikit-image"},
    "test": {"jsonschema": "jsonschema"},
}


class MissingPackageError(UserError, ImportError):
    """A package is not installed that an extra brings; the text says which, and the command that installs it."""


def need(what: str, extra: str, *modules: str) -> None:
    """Make sure that packages of an extra are installed. They are looked for, not imported.

    Args:
        what: what needs them, as the error names it.
        extra: the name of the extra.
        modules: names in an import, such as ``ignite``; default all of the extra's.

    Raises:
        MissingPackageError: one line with the names of the missing packages and the command that installs them.
    """
    names = EXTRAS[extra]
    missing = [names[module] for module in modules or names if not is_installed(module)]
    if missing:
        install = f'pip install "monai_losses_ext[{extra}]"'
        raise MissingPackageError(f"{what}: needs {', '.join(missing)}, not installed here; install with: {install}")


def is_installed(module: str) -> bool:
    """Tell whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # refused, or put into sys.modules by hand
        return False
