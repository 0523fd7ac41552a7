# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m monai_losses_ext.benchmark``: measure speed and memory into a JSON, write the docs' tables from it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from monai_losses_ext import _checks
from monai_losses_ext.benchmark import cuda
from monai_losses_ext.benchmark.cases import SHAPES, loss_pairs
from monai_losses_ext.benchmark.distance import measure_compounds, measure_epoch, measure_maps
from monai_losses_ext.benchmark.losses import measure_losses
from monai_losses_ext.benchmark.memory import measure_memory
from monai_losses_ext.benchmark.quality import measure_quality
from monai_losses_ext.benchmark.report import write_tables
from monai_losses_ext.benchmark.speed import measure_speed_alone

SUITES = (
    "speed: time and memory; distance: what distance maps cost; quality: evaluate a trained bundle; "
    "losses: train a bundle with several losses and compare them; "
    "report: write the docs' tables from the JSON"
)
# Memory is measured where the losses differ in kind, and at the size that matters least to noise.
MEMORY_CASES = [(loss, shape) for loss in ("dice", "dice_ce", "dice_focal_ce") for shape in ("2x3x96^3", "2x14x96^3")]


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
        print(*write_tables(Path()), sep="\n")
        return 0
    if arguments.suite in ("quality", "losses"):
        return _trained(arguments)
    torch.set_num_threads(arguments.threads)
    if arguments.suite == "distance":
        return _distance(arguments)
    if arguments.device == "cuda":
        return _cuda(arguments)
    losses, shapes = _cases(arguments, loss_pairs(), SHAPES)
    cases = [(loss, shape) for shape in shapes for loss in losses]
    result: dict[str, Any] = {"about": _about(arguments), "speed": [], "memory": []}
    for loss, shape in tqdm(cases, desc="speed"):
        row = measure_speed_alone(loss, shape, arguments.repeats, arguments.seed, arguments.threads)
        result["speed"].append(row)
    for loss, shape in tqdm(
        [case for case in MEMORY_CASES if case in cases and not arguments.no_memory], desc="memory"
    ):
        result["memory"].append(measure_memory(loss, shape, arguments.seed))
    return _write(arguments, result, "speed--cpu.json")


def _write(arguments: argparse.Namespace, result: dict[str, Any], default: str) -> int:
    out: Path = arguments.out or Path("docs/benchmarks") / default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(out)
    return 0


def _cases(arguments: argparse.Namespace, losses: Collection[str], shapes: Collection[str]) -> list[list[str]]:
    """Return the losses and shapes that were asked for, all by default, of those that the device's suite has."""
    cases = []
    for name, chosen, known in (("--losses", arguments.losses, losses), ("--shapes", arguments.shapes, shapes)):
        cases.append([_checks.one_of(f"{name} on {arguments.device}", value, known) for value in chosen or known])
    return cases


def _cuda(arguments: argparse.Namespace) -> int:
    """Measure time and memory on the GPU."""
    losses, shapes = _cases(arguments, cuda.CUDA_LOSSES, cuda.CUDA_SHAPES)
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this torch sees no GPU.")
    if arguments.memory_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory_gib * 2**30 / total))
    return _write(arguments, measure_on("cuda", losses, shapes, arguments), "speed--cuda.json")


def measure_on(
    device: str, losses: Sequence[str], shapes: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what ``speed--cuda.json`` holds; on a CPU all but the peaks of memory."""
    bandwidth = cuda.measure_bandwidth(device)
    about = {**_about(arguments), "memory_gib": arguments.memory_gib, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    if device == "cuda":
        about |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": version("triton")}
    result: dict[str, Any] = {"about": about, "maps": [], "speed": []}
    rounds = (arguments.repeats, arguments.seed, device)
    if "2x3x128^3" in shapes:
        result["maps"].append(cuda.measure_maps("2x3x128^3", *rounds))
    for loss, shape in tqdm([(loss, shape) for shape in shapes for loss in losses], desc=f"speed on {device}"):
        result["speed"].append(cuda.measure_case(loss, shape, *rounds, bandwidth))
    return result


def _distance(arguments: argparse.Namespace) -> int:
    """Measure maps by every backend, the loss's term, and, where there is data, a training's epoch."""
    rows = [
        measure_maps("2x3x96^3", backend, arguments.repeats, arguments.seed)
        for backend in tqdm(("edt", "scipy"), desc="maps")
    ]
    shapes = [shape for shape in _cases(arguments, loss_pairs(), SHAPES)[1] if shape != "16x2x512^2"]
    for shape in tqdm(shapes, desc="compounds"):
        rows += measure_compounds(shape, arguments.repeats, arguments.seed)
    if arguments.dataset_dir is not None:
        rows.append(measure_epoch(arguments.dataset_dir, arguments.repeats))
    return _write(arguments, {"about": _about(arguments), "distance": rows}, "distance--cpu.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m monai_losses_ext.benchmark", description=__doc__)
    parser.add_argument("suite", choices=["speed", "distance", "report", "quality", "losses"], help=SUITES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="speed: (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds of a case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the batches (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", help=f"default: all of {', '.join(SHAPES)}; on cuda larger ones too")
    parser.add_argument("--losses", nargs="+", help=f"default: all of {', '.join(loss_pairs())}; on cuda others")
    parser.add_argument("--memory-gib", type=float, help="speed on cuda: as if the GPU had no more than this")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/<suite>--<device>.json")
    parser.add_argument("--bundle", type=Path, help="quality, losses: folder of the bundle")
    parser.add_argument("--folder", type=Path, help="losses: where the trainings go")
    parser.add_argument("--epochs", type=int, default=30, help="losses: of each training (default: %(default)s)")
    parser.add_argument(
        "--dataset-dir", type=Path, help="quality, losses: the bundle's data; distance: data for an epoch"
    )
    return parser


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


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader needs to judge the numbers."""
    head = subprocess.run(["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True)  # noqa: S607
    models = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": head.stdout.strip(),
        "command": "python -m monai_losses_ext.benchmark " + " ".join(map(_without_folder, sys.argv[1:])),
        "device": "cpu",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[0], 2),
        "seed": arguments.seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "huge_pages_for_tensors": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "monai", "numpy")},
    }


def _without_folder(argument: str) -> str:
    """Return an argument of the command line with the folders of this machine left out."""
    return f"DIR/{Path(argument).name}" if Path(argument).is_absolute() else argument


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    raise SystemExit(main())
