# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Running bundles as users do, and reading what they tracked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

REPOSITORY = Path(__file__).parents[2]


def bundle_run(
    cwd: Path, configs: str, *options: str, python: tuple[str, ...] = ("-m", "monai.bundle"), store: str = ""
) -> str:
    """Run a bundle as a user does; return what it printed, or raise with it."""
    command = [sys.executable, *python, "run", "--config_file", configs, *options]
    path = f"{REPOSITORY}{os.pathsep}{cwd}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout + done.stderr


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
