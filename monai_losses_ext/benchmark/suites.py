# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmark can measure, what of it each suite lets choose, and the options that it takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from monai_losses_ext import errors
from monai_losses_ext.benchmark import cuda
from monai_losses_ext.benchmark.cases import CUDA_SHAPES, FEWER_LOSSES, SHAPES, loss_pairs
from monai_losses_ext.benchmark.conditions import CASES, CONDITION_SHAPES, measure_condition
from monai_losses_ext.benchmark.distance import measure_compounds, measure_epoch, measure_maps
from monai_losses_ext.benchmark.losses import measure_losses
from monai_losses_ext.benchmark.memory import measure_memory
from monai_losses_ext.benchmark.purpose import PURPOSES, measure_purpose
from monai_losses_ext.benchmark.quality import measure_quality
from monai_losses_ext.benchmark.speed import measure_speed_alone
from monai_losses_ext.benchmark.step import STEP_TASKS, measure_steps
from monai_losses_ext.data.tasks import TASKS

# Losses and shapes. On a CPU where losses differ in kind; on a GPU where memory decides whether a training runs at all.
MEMORY_CASES = {
    "cpu": (("dice", "dice_ce", "dice_focal_ce"), ("2x3x96^3", "2x14x96^3", "1x118x128^3")),
    "cuda": (("dice_ce",), ("1x118x128^3",)),
}
VOLUMES = ("2x3x96^3", "2x3x128^3", "2x14x96^3")  # of the distance suite
SEEDS = 3  # trainings of each row of the purpose suite
MEASURED_BUNDLE = "msd_hippocampus_mri_segmentation"  # whose results the documentation shows
Result = dict[str, Any]


def _chosen(
    option: str, values: Sequence[str] | None, known: Collection[str], default: Collection[str] = ()
) -> list[str]:
    """Return what was asked for, of what the suite knows, or the default, or all."""
    return [errors.one_of(option, value, known) for value in values or default or known]


def _choose_cases(arguments: argparse.Namespace) -> bool:
    """Settle losses and shapes, of those that the device's suite has, and tell whether some were picked."""
    is_partial, device = bool(arguments.losses or arguments.shapes), arguments.device
    losses = cuda.CUDA_LOSSES if device == "cuda" else tuple(loss_pairs())
    defaults: tuple[Collection[str], Collection[str]] = ((), CUDA_SHAPES if device == "cuda" else ())
    if arguments.suite == "memory":
        losses = tuple(loss for loss in losses if loss in loss_pairs() and loss != "floor")
        defaults = MEMORY_CASES[device]
    only = {} if arguments.losses else FEWER_LOSSES
    chosen = _chosen(f"--losses on {device}", arguments.losses, losses, defaults[0])
    arguments.shapes = _chosen("--shapes", arguments.shapes, SHAPES, defaults[1])
    arguments.cases = [
        (loss, shape) for shape in arguments.shapes for loss in chosen if loss in only.get(shape, chosen)
    ]
    return is_partial


def _choose_tasks(arguments: argparse.Namespace) -> bool:
    """Settle the tasks and tell whether some were picked."""
    is_partial = bool(arguments.tasks)
    arguments.tasks = _chosen("--tasks", arguments.tasks, TASKS, STEP_TASKS)
    return is_partial


def _choose_volumes(arguments: argparse.Namespace) -> bool:
    """Settle the shapes of volumes and tell whether some were picked, or the epoch is left out."""
    is_partial = bool(arguments.shapes) or arguments.dataset_dir is None
    arguments.shapes = _chosen("--shapes", arguments.shapes, VOLUMES)
    return is_partial


def _choose_conditions(arguments: argparse.Namespace) -> bool:
    """Settle the shapes and tell whether some were picked."""
    is_partial = bool(arguments.shapes)
    arguments.shapes = _chosen("--shapes", arguments.shapes, CONDITION_SHAPES)
    return is_partial


def _choose_purposes(arguments: argparse.Namespace) -> bool:
    """Settle the purposes and tell whether some were picked."""
    if arguments.folder is None:
        raise errors.UserError("purpose: needs --folder, which keeps the trainings that are over.")
    is_partial = bool(arguments.purposes)
    arguments.purposes = _chosen("--purposes", arguments.purposes, PURPOSES)
    return is_partial


def _choose_training(arguments: argparse.Namespace) -> bool:
    """Check that the folders of a training were given, and tell whether it is of another bundle than the docs'."""
    for option in ("bundle", "dataset_dir", *(["folder"] if arguments.suite == "losses" else [])):
        if getattr(arguments, option) is None:
            raise errors.UserError(f"{arguments.suite}: needs --{option.replace('_', '-')}.")
    return arguments.bundle.resolve().name != MEASURED_BUNDLE


