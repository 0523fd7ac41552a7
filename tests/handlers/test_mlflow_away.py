# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A training does not depend on MLflow: with a real server that comes and goes, and stores that are broken."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events
from mlflow import MlflowClient

from monai_losses_ext.cli import main
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import ResumableMLFlowHandler
from monai_losses_ext.handlers.mlflow_backlog import Backlog
from monai_losses_ext.handlers.mlflow_outbox import Outbox
from monai_losses_ext.handlers.mlflow_send import send_metrics
from monai_losses_ext.handlers.mlflow_store import make_store, sqlite_file, sqlite_uri

NAMES = {"experiment_name": "test", "run_name": "test"}


class Server:
    """A real ``mlflow server`` on a port of its own."""

    def __init__(self, folder: Path, store: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder, self.store = folder, store
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise TimeoutError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def train(uri: str, last: int, happen: dict[int, Callable[[], None]], **arguments: Any) -> None:
    """Train epochs up to ``last``, with a metric each; ``happen`` before the epochs that it names."""
    handler = ResumableMLFlowHandler(
        uri, iteration_log=False, close_on_complete=True, experiment_param={"seed": 3}, **NAMES, **arguments
    )
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: happen.get(e.state.epoch, lambda: None)())
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.state.metrics.update(loss=1 / e.state.epoch))
    handler.attach(engine)
    engine.run([0], max_epochs=last)


def histories(uri: str) -> tuple[Any, dict[int, float]]:
    """Return the only run and its losses by epoch; none of them twice."""
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert len({metric.step for metric in losses}) == len(losses)
    return run, {metric.step: metric.value for metric in losses}


def test_server_that_is_away_at_the_start_and_dies_in_between(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("monai_losses_ext.handlers.mlflow_outbox.PAUSE", 0.0)
    server = Server(tmp_path, store.uri)
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"x")
    backlog = tmp_path / "run" / "mlflow_backlog_test.jsonl"
    arguments = {"backlog_dir": tmp_path / "run", "artifacts": [str(picture)]}
    seen: list[bool] = []

    def look() -> None:
        seen.append(backlog.is_file())

    try:
        begin = time.monotonic()
        train(server.uri, 6, {2: look, 3: server.start, 4: look, 5: server.kill}, new_run=True, **arguments)
        assert seen == [True, False]
        assert backlog.is_file()  # the end of the training waits
        told = [record.getMessage() for record in caplog.records if record.name.startswith("monai_losses_ext")]
        assert [line.split("(")[0] for line in told] == [
            f"tracking: MLflow at {server.uri} cannot be used ",
            f"tracking: MLflow at {server.uri} can be reached again; all is sent",
            f"tracking: MLflow at {server.uri} cannot be used ",
            told[3],
        ]
        assert "Connection refused" in told[0]
        assert str(backlog) in told[3]
        assert not [record for record in caplog.records if record.name.startswith(("urllib3", "mlflow"))]
        assert time.monotonic() - begin < 120
        run, losses = histories(store.uri)
        assert set(losses) == {1, 2, 3, 4}
        assert run.info.status == "RUNNING"
        server.start()
        train(server.uri, 0, {}, **arguments)  # a resumed training that has nothing left to do
        run, losses = histories(store.uri)
        assert losses == {epoch: 1 / epoch for epoch in range(1, 7)}
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == "3"
        assert not backlog.exists()
        assert [file.path for file in MlflowClient(server.uri).list_artifacts(run.info.run_id)] == ["curves.png"]
    finally:
        server.kill()


