# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A training that is killed and resumed comes to the same numbers as one that ran through, in one MLflow run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles.helpers import TrackedRun, bundle_run, only_run, only_run_folder

EPOCHS = 4
KILLED_IN_EPOCH = 3
# Dropout, so that the global random numbers matter; every kind of state that a loss can have.
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "dropout": 0.2,
}
KILLER = """
import os, signal
from ignite.engine import Events

class Killer:
    def __init__(self, iteration):
        self.iteration = iteration

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self)

    def __call__(self, engine):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def loss(weighting: str) -> dict[str, Any]:
    return {"type": "compound", "components": ["dice", "focal"], "weighting": weighting}


@pytest.fixture(scope="module", params=["uncertainty", "dwa"])
def runs(request: pytest.FixtureRequest, bundle: Path, dataset: Path, tmp_path_factory: Any) -> SimpleNamespace:
    """Train once through, and once killed in the middle of an epoch and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "killer.py").write_text(KILLER)
    kill = {"+train#handlers": [{"_target_": "killer.Killer", "iteration": 3 * (KILLED_IN_EPOCH - 1) + 2}]}
    (folder / "kill.json").write_text(json.dumps(kill))
    train = str(bundle / "configs" / "train.json")

    def run(root: str, configs: str, *options: str) -> None:
        common = {"bundle_root": folder / root, "dataset_dir": dataset, "epochs": EPOCHS, "val_interval": 1}
        common |= {"network_def": NETWORK, "loss_config": loss(request.param), "patch_size": [16, 16, 16]}
        arguments = [part for name, value in common.items() for part in (f"--{name}", str(value))]
        bundle_run(folder, configs, *arguments, "--iteration_log", "True", *options)

    run("whole", train)
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run("killed", f"['{train}','{folder / 'kill.json'}']")
    assert killed.value.returncode == -9
    run("killed", train, "--resume", "true")
    tracked = {name: only_run(f"sqlite:///{folder / name}/output/mlruns.db") for name in ("whole", "killed")}
    return SimpleNamespace(folder=folder, loss=loss(request.param), **tracked)


def folder(runs: SimpleNamespace, root: str) -> Path:
    """Return the folder of a root's one run: a resumed training goes on in its own."""
    return only_run_folder(runs.folder / root / "output")


def histories(run: TrackedRun) -> dict[str, list[tuple[int, float]]]:
    """Return every metric of a run as it was logged, duplicates included."""
    names = sorted(run.run.data.metrics)
    entries = {name: run.client.get_metric_history(run.run.info.run_id, name) for name in names}
    return {name: sorted((entry.step, entry.value) for entry in entries[name]) for name in names}


def test_mlflow_has_one_run_without_holes_or_duplicates(runs: SimpleNamespace) -> None:
    whole, killed = histories(runs.whole), histories(runs.killed)
    assert [step for step, _ in killed["loss"]] == [*range(1, EPOCHS + 1)]
    assert [step for step, _ in killed["iteration_loss"]] == [*range(1, 3 * EPOCHS + 1)]
    assert {"loss_dice", "weight_dice", "mean_dice", "lr"} <= set(killed)
    assert killed == whole
    assert runs.killed.run.info.status == "FINISHED"


def test_weights_move(runs: SimpleNamespace) -> None:
    assert len({value for _, value in histories(runs.whole)["weight_dice"]}) > 1


@pytest.mark.parametrize("name", ["model.pt", "model_final.pt"])
def test_networks_are_equal_to_the_bit(runs: SimpleNamespace, name: str) -> None:
    whole, killed = (torch.load(folder(runs, run) / name, weights_only=True) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_curves_tell_of_all_epochs(runs: SimpleNamespace) -> None:
    tables = [(folder(runs, run) / "curves.csv").read_text() for run in ("whole", "killed")]
    assert tables[0] == tables[1]
    assert len(tables[0].splitlines()) == EPOCHS + 1


def test_what_cannot_be_resumed_is_one_line(runs: SimpleNamespace, bundle: Path, dataset: Path) -> None:
    train, run = str(bundle / "configs" / "train.json"), folder(runs, "killed")
    files = {path: path.read_bytes() for path in run.iterdir()}

    def error(root: str, resume: str, *options: str) -> str:
        arguments = ["--dataset_dir", str(dataset), "--bundle_root", str(runs.folder / root), "--resume", resume]
        with pytest.raises(subprocess.CalledProcessError) as caught:
            bundle_run(runs.folder, train, *arguments, *options)
        assert caught.value.returncode == 1
        assert "Traceback" not in caught.value.stderr + caught.value.stdout
        (line,) = [line for line in caught.value.stderr.splitlines() if line.startswith("error: ")]
        assert (caught.value.stdout + caught.value.stderr).count(line[len("error: ") :]) == 1
        return line

    assert "no training to resume" in error("absent", "true")
    assert "'maybe'" in error("absent", "maybe")
    assert f"resume: nothing to do: {run} is finished" in error("killed", "true")
    assert "holds a training already" in error("killed", "false", "--run_name", run.name)
    (run / "finished.json").unlink()  # as if it had been killed at its very end
    same = ["--epochs", str(EPOCHS), "--loss_config", str(runs.loss), "--patch_size", "[16,16,16]"]
    assert "its network does not fit" in error("killed", "true", *same)
    same += ["--network_def", str(NETWORK)]
    assert "a training with epochs 4; this config has 5" in error("killed", "true", *same, "--epochs", "5")
    for option, value, what in (
        ("patch_size", "[16,16,32]", "patch_size#2 16; this config has 32"),
        ("optimizer#lr", "0.5", "#lr#0 0.003; this config has 0.5"),
        ("optimizer#weight_decay", "0.5", "#weight_decay#0 0.05; this config has 0.5"),
        ("optimizer#_target_", "torch.optim.SGD", "#class 'AdamW'; this config has 'SGD'"),
        ("lr_scheduler#warmup_steps", "3", "#warmup_steps"),
    ):
        assert what in error("killed", "true", *same, f"--{option}", value)
    kept = {path: content for path, content in files.items() if path.suffix in (".pt", ".csv", ".png")}
    assert {path: path.read_bytes() for path in kept} == kept
