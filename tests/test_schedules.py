# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights as functions of the epoch."""

from __future__ import annotations

import itertools

import pytest
import torch
from ignite.engine import Engine

from monai_losses_ext import get_loss
from monai_losses_ext.handlers import WeightSchedule
from monai_losses_ext.schedules import get_schedule, table

REBALANCE = {"type": "rebalance", "component": "boundary", "regions": ["dice", "focal"], "step": 0.01, "floor": 0.1}


def values(config, epochs, name="boundary"):
    return [row[name] for row in table([get_schedule(config)], epochs)]


def test_constant():
    assert values({"type": "constant", "component": "boundary", "value": 0.3}, 3) == [0.3] * 3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_moves_from_start_to_end_and_stays(kind):
    got = values({"type": kind, "component": "boundary", "start": 0.1, "end": 0.9, "epochs": 11}, 15)
    assert got[0] == pytest.approx(0.1) and got[5] == pytest.approx(0.5)
    assert got[10:] == pytest.approx([0.9] * 5)
    assert all(a < b for a, b in itertools.pairwise(got[:11]))
    steps = [b - a for a, b in itertools.pairwise(got[:11])]
    if kind == "linear":
        assert steps == pytest.approx([0.08] * 10)
    else:
        assert steps[0] == pytest.approx(steps[-1]) and steps[0] < steps[4] / 3
    down = values({"type": kind, "component": "boundary", "start": 0.9, "end": 0.1, "epochs": 11}, 11)
    assert down == pytest.approx(got[:11][::-1])
    assert values({"type": kind, "component": "boundary", "start": 0.9, "end": 0.1, "epochs": 1}, 2) == pytest.approx(
        [0.1] * 2
    )


def test_rebalance_moves_a_hundredth_an_epoch_down_to_the_floor():
    rows = table([get_schedule(REBALANCE)], 120)
    for epoch, row in enumerate(rows, 1):
        region = 1.0
        for _ in range(epoch):  # the paper's rule, step by step
            region = max(0.1, region - 0.01)
        assert row["dice"] + row["focal"] == pytest.approx(region)
        assert row["boundary"] == pytest.approx(1 - region)
    shares = table([get_schedule({**REBALANCE, "regions": {"dice": 3, "focal": 1}})], 1)[0]
    assert shares["dice"] == pytest.approx(3 * shares["focal"])


def test_handler_sets_the_weights_of_the_engines_epoch():
    loss = get_loss({"type": "compound", "components": ["dice", "focal", "boundary"]})
    seen = []
    engine = Engine(lambda engine, batch: seen.append(loss.get_weights()))
    handler = WeightSchedule(loss, REBALANCE)
    assert loss.get_weights()["boundary"] == pytest.approx(0.01)
    handler.attach(engine)
    engine.run([0], max_epochs=4)
    assert seen == table(handler.schedules, 4)
    resumed = Engine(lambda engine, batch: seen.append(loss.get_weights()))
    WeightSchedule(loss, [REBALANCE]).attach(resumed)
    resumed.load_state_dict({"epoch": 50, "epoch_length": 1, "max_epochs": 60, "rng_states": None})
    resumed.run([0], max_epochs=51)
    assert seen[-1] == table(handler.schedules, 51)[-1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "linar"},
            r"schedule: type: must be one of constant, linear, cosine, rebalance; got 'linar'\. Did you",
        ),
        ({"component": "boundary"}, r"schedule: type: must be one of"),
        ({"type": "linear", "component": "b", "begin": 1}, r"schedule: linear: key: must be one of component, start"),
        ({"type": "linear", "component": "b"}, r"schedule: linear: takes component, start, end, epochs; got"),
        ({"type": "linear", "component": "b", "end": 1}, r"schedule: linear: takes .*\. Missing: start, epochs\.$"),
        ({"type": "rebalance"}, r"schedule: rebalance: takes .*; got \[\]\. Missing: component, regions\.$"),
        ({"type": None}, r"schedule: type: must be one of [^.]*; got None\.$"),
        ({"type": ["linear"]}, r"schedule: type: must be one of [^.]*; got \['linear'\]\.$"),
        ("linear", r"schedules: must be a dictionary with a type, or a list of them; got 'linear'\.$"),
        (5, r"schedules: must be a dictionary with a type, or a list of them; got 5\.$"),
        (None, r"schedules: must be a dictionary with a type, or a list of them; got None\.$"),
        ([5], r"schedule: must be a dictionary with a type; got 5\.$"),
        (["linear"], r"schedule: must be a dictionary with a type; got 'linear'\.$"),
        (
            {"type": "constant", "component": "b", "value": -1},
            r"schedule: constant: value: must be a number of at least",
        ),
        ({**REBALANCE, "floor": 2}, r"schedule: rebalance: floor: must be a number between 0 and 1; got 2"),
        ({**REBALANCE, "regions": ["dice", "boundary"]}, r"schedule: rebalance: regions: must differ .* 'boundary'"),
        ({**REBALANCE, "regions": ["dice", "dice"]}, r"schedule: rebalance: regions: must differ from each other"),
        (
            {**REBALANCE, "regions": {"dice": float("nan")}},
            r"schedule: rebalance: regions: dice: .* at least 0; got nan",
        ),
        ({**REBALANCE, "regions": {"dice": "a"}}, r"schedule: rebalance: regions: dice: .* at least 0; got 'a'\.$"),
        ({**REBALANCE, "regions": {"dice": -1}}, r"schedule: rebalance: regions: dice: .* at least 0; got -1\.$"),
        (
            {**REBALANCE, "regions": {"dice": 0, "focal": 0}},
            r"schedule: rebalance: regions: must name at least one loss",
        ),
        ({**REBALANCE, "regions": 5}, r"schedule: rebalance: regions: must be a loss's name, a list .*; got 5\.$"),
        ({**REBALANCE, "regions": None}, r"schedule: rebalance: regions: must be a loss's name, a list .*; got None"),
        ({**REBALANCE, "regions": [["dice"]]}, r"schedule: rebalance: regions: must be a loss's name, a list"),
        ({**REBALANCE, "regions": {5: 1}}, r"schedule: rebalance: regions: must be a loss's name, a list"),
        ({**REBALANCE, "regions": []}, r"schedule: rebalance: regions: must name at least one loss"),
        (
            {**REBALANCE, "component": "boundry"},
            r"weights: must be one of dice, focal, boundary; got 'boundry'\. Did you",
        ),
    ],
)
def test_errors_are_one_line(config, message):
    loss = get_loss({"type": "compound", "components": ["dice", "focal", "boundary"]})
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        WeightSchedule(loss, config)
    assert "\n" not in str(caught.value)


def test_a_loss_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"^WeightSchedule: loss: must be a compound loss; got 'CrossEntropyLoss'"):
        WeightSchedule(torch.nn.CrossEntropyLoss(), REBALANCE)


def test_two_schedules_of_one_component_are_refused():
    schedule = {"type": "constant", "component": "dice", "value": 0.5}
    with pytest.raises(ValueError, match=r"^schedules: must not set one component twice; got 'dice'\.$"):
        WeightSchedule(get_loss({"type": "compound", "components": ["dice", "focal"]}), [schedule, schedule])