def test_server_that_is_required(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tracking: MLflow at http://127\.0\.0\.1:9 cannot be used \(.*\)\. Without"):
        train("http://user:secret@127.0.0.1:9", 2, {}, required=True)


def test_broken_store_stops_no_training(tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "broken.db"
    file.write_text("no database" * 100)
    train(sqlite_uri(file), 3, {}, backlog_dir=tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(f"tracking: MLflow's store {file} cannot be used (")
    assert "move that file away" in told[0]
    assert "\n" not in told[0]
    train(store.uri, 0, {}, backlog_dir=tmp_path)  # resumed with another one
    assert set(histories(store.uri)[1]) == {1, 2, 3}


def _make(uri: str) -> None:
    make_store(uri)


def test_store_is_whole_after_an_interruption_and_with_two_at_once(tmp_path: Path) -> None:
    file = tmp_path / "a?b%20c#d" / "runs.db"
    file.parent.mkdir()
    uri = sqlite_uri(file)
    assert sqlite_file(uri) == file
    file.with_name("runs.db.unfinished").write_text("half of the tables")  # what a killed process leaves
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_make, args=(uri,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in file.parent.iterdir()] == ["runs.db"]
    train(uri, 2, {})
    assert set(histories(uri)[1]) == {1, 2}


@pytest.mark.parametrize("uri", ["nonsense://x", "/a/folder", "file:///a/folder"])
def test_what_is_no_store(uri: str) -> None:
    with pytest.raises(UserError, match=r"^tracking_uri: must name a server or a database"):
        train(uri, 1, {})


def test_finished_run_is_sent_by_a_command(
    tmp_path: Path, empty_store: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that ended while its store was broken; the command that it names sends all, and the status."""
    caplog.set_level("INFO")
    file, folder, picture = tmp_path / "runs.db", tmp_path / "a run", tmp_path / "curves.png"
    file.write_text("no database" * 100)
    picture.write_bytes(b"x")
    train(sqlite_uri(file), 3, {}, backlog_dir=folder, new_run=True, artifacts=[str(picture)])
    (backlog,) = folder.glob("mlflow_backlog_*.jsonl")
    command = f"python -m monai_losses_ext send_metrics '{folder}'"
    assert command in caplog.text
    assert main(["send_metrics", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: tracking: MLflow's store {file} cannot be used (") and error.count("\n") == 1
    shutil.copy(empty_store, file)
    assert main(["send_metrics", str(folder)]) == 0
    assert re.fullmatch(r"sent \d+ entries to MLflow\n", capsys.readouterr().out)
    run, losses = histories(sqlite_uri(file))
    assert losses == {epoch: 1 / epoch for epoch in range(1, 4)}
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "3")
    assert not list(folder.iterdir())
    assert main(["send_metrics", str(folder)]) == 0
    assert capsys.readouterr().out == f"nothing waits for MLflow in {folder}\n"
    assert not backlog.exists()


def test_file_that_mlflow_does_not_take_blocks_nothing(
    tmp_path: Path, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlruns").write_text("a file where the folder of artifacts should be")
    pictures = [tmp_path / "curves.png", tmp_path / "cases.png"]
    for picture in pictures:
        picture.write_bytes(b"x")
    train(store.uri, 3, {}, backlog_dir=tmp_path / "run", artifacts=[str(path) for path in pictures])
    run, losses = histories(store.uri)
    assert (set(losses), run.info.status) == ({1, 2, 3}, "FINISHED")
    told = [record.getMessage() for record in caplog.records if record.name.startswith("monai_losses_ext")]
    assert [line.split(" (")[0] for line in told] == [f"tracking: MLflow does not take {path}" for path in pictures]
    with pytest.raises(UserError, match=rf"^tracking: MLflow does not take {pictures[0]}, {pictures[1]}; every"):
        send_metrics(tmp_path / "run")
    (tmp_path / "mlruns").unlink()
    assert send_metrics(tmp_path / "run") == 2
    assert store.artifacts() == ["cases.png", "curves.png"]


def test_backlog_that_cannot_be_written_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> None:
    """What waits stays in the memory, is said once, and is sent when the store is back."""
    monkeypatch.setattr("monai_losses_ext.handlers.mlflow_outbox.PAUSE", 0.0)
    file = tmp_path / "runs.db"
    file.write_text("no database" * 100)
    (tmp_path / "run").write_text("a file where the run's folder should be")
    outbox = Outbox(sqlite_uri(file), "test", "test", tmp_path / "run" / "mlflow_backlog_test.jsonl")
    outbox.start(new_run=True)
    for step in (1, 2, 3):
        outbox.add({"metrics": {"loss": 1.0}, "step": step, "time": step})
        outbox._next_try = 0.0
    told = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(told) == 1 and str(tmp_path / "run") in told[0] and "\n" not in told[0]
    shutil.copy(empty_store, file)
    outbox.finish("FINISHED")
    assert set(histories(sqlite_uri(file))[1]) == {1, 2, 3}


def test_backlog_is_whole_when_its_writing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backlog = Backlog(tmp_path / "mlflow_backlog_a.jsonl")
    backlog.write({"uri": "a"}, [{"tags": {"a": "1"}}])
    before = backlog.read()

    def cut_off(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:9].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    backlog.write({"uri": "a"}, [{"tags": {"a": "2"}}])
    assert backlog.read() == before == [{"run": {"uri": "a"}}, {"tags": {"a": "1"}}]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow_backlog_a.jsonl"]
