# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Dependencies point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "monai_losses_ext"
# From the top down; a room may import from those after it, and from itself.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"quickstart"},
    {"bundlekit", "benchmark"},
    {"distributed"},
    {"handlers", "engine"},
    {"transforms", "data", "metrics", "schedules"},
    {"losses"},
    {"sums", "distance"},
    {"_checks"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [node.module] if node.module != "monai_losses_ext" else [f"{node.module}.{a.name}" for a in node.names]
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "monai_losses_ext" and rest and rest[0] in LEVEL:
            assert rest[0] == room or LEVEL[rest[0]] > LEVEL[room], f"{path.name} imports {name}"
        assert top != "triton" or "triton" in path.with_suffix("").parts
        assert top != "edt" or path.name == "euclidean.py"
        assert top != "mlflow", f"{path.name} imports {top}"


def test_a_bare_name_means_monais_class_even_if_this_package_is_imported_first():
    code = (
        "import monai_losses_ext; from monai.bundle import ConfigParser;"
        "print(type(ConfigParser({'loss': {'_target_': 'DiceLoss'}}).get_parsed_content('loss')).__module__)"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "monai.losses.dice"
