# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the bundles and the overlays are: beside the package in a checkout, inside of it once it is installed.

The one source of both are the folders ``bundles/`` and ``configs/`` of the repository; ``setup.py`` copies them into a
wheel.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from monai_losses_ext.errors import UserError, fail, one_of

PACKAGE = Path(__file__).parent
# What trainings and users leave in a bundle: names of files and folders that are not of the template.
OF_RUNS = ("*.pt", "*.ts", "data", "output", "eval", "__pycache__")


def shipped_folder(name: str) -> Path:
    """Return the folder ``bundles`` or ``configs``.

    Raises:
        UserError: where the package was copied by hand, without either.
    """
    for folder in (PACKAGE / "_shipped" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"{name}: not found beside {PACKAGE} nor in it; install the package with pip, or use a checkout.")


def bundle_names() -> list[str]:
    """Return the names of the bundles, in alphabetical order."""
    return sorted(path.parents[1].name for path in shipped_folder("bundles").glob("*/configs/metadata.json"))


def copy_bundle(name: str, out: str | Path = ".", aliases: Mapping[str, str] | None = None) -> Path:
    """Copy a bundle to a folder of the user's, where it can be edited and trained.

    Args:
        name: name of the bundle.
        out: the folder in which the bundle's own is made.
        aliases: other names -> names of bundles, such as those of the tasks.

    Returns:
        The bundle's new folder.

    Raises:
        UserError: for an unknown name, with the nearest one, or where there is such a folder already.
        OSError: where it cannot be written.
    """
    known = bundle_names()
    name = one_of("bundle", (aliases or {}).get(name, name), known)
    target = Path(out).expanduser().absolute() / name
    if target.exists():
        raise fail("out", f"must not hold {name} yet, since nothing is overwritten", str(target.parent))
    source = shipped_folder("bundles") / name
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns(*OF_RUNS)))


def overlay_notes() -> dict[str, str]:
    """Return the overlays' names, relative to the folder ``configs``, and what each says of itself."""
    root = shipped_folder("configs")
    notes = {}
    for path in sorted(root.rglob("*.json")):
        if not path.name.endswith(".schema.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            notes[path.relative_to(root).as_posix()] = content.get("_note_", "")
    return notes


@contextlib.contextmanager
def own_scripts(bundle: Path) -> Iterator[None]:
    """Let this process use a bundle's scripts meanwhile: every bundle calls its folder ``scripts``."""
    path, hook = sys.path[:], sys.excepthook
    _forget_scripts()
    sys.path.insert(1, str(bundle))
    try:
        yield
    finally:
        sys.path[:], sys.excepthook = path, hook
        _forget_scripts()


def _forget_scripts() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
