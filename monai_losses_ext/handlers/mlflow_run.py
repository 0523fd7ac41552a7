# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's MLflow handler for a training that may be resumed."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from monai.handlers import MLFlowHandler


class ResumableMLFlowHandler(MLFlowHandler):
    """MONAI's MLFlowHandler, which goes on with the run that has its name and logs no value of a step twice.

    A training that was killed and resumed, with the former ``run_name``, so leaves one run without holes or duplicates.
    MONAI's handler goes on with an unfinished run too, but neither with a finished one nor beyond the first thousand,
    and logs again what the killed training had logged after its last saved state.

    Args:
        args: see MONAI's MLFlowHandler.
        kwargs: see MONAI's MLFlowHandler. Give each training a ``run_name`` of its own.
    """

    cur_run: Any  # an mlflow Run; None before the start

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps: dict[str, set[int]] = {}  # what the run has already

    def start(self, engine: Engine) -> None:
        """Find the run, or make it."""
        self._set_experiment()
        if self.cur_run is None and self.run_name:
            found = self.client.search_runs(
                [self.experiment.experiment_id], f"attributes.run_name = '{self.run_name}'", max_results=1
            )
            if found:
                self.client.update_run(found[0].info.run_id, status="RUNNING")
                self.cur_run = self.client.get_run(found[0].info.run_id)
        super().start(engine)

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        new = {name: value for name, value in metrics.items() if (step or 0) not in self._steps_of(name)}
        if new:
            super()._log_metrics(new, step)

    def _steps_of(self, name: str) -> set[int]:
        if name not in self._steps:
            history = self.client.get_metric_history(self.cur_run.info.run_id, name) if self.cur_run else []
            self._steps[name] = {metric.step for metric in history}
        return self._steps[name]
