# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Check bundles as the MONAI model zoo does, and run them: training, evaluation and inference in miniature.

The runs take place in a temporary copy of the bundle, on phantoms with the task's channels, labels and voxel size but
few voxels, with the smallest patch and few filters. All share this process; each has its bundle's scripts.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export

from monai_losses_ext.bundlekit import zoo
from monai_losses_ext.data.phantoms import LEAST_VOXELS, make_phantoms
from monai_losses_ext.data.tasks import Task
from monai_losses_ext.errors import fail
from monai_losses_ext.shipped import OF_RUNS, own_scripts

N_CASES = 3  # two to train on, one to validate with
SCALE = 1e-3  # of the phantoms: it leaves LEAST_VOXELS per axis
RUN = "training"  # name of the run in miniature
FEW_FILTERS = 8  # divisible by the groups of a group norm
WEIGHTS = Path("models") / "model.pt"
LEAST_DICE = 0.5  # mean over the classes: below, a network has not learned the task
STATIC = {
    "files": zoo.check_files,
    "metadata": zoo.check_metadata,
    "references": zoo.check_references,
    "network": zoo.check_network,
}
TRIALS = ("properties", "train", "evaluate", "infer", "torchscript")  # methods of _Trial
CHECKS = (*STATIC, *TRIALS)


@dataclass
class Report:
    """What was found for one bundle: the problems and the seconds of each check, in the order in which they ran."""

    bundle: str
    lacking: str  # why the bundle's weights are nothing to publish, or ""
    problems: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """One line per problem."""
        return [f"{self.bundle}: {name}: {line}" for name, found in self.problems.items() for line in found]

    @property
    def verdict(self) -> str:
        """Whether the model zoo would take the bundle, and why not."""
        failed = [name for name, found in self.problems.items() if found]
        if failed:
            return f"not zoo-ready: {', '.join(failed)} failed"
        return f"not zoo-ready: {self.lacking}" if self.lacking else "zoo-ready"


def verify(tasks: Iterable[Task], bundles: str | Path = "bundles") -> Iterator[Report]:
    """Check the bundles of tasks, one after another; see :func:`verify_bundle`."""
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            yield verify_bundle(task, bundles, scratch)


def verify_bundle(task: Task, bundles: str | Path, scratch: str | Path) -> Report:
    """Check one task's bundle, and run it in miniature.

    Args:
        task: the row.
        bundles: folder that holds the bundle; nothing in it is changed.
        scratch: folder for the bundle's copy, the phantoms and the MLflow store. Bundles that share it share the store,
            whose making takes seconds.

    Returns:
        The problems found, by check.

    Raises:
        ValueError: if the folder does not hold the bundle.
    """
    bundle = Path(bundles).expanduser().absolute() / task.bundle
    if not bundle.is_dir():
        raise fail("out", f"must hold the bundles (write them with bundles render), {task.bundle} too", str(bundles))
    report = Report(bundle.name, lacking(bundle))
    with own_scripts(bundle):
        for name, check in STATIC.items():
            _run(report, name, partial(check, bundle))
    trial = _Trial(task, bundle, Path(scratch))
    with own_scripts(trial.root):
        for name in TRIALS:
            _run(report, name, getattr(trial, name))
    return report


