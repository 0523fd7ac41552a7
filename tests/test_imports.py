# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dependencies point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "monai_losses_ext"
# From the top down; a room may import from those after it, and from itself.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"quickstart"},
    {"bundlekit", "benchmark"},
    {"handlers", "engine"},
    {"transforms", "data", "schedules"},
    {"losses", "metrics"},
    {"distance", "maps"},
    {"sums"},
    {"arguments", "extras", "shipped", "distributed", "weights"},
    {"errors", "files", "_fallback"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
ROOT = PACKAGE / "__init__.py"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != ROOT)


def imported(source, package):
    """Return the full names that a module of a package imports; of ``from x import y`` it is ``x.y``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


# What can be had from the package itself, and its room: a public name stands for the room that it comes from.
PUBLIC = {
    name.split(".")[-1]: name.split(".")[1]
    for name in imported(ROOT.read_text(), PACKAGE.name)
    if name.startswith(f"{PACKAGE.name}.")
}


def room_of(name):
    """Return the room that a full name leads to: None outside the package, the public names' for the whole of it."""
    top, *rest = name.split(".")
    if top != PACKAGE.name:
        return None
    if rest == ["__version__"]:
        return None
    return PUBLIC.get(rest[0], rest[0]) if rest else "losses"


def test_every_module_has_a_level():
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert modules == LEVEL.keys()
    assert set(PUBLIC.values()) == {"losses"}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("from ..cli import main", ["monai_losses_ext.cli.main"]),
        ("from .. import cli, errors", ["monai_losses_ext.cli", "monai_losses_ext.errors"]),
        ("from . import dice", ["monai_losses_ext.losses.dice"]),
        ("from .dice import DiceLoss", ["monai_losses_ext.losses.dice.DiceLoss"]),
        ("from monai_losses_ext import cli", ["monai_losses_ext.cli"]),
        ("def f():\n    import monai_losses_ext.cli as c", ["monai_losses_ext.cli"]),
    ],
)
def test_relative_imports_are_seen(line, names):
    assert list(imported(line, "monai_losses_ext.losses")) == names


def test_names_lead_to_rooms():
    names = ["monai_losses_ext.DiceLoss", "monai_losses_ext", "monai_losses_ext.cli.main", "monai.losses.DiceLoss"]
    assert [room_of(name) for name in names] == ["losses", "losses", "cli", None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room, *_ = path.relative_to(PACKAGE).with_suffix("").parts
    package = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]])
    for name in imported(path.read_text(), package):
        other = room_of(name)
        assert other in (None, room) or LEVEL[other] > LEVEL[room], f"{path.name} imports {name}"
        top = name.split(".")[0]
        assert top != "triton" or "triton" in path.with_suffix("").parts
        assert top != "numba" or "numba" in path.with_suffix("").parts
        assert top != "mlflow" or path.name.startswith("mlflow_"), f"{path.name} imports {top}"


def test_a_bare_name_means_monais_class_without_a_word():
    """MONAI looks into all modules whose names begin with its own, and warns where a name has two meanings."""
    code = """
import warnings
import monai_losses_ext, monai_losses_ext.engine, monai_losses_ext.handlers, monai_losses_ext.data.bad_case
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator
warnings.simplefilter("error")
for name in ("DiceLoss", "HausdorffDTLoss"):
    assert type(ConfigParser({"x": {"_target_": name}}).get_parsed_content("x")).__module__.startswith("monai.losses.")
ours = ConfigParser({"x": {"_target_": "monai_losses_ext.DiceLoss"}}).get_parsed_content("x")
assert type(ours) is monai_losses_ext.DiceLoss
locator = ComponentLocator()
locator.get_component_module_name("")
for name, modules in locator._components_table.items():
    ours = [module for module in modules if module.startswith("monai_losses_ext")]
    assert not ours or ours == modules, (name, modules)
assert "DiceLoss" in dir(monai_losses_ext) and "DiceLoss" in dir(monai_losses_ext.losses)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
