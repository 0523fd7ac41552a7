# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's command line: which suite, with which options, into which file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from monai_losses_ext import errors, files
from monai_losses_ext.benchmark.about import about_run
from monai_losses_ext.benchmark.cases import SHAPES, loss_pairs
from monai_losses_ext.benchmark.purpose import PURPOSES
from monai_losses_ext.benchmark.report import write_report
from monai_losses_ext.benchmark.step import STEP_TASKS
from monai_losses_ext.benchmark.suites import SUITES

RESULTS = Path("docs", "benchmarks")  # in a checkout of the project
EVERYWHERE = ("suite", "device", "threads", "seed", "out")  # options that every suite takes
DEFAULTS = {"threads": 2, "repeats": 9, "seed": 0, "epochs": 30}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite and return the exit status: 0, or 1 with one line on stderr where it failed."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.suite == "report":
            _check_options(arguments, ())
            print(*write_report(Path()), sep="\n")
        else:
            print(_run(arguments))
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> Path:
    """Run a suite and return the file with what it measured; whatever can be wrong is found before it measures."""
    suite = SUITES[arguments.suite]
    _check_options(arguments, (*EVERYWHERE, *suite.options))
    is_short = _fill_defaults(arguments)
    devices = suite.devices or (bundles_device(),)
    arguments.device = errors.one_of(f"{arguments.suite}: --device", arguments.device or devices[0], devices)
    is_partial = suite.choose(arguments) or is_short
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this torch sees no GPU.")
    out = _output(arguments, suite.result.format(device=arguments.device), is_partial)
    torch.set_num_threads(arguments.threads)
    about = about_run(arguments.device, arguments.threads, arguments.seed)
    out.write_text(json.dumps(suite.measure(arguments, about), indent=2) + "\n")
    return out


def _check_options(arguments: argparse.Namespace, taken: Sequence[str]) -> None:
    """Refuse an option that the suite does not take."""
    for name, value in vars(arguments).items():
        if value is not None and name not in (*taken, "suite"):
            options = ", ".join(_option(name) for name in taken if name != "suite") or "none"
            raise errors.UserError(f"{arguments.suite}: takes no {_option(name)}; its options: {options}.")


def _fill_defaults(arguments: argparse.Namespace) -> bool:
    """Fill in the defaults, and tell whether fewer rounds or other epochs than these were asked for."""
    epochs, repeats = arguments.epochs, arguments.repeats
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    is_short = epochs not in (None, DEFAULTS["epochs"])
    return is_short or (repeats is not None and repeats < DEFAULTS["repeats"])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def bundles_device() -> str:
    """Return the device that a bundle takes by itself."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _output(arguments: argparse.Namespace, default: str, is_partial: bool) -> Path:
    """Return the file to write, which can be written."""
    if arguments.out is None and is_partial:
        options = ", ".join(_option(name) for name in SUITES[arguments.suite].options)
        rule = f"must be given where not all is measured as in {RESULTS / default} (by {options})"
        raise errors.UserError(f"--out: {rule}.")
    if arguments.out is None and not RESULTS.is_dir():
        raise errors.UserError(f"--out: must be given outside of a checkout of the project, which has {RESULTS}.")
    out: Path = arguments.out or RESULTS / default
    reason = files.why_unwritable(out.parent)
    if reason is None and out.exists() and (out.is_dir() or not os.access(out, os.W_OK)):
        reason = "is a folder" if out.is_dir() else "is read-only"
    if reason is not None:
        raise errors.fail("--out", f"must be a file that can be written to ({reason})", str(out))
    return out


def _parser() -> argparse.ArgumentParser:
    suites = "; ".join(f"{name}: {suite.help}" for name, suite in SUITES.items())
    suites += "; report: write the docs' tables and pictures from the JSON"
    text = "Measure speed and memory into a JSON file, write tables and pictures from it."
    parser = argparse.ArgumentParser(prog="python -m monai_losses_ext.benchmark", description=text)
    parser.add_argument("suite", choices=[*SUITES, "report"], help=suites)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="speed, memory, step: (default: cpu)")
    parser.add_argument("--threads", type=_whole(1), help=f"threads of torch (default: {DEFAULTS['threads']})")
    repeats = f"speed, step, distance: counted rounds of a case (default: {DEFAULTS['repeats']})"
    parser.add_argument("--repeats", type=_whole(2), help=repeats)
    parser.add_argument("--seed", type=int, help=f"seed of the batches (default: {DEFAULTS['seed']})")
    shapes = f"speed, memory, distance: default: all of {', '.join(SHAPES)}, or those that the suite is about"
    parser.add_argument("--shapes", nargs="+", help=shapes)
    losses = f"speed, memory: default: all of {', '.join(loss_pairs())}; on cuda others"
    parser.add_argument("--losses", nargs="+", help=losses)
    parser.add_argument("--tasks", nargs="+", help=f"step: (default: {' '.join(STEP_TASKS)})")
    budget = "memory on cuda: what may be used of the GPU's (default: three times the logits)"
    parser.add_argument("--memory-gib", type=float, help=budget)
    parser.add_argument("--out", type=Path, help=f"default, where all is measured: a file in {RESULTS}")
    parser.add_argument("--bundle", type=Path, help="quality, losses: folder of the bundle")
    folder = "losses: where the trainings go; purpose: where what is measured is kept"
    parser.add_argument("--folder", type=Path, help=folder)
    parser.add_argument("--purposes", nargs="+", help=f"purpose: default: all of {', '.join(PURPOSES)}")
    epochs = f"losses: of each training (default: {DEFAULTS['epochs']})"
    parser.add_argument("--epochs", type=_whole(1), help=epochs)
    data = "quality, losses: the bundle's data; distance: data for an epoch"
    parser.add_argument("--dataset-dir", type=Path, help=data)
    return parser


def _whole(minimum: int) -> Callable[[str], int]:
    """Return what reads a whole number of at least ``minimum`` from the command line."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}; got {text}.")
        return int(text)

    return whole_number