def lacking(bundle: Path) -> str:
    """Say why a bundle's weights are nothing to publish: there are none, they were not evaluated, or they are poor.

    ``metadata.json`` records an evaluation: its ``eval_metrics``, with the mean ``dice``, and in ``weights_sha256`` of
    which weights it is.

    Returns:
        The reason, or "" for weights with a recorded mean Dice of at least ``LEAST_DICE``.
    """
    if not (bundle / WEIGHTS).is_file():
        return "no trained weights"
    try:
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        dice, of_weights = float(metadata["eval_metrics"]["dice"]), metadata["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return "metadata.json records no evaluation of the weights"
    if of_weights != hashlib.sha256((bundle / WEIGHTS).read_bytes()).hexdigest():
        return "the evaluation that metadata.json records is of other weights"
    return "" if dice >= LEAST_DICE else f"the weights' mean Dice of {dice:.3f} is below {LEAST_DICE}"


def header() -> str:
    """Return the head of the table whose rows :func:`row` returns."""
    return _line("bundle", CHECKS, "seconds", "")


def row(report: Report) -> str:
    """Return a report as a row of text: each check's outcome and seconds, all seconds, the verdict."""
    cells = [f"{'failed' if report.problems[name] else 'ok'} {report.seconds[name]:.1f}" for name in CHECKS]
    return _line(report.bundle, cells, f"{sum(report.seconds.values()):.1f}", report.verdict)


def _line(bundle: str, cells: Iterable[str], seconds: str, verdict: str) -> str:
    return f"{bundle:40}{''.join(f'{cell:13}' for cell in cells)}{seconds:9}{verdict}".rstrip()


def _run(report: Report, name: str, check: Callable[[], Iterator[str]]) -> None:
    """Run one check, quietly; what it raises is a problem too."""
    start = time.perf_counter()
    logging.disable(logging.WARNING)  # MONAI tells what it does
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = list(check())
        except Exception as error:
            found = [_reason(error)]
        finally:
            logging.disable(logging.NOTSET)
    report.problems[name], report.seconds[name] = found, time.perf_counter() - start


def _reason(error: BaseException) -> str:
    """Return the first line of the error that MONAI's own errors wrap."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).strip().splitlines()), "")
    of_user = any(kind.__name__ == "UserError" for kind in type(error).__mro__)  # ours, or the scripts'
    return text if of_user else f"{type(error).__name__}: {text}"


class _Trial:
    """A copy of a bundle, run in miniature. Each method is a check."""

    def __init__(self, task: Task, bundle: Path, scratch: Path) -> None:
        self.task, self.bundle = task, bundle
        self.root, self.data = scratch / bundle.name, scratch / task.name
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(bundle, self.root, ignore=shutil.ignore_patterns(*OF_RUNS))
        (self.root / "models").mkdir(exist_ok=True)
        make_phantoms(task, self.data, N_CASES, scale=SCALE)
        network = task.training.network_def
        if "filters" in network:
            network = {**network, "filters": [FEW_FILTERS] * len(network["filters"])}
        self.patch = zoo.small_patch(network, task.training.patch_size, LEAST_VOXELS)
        self.overrides = {
            "network_def": network,
            "patch_size": list(self.patch),
            "dataset_dir": str(self.data),
            "tracking_uri": f"sqlite:///{scratch}/mlruns.db",
        }

    def properties(self) -> Iterator[str]:
        for name in ("train", "evaluate", "inference"):
            workflow = self._workflow(name, is_not_rank0=True)  # which writes nothing
            for missing in workflow.check_properties() or ():
                yield f"{name}: MONAI's workflow property {missing!r} is missing"

    def train(self) -> Iterator[str]:
        workflow = self._finished("train", epochs=1, val_interval=1, run_name=RUN)
        loss = workflow.trainer.state.metrics["loss"]
        if not math.isfinite(loss):
            yield f"the loss is {loss}"
        for name in ("model.pt", "model_final.pt"):
            if not (self.root / "output" / RUN / name).is_file():
                yield f"no {name} was written into the run's folder"

    def evaluate(self) -> Iterator[str]:
        self._need_weights()
        self._finished("evaluate", run_name="evaluation", ckpt_path=str(self.root / WEIGHTS))
        with open(self.root / "output" / "evaluation" / "evaluation.csv", newline="") as file:
            reported = {row["class"] for row in csv.DictReader(file)}
        for label in self.task.labels[1:]:
            if label not in reported:
                yield f"evaluation.csv has no {label!r}"

    def infer(self) -> Iterator[str]:
        self._need_weights()
        images = sorted((self.data / "imagesTr").glob("*.nii.gz"))
        self._finished("inference", dataset_dir=str(self.data / "imagesTr"), ckpt_path=str(self.root / WEIGHTS))
        for path in images:
            name = path.name.replace(".nii.gz", "_seg.nii.gz")
            image, label = nib.load(path), nib.load(self.root / "output" / "predictions" / name)
            if label.shape != image.shape[:3] or not np.allclose(label.affine, image.affine, atol=1e-4):
                yield f"{name} does not lie on its image: {label.shape}, {image.shape[:3]}"
            if not set(np.unique(label.dataobj)) <= set(range(len(self.task.labels))):
                yield f"{name} has labels that the task has not"

    def torchscript(self) -> Iterator[str]:
        self._need_weights()
        config, weights = str(self.root / "configs" / "inference.json"), self.root / WEIGHTS
        overrides = {"network_def": self.overrides["network_def"]}
        if (self.bundle / WEIGHTS).is_file():  # the real thing: the row's own network
            weights, overrides = self.bundle / WEIGHTS, {}
            parser = ConfigParser(ConfigParser.load_config_file(config))
            scripts = importlib.import_module("scripts.weights")  # the bundle's own
            scripts.check_weights(str(weights), parser.get_parsed_content("network_def"))
        ckpt_export(
            filepath=str(self.root / "models" / "model.ts"),
            ckpt_file=str(weights),
            meta_file=str(self.root / "configs" / "metadata.json"),
            config_file=config,
            input_shape=[1, len(self.task.channels), *self.patch],
            converter_kwargs={"verify": True, "rtol": 1e-3, "atol": 1e-4},  # compares what both networks give
            **overrides,
        )
        yield from ()

    def _need_weights(self) -> None:
        """Take the training's weights, or make some if it left none: its failure is not that of all that follows."""
        if (self.root / "output" / RUN / WEIGHTS.name).is_file():
            shutil.copy(self.root / "output" / RUN / WEIGHTS.name, self.root / WEIGHTS)
        elif not (self.root / WEIGHTS).is_file():
            parser = ConfigParser({"network": self.overrides["network_def"]})
            torch.save(parser.get_parsed_content("network").state_dict(), self.root / WEIGHTS)

    def _workflow(self, name: str, **overrides: Any) -> ConfigWorkflow:
        kind = "infer" if name == "inference" else "train"
        files = zoo.config_files(self.root, name)
        workflow = ConfigWorkflow(files, workflow_type=kind, logging_file=False, **{**self.overrides, **overrides})
        workflow.initialize()
        return workflow

    def _finished(self, name: str, **overrides: Any) -> ConfigWorkflow:
        workflow = self._workflow(name, **overrides)
        elsewhere = os.environ.pop("MLFLOW_TRACKING_URI", None)  # the user's store, which would get these runs
        try:
            workflow.run()
        finally:
            if elsewhere is not None:
                os.environ["MLFLOW_TRACKING_URI"] = elsewhere
        workflow.finalize()
        return workflow
