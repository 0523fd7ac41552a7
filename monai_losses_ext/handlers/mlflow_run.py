# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's MLflow handler for a training that may be resumed, and that never fails because of MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ignite.engine import Engine
from monai.handlers import MLFlowHandler
from monai.utils import flatten_dict

from monai_losses_ext.errors import fail
from monai_losses_ext.handlers._engine import numeric
from monai_losses_ext.handlers.mlflow_outbox import Outbox, close_outbox, outbox_of
from monai_losses_ext.handlers.mlflow_store import briefly, release, sqlite_file
from monai_losses_ext.handlers.stopping import at_stop

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "uc", "databricks-uc")


class ResumableMLFlowHandler(MLFlowHandler):
    """MONAI's MLFlowHandler, which goes on with the run that has its name and logs no value of a step twice.

    A training that was killed and resumed, with the former ``run_name``, so leaves one run without holes or duplicates.
    MONAI's handler goes on with an unfinished run too, but neither with a finished one nor beyond the first thousand,
    and logs again what the killed training had logged after its last saved state.

    Where the store cannot be used, a server that is away or a database that is broken, the training goes on and says so
    once. What it has to log waits in a file; it is sent when the store is back, or when the training is resumed.

    An error closes the run as FAILED, a signal or Ctrl-C as KILLED.

    Handlers of a trainer and its validator with the same store, experiment and run name write to one run.

    Args:
        tracking_uri: see MONAI's MLFlowHandler; the environment variable ``MLFLOW_TRACKING_URI`` overrides it.
        run_name: name of the run.
        experiment_name: name of the experiment; it is made.
        new_run: begin a run of its own, even if there is one with its name.
        backlog_dir: folder of the file in which metrics wait while the store cannot be used; None keeps them in memory.
        required: stop the training where the store cannot be used.
        tags: name -> text, for the run.
        kwargs: see MONAI's MLFlowHandler.

    Raises:
        UserError: for no ``run_name``, or one with a quote in it, or a store that MLflow does not have; when the
            training starts or later, if ``required``, for a store that cannot be used.
    """

    cur_run: Any  # an mlflow Run; None where there is none, or the store is away

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        run_name: str = "",
        experiment_name: str = "monai_experiment",
        new_run: bool = False,
        backlog_dir: str | os.PathLike[str] | None = None,
        required: bool = False,
        tags: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not run_name or "'" in run_name:
            raise fail("run_name", "must be given, without quotes", run_name)
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri or "sqlite:///mlruns.db"
        if urlsplit(self.uri).scheme.split("+")[0] not in SCHEMES:
            raise fail("tracking_uri", "must name a server or a database: http://HOST:PORT or sqlite:///FILE", self.uri)
        # MONAI's constructor opens the store, which may be away: it gets one that is never asked.
        with _without_environment():
            super().__init__("http://unused", run_name=run_name, experiment_name=experiment_name, **kwargs)
        self.client = None
        self.new_run = new_run
        self.required = required
        self.tags = dict(tags or {})
        self.backlog = None
        if backlog_dir is not None:
            safe = re.sub(r"[^\w.-]", "_", run_name)
            self.backlog = Path(backlog_dir) / f"mlflow_backlog_{safe}.jsonl"
        self._outbox: Outbox | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or an evaluator."""
        super().attach(engine)
        at_stop(engine, self.stopped)

    def start(self, engine: Engine) -> None:
        """Find the run, or make it, and log what does not change while it runs."""
        if self._outbox is None:
            key = (self.uri, self.experiment_name, self.run_name)
            if self.new_run:
                close_outbox(key)
            self._outbox, is_new = outbox_of(key, self._make_outbox)
            if is_new:
                self._outbox.start(self.new_run)
            attributes = {name: getattr(engine.state, name, None) for name in self.default_tracking_params}
            self._log_params((self.experiment_param or {}) | attributes)
            if self.tags:
                self._outbox.add({"tags": {name: str(value) for name, value in self.tags.items()}})
        self.client, self.cur_run = self._outbox.client, self._outbox.run
        if self.cur_run is not None and (self.dataset_logger or self.dataset_dict):
            with briefly():
                (self.dataset_logger or self._default_dataset_log)(self.dataset_dict)

    def complete(self) -> None:
        """Log the artifacts that are there."""
        if self._outbox is not None:
            for path in self._parse_artifacts():
                self._outbox.add({"artifact": os.path.abspath(path)})

    def close(self) -> None:
        """Close the run as FINISHED."""
        self._finish(self.run_finish_status)

    def stopped(self, error: BaseException) -> None:
        """Log the artifacts that are there and close the run as what it is."""
        self.complete()
        self._finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _finish(self, status: str) -> None:
        if self._outbox is not None:
            outbox, self._outbox, self.cur_run = self._outbox, None, None
            close_outbox((self.uri, self.experiment_name, self.run_name))
            try:
                outbox.finish(status)
            finally:
                release(outbox.client)

    def _make_outbox(self) -> Outbox:
        file = sqlite_file(self.uri)
        place = self.artifact_location
        if place is None and file is not None:  # beside the database, as MONAI has it
            place = (file.parent.absolute() / "mlruns").as_uri()
        return Outbox(self.uri, self.experiment_name, self.run_name, self.backlog, self.required, place)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.add({"params": {name: str(value) for name, value in params.items()}})

    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        values = numeric(flatten_dict(metrics))
        if self._outbox is not None and values:
            self._outbox.add({"metrics": values, "step": step or 0, "time": int(time.time() * 1000)})


@contextmanager
def _without_environment() -> Iterator[None]:
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        if uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = uri
