# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What cannot be measured, or not be written, is said in one line before anything is measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from monai_losses_ext.benchmark import command, suites
from monai_losses_ext.benchmark.about import about_run
from monai_losses_ext.benchmark.alone import run_alone

TRAINED = ["--bundle", "DIR/msd_hippocampus_mri_segmentation", "--dataset-dir", "DIR", "--folder", "DIR"]
OPTIONS = {
    "shapes": ["2x3x96^3"],
    "losses": ["dice"],
    "tasks": ["Task09_Spleen"],
    "purposes": ["thin_tubes"],
    "repeats": ["9"],
    "memory-gib": ["1"],
    "bundle": ["DIR"],
    "folder": ["DIR"],
    "epochs": ["30"],
    "dataset-dir": ["DIR"],
}


@pytest.fixture
def nothing_is_measured(monkeypatch, tmp_path):
    """Fail where a suite gets as far as its measurement; nothing was written then."""
    monkeypatch.chdir(tmp_path)
    for name, suite in suites.SUITES.items():
        monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suite, measure=pytest.fail))


def error_of(arguments, capsys):
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").removesuffix("\n")


def trained(suite):
    """Return the options of a trained bundle that a suite takes."""
    return {"quality": TRAINED[:4], "losses": TRAINED, "purpose": TRAINED[4:]}.get(suite, [])


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("suite", [*suites.SUITES, "report"])
def test_an_option_that_a_suite_does_not_take_is_an_error(suite, capsys, tmp_path):
    taken = {name.replace("_", "-") for name in suites.SUITES[suite].options} if suite != "report" else set()
    assert taken <= OPTIONS.keys()
    for option in OPTIONS.keys() - taken:
        error = error_of([suite, f"--{option}", *OPTIONS[option]], capsys)
        assert error.startswith(f"{suite}: takes no --{option}; its options: ")
    assert not list(tmp_path.iterdir())


def test_names_of_losses_are_no_trainings(capsys):
    """They were passed over, and three fixed trainings ran."""
    error = error_of(["losses", *TRAINED, "--losses", "dice", "focal"], capsys)
    assert error.startswith("losses: takes no --losses; its options: --device, --threads, --seed, --out, --bundle")


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("arguments", [["speed"], ["losses", *TRAINED]], ids=" ".join)
def test_outside_of_a_checkout_the_file_must_be_named(arguments, capsys, tmp_path):
    error = error_of(arguments, capsys)
    assert error == "--out: must be given outside of a checkout of the project, which has docs/benchmarks."
    assert not list(tmp_path.iterdir())


def test_a_report_outside_of_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(["report"], capsys)
    assert error == "report: must be run in the folder of a checkout of the project; got 'no docs/benchmarks here'."


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    "arguments",
    [
        ["speed", "--losses", "floor"],
        ["speed", "--shapes", "2x3x96^3"],
        ["memory", "--losses", "dice"],
        ["step", "--tasks", "Task04_Hippocampus"],
        ["distance"],
        ["distance", "--dataset-dir", "DIR", "--shapes", "2x3x96^3"],
        ["speed", "--repeats", "2"],
        ["losses", *TRAINED, "--epochs", "2"],
        ["losses", "--bundle", "bundles/msd_spleen_ct_segmentation", *TRAINED[2:]],
        ["quality", "--bundle", "bundles/msd_spleen_ct_segmentation", *TRAINED[2:4]],
    ],
    ids=" ".join,
)
def test_a_part_does_not_replace_the_whole(arguments, capsys, tmp_path):
    assert error_of(arguments, capsys).startswith("--out: must be given where not all is measured")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("suite", ["speed", "memory", "step"])
def test_no_gpu(suite, capsys):
    assert error_of([suite, "--device", "cuda"], capsys) == "--device cuda: this torch sees no GPU."


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_distance_is_measured_on_a_cpu_alone(capsys, monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    error = error_of(["distance", "--device", "cuda", "--dataset-dir", "DIR"], capsys)
    assert error == "distance: --device: must be one of cpu; got 'cuda'."


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(("has_gpu", "other", "own"), [(False, "cuda", "cpu"), (True, "cpu", "cuda")])
@pytest.mark.parametrize("suite", ["quality", "losses"])
def test_a_bundle_takes_its_own_device(suite, has_gpu, other, own, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    error = error_of([suite, "--device", other, *trained(suite)], capsys)
    assert error == f"{suite}: --device: must be one of {own}; got {other!r}."


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("suite", ["speed", "memory", "step", "distance", "quality", "losses"])
def test_a_file_that_cannot_be_written(suite, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be shown shortened
    (tmp_path / "file").touch()
    for out in ("file/x.json", "."):
        error = error_of([suite, *trained(suite), "--out", out], capsys)
        assert error.startswith("--out: must be a file that can be written to (") and error.endswith(f"; got '{out}'.")


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    ("suite", "given", "missing"),
    [("quality", [], "bundle"), ("losses", TRAINED[:2], "dataset-dir"), ("losses", TRAINED[:4], "folder")],
)
def test_folders_that_a_training_needs(suite, given, missing, capsys):
    assert error_of([suite, *given], capsys) == f"{suite}: needs --{missing}."


@pytest.mark.parametrize(
    ("option", "value", "minimum"), [("--repeats", "1", 2), ("--threads", "0", 1), ("--epochs", "-3", 1)]
)
def test_numbers_that_are_too_small(option, value, minimum, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["speed", f"{option}={value}"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"argument {option}: must be a whole number of at least {minimum}; got {value}.")


@pytest.mark.parametrize("arguments", [("speed", "dice", "2x3x7^3", 2, 0, 1), ("memory", "dice", "2x3x7^3", "ours", 0)])
def test_a_process_that_fails_says_why(arguments):
    with pytest.raises(RuntimeError) as caught:
        run_alone(*arguments)
    assert str(caught.value) == f"{' '.join(map(str, arguments))}: exit status 1: KeyError: '2x3x7^3'"


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux alone tells")
def test_about_says_how_it_was_scheduled():
    assert about_run("cpu", 2, 0)["scheduling"] == "SCHED_OTHER"
    code = (
        "import json, os; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0));"
        "from monai_losses_ext.benchmark.about import about_run; print(json.dumps(about_run('cpu', 2, 0)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    about = json.loads(run.stdout)
    assert about["scheduling"] == "SCHED_BATCH"
    assert about["load_average"] >= 0
