# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_losses_ext.benchmark``: measure speed and memory into a JSON, write tables and pictures from it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from monai_losses_ext import _checks
from monai_losses_ext.benchmark import cuda
from monai_losses_ext.benchmark.about import about_run
from monai_losses_ext.benchmark.cases import SHAPES, loss_pairs
from monai_losses_ext.benchmark.distance import measure_compounds, measure_epoch, measure_maps
from monai_losses_ext.benchmark.losses import measure_losses
from monai_losses_ext.benchmark.memory import measure_memory
from monai_losses_ext.benchmark.quality import measure_quality
from monai_losses_ext.benchmark.report import write_report
from monai_losses_ext.benchmark.speed import measure_speed_alone
from monai_losses_ext.benchmark.step import STEP_TASKS, measure_steps
from monai_losses_ext.data.tasks import TASKS

# Losses and shapes. On a CPU where losses differ in kind; on a GPU where memory decides whether a training runs at all.
MEMORY_CASES = {
    "cpu": (("dice", "dice_ce", "dice_focal_ce"), ("2x3x96^3", "2x14x96^3")),
    "cuda": (("dice_ce",), ("1x118x128^3",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite and return the exit status: 0, or 1 with one line on stderr where it failed."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    if arguments.suite == "report":
        print(*write_report(Path()), sep="\n")
        return 0
    torch.set_num_threads(arguments.threads)
    run, _ = SUITES[arguments.suite]
    return run(arguments)


def _write(arguments: argparse.Namespace, result: dict[str, Any], default: str) -> int:
    out: Path = arguments.out or Path("docs/benchmarks") / default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(out)
    return 0


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    return about_run(arguments.device, arguments.threads, arguments.seed)


def _chosen(
    option: str, values: Sequence[str] | None, known: Collection[str], default: Collection[str] = ()
) -> list[str]:
    """Return what was asked for, of what the suite knows, or the default, or all."""
    return [_checks.one_of(option, value, known) for value in values or default or known]


def _cases(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the losses and shapes that were asked for, of those that the device's suite has."""
    device = arguments.device
    losses, shapes = (cuda.CUDA_LOSSES, cuda.CUDA_SHAPES) if device == "cuda" else (tuple(loss_pairs()), SHAPES)
    defaults: tuple[Collection[str], Collection[str]] = ((), ())
    if arguments.suite == "memory":
        losses = tuple(loss for loss in losses if loss in loss_pairs() and loss != "floor")
        defaults = MEMORY_CASES[device]
    chosen_losses = _chosen(f"--losses on {device}", arguments.losses, losses, defaults[0])
    chosen_shapes = _chosen(f"--shapes on {device}", arguments.shapes, shapes, defaults[1])
    _check_device(device)
    return chosen_losses, chosen_shapes


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this torch sees no GPU.")


def _speed(arguments: argparse.Namespace) -> int:
    """Measure time; on a GPU memory as well."""
    losses, shapes = _cases(arguments)
    if arguments.device == "cuda":
        return _write(arguments, measure_on("cuda", losses, shapes, arguments), "speed--cuda.json")
    result: dict[str, Any] = {"about": _about(arguments), "speed": []}
    for loss, shape in tqdm([(loss, shape) for shape in shapes for loss in losses], desc="speed"):
        row = measure_speed_alone(loss, shape, arguments.repeats, arguments.seed, arguments.threads)
        result["speed"].append(row)
    return _write(arguments, result, "speed--cpu.json")


def measure_on(
    device: str, losses: Sequence[str], shapes: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what ``speed--cuda.json`` holds; on a CPU all but the peaks of memory."""
    bandwidth = cuda.measure_bandwidth(device)
    about = {**_about(arguments), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    result: dict[str, Any] = {"about": about, "maps": [], "speed": []}
    rounds = (arguments.repeats, arguments.seed, device)
    if "2x3x128^3" in shapes:
        result["maps"].append(cuda.measure_maps("2x3x128^3", *rounds))
    for loss, shape in tqdm([(loss, shape) for shape in shapes for loss in losses], desc=f"speed on {device}"):
        result["speed"].append(cuda.measure_case(loss, shape, *rounds, bandwidth))
    return result


def _memory(arguments: argparse.Namespace) -> int:
    """Measure the peak of memory; on a GPU also what runs where there is little of it."""
    losses, shapes = _cases(arguments)
    result: dict[str, Any] = {"about": _about(arguments), "memory": []}
    for loss, shape in tqdm([(loss, shape) for loss in losses for shape in shapes], desc="memory"):
        if arguments.device == "cuda":
            row = cuda.measure_budget(loss, shape, arguments.memory_gib, arguments.seed, "cuda")
        else:
            row = measure_memory(loss, shape, arguments.seed)
        result["memory"].append(row)
    return _write(arguments, result, f"memory--{arguments.device}.json")


def _step(arguments: argparse.Namespace) -> int:
    """Measure the share of a training step that its loss takes."""
    tasks = _chosen("--tasks", arguments.tasks, TASKS, STEP_TASKS)
    _check_device(arguments.device)
    result: dict[str, Any] = {"about": _about(arguments), "step": []}
    for task in tqdm(tasks, desc="step"):
        result["step"] += measure_steps(task, arguments.device, arguments.repeats, arguments.seed)
    return _write(arguments, result, f"step--{arguments.device}.json")


def _distance(arguments: argparse.Namespace) -> int:
    """Measure maps by every backend, the loss's term, and, where there is data, a training's epoch."""
    shapes = [shape for shape in _chosen("--shapes on cpu", arguments.shapes, SHAPES) if shape != "16x2x512^2"]
    rows = [
        measure_maps("2x3x96^3", backend, arguments.repeats, arguments.seed)
        for backend in tqdm(("edt", "scipy"), desc="maps")
    ]
    for shape in tqdm(shapes, desc="compounds"):
        rows += measure_compounds(shape, arguments.repeats, arguments.seed)
    if arguments.dataset_dir is not None:
        rows.append(measure_epoch(arguments.dataset_dir, arguments.repeats))
    return _write(arguments, {"about": _about(arguments), "distance": rows}, "distance--cpu.json")


def _trained(arguments: argparse.Namespace) -> int:
    """Measure what trainings on real data reach."""
    if arguments.bundle is None or arguments.dataset_dir is None:
        raise ValueError(f"{arguments.suite}: needs --bundle and --dataset-dir.")
    about = _about(arguments)
    if arguments.suite == "losses":
        if arguments.folder is None:
            raise ValueError("losses: needs --folder.")
        rows = measure_losses(arguments.bundle, arguments.dataset_dir, arguments.folder, arguments.epochs)
        return _write(arguments, {"about": about, "losses": rows}, "hippocampus_losses.json")
    result = measure_quality(arguments.bundle, arguments.dataset_dir)
    result["hardware"] = f"{about['cpu']}, {about['cores']} cores"
    result["about"] = {key: about[key] for key in ("date", "commit", "python", "versions")}
    return _write(arguments, result, "hippocampus.json")


SUITES: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "speed": (_speed, "time, on cuda also memory and distance maps"),
    "memory": (_memory, "peak memory, on cuda also what runs in little of it"),
    "step": (_step, "the share of a training step that the loss takes"),
    "distance": (_distance, "what distance maps cost"),
    "quality": (_trained, "evaluate a trained bundle"),
    "losses": (_trained, "train a bundle with several losses and compare them"),
}


def _parser() -> argparse.ArgumentParser:
    suites = "; ".join(f"{name}: {text}" for name, (_, text) in SUITES.items())
    suites += "; report: write the docs' tables and pictures from the JSON"
    parser = argparse.ArgumentParser(prog="python -m monai_losses_ext.benchmark", description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "report"], help=suites)
    devices = "speed, memory, step: (default: %(default)s)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=devices)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds of a case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the batches (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", help=f"default: all of {', '.join(SHAPES)}; on cuda larger ones too")
    parser.add_argument("--losses", nargs="+", help=f"default: all of {', '.join(loss_pairs())}; on cuda others")
    parser.add_argument("--tasks", nargs="+", help=f"step: (default: {' '.join(STEP_TASKS)})")
    budget = "memory on cuda: what may be used of the GPU's (default: three times the logits)"
    parser.add_argument("--memory-gib", type=float, help=budget)
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/<suite>--<device>.json")
    parser.add_argument("--bundle", type=Path, help="quality, losses: folder of the bundle")
    parser.add_argument("--folder", type=Path, help="losses: where the trainings go")
    parser.add_argument("--epochs", type=int, default=30, help="losses: of each training (default: %(default)s)")
    parser.add_argument(
        "--dataset-dir", type=Path, help="quality, losses: the bundle's data; distance: data for an epoch"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
