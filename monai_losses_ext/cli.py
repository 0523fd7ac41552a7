# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m monai_losses_ext <command>``. Thin: every command calls one function of the package."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from monai_losses_ext import __version__, shipped
from monai_losses_ext.benchmark.__main__ import main as benchmark
from monai_losses_ext.data.tasks import TASKS, get_task
from monai_losses_ext.errors import UserError, fail
from monai_losses_ext.extras import need
from monai_losses_ext.files import why_unwritable
from monai_losses_ext.quickstart import CASES, EPOCHS, quickstart

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# What needs the packages of an extra is imported by the command that uses it, so that the others work without.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        Exit status: 0; 1 if the command failed, with one line on stderr; argparse itself exits with 2 on wrong usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["benchmark"]:  # has its own options, which argparse must not touch
        return benchmark(argv[1:])
    try:
        arguments = _parser().parse_args(argv)
        if arguments.extra:
            need(arguments.needs, arguments.extra)
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m monai_losses_ext",
        description="Segmentation losses for MONAI, and bundles that train with them.",
    )
    parser.add_argument("--version", action="version", version=f"monai_losses_ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_quickstart(commands)
    _add_data(commands)
    _add_bundles(commands)
    text = "Print the folder of the overlays, then a line per overlay: its name in that folder, and what it does."
    overlays = commands.add_parser("overlays", help="say where the overlays are, and what each does", description=text)
    overlays.set_defaults(command=_overlays, extra="")
    text = "Send MLflow what a training or an evaluation that is over could not tell it, and how the run ended."
    send = commands.add_parser("send_metrics", help="send MLflow what waits in a run's folder", description=text)
    send.add_argument("folder", metavar="RUN_FOLDER", help="the run's folder, output/NAME")
    send.add_argument("--tracking_uri", metavar="URI", help="store to send it to (default: that of the run)")
    send.set_defaults(command=_send_metrics, extra="bundles", needs="send_metrics")
    commands.add_parser("benchmark", help="measure losses; takes the options of python -m monai_losses_ext.benchmark")
    return parser


def _add_quickstart(commands: Commands) -> None:
    text = (
        "Train the hippocampus bundle on synthetic cases, evaluate it on cases that were held out, and say where the "
        "pictures, the table and the MLflow store are. Needs no data and takes a few minutes on a CPU."
    )
    parser = commands.add_parser("quickstart", help="see it all work once, on synthetic cases", description=text)
    parser.add_argument("--out", metavar="DIR", help="where to write (default: a folder in your cache)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="length of the training (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=CASES, help="number of synthetic cases (default: %(default)s)")
    parser.add_argument("--bundles", metavar="DIR", help="folder of the bundles (default: those of the package)")
    parser.set_defaults(command=_quickstart, extra="bundles", needs="quickstart")


def _add_data(commands: Commands) -> None:
    parser = commands.add_parser("data", help="get and check datasets", description="Get and check datasets.")
    actions = parser.add_subparsers(required=True, metavar="action")
    text = "Write synthetic cases of a task, with dataset.json, imagesTr/ and labelsTr/ as the Decathlon has them."
    parser = actions.add_parser("phantoms", help="write synthetic cases of a task", description=text)
    parser.add_argument("--task", required=True, help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; it is made if absent")
    parser.add_argument("--cases", type=int, default=40, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="below 1 for miniatures: share of the voxels per axis (default: 1)"
    )
    parser.set_defaults(command=_phantoms, extra="bundles", needs="data phantoms")
    text = "Read every case of a dataset and list what would break a training; exit status 1 if there is anything."
    parser = actions.add_parser("check", help="find what would break a training", description=text)
    _add_dataset(parser)
    parser.set_defaults(command=_check_data, extra="bundles", needs="data check")
    text = (
        "Count the voxels of each class in the training labels, each class in the cases that were annotated for it, "
        "print the shares, and keep them for losses with the class weights 'balanced'."
    )
    parser = actions.add_parser("statistics", help="count the voxels of each class", description=text)
    _add_dataset(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: statistics.json in the dataset's folder)"
    )
    parser.set_defaults(command=_statistics, extra="bundles", needs="data statistics")
    text = "Fetch a task of the Medical Segmentation Decathlon and unpack it to DIR/TASK; what is there is kept."
    parser = actions.add_parser("download", help="fetch a task of the Decathlon", description=text)
    parser.add_argument("--task", required=True, help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; it is made if absent")
    parser.set_defaults(command=_download, extra="bundles", needs="data download")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a dataset is and what its labels mean."""
    parser.add_argument("--task", help="task of the Decathlon whose row counts (default: what dataset.json tells)")
    parser.add_argument("--dataset_dir", required=True, metavar="DIR", help="folder with dataset.json")
    parser.add_argument(
        "--ignore_label",
        type=int,
        nargs="+",
        metavar="N",
        help="values of voxels that nobody labeled, as in the bundle",
    )
    parser.add_argument(
        "--label_map", metavar="JSON", help="classes of the values in the label files, as in the bundle: '{\"17\": 1}'"
    )


def _add_bundles(commands: Commands) -> None:
    parser = commands.add_parser("bundles", help="list, copy, render, check or verify the bundles")
    actions = parser.add_subparsers(required=True, metavar="action")
    text = "Copy a bundle to DIR/NAME, to edit and train it there; without a name, list the names. Overwrites nothing."
    copy = actions.add_parser("copy", help="copy a bundle to a folder of yours", description=text)
    copy.add_argument("name", nargs="?", metavar="NAME", help="name of a bundle, or of its task")
    copy.add_argument("--out", default=".", metavar="DIR", help="where the bundle's folder goes (default: here)")
    copy.set_defaults(command=_copy, extra="")
    text = "Write all bundles from the template and the tasks' rows, and, beside their folder, what is generated of "
    text += "configs/ and README.md. For contributors, in a checkout."
    render = actions.add_parser("render", help="write the bundles and the overlays of the losses", description=text)
    check = actions.add_parser("check", help="fail if a file differs from what render would write")
    text = (
        "Check the bundles as the MONAI model zoo does, offline, and run each in miniature: training, evaluation, "
        "inference, TorchScript. Says which ones are zoo-ready."
    )
    verify = actions.add_parser(
        "verify", help="check the bundles as the model zoo does, and run them", description=text
    )
    verify.add_argument("--task", nargs="+", default=list(TASKS), metavar="TASK", help="tasks (default: all)")
    for action, command in ((render, _render), (check, _check), (verify, _verify)):
        action.add_argument(
            "--out", default="bundles", metavar="DIR", help="folder of the bundles (default: %(default)s)"
        )
        name = action.prog.split()[-1]
        action.set_defaults(command=command, extra="bundles", needs=f"bundles {name}")


def _writable(folder: str) -> str:
    """Return a folder to write to, which is made, or raise a UserError."""
    folder = os.path.expanduser(folder)
    if reason := why_unwritable(folder):
        raise UserError(f"out: must be a folder that can be written to ({reason}); got {folder}.")
    return folder


def _quickstart(arguments: argparse.Namespace) -> int:
    quickstart(arguments.out, arguments.epochs, arguments.cases, arguments.bundles)
    return 0


def _overlays(_: argparse.Namespace) -> int:
    notes = shipped.overlay_notes()
    print(shipped.shipped_folder("configs"))
    for name, note in notes.items():
        print(f"{name:{max(map(len, notes))}}  {note}")
    return 0


def _send_metrics(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.handlers.mlflow_send import send_metrics

    sent = send_metrics(arguments.folder, arguments.tracking_uri)
    print(f"sent {sent} entries to MLflow" if sent else f"nothing waits for MLflow in {arguments.folder}")
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        print(*shipped.bundle_names(), sep="\n")
        return 0
    aliases = {task.name: task.bundle for task in TASKS.values()}
    bundle = shipped.copy_bundle(arguments.name, _writable(arguments.out), aliases)
    print(bundle)
    return 0


def _phantoms(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.data.phantoms import make_phantoms

    task = get_task(arguments.task)
    folder = make_phantoms(task, _writable(arguments.out), arguments.cases, arguments.seed, arguments.scale)
    print(f"{arguments.cases} synthetic cases of {arguments.task} (seed {arguments.seed}), not medical data: {folder}")
    return 0


def _check_data(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.data.check import check_dataset

    label_map = _label_map(arguments.label_map)
    report = check_dataset(arguments.dataset_dir, arguments.task, True, arguments.ignore_label, label_map)
    if report.problems:
        print("\n".join([report.table(), *report.warnings()]))
        cases = len({problem.case for problem in report.problems if problem.case})
        raise UserError(
            f"dataset_dir: {arguments.dataset_dir}: {len(report.problems)} problems in {cases} of {len(report.cases)} "
            "cases, listed above"
        )
    print(report.summary())
    return 0


def _statistics(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.data.statistics import FILE, dataset_statistics, statistics_table, write_statistics

    label_map = _label_map(arguments.label_map)
    folder = os.path.expanduser(arguments.dataset_dir)
    statistics = dataset_statistics(folder, arguments.task, arguments.ignore_label, label_map, progress=True)
    out = os.path.expanduser(arguments.out) if arguments.out else os.path.join(folder, FILE)
    print(statistics_table(statistics))
    write_statistics(statistics, out)
    print(out)
    return 0


def _label_map(text: str | None) -> dict[str, int] | None:
    """Return the label map that was typed as JSON, or as Python with its single quotes."""
    if text is None:
        return None
    try:
        return dict(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError):
        raise fail("label_map", 'must be JSON, as {"17": 1, "53": 2}', text) from None


def _download(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.data.download import download

    print(f"complete: {download(arguments.task, arguments.out)}")
    return 0


def _render(arguments: argparse.Namespace) -> int:
    from monai_losses_ext import bundlekit

    for path in bundlekit.render(arguments.out):
        print(path)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from monai_losses_ext import bundlekit

    problems = bundlekit.check(arguments.out)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    from monai_losses_ext.bundlekit.verify import header, row, verify

    tasks = [get_task(name) for name in arguments.task]
    print(header(), flush=True)
    problems = []
    for report in verify(tasks, arguments.out):
        print(row(report), flush=True)
        problems += report.lines
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
