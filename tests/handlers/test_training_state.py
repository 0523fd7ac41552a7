# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""States of a training on real engines: whole files, seeds by epoch, one MLflow run."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from monai.data import DataLoader, DistributedSampler
from monai.handlers import StatsHandler
from monai.transforms import Compose, Lambdad, RandGaussianNoised
from torch import nn

from monai_losses_ext.data.seeded import SeededCacheDataset
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import BestModel, EpochSeed, FinalModel, ResumableMLFlowHandler, TrainingState
from monai_losses_ext.handlers.state_file import load_state, save_whole


class Trainer:
    """A trainer that draws random numbers and steps a network."""

    def __init__(self, path: Path, stop_in: int | None = None, resume: bool = False) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.stop_in = stop_in
        self.engine = Engine(self.step)
        objects = {"network": self.network, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        EpochSeed(seed=7).attach(self.engine)
        TrainingState(path, objects, {"run_name": "a"}, resume=resume).attach(self.engine)

    def step(self, engine: Engine, batch: int) -> None:
        if engine.state.epoch == self.stop_in and batch == 1:
            raise KeyboardInterrupt
        inputs = torch.randn(4, 2) + random.random() + np.random.rand()
        self.optimizer.zero_grad()
        (self.network(inputs) - 1).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def run(self) -> torch.Tensor:
        self.engine.run([0, 1, 2], max_epochs=5)
        return torch.cat([p.detach().flatten() for p in self.network.parameters()])


def test_resumed_training_ends_where_one_that_ran_through_ends(tmp_path: Path) -> None:
    whole = Trainer(tmp_path / "whole.pt").run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(tmp_path / "cut.pt", stop_in=4).run()
    assert load_state(tmp_path / "cut.pt")["trainer"] == {"epoch": 3, "iteration": 9}
    resumed = Trainer(tmp_path / "cut.pt", resume=True)
    assert torch.equal(resumed.run(), whole)
    assert resumed.engine.state.epoch == 5


def test_gradient_scaler_goes_on(tmp_path: Path) -> None:
    def run(resume: bool) -> float:
        engine = Engine(lambda engine, batch: None)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0 if resume else 8.0)
        TrainingState(tmp_path / "state.pt", {}, resume=resume).attach(engine)
        engine.run([0], max_epochs=2 if resume else 1)
        return float(engine.scaler.get_scale())

    assert [run(False), run(True)] == [8.0, 8.0]


class Rate:
    """Something with a state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"groups": [{"lr": self.value}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["groups"][0]["lr"]


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    numbers = {"rate": np.float64(0.003), "count": np.int64(3), "name": np.str_("a"), "flag": np.bool_(True)}

    def run(rate: Rate, epochs: int, resume: bool) -> None:
        engine = Engine(lambda engine, batch: None)
        TrainingState(tmp_path / "state.pt", {"rate": rate}, numbers, {"all": numbers}, resume).attach(engine)
        engine.run([0], max_epochs=epochs)

    run(Rate(np.float64(0.003)), epochs=1, resume=False)
    rate = Rate(None)
    run(rate, epochs=2, resume=True)
    assert rate.value == 0.003
    state = load_state(tmp_path / "state.pt")
    assert state["values"] == state["same"]["all"] == numbers
    assert state["trainer"]["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "entry"),
    [
        ({"objects": {"rate": Rate(np.zeros(2))}}, "objects: rate"),
        ({"objects": {"rate": Rate(lambda: 0)}}, "objects: rate"),
        ({"objects": {}, "values": {"folder": Path("a")}}, "values: folder"),
        ({"objects": {}, "same": {"part": slice(1)}}, "same: part"),
    ],
)
def test_what_could_not_be_read_again_is_refused_before_the_training(
    tmp_path: Path, arguments: dict[str, Any], entry: str
) -> None:
    steps: list[int] = []
    engine = Engine(lambda engine, batch: steps.append(batch))
    TrainingState(tmp_path / "state.pt", **arguments).attach(engine)
    with pytest.raises(UserError, match=f"^TrainingState: {entry}: must consist of .*; got ") as caught:
        engine.run([0], max_epochs=2)
    assert "\n" not in str(caught.value)
    assert steps == []


def test_state_that_a_step_spoils_never_takes_the_former_files_place(tmp_path: Path) -> None:
    path, rate = tmp_path / "state.pt", Rate(0.1)

    def run(step: Any) -> None:
        engine = Engine(step)
        TrainingState(path, {"rate": rate}).attach(engine)
        engine.run([0])

    run(lambda engine, batch: None)
    with pytest.raises(UserError, match="^TrainingState: objects: rate: "):
        run(lambda engine, batch: setattr(rate, "value", np.zeros(2)))
    assert load_state(path)["objects"]["rate"]["groups"] == [{"lr": 0.1}]


def test_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_whole({"a": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        save_whole({"a": lambda: 0}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no training to resume"), (b"no", "cannot be read"), ({"a": 1}, "holds no state")]
)
def test_what_is_no_state_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"^resume: .*{message}") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_best_model_is_the_best_also_after_a_resume(tmp_path: Path) -> None:
    network = nn.Linear(1, 1, bias=False)

    def validate(saver: BestModel, *values: float) -> float:
        engine = Engine(lambda engine, batch: None)
        saver.attach(engine)
        for value in values:
            nn.init.constant_(network.weight, value)
            engine.state.metrics["mean_dice"] = value
            engine.run([0])
        return float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"])

    first = BestModel(tmp_path / "model.pt", network)
    assert validate(first, 0.5, math.nan, 0.7, 0.6) == pytest.approx(0.7)
    second = BestModel(tmp_path / "model.pt", network)
    second.load_state_dict(first.state_dict())
    assert validate(second, 0.65) == pytest.approx(0.7)
    assert validate(second, 0.8) == pytest.approx(0.8)


def noisy(epoch: int, num_workers: int, rank: int = 0, num_ranks: int = 1) -> dict[int, float]:
    """Return what each case looks like in an epoch, case -> value, loaded in an epoch's own order."""
    steps = Compose([Lambdad("image", lambda x: x), RandGaussianNoised("image", prob=1.0)])
    data = [{"image": torch.full((1, 2), 1000.0 * i)} for i in range(6)]
    dataset = SeededCacheDataset(data, steps, seed=3, progress=False)
    sampler = DistributedSampler(dataset, num_replicas=num_ranks, rank=rank, seed=3)
    for item in (dataset, sampler):
        item.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=num_workers)
    values = [float(batch["image"][0, 0, 0]) for batch in loader]
    return {round(value / 1000): value for value in values}


