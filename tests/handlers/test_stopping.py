# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainings that end before their time: by NaN, by a signal, by a full disk, by a killed worker. Each with one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedEvaluator, SupervisedTrainer
from monai.handlers import StatsHandler, ValidationHandler
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from torch import nn

from monai_losses_ext import get_loss
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import (
    BestModel,
    FinalModel,
    Interrupted,
    ResumableMLFlowHandler,
    StopOnDivergence,
    StopOnSignal,
    TrainingState,
)
from monai_losses_ext.handlers.state_file import load_state, save_whole
from monai_losses_ext.handlers.stopping import one_line
from monai_losses_ext.weights import check_finite

EPOCHS = 4


class Training:
    """A small training whose ``trouble`` is called in each step with the trainer, before the loss is known."""

    def __init__(self, folder: Path, store: Any, data: Any, trouble: Any, **arguments: Any) -> None:
        self.folder, self.store = folder, store
        self.network: nn.Module = nn.Conv3d(1, 2, 1)
        self.loss = get_loss({"type": "compound", "components": ["dice", "focal"]})
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        device = torch.device("cpu")
        names = {"experiment_name": "test", "run_name": "test"}
        self.validator = validator = SupervisedEvaluator(device, data, self.network)
        validator.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: engine.state.metrics.update(mean_dice=0.5)
        )
        BestModel(folder / "model.pt", self.network).attach(validator)
        self.state = TrainingState(folder / "state.pt", {"network": self.network}, **arguments)
        self.trainer = SupervisedTrainer(
            device,
            EPOCHS,
            data,
            self.network,
            optimizer,
            self.loss,
            train_handlers=[
                StopOnSignal(validator),
                StopOnDivergence(self.loss),
                self.state,
                ValidationHandler(1, validator),
                FinalModel(folder / "model_final.pt", self.network),
                ResumableMLFlowHandler(store.uri, iteration_log=False, close_on_complete=True, **names),
                StatsHandler(iteration_log=False, epoch_log=False),  # would log a traceback of what it sees
            ],
        )
        if trouble is not None:
            self.trainer.add_event_handler(Events.ITERATION_STARTED, trouble)

    def stop(self, kind: type[BaseException]) -> BaseException:
        with pytest.raises(kind) as caught:
            self.trainer.run()
        assert "\n" not in str(caught.value)
        return caught.value

    def status(self) -> str:
        client = MlflowClient(self.store.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
        return run.info.status


@pytest.fixture
def data(write_case: Any) -> DataLoader:
    """Return batches of two cases each, as NIfTI files."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for name in "abcd":
        image = torch.rand(4, 4, 4, generator=generator)
        cases.append(write_case(name, image.numpy(), (image > 0.5).float().numpy(), torch.eye(4).numpy()))
    load = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])
    return DataLoader(Dataset(cases, load), batch_size=2)


def test_first_loss_that_is_nan_ends_the_training_and_spoils_nothing(
    tmp_path: Path, store: Any, data: DataLoader, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(engine: Engine) -> None:
        if engine.state.iteration == 4:
            with torch.no_grad():
                next(iter(engine.network.parameters())).fill_(float("nan"))

    training = Training(tmp_path, store, data, spoil)
    line = str(training.stop(UserError))
    assert line.startswith(
        "training: the loss is not finite since epoch 2, iteration 4 (loss nan, dice nan, focal nan; "
        "cases: c.nii.gz, d.nii.gz)."
    )
    assert "Train anew with a smaller --optimizer#lr" in line  # a resume with another one is refused
    assert training.status() == "FAILED"
    assert load_state(tmp_path / "state.pt")["trainer"] == {"epoch": 1, "iteration": 2}
    check_finite(torch.load(tmp_path / "model.pt", weights_only=True), "model")
    assert not (tmp_path / "model_final.pt").exists()
    assert not [record for record in caplog.records if record.exc_info]


def test_weights_that_the_last_step_spoils_are_not_saved(tmp_path: Path, store: Any, data: DataLoader) -> None:
    training = Training(tmp_path, store, data, None)

    def spoil(engine: Engine) -> None:
        if engine.state.iteration == 4:
            with torch.no_grad():
                next(iter(training.network.parameters())).fill_(float("inf"))

    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, spoil)
    assert "the weights of the network: must be finite numbers; weight" in str(training.stop(UserError))
    assert load_state(tmp_path / "state.pt")["trainer"]["epoch"] == 1
    assert training.status() == "FAILED"


@pytest.mark.parametrize(("bad_steps", "diverges"), [(1, False), (9, False), (10, True)])
def test_steps_that_a_gradient_scaler_skips_are_no_divergence(bad_steps: int, diverges: bool) -> None:
    steps: list[int] = []
    engine = Engine(lambda engine, batch: None)
    engine.scaler = torch.amp.GradScaler("cpu")
    engine.register_events(*IterationEvents)
    StopOnDivergence().attach(engine)

    @engine.on(Events.ITERATION_COMPLETED)
    def step(engine: Engine) -> None:
        value = float("inf") if 3 <= engine.state.iteration < 3 + bad_steps else 1.0
        engine.state.output = {"loss": torch.tensor(value)}
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        steps.append(engine.state.iteration)

    if diverges:
        with pytest.raises(UserError, match="since epoch 1, iteration 3 "):
            engine.run(range(20))
    else:
        engine.run(range(20))
        assert len(steps) == 20


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_signal_ends_the_step_and_keeps_the_state(
    tmp_path: Path, store: Any, data: DataLoader, name: str, status: int, where: str
) -> None:
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    steps: list[int] = []

    def send(engine: Engine) -> None:
        if engine.state.epoch == 2 and engine.state.iteration % 2 == 1:
            os.kill(os.getpid(), number)

    training = Training(tmp_path, store, data, send if where == "training" else None)
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    if where == "validation":
        training.validator.add_event_handler(Events.ITERATION_STARTED, send)
    error = training.stop(Interrupted)
    assert error.exit_status == status
    assert str(error) == (
        f"stopped by {name} in epoch 2 of 4. --resume true goes on with epoch 2, from what was saved before it."
    )
    assert steps[-1] == (2 if where == "training" else 4)
    assert training.status() == "KILLED"
    assert load_state(tmp_path / "state.pt")["trainer"]["epoch"] == 1
    assert signal.getsignal(number) is before


def test_a_training_in_a_thread_takes_no_signals(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    StopOnSignal().attach(engine)
    thread = threading.Thread(target=engine.run, args=([0, 1],))
    thread.start()
    thread.join()
    assert engine.state.iteration == 2


def test_stopped_in_the_first_epoch_can_be_resumed(tmp_path: Path, store: Any, data: DataLoader) -> None:
    training = Training(tmp_path, store, data, lambda engine: os.kill(os.getpid(), signal.SIGTERM))
    first = {name: value.clone() for name, value in training.network.state_dict().items()}
    assert "--resume true goes on with epoch 1," in str(training.stop(Interrupted))
    state = load_state(tmp_path / "state.pt")
    assert state["trainer"] == {"epoch": 0, "iteration": 0}
    assert all(torch.equal(value, first[name]) for name, value in state["objects"]["network"].items())
    training = Training(tmp_path, store, data, None, resume=True)
    training.trainer.run()
    assert training.status() == "FINISHED"


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line_and_leaves_the_last_state(tmp_path: Path, store: Any, data: DataLoader) -> None:
    training = Training(tmp_path, store, data, None)
    training.state.objects["ballast"] = nn.Linear(1000, 1000)  # 4 MB
    limits = ExitStack()
    training.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda engine: limits.enter_context(small_files(2_000_000))
    )
    with limits:
        line = str(training.stop(UserError))
    assert line.startswith(f"output: {tmp_path / 'state.pt'} cannot be written ('File too large').")
    assert training.status() == "FAILED"
    assert load_state(tmp_path / "state.pt")["trainer"]["epoch"] == 1
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "curves.png"),
        sqlite3.OperationalError("database or disk is full"),
        RuntimeError("Caught OSError in DataLoader worker process 0.\nTraceback ...\nOSError: No space left on device"),
    ],
)
def test_a_full_disk_is_known_wherever_it_shows(error: Exception) -> None:
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("applying transform") from cause
    except RuntimeError as wrapped:
        line = one_line(wrapped)
    assert isinstance(line, UserError)
    assert str(line).startswith("output: ")
    assert "\n" not in str(line)


class Deadly(Dataset):
    """A data set whose worker is killed, as by a system that runs out of memory."""

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_killed_worker_is_one_line(tmp_path: Path, store: Any, data: DataLoader) -> None:
    deadly = DataLoader(Deadly(data.dataset.data, data.dataset.transform), batch_size=2, num_workers=1)
    training = Training(tmp_path, store, data, None)
    training.trainer.data_loader = deadly
    training.trainer.state.dataloader = deadly
    line = str(training.stop(UserError))
    assert line.startswith("num_workers: a process that loads cases was killed ('DataLoader worker (pid")
    assert training.status() == "FAILED"


def test_save_whole_of_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: .*file/state.pt cannot be written \('(Not a directory|File exists)"):
        save_whole({}, tmp_path / "file" / "state.pt")


def test_finite_weights_and_others() -> None:
    check_finite({"a": torch.ones(2), "count": torch.tensor(3)}, "model")
    spoiled = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.tensor(float("inf"))}
    with pytest.raises(UserError, match=r"^model: must be finite numbers; b \(and 1 others\) holds NaN or infinity\."):
        check_finite(spoiled, "model")
