# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The line of an epoch, and what a refused resume says."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from ignite.engine import Engine, Events

from monai_losses_ext.handlers import ProgressLog
from monai_losses_ext.handlers._difference import difference
from monai_losses_ext.handlers.progress import duration, shown_metrics


def test_a_line_for_every_epoch_with_what_was_validated_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    validator = Engine(lambda engine, batch: time.sleep(0.03))
    trainer = Engine(lambda engine, batch: engine.state.metrics.update(loss=0.5))
    trainer.optimizer = None  # what tells a trainer from an evaluator
    ProgressLog(validator, every_s=0.02).attach(trainer)
    validator.add_event_handler(Events.COMPLETED, lambda engine: engine.state.metrics.update(mean_dice=0.71))

    @trainer.on(Events.EPOCH_COMPLETED(every=2))
    def validate(engine: Engine) -> None:
        validator.state.epoch = engine.state.epoch - 1
        validator.run([0, 1], max_epochs=engine.state.epoch)

    trainer.run([0], max_epochs=3)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
    epochs = [line for line in lines if "took" in line]
    number = r"\d+\.\d s"
    for line, pattern in zip(
        epochs,
        [
            rf"epoch 1/3: loss 0\.5; took {number}, {number} left",
            rf"epoch 2/3: loss 0\.5, mean_dice 0\.71; took {number}, {number} left",
            rf"epoch 3/3: loss 0\.5; took {number}",
        ],
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line
    assert "epoch 2/3: 1 of 2 validation batches" in lines


def test_many_classes_and_durations() -> None:
    metrics = {"mean_dice": 0.5, "loss": 1.0, **{f"dice_{i}": 0.1 for i in range(118)}, "text": "x"}
    assert shown_metrics(metrics) == "mean_dice 0.5, loss 1"
    assert [duration(s) for s in (1.26, 12.4, 540, 11100)] == ["1.3 s", "12 s", "9 min", "3 h 05 min"]


@pytest.mark.parametrize(
    ("theirs", "ours", "found"),
    [
        ({"a": [1, 2]}, {"a": (1, 2)}, None),
        (4, 5, ("", "4", "5")),
        (
            {"components": [{"type": "dice"}, {"type": "focal", "gamma": 2.0}]},
            {"components": [{"type": "dice"}, {"type": "focal", "gamma": 1.5}]},
            ("#components#1#gamma", "2.0", "1.5"),
        ),
        ({"a": 1}, {"a": 1, "b": None}, ("#b", "absent", "None")),
        ([1], [1, 2], ("#1", "absent", "2")),
        ("x" * 200 + "1" + "y" * 90, "x" * 200 + "2", ("", f"...{'x' * 20}1{'y' * 39}...", f"...{'x' * 20}2'")),
    ],
)
def test_first_difference(theirs: Any, ours: Any, found: Any) -> None:
    assert difference(theirs, ours) == found