def _speed(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure time; on a GPU memory as well."""
    if arguments.device == "cuda":
        return measure_on("cuda", arguments, about)
    rounds = (arguments.repeats, arguments.seed, arguments.threads)
    rows = [measure_speed_alone(loss, shape, *rounds) for loss, shape in tqdm(arguments.cases, desc="speed")]
    return {"about": about, "speed": rows}


def measure_on(device: str, arguments: argparse.Namespace, about: Result) -> Result:
    """Return what ``speed--cuda.json`` holds; on a CPU all but the peaks of memory."""
    bandwidth = cuda.measure_bandwidth(device)
    result: Result = {"about": {**about, "copy_gb_per_s": round(bandwidth / 1e9, 1)}, "maps": [], "speed": []}
    rounds = (arguments.repeats, arguments.seed, device)
    if "2x3x128^3" in arguments.shapes:
        result["maps"].append(cuda.measure_maps("2x3x128^3", *rounds))
    for loss, shape in tqdm(arguments.cases, desc=f"speed on {device}"):
        result["speed"].append(cuda.measure_case(loss, shape, *rounds, bandwidth))
    return result


def _memory(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure the peak of memory; on a GPU also what runs where there is little of it."""
    rows = []
    for loss, shape in tqdm(arguments.cases, desc="memory"):
        if arguments.device == "cuda":
            rows.append(cuda.measure_budget(loss, shape, arguments.memory_gib, arguments.seed, "cuda"))
        else:
            rows.append(measure_memory(loss, shape, arguments.seed))
    return {"about": about, "memory": rows}


def _conditions(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure the time on free cores, on loaded ones, and beside a thread of Python."""
    cases = [case for case in CASES if case[1] in arguments.shapes]
    rows = [
        measure_condition(condition, shape, threads or arguments.threads, arguments.repeats, arguments.seed)
        for condition, shape, threads in tqdm(cases, desc="conditions")
    ]
    return {"about": about, "conditions": rows}


def _step(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure the share of a training step that its loss takes."""
    rows = []
    for task in tqdm(arguments.tasks, desc="step"):
        rows += measure_steps(task, arguments.device, arguments.repeats, arguments.seed)
    return {"about": about, "step": rows}


def _distance(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure maps by every backend, the loss's term, and, where there is data, a training's epoch."""
    rounds = (arguments.repeats, arguments.seed)
    rows = [measure_maps("2x3x96^3", backend, *rounds) for backend in tqdm(("numba", "scipy"), desc="maps")]
    for shape in tqdm(arguments.shapes, desc="compounds"):
        rows += measure_compounds(shape, *rounds)
    if arguments.dataset_dir is not None:
        rows.append(measure_epoch(arguments.dataset_dir, arguments.repeats))
    return {"about": about, "distance": rows}


def _quality(arguments: argparse.Namespace, about: Result) -> Result:
    """Measure what a training on real data reached."""
    is_cpu = about["device"] == "cpu"
    return {
        **measure_quality(arguments.bundle, arguments.dataset_dir),
        "hardware": f"{about['cpu']}, {about['cores']} cores" if is_cpu else about["device"],
        "about": {key: about[key] for key in ("date", "commit", "python", "versions")},
    }


def _purpose(arguments: argparse.Namespace, about: Result) -> Result:
    """Train on phantoms, each made for one family of losses, beside Dice + CE."""
    seeds = range(arguments.seed, arguments.seed + SEEDS)
    trainings = [(name, row, seed) for seed in seeds for name in arguments.purposes for row in PURPOSES[name].rows]
    rows = [measure_purpose(name, row, seed, arguments.folder) for name, row, seed in tqdm(trainings, desc="purpose")]
    return {"about": about, "purpose": rows}


def _losses(arguments: argparse.Namespace, about: Result) -> Result:
    """Train with several losses on real data and measure what each reaches."""
    rows = measure_losses(arguments.bundle, arguments.dataset_dir, arguments.folder, arguments.epochs)
    return {"about": about, "losses": rows}


@dataclass(frozen=True)
class Suite:
    """What can be measured.

    Attributes:
        help: what it is.
        choose: settle what is measured, or raise; return whether less than all of it is.
        measure: measure it and return the result.
        result: the name of its file.
        options: the options that it takes beside ``--device``, ``--threads``, ``--seed`` and ``--out``.
        devices: where it runs, the default first; none where a bundle takes its own.
    """

    help: str
    choose: Callable[[argparse.Namespace], bool]
    measure: Callable[[argparse.Namespace, Result], Result]
    result: str
    options: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")


SUITES = {
    "speed": Suite(
        "time, on cuda also memory and distance maps",
        _choose_cases,
        _speed,
        "speed--{device}.json",
        ("losses", "shapes", "repeats"),
    ),
    "conditions": Suite(
        "time on free and on loaded cores, and beside a thread of Python",
        _choose_conditions,
        _conditions,
        "conditions--{device}.json",
        ("shapes", "repeats"),
        ("cpu",),
    ),
    "memory": Suite(
        "peak memory, on cuda also what runs in little of it",
        _choose_cases,
        _memory,
        "memory--{device}.json",
        ("losses", "shapes", "memory_gib"),
    ),
    "step": Suite(
        "the share of a training step that the loss takes",
        _choose_tasks,
        _step,
        "step--{device}.json",
        ("tasks", "repeats"),
    ),
    "distance": Suite(
        "what distance maps cost",
        _choose_volumes,
        _distance,
        "distance--{device}.json",
        ("shapes", "dataset_dir", "repeats"),
        ("cpu",),
    ),
    "purpose": Suite(
        "what each loss is for: short trainings on phantoms made for it",
        _choose_purposes,
        _purpose,
        "purpose--{device}.json",
        ("purposes", "folder"),
        ("cpu",),
    ),
    "quality": Suite(
        "evaluate a trained bundle", _choose_training, _quality, "hippocampus.json", ("bundle", "dataset_dir"), ()
    ),
    "losses": Suite(
        "train a bundle with three losses and compare them",
        _choose_training,
        _losses,
        "hippocampus_losses.json",
        ("bundle", "dataset_dir", "folder", "epochs"),
        (),
    ),
}
