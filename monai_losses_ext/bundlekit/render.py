# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Write what is generated, and check that what is on disk is what would be written.

The bundles come from the template and the tasks' rows, the overlays of the losses, their schema and README's table from
the losses. Nothing of it is edited by hand: a change goes into its source, and ``render`` follows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai.apps import DecathlonDataset

from monai_losses_ext.bundlekit.memory import training_memory_gb
from monai_losses_ext.bundlekit.overlays import CONFIGS, generated_configs, with_losses
from monai_losses_ext.data.tasks import Task, read_tasks
from monai_losses_ext.errors import UserError, fail
from monai_losses_ext.extras import need
from monai_losses_ext.files import why_unwritable
from monai_losses_ext.shipped import OF_RUNS

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATE = Path(__file__).with_name("template")
RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"  # in the project's checkout, the one place with bundles


def render_task(task: Task) -> dict[str, str]:
    """Return the files of one task's bundle.

    Args:
        task: the row of facts.

    Returns:
        Path inside ``bundles/`` -> content.
    """
    environment = _environment()
    context = {"task": task, "results": measured_results(task), "msd": is_decathlon(task)}
    files = {}
    for path in sorted(TEMPLATE.rglob("*")):
        name = path.relative_to(TEMPLATE).as_posix()
        if path.is_dir() or name == "macros.j2" or any(map(_of_runs, path.relative_to(TEMPLATE).parts)):
            continue
        text = environment.get_template(name).render(context) if path.suffix == ".j2" else path.read_text("utf-8")
        name = name.removesuffix(".j2")
        files[f"{task.bundle}/{name}"] = pretty_json(text) if name.endswith(".json") else text
    return files


def render(out: str | Path = "bundles") -> list[Path]:
    """Write every task's bundle, and what is generated of the overlays and of README beside the bundles' folder.

    Args:
        out: folder of the bundles. Files in it that are not of the template, such as trained weights, are left alone.
            The overlays go to ``configs`` beside it, the table of the losses between its marks in a ``README.md``
            beside it.

    Returns:
        The files written.

    Raises:
        UserError: outside a checkout of the project, or without the packages of the extra ``bundles``.
    """
    out = Path(out).expanduser()
    files = _all_files(out)  # refuses what is no checkout, before anything is made
    if reason := why_unwritable(out):
        raise UserError(f"out: must be a folder that can be written to ({reason}); got {out}.")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return list(files)


def check(out: str | Path = "bundles") -> list[str]:
    """Compare what is on disk with what :func:`render` would write, byte for byte.

    Args:
        out: folder of the bundles.

    Returns:
        One line per file that differs, is absent or is not of the template; nothing if all is well. What trainings and
        users leave in a bundle (``OF_RUNS``) is passed over.

    Raises:
        UserError: for a folder without any of the bundles, outside a checkout of the project, or without the packages
            of the extra ``bundles``.
    """
    files = _all_files(Path(out))
    if not any((Path(out) / task.bundle).is_dir() for task in read_tasks().values()):
        raise fail("out", "must hold the bundles (write them with bundles render)", str(out))
    problems = []
    for path, text in files.items():
        if not path.is_file():
            problems.append(f"{path}: absent")
        elif path.read_bytes() != text.encode("utf-8"):
            problems.append(f"{path}: differs from the template")
    found = [*_found(Path(out)), *_found(Path(out).parent / CONFIGS / "losses")]
    return problems + [f"{path}: not of the template" for path in found if path not in files]


def _found(out: Path) -> Iterator[Path]:
    """Give the files in a folder, but those of runs."""
    for folder, folders, names in os.walk(out):
        folders[:] = sorted(name for name in folders if not _of_runs(name))  # into these the walk does not go
        yield from (Path(folder) / name for name in sorted(names) if not _of_runs(name))


def _of_runs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in OF_RUNS)


def measured_results(task: Task) -> dict[str, Any] | None:
    """Return what was measured on the task's real data, or None before that.

    It stands in ``docs/benchmarks/<organ>.json``: ``command``, ``hardware``, ``minutes``, ``n_training``,
    ``n_validation``, ``about`` with the ``date`` and ``commit`` of the measurement, and ``metrics``: for each class,
    and for ``mean``, its ``dice``, ``nsd`` and ``hd95`` in mm.
    """
    path = RESULTS / f"{task.name.split('_')[-1].lower()}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_decathlon(task: Task) -> bool:
    """Tell by its name whether a row is one of the Decathlon's: what is said of that must not be said of other data."""
    return task.name in DecathlonDataset.resource


def mirrors(axes: Sequence[int]) -> list[list[int]]:
    """Return every set of the spatial ``axes``, the empty one first, as axes of a tensor of shape [B, C, *S]."""
    return [[2 + axis for axis in some] for n in range(len(axes) + 1) for some in combinations(axes, n)]


def cache_gb(task: Task) -> int:
    """Return about what the cases to train on take on disk: float32 images and one byte of label per voxel."""
    return math.ceil(0.8 * task.n_training * _voxels(task) * (4 * len(task.channels) + 1) / 1e9)


def map_gib(task: Task) -> float:
    """Return what the distance maps of a typical case take, in GiB: one float32 per voxel and class, uncropped."""
    return _voxels(task) * 4 * len(task.labels) / 2**30


def _voxels(task: Task) -> float:
    """Return the number of voxels of a typical case as it is trained on."""
    stored = task.typical_spacing_mm
    spacing = task.training.spacing_mm or stored
    return math.prod(n * mm / new for n, mm, new in zip(task.typical_shape, stored, spacing, strict=True))


def pretty_json(text: str) -> str:
    """Return JSON as the bundles have it: four spaces, the keys in the template's order."""
    return json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"


@cache
def _environment() -> Environment:
    """Return what reads the templates; kept, because compiling them takes longer than all ten renderings."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # of an extra

    environment = Environment(  # noqa: S701 - writes JSON and Markdown, where HTML's escapes would be wrong
        loader=FileSystemLoader(TEMPLATE), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of the row; jinja2 would sort the keys
    environment.filters["by_index"] = lambda names: {str(i): name for i, name in enumerate(names)}
    environment.filters["mirrors"] = mirrors
    environment.filters["cache_gb"] = cache_gb
    environment.filters["memory_gb"] = lambda training: round(training_memory_gb(training), 1)
    environment.filters["map_gib"] = map_gib
    return environment


def _all_files(out: Path) -> dict[Path, str]:
    """Return all that is rendered, by its place."""
    if not RESULTS.is_dir():  # as in an installed package: every README would say that nothing was measured
        rule = "must be rendered and checked in a checkout of the project, which has what was measured"
        raise fail("bundles", rule, f"no {RESULTS}")
    need("bundles", "bundles", "jinja2")
    files = {out / name: text for task in read_tasks().values() for name, text in render_task(task).items()}
    files |= {out.parent / CONFIGS / name: text for name, text in generated_configs().items()}
    readme = out.parent / "README.md"
    if readme.is_file():
        files[readme] = with_losses(readme.read_text(encoding="utf-8"))
    return files
