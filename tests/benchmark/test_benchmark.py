# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The committed results, the tables made of them, and a small real measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from monai_losses_ext.benchmark import cases, command, cuda, report, suites
from monai_losses_ext.benchmark.about import about_run

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results():
    for path, text in report.tables(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python -m monai_losses_ext.benchmark report"


def test_committed_results_say_how_they_came_about():
    result = json.loads((ROOT / "docs" / "benchmarks" / "speed--cpu.json").read_text())
    assert {"date", "commit", "command", "cpu", "threads", "seed", "versions"} <= result["about"].keys()
    names = {(row["loss"], row["shape"]) for row in result["speed"]}
    assert {("dice_ce", "2x3x128^3"), ("dice_ce", "2x14x96^3")} <= names
    for row in result["speed"]:
        assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]


@pytest.mark.filterwarnings("ignore")
def test_a_small_measurement(tmp_path):
    out = tmp_path / "speed.json"
    arguments = ["speed", "--shapes", "2x3x96^3", "--losses", "dice", "dice_focal_ce", "--repeats", "2"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["speed"]
    assert [row["loss"] for row in rows] == ["dice", "dice_focal_ce"]
    assert all(row["ours_ms"]["both"]["median"] > 0 for row in rows)


def test_a_case_that_disagrees_is_not_timed(monkeypatch):
    from monai_losses_ext.benchmark import speed

    wrong = cases.Pair(lambda x, y: 2 * x.sum(), lambda x, y: x.sum(), "the truth")
    monkeypatch.setattr(speed, "loss_pairs", lambda: {"dice": wrong})
    monkeypatch.setitem(cases.SHAPES, "2x3x96^3", (1, 3, 16, 16, 16))
    with pytest.raises(RuntimeError, match="must agree before they are timed"):
        speed.measure_speed("dice", "2x3x96^3", 1, 0)


def test_a_machine_without_a_compiler_has_no_compiled_side(monkeypatch):
    from monai_losses_ext.benchmark import speed

    def refuse(*_):
        raise TorchDynamoException("no C++ compiler found\nread the docs")

    monkeypatch.setitem(cases.SHAPES, "2x3x96^3", (1, 3, 16, 16, 16))
    monkeypatch.setattr(speed, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    row = speed.measure_speed("dice", "2x3x96^3", 2, 0)
    assert row["not_compiled"] == "no C++ compiler found" and "compiled_ms" not in row
    monkeypatch.setattr(torch, "compile", lambda function: lambda x, y: 2 * function(x, y))
    with pytest.raises(RuntimeError, match="ours and MONAI DiceLoss, compiled must agree"):
        speed.measure_speed("dice", "2x3x96^3", 2, 0)


def test_large_shapes_have_few_losses_on_a_cpu_unless_they_are_asked_for():
    def chosen(*options):
        arguments = command._parser().parse_args(["speed", "--device", "cpu", *options])
        assert suites._choose_cases(arguments) == bool(options)
        return [loss for loss, shape in arguments.cases if shape == "1x118x128^3"]

    assert chosen() == ["dice_ce", "floor"]
    assert chosen("--losses", "focal") == ["focal"]


@pytest.mark.filterwarnings("ignore")
def test_the_suite_for_a_gpu_on_a_cpu(monkeypatch):
    monkeypatch.setitem(cases.SHAPES, "2x3x128^3", (2, 3, 16, 16, 16))
    monkeypatch.setitem(cuda.COPIED_BYTES, "cpu", 2**16)
    monkeypatch.setattr(cuda, "PARITY_SIDE", 8)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # a compiler of C++ takes half a minute
    cases_asked_for = ["--losses", "dice_ce", "dice_focal_boundary", "--shapes", "2x3x128^3"]
    arguments = command._parser().parse_args(["speed", "--repeats", "2", "--seed", "0", *cases_asked_for])
    arguments.cases = [(loss, "2x3x128^3") for loss in arguments.losses]
    result = suites.measure_on("cpu", arguments, about_run("cpu", 2, 0))
    table = report.cuda_table(json.loads(json.dumps(result)))
    sides = [set(row["sides"]) for row in result["speed"]]
    assert sides == [
        {"ours", "MONAI DiceCELoss", "MONAI DiceCELoss, compiled"},
        {"ours", "ours, Dice alone"},
    ]
    for row in result["speed"]:
        assert row["floor_ms"] > 0 and all(f"| {row['loss']} | {name} |" in table for name in row["sides"])
        assert all(side["ms"]["both"]["median"] > 0 for side in row["sides"].values())
    assert result["maps"][0]["ours"]["median"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_budget_of_memory_on_a_cpu(monkeypatch):
    monkeypatch.setitem(cases.SHAPES, "1x118x128^3", (1, 7, 8, 8, 8))
    row = cuda.measure_budget("dice_ce", "1x118x128^3", None, 0, "cpu")
    assert row["gib"] == pytest.approx((3 * 7 * 4 + 8) * 8**3 / 2**30)
    about = json.loads((ROOT / "docs" / "benchmarks" / "speed--cpu.json").read_text())["about"]
    table = report.budget_table({"about": about, "memory": [row]})
    assert table.count("| runs in 0.00 GiB |") == 2 and "| dice_ce | MONAI DiceCELoss |" in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ours_runs_in_a_memory_that_monais_does_not_fit():
    ours, theirs = cuda.measure_budget("dice_ce", "1x118x128^3", None, 0, "cuda")["sides"].values()
    assert ours["copies"] < 1.1 and ours["fits"] and not theirs["fits"]


def test_a_loss_that_does_not_fit_is_a_result():
    def hungry(logits, labels):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    logits, labels = cases.make_batch((1, 2, 8, 8), 0)
    assert cuda._measure_side(hungry, logits, labels, 1) == {"error": "out of memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--tasks", "Task04"], "--tasks: must be one of"),
        (["speed", "--losses", "dise"], "--losses on cpu: must be one of"),
        (["speed", "--shapes", "1x118x256^3"], "--shapes: must be one of"),
        (["speed", "--device", "cuda", "--losses", "dice_focal_ce"], "--losses on cuda: must be one of"),
        pytest.param(
            ["speed", "--device", "cuda"],
            "--device cuda: this torch sees no GPU.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments, message, capsys):
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
