# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Running bundles as users do, and reading what they tracked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from warm import warm_python

REPOSITORY = Path(__file__).parents[2]


def bundle_run(
    cwd: Path, configs: str, *options: str, python: tuple[str, ...] = ("-m", "monai.bundle"), store: str = ""
) -> str:
    """Run a bundle as a user does; return what it printed, or raise with it."""
    arguments = ["run", "--config_file", configs, *options]
    path = f"{REPOSITORY}{os.pathsep}{cwd}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": store}
    if len(python) == 2 and python[0] == "-m":
        done = warm_python().run(python[1], arguments, cwd, environment, timeout=300)
    else:
        command = [sys.executable, *python, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout + done.stderr


def on_path(bundle: Path) -> None:
    """Let this process use a bundle's scripts, as MONAI does when the bundle runs, and forget those of another."""
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
    sys.path.insert(1, str(bundle))


def user_error(work: Callable[[], Any]) -> str:
    """Return the one line of the error that a user gets to see of what MONAI and Ignite wrap; Python goes on."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    error: BaseException | None = caught.value
    while error is not None and not any(kind.__name__ == "UserError" for kind in type(error).__mro__):
        error = error.__cause__ or error.__context__
    if error is None:
        raise caught.value
    assert "\n" not in str(error)
    return str(error)


def only_run_folder(output: Path, kind: str = "train") -> Path:
    """Return the folder of the one run of a kind that an output folder has."""
    (folder,) = output.glob(f"{kind}_*")
    return folder


class TrackedRun:
    """A run in an MLflow store."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client, self.run = client, run

    def history(self, metric: str) -> dict[int, float]:
        """Return a metric's values by step."""
        return {m.step: m.value for m in self.client.get_metric_history(self.run.info.run_id, metric)}

    def artifacts(self) -> set[str]:
        """Return the names of the artifacts."""
        return {entry.path for entry in self.client.list_artifacts(self.run.info.run_id)}


def only_run(store: str, experiment: str = "msd_hippocampus_mri_segmentation") -> TrackedRun:
    """Return the one run that an experiment, by default the bundle's own, has in a store."""
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return TrackedRun(client, run)
