# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run has to tell MLflow, kept in a file for as long as MLflow does not listen."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers.mlflow_backlog import Backlog, Entry
from monai_losses_ext.handlers.mlflow_store import briefly, make_store, shown, sqlite_file, sqlite_uri, why_away

BATCH = 1000  # metrics that MLflow takes at once
PAUSE = 30.0  # seconds between two attempts to reach a store that is away


class Outbox:
    """Tell an MLflow run everything in order, now or as soon as its store can be reached.

    The training never fails, and hardly waits, because of the store: a request ends after 10 s, and after a failed one
    the next follows 30 s later at the earliest, or ten times as long as it took. What could not be told waits in
    ``file`` and in the memory. Nothing is told twice: before it repeats itself, the outbox asks what the run has.

    A file that MLflow does not take, while it takes the rest, is ``parked``: nothing waits for it.

    Args:
        uri: of the store, as MLflow takes it.
        experiment: name of the experiment; it is made.
        run_name: name of the run. The newest one of that name is gone on with.
        file: where entries wait, a line of JSON each; None keeps them in the memory alone.
        required: raise instead of waiting.
        artifact_location: of an experiment that is made.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        file: Path | None = None,
        required: bool = False,
        artifact_location: str | None = None,
    ) -> None:
        self.uri, self.experiment, self.run_name = uri, experiment, run_name
        self.backlog, self.required, self.artifact_location = Backlog(file), required, artifact_location
        self.client: Any = None
        self.run: Run | None = None
        self.new_run = False
        self.waiting: deque[Entry] = deque()
        self.parked: list[Entry] = []
        self._steps: defaultdict[str, set[int]] = defaultdict(set)  # what the run has already
        self._asked: set[str] = set()  # metrics whose steps are known
        self._is_away = False
        self._next_try = 0.0
        self._started = int(time.time() * 1000)

    def start(self, new_run: bool) -> None:
        """Find the run or make it, and tell it what an earlier training could not.

        Raises:
            UserError: where the store is required and cannot be reached.
        """
        self.new_run = new_run
        if not new_run:
            # That training's end is not this one's.
            self.waiting.extend(entry for entry in self.backlog.read() if not entry.keys() & {"status", "run"})
        self.flush()

    def add(self, entry: Entry) -> None:
        """Tell the run something, now or later."""
        self.waiting.append(entry)
        if time.monotonic() >= self._next_try:
            self.flush()
        else:
            self.backlog.append(entry)

    def flush(self) -> bool:
        """Try to tell all that waits; return whether that went well.

        Raises:
            UserError: where the store is required and cannot be reached.
        """
        begin = time.monotonic()
        try:
            self.send()
        except Exception as error:  # clients of servers and databases raise whatever they like
            self._away(error, time.monotonic() - begin)
            return False
        if self._is_away:
            logging.getLogger(__name__).info(f"tracking: MLflow at {shown(self.uri)} can be reached again; all is sent")
        self._is_away, self._next_try = False, 0.0
        return True

    def send(self) -> None:
        """Tell all that waits; raise what MLflow's client raises."""
        with briefly():
            self._open()
            while self.waiting:
                self._tell()
        if self.parked:
            self.backlog.write(self._whose(), self.parked)
        else:
            self.backlog.remove()

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self.waiting.append({"status": status})
        if not self.flush() and self.backlog.is_whole:
            n, command = len(self.waiting) + len(self.parked), self.backlog.how_to_send()
            logging.getLogger(__name__).info(
                f"tracking: {n} entries for MLflow wait in {self.backlog.file}; to send them: {command}"
            )

    def _open(self) -> None:
        if self.client is None:
            make_store(self.uri)
            self.client = MlflowClient(self.uri)
        if self.run is not None:
            return
        experiment = self._experiment_id()
        named, newest = f"attributes.run_name = '{self.run_name}'", ["attributes.start_time DESC"]
        found = [] if self.new_run else self.client.search_runs([experiment], named, order_by=newest, max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            self.run = found[0]
        else:
            self.run = self.client.create_run(experiment, start_time=self._started, run_name=self.run_name)
            self.new_run = False  # what is opened once more, after a failure, is this one
        self._asked = set(self._steps) if not found else set()

    def _experiment_id(self) -> str:
        for attempt in range(5):
            experiment = self.client.get_experiment_by_name(self.experiment)
            if experiment is not None:
                if experiment.lifecycle_stage != "active":
                    raise UserError(f"experiment_name: {self.experiment!r} is deleted in MLflow; give another.")
                return experiment.experiment_id
            try:
                return self.client.create_experiment(self.experiment, self.artifact_location)
            except Exception:
                if attempt == 4:
                    raise
                time.sleep(0.2)  # another training has just made it
        raise AssertionError("unreachable")

    def _tell(self) -> None:
        entry = self.waiting[0]
        run_id = self.run.info.run_id if self.run is not None else ""
        if "metrics" in entry:
            self._tell_metrics(run_id)
            return
        if "params" in entry:
            known = self.client.get_run(run_id).data.params  # MLflow refuses another value
            params = [Param(name, value) for name, value in entry["params"].items() if name not in known]
            self.client.log_batch(run_id, params=params)
        elif "tags" in entry:
            self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in entry["tags"].items()])
        elif "artifact" in entry and Path(entry["artifact"]).is_file():
            self._tell_file(run_id, entry)
        elif "status" in entry:
            self.client.set_terminated(run_id, entry["status"])
        self.waiting.popleft()

    def _tell_file(self, run_id: str, entry: Entry) -> None:
        try:
            self.client.log_artifact(run_id, entry["artifact"])
        except Exception as error:
            self.client.get_run(run_id)  # raises where it is the store that is away, not the place of its files
            if entry not in self.parked:
                self.parked.append(entry)
                later = f" To send it later: {self.backlog.how_to_send()}" if self.backlog.file else ""
                logging.getLogger(__name__).warning(
                    f"tracking: MLflow does not take {entry['artifact']} ({why_away(error)}); the rest is sent.{later}"
                )

    def _tell_metrics(self, run_id: str) -> None:
        """Tell the metrics of as many entries as MLflow takes at once."""
        metrics: dict[tuple[str, int], Metric] = {}
        taken = 0
        for entry in self.waiting:
            if "metrics" not in entry or (taken and len(metrics) + len(entry["metrics"]) > BATCH):
                break
            for name, value in entry["metrics"].items():
                if entry["step"] not in self._steps_of(run_id, name):
                    metrics.setdefault((name, entry["step"]), Metric(name, value, entry["time"], entry["step"]))
            taken += 1
        told = list(metrics.values())
        for i in range(0, len(told), BATCH):
            self.client.log_batch(run_id, metrics=told[i : i + BATCH])
        for name, step in metrics:
            self._steps[name].add(step)
        for _ in range(taken):
            self.waiting.popleft()

    def _steps_of(self, run_id: str, name: str) -> set[int]:
        if name not in self._asked:
            self._steps[name] = {metric.step for metric in self.client.get_metric_history(run_id, name)}
            self._asked.add(name)
        return self._steps[name]

    def _away(self, error: Exception, seconds: float) -> None:
        if isinstance(error, UserError):
            raise error
        what = self.what(error)
        if self.required:
            raise UserError(f"{what} Without --tracking_required the training would go on.") from error
        self._next_try = time.monotonic() + max(PAUSE, 10 * seconds)
        self._asked = set()  # the answer to the last request may be lost, not the request
        if not self._is_away:
            kept = f"kept in {self.backlog.file}, and sent when it is back" if self.backlog.file else "kept"
            hint = " If its creation was interrupted, move that file away." if sqlite_file(self.uri) else ""
            logging.getLogger(__name__).warning(f"{what} The training goes on; its metrics are {kept}.{hint}")
        self._is_away = True
        self.backlog.write(self._whose(), [*self.parked, *self.waiting])

    def what(self, error: Exception) -> str:
        """Return in a sentence which store cannot be used, and why."""
        file = sqlite_file(self.uri)
        where = f"MLflow's store {file}" if file else f"MLflow at {shown(self.uri)}"
        return f"tracking: {where} cannot be used ({why_away(error)})."

    def _whose(self) -> dict[str, Any]:
        """Return what finds the run again, in a process of any folder; without a user's name and password."""
        file = sqlite_file(self.uri)
        return {
            "uri": sqlite_uri(file) if file else shown(self.uri),
            "experiment": self.experiment,
            "run_name": self.run_name,
            "artifact_location": self.artifact_location,
            "new_run": self.new_run,
        }


def outbox_of(key: tuple[str, str, str], make: Callable[[], Outbox]) -> tuple[Outbox, bool]:
    """Return the open outbox of a store, an experiment and a run's name, and whether it is a new one.

    The handlers of a trainer and of its validator tell the same run.
    """
    is_new = key not in _open
    if is_new:
        _open[key] = make()
    return _open[key], is_new


def close_outbox(key: tuple[str, str, str]) -> None:
    """Forget an outbox whose run is closed."""
    _open.pop(key, None)


_open: dict[tuple[str, str, str], Outbox] = {}