def test_random_transforms_depend_on_seed_epoch_and_case_alone() -> None:
    once = noisy(epoch=2, num_workers=0)
    assert len(once) == 6
    assert len({round(value - 1000 * case, 4) for case, value in once.items()}) == 6
    assert noisy(epoch=2, num_workers=2) == once
    assert list(noisy(epoch=2, num_workers=0)) == list(once)
    halves = [noisy(epoch=2, num_workers=0, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert {**halves[0], **halves[1]} == once
    other = noisy(epoch=3, num_workers=0)
    assert all(other[case] != once[case] for case in once)
    assert list(other) != list(once)


def test_a_training_of_another_length_is_refused_before_anything_is_restored(tmp_path: Path) -> None:
    network = nn.Linear(1, 1)

    def train(epochs: int, resume: bool) -> None:
        engine = Engine(lambda engine, batch: None)
        objects = {"network": network}
        TrainingState(tmp_path / "state.pt", objects, same={"epochs": epochs}, resume=resume).attach(engine)
        engine.run([0], max_epochs=epochs)

    train(1, resume=False)
    nn.init.constant_(network.weight, 5.0)
    with pytest.raises(UserError, match="a training with epochs 1; this config has 2"):
        train(2, resume=True)
    assert network.weight.item() == 5.0


def test_state_is_saved_after_handlers_that_were_attached_later(tmp_path: Path) -> None:
    class Counter:
        epochs = 0

        def state_dict(self) -> dict[str, int]:
            return {"epochs": self.epochs}

        def count(self) -> None:
            self.epochs += 1

    counter, engine = Counter(), Engine(lambda engine, batch: None)
    TrainingState(tmp_path / "state.pt", {"counter": counter}).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, counter.count)
    engine.run([0], max_epochs=2)
    assert load_state(tmp_path / "state.pt")["objects"]["counter"] == {"epochs": 2}


def test_final_model_is_of_a_completed_training_alone(tmp_path: Path) -> None:
    def train(fails: bool) -> None:
        def step(engine: Engine, batch: int) -> None:
            if fails:
                raise ValueError("a bad case")

        engine = Engine(step)
        FinalModel(tmp_path / "model_final.pt", nn.Linear(1, 1)).attach(engine)
        engine.run([0])

    with pytest.raises(ValueError, match="a bad case"):
        train(fails=True)
    assert list(tmp_path.iterdir()) == []
    train(fails=False)
    assert set(torch.load(tmp_path / "model_final.pt", weights_only=True)) == {"weight", "bias"}


def test_resumed_run_has_no_step_twice(store: Any) -> None:
    def train(first: int, last: int, new_run: bool) -> None:
        handler = ResumableMLFlowHandler(
            store.uri,
            iteration_log=False,
            experiment_name="test",
            run_name="test",
            close_on_complete=True,
            new_run=new_run,
        )
        engine = Engine(lambda engine, batch: None)
        engine.state.epoch, engine.state.metrics = first - 1, {"loss": 1.0}
        handler.attach(engine)
        for epoch in range(first, last + 1):
            engine.state.epoch, engine.state.metrics["loss"] = epoch, float(epoch)
            if epoch == first:
                handler.start(engine)
            handler.epoch_completed(engine)
        handler.close()

    train(1, 3, new_run=True)
    train(3, 4, new_run=False)  # epoch 3 had been logged when the training was killed
    assert store.history("loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    client = MlflowClient(store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == "FINISHED"
    train(1, 1, new_run=True)  # another training with the same name
    assert len(client.search_runs([client.get_experiment_by_name("test").experiment_id])) == 2


@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [(UserError("x"), "FAILED", 0), (KeyError("x"), "FAILED", 1), (KeyboardInterrupt(), "KILLED", 0)],
)
def test_run_that_an_error_stops_is_closed(
    store: Any, caplog: pytest.LogCaptureFixture, error: BaseException, status: str, logged: int
) -> None:
    """With MONAI's StatsHandler behind it, which logs a traceback of whatever reaches it."""

    def step(engine: Engine, batch: int) -> None:
        raise error

    engine = Engine(step)
    names = {"experiment_name": "test", "run_name": "test"}
    ResumableMLFlowHandler(store.uri, iteration_log=False, epoch_log=False, **names).attach(engine)
    StatsHandler(iteration_log=False, epoch_log=False).attach(engine)
    with pytest.raises(type(error)) as caught:
        engine.run([0])
    assert caught.value is error
    assert sum(record.exc_info is not None for record in caplog.records) == logged
    client = MlflowClient(store.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert run.info.status == status
