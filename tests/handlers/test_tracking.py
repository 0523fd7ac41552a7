# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""LossTracker on a real trainer, with MONAI's handlers reading what it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import LrScheduleHandler, MLFlowHandler, TensorBoardStatsHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_losses_ext import CompoundLoss, DeepSupervisionLoss, FocalLoss, get_loss
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import LossTracker

EPOCHS = 3
BATCH_SIZES = [2, 2, 1]


class TwoTerms(nn.Module):
    """A loss with two terms, as a compound loss offers them."""

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = prediction - target
        self.last_terms = {"square": (error**2).mean().detach(), "abs": error.abs().mean().detach()}
        return 0.75 * (error**2).mean() + 0.25 * error.abs().mean()

    def get_weights(self) -> dict[str, float]:
        return {"square": 0.75, "abs": 0.25}


class Recorder:
    """Write down, on its own, what each iteration's loss and learning rate were."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.iterations: dict[int, list[dict[str, float]]] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output: Any = engine.state.output
        error = (output["pred"] - output["label"]).detach()
        values = {
            "loss": output["loss"].item(),
            "loss_square": (error**2).mean().item(),
            "loss_abs": error.abs().mean().item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.iterations.setdefault(engine.state.epoch, []).append(values)

    def mean(self, epoch: int, name: str) -> float:
        values = [values[name] for values in self.iterations[epoch]]
        return sum(n * value for n, value in zip(BATCH_SIZES, values, strict=True)) / sum(BATCH_SIZES)


class Case:
    """What a training needs: network, optimizer, loss, data."""

    def __init__(self, loss: nn.Module | None = None, **trainer_arguments: Any) -> None:
        torch.manual_seed(0)
        self.network = nn.Conv1d(1, 1, 3, padding=1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        self.loss = loss or TwoTerms()
        data = [{"image": torch.randn(1, 4) * (i + 1), "label": torch.randn(1, 4)} for i in range(sum(BATCH_SIZES))]
        self.loader: Any = DataLoader(Dataset(data), batch_size=2)
        self.recorder = Recorder(self.optimizer)
        self.trainer_arguments = trainer_arguments

    def run(self, *handlers: Any) -> SupervisedTrainer:
        trainer = SupervisedTrainer(
            torch.device("cpu"),
            EPOCHS,
            self.loader,
            self.network,
            self.optimizer,
            self.loss,
            train_handlers=[self.recorder, *handlers],
            **self.trainer_arguments,
        )
        trainer.run()
        return trainer


@pytest.mark.parametrize("tracker_first", [True, False])
@pytest.mark.parametrize("per_epoch", [True, False])
def test_mlflow_has_each_epoch_at_its_own_step(store: Any, tracker_first: bool, per_epoch: bool) -> None:
    case = Case()
    schedule = torch.optim.lr_scheduler.ExponentialLR(case.optimizer, gamma=0.5)
    handlers: list[Any] = [
        LrScheduleHandler(schedule, print_lr=False, epoch_level=per_epoch),
        store.handler(close_on_complete=True),
    ]
    tracker = LossTracker(case.loss, case.optimizer)
    case.run(*([tracker, *handlers] if tracker_first else [*handlers, tracker]))

    for name in ("loss", "loss_square", "loss_abs"):
        expected = {epoch: pytest.approx(case.recorder.mean(epoch, name)) for epoch in (1, 2, 3)}
        assert store.history(name) == expected
    assert store.history("weight_square") == {1: 0.75, 2: 0.75, 3: 0.75}
    # The rate of the epoch's last step, before the scheduler moved it.
    expected_lr = {1: 0.1, 2: 0.05, 3: 0.025} if per_epoch else {n: 0.1 * 0.5 ** (3 * n - 1) for n in (1, 2, 3)}
    assert store.history("lr") == {step: pytest.approx(rate) for step, rate in expected_lr.items()}


def test_tensorboard_has_each_epoch_at_its_own_step(tmp_path: Path) -> None:
    case = Case()
    reader = TensorBoardStatsHandler(log_dir=str(tmp_path), iteration_log=False)
    case.run(reader, LossTracker(case.loss, case.optimizer))  # the reader first, where it could come too early
    reader.close()
    written = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "loss_square", "loss_abs"):
        values = {event.step: event.value for event in written.Scalars(name)}
        assert values == {epoch: pytest.approx(case.recorder.mean(epoch, name)) for epoch in (1, 2, 3)}
    assert {event.step: event.value for event in written.Scalars("weight_square")} == {1: 0.75, 2: 0.75, 3: 0.75}


@pytest.mark.parametrize("arguments", [{"decollate": False}, {"accumulation_steps": 2}])
def test_ways_to_run_the_trainer(arguments: dict[str, Any]) -> None:
    case = Case(**arguments)
    trainer = case.run(LossTracker(case.loss, case.optimizer))
    assert trainer.state.metrics["loss"] == pytest.approx(case.recorder.mean(EPOCHS, "loss"))


def test_any_loss_and_several_parameter_groups() -> None:
    case = Case(loss=nn.MSELoss())
    case.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01})
    trainer = case.run(LossTracker(case.loss, case.optimizer))
    assert trainer.state.metrics == {
        "loss": pytest.approx(case.recorder.mean(EPOCHS, "loss_square")),
        "lr": 0.1,
        "lr_1": 0.01,
    }


def test_terms_and_weights_of_the_compound_loss() -> None:
    case = Case(
        loss=get_loss(
            {"type": "compound", "components": [{"type": "dice", "weight": 1.0}, {"type": "focal", "weight": 3.0}]}
        )
    )
    case.network = nn.Conv1d(1, 2, 1)
    case.loader = [{"image": torch.randn(2, 1, 5), "label": torch.ones(2, 1, 5)}]
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        1,
        case.loader,
        case.network,
        case.optimizer,
        case.loss,
        train_handlers=[LossTracker(case.loss, case.optimizer)],
    )
    trainer.run()
    metrics = trainer.state.metrics
    assert set(metrics) == {"loss", "loss_dice", "loss_focal", "weight_dice", "weight_focal", "lr"}
    weighted = sum(metrics[f"weight_{name}"] * metrics[f"loss_{name}"] for name in ("dice", "focal"))
    assert metrics["loss"] == pytest.approx(weighted)


def test_iterations_of_a_compound_of_voxel_maps() -> None:
    parts = [FocalLoss(use_softmax=True, gamma=gamma, reduction="none") for gamma in (0.0, 2.0)]
    case = Case(loss=CompoundLoss(parts, weights=[1.0, 2.0], names=["plain", "focal"]))
    case.network = nn.Conv1d(1, 2, 1)
    case.loader = [{"image": torch.randn(2, 1, 5), "label": torch.ones(2, 1, 5)}]
    seen: list[dict[str, float]] = []
    tracker = LossTracker(case.loss, case.optimizer)
    trainer = SupervisedTrainer(
        torch.device("cpu"), 1, case.loader, case.network, case.optimizer, case.loss, train_handlers=[tracker]
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(tracker.of_iteration(engine.state.output))
    )
    trainer.run()
    assert case.loss.last_terms["focal"].shape == (2, 2, 5)
    metrics = trainer.state.metrics  # of an epoch of one iteration
    assert seen == [{f"iteration_{name}": pytest.approx(value) for name, value in metrics.items() if name != "lr"}]


def test_an_epoch_of_unknown_length_is_written_at_its_end() -> None:
    case = Case()
    batches = list(case.loader)
    seen: dict[str, float] = {}
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        1,
        iter(batches),
        case.network,
        case.optimizer,
        case.loss,
        train_handlers=[case.recorder, LossTracker(case.loss, case.optimizer)],
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.update(engine.state.metrics))
    trainer.run()
    assert seen["loss"] == pytest.approx(case.recorder.mean(1, "loss"))


def test_names_that_mlflow_refuses_and_a_loss_that_is_nan(store: Any) -> None:
    class Broken(nn.Module):
        def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.last_terms = {"dice (front)": torch.tensor(math.inf)}
            return (prediction * math.nan).mean()

    case = Case(loss=Broken())
    case.run(LossTracker(case.loss, case.optimizer), store.handler(close_on_complete=True))
    assert [math.isnan(value) for value in store.history("loss").values()] == [True] * EPOCHS
    assert list(store.history("loss_dice_front_")) == [1, 2, 3]


def test_an_optimizer_without_the_learned_weights_stops_at_the_start_with_the_fix() -> None:
    loss = get_loss({"type": "compound", "components": ["dice", "focal"], "learnable_weights": True})
    case = Case(loss=loss)
    with pytest.raises(UserError, match="^optimizer: must train the weights") as caught:
        case.run(LossTracker(case.loss, case.optimizer))
    assert "\n" not in str(caught.value)
    assert "@loss.parameters()" in str(caught.value)
    assert case.recorder.iterations == {}


def test_learned_weights_are_tracked_of_a_loss_inside_another(store: Any) -> None:
    loss = DeepSupervisionLoss(
        get_loss({"type": "compound", "components": ["dice", "cross_entropy"], "learnable_weights": True})
    )
    case = Case(loss=loss)
    case.network = nn.Conv1d(1, 2, 1)
    case.optimizer = torch.optim.Adam([*case.network.parameters(), *loss.parameters()], lr=0.1)
    case.loader = [{"image": torch.randn(2, 1, 5), "label": torch.ones(2, 1, 5)}] * 3
    mlflow = store.handler(close_on_complete=True)
    case.run(LossTracker(loss, case.optimizer), mlflow)
    weights = {name: store.history(f"weight_{name}") for name in ("dice", "cross_entropy")}
    assert list(weights["dice"]) == [1, 2, 3]
    assert weights["dice"][1] != weights["dice"][3]
    for epoch in (1, 2, 3):
        assert weights["dice"][epoch] + weights["cross_entropy"][epoch] == pytest.approx(1)
    assert set(store.history("loss_dice")) == {1, 2, 3}


def test_dynamic_weights_follow_the_epochs_means() -> None:
    loss = get_loss({"type": "compound", "components": ["dice", "cross_entropy"], "weighting": "dwa"})
    case = Case(loss=loss)
    case.network = nn.Conv1d(1, 2, 1)
    case.optimizer = torch.optim.Adam(case.network.parameters(), lr=0.1)
    case.loader = [{"image": torch.randn(2, 1, 5), "label": torch.ones(2, 1, 5)}] * 3
    history: list[dict[str, float]] = []
    trainer = SupervisedTrainer(
        torch.device("cpu"),
        4,
        case.loader,
        case.network,
        case.optimizer,
        loss,
        train_handlers=[LossTracker(loss, case.optimizer)],
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: history.append(dict(engine.state.metrics)))
    trainer.run()
    assert [row["weight_dice"] for row in history[:2]] == [0.5, 0.5]
    names = ("dice", "cross_entropy")
    for t in (2, 3):
        ratios = [history[t - 1][f"loss_{name}"] / history[t - 2][f"loss_{name}"] for name in names]
        shares = [math.exp(min(ratio, 2) / 2) for ratio in ratios]
        assert history[t]["weight_dice"] == pytest.approx(shares[0] / sum(shares))


def test_values_of_an_iteration_reach_mlflow_where_they_are_asked_for(store: Any) -> None:
    case = Case()
    tracker = LossTracker(case.loss, case.optimizer)
    handler = MLFlowHandler(
        store.uri,
        iteration_log=True,
        output_transform=tracker.of_iteration,
        experiment_name="test",
        run_name="test",
        close_on_complete=True,
    )
    case.run(tracker, handler)
    seen = [values["loss"] for epoch in (1, 2, 3) for values in case.recorder.iterations[epoch]]
    assert list(store.history("iteration_loss").values()) == pytest.approx(seen)
    assert list(store.history("iteration_weight_square")) == [*range(1, 10)]
    assert list(store.history("loss")) == [1, 2, 3]
