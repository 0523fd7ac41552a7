# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Small real engines, NIfTI cases and MLflow stores for the tests of the handlers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from monai.handlers import MLFlowHandler

LABELS = {"0": "background", "1": "front part", "2": "back"}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow store with its tables made, which takes seconds; tests copy it."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


class Store:
    """An MLflow store of one test."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        shutil.copy(empty_store, folder / "runs.db")
        self.uri = f"sqlite:///{folder / 'runs.db'}"

    def handler(self, **arguments: object) -> MLFlowHandler:
        """Return MONAI's handler, writing to this store."""
        return MLFlowHandler(
            self.uri, iteration_log=False, experiment_name="test", run_name="test", **arguments
        )  # fmt: skip

    def history(self, name: str) -> dict[int, float]:
        """Return the values that were logged under ``name``, by step; each step at most once."""
        found: list[Metric] = self._client().get_metric_history(self._run_id(), name)
        steps = {metric.step: metric.value for metric in found}
        assert len(steps) == len(found)
        return steps

    def artifacts(self) -> list[str]:
        """Return the names of the files that were logged."""
        return sorted(item.path for item in self._client().list_artifacts(self._run_id()))

    def _client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def _run_id(self) -> str:
        client = self._client()
        experiment = client.get_experiment_by_name("test")
        (run,) = client.search_runs([experiment.experiment_id])
        return run.info.run_id


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a fresh MLflow store in SQLite."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(tmp_path, empty_store)


@pytest.fixture
def write_case(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Return a function that writes image and label as NIfTI and returns the case as MONAI's datasets hold it."""

    def write(name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> dict[str, str]:
        case = {}
        for key, array in (("image", image.astype(np.float32)), ("label", label.astype(np.uint8))):
            folder = tmp_path / key
            folder.mkdir(exist_ok=True)
            case[key] = str(folder / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(array, affine), case[key])
        return case

    return write
