# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's MLflow handler for a training that may be resumed."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from monai.utils import flatten_dict

from monai_losses_ext.errors import fail


class ResumableMLFlowHandler(MLFlowHandler):
    """MONAI's MLFlowHandler, which goes on with the run that has its name and logs no value of a step twice.

    A training that was killed and resumed, with the former ``run_name``, so leaves one run without holes or duplicates.
    MONAI's handler goes on with an unfinished run too, but neither with a finished one nor beyond the first thousand,
    and logs again what the killed training had logged after its last saved state.

    An error closes the run as FAILED, Ctrl-C as KILLED. It goes on to the caller and, with its traceback, into the log;
    a ``SystemExit`` does not: its one line is all that there is to say. Ignite asks the first handler alone, so this
    one stands before a ``StatsHandler``, which would write that traceback.

    Args:
        args: see MONAI's MLFlowHandler.
        new_run: begin a run of its own, even if there is one with its name.
        kwargs: see MONAI's MLFlowHandler. ``run_name`` has to be given.

    Raises:
        ValueError: for no ``run_name``, or one with a quote in it.
    """

    cur_run: Any  # an mlflow Run; None before the start

    def __init__(self, *args: Any, new_run: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.run_name or "'" in self.run_name:
            raise fail("run_name", "must be given, without quotes", self.run_name)
        self.new_run = new_run
        self._steps: dict[str, set[int]] = {}  # what the run has already

    def start(self, engine: Engine) -> None:
        """Find the run, or make it."""
        self._set_experiment()
        if self.cur_run is None:
            named, newest = f"attributes.run_name = '{self.run_name}'", ["attributes.start_time DESC"]
            experiment = self.experiment.experiment_id
            found = [] if self.new_run else self.client.search_runs([experiment], named, order_by=newest, max_results=1)
            run = found[0] if found else self.client.create_run(experiment, run_name=self.run_name)
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.cur_run = self.client.get_run(run.info.run_id)
        super().start(engine)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or an evaluator."""
        super().attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.failed)

    def failed(self, engine: Engine, error: BaseException) -> NoReturn:
        """Close the run as what it is, and let the error go on; Ignite tells of an error within an epoch twice."""
        try:
            if self.cur_run is not None:
                if not isinstance(error, SystemExit):
                    logging.getLogger(__name__).error("stopped by an error", exc_info=error)
                status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
                self.client.set_terminated(self.cur_run.info.run_id, status)
                self.cur_run = None
                self.close()
        finally:
            raise error

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        step = step or 0
        new = {name: value for name, value in flatten_dict(metrics).items() if step not in self._steps_of(name)}
        if new:
            super()._log_metrics(new, step)
        for name in new:
            self._steps[name].add(step)

    def _steps_of(self, name: str) -> set[int]:
        if name not in self._steps:
            history = self.client.get_metric_history(self.cur_run.info.run_id, name) if self.cur_run else []
            self._steps[name] = {metric.step for metric in history}
        return self._steps[name]
