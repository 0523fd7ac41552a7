# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What each bundle brings as Python: errors of one line, the folders of runs, the device, the mirrored inference."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bundles.helpers import REPOSITORY, on_path
from ignite.engine import Engine
from monai.optimizers import WarmupCosineSchedule

from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import get_task
from monai_losses_ext.errors import ShapeError, UserError
from monai_losses_ext.handlers import TrainingState

TEMPLATE = REPOSITORY / "monai_losses_ext" / "bundlekit" / "template"
# An error as MONAI, Ignite and a loader's worker hand it on; then one that is nobody's fault but the program's.
WRAPPED = """
import logging, sys
sys.path.insert(0, {template!r})
from scripts.errors import UserError, one_line_errors
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
one_line_errors()
one_line_errors()
try:
    raise UserError("caught")
except UserError:
    print("alive")
try:
    try:
        raise {error}
    except Exception as error:
        logging.getLogger("ignite").error(f"run is terminating due to exception: {{error}}")
        raise RuntimeError("Failed to instantiate component\\nin two lines") from error
except RuntimeError as wrapped:
    logging.getLogger("stats").exception("Exception")
    raise RuntimeError("outermost") from wrapped
"""


@pytest.fixture
def scripts() -> Iterator[Any]:
    """Return a function that imports one of the scripts by name."""
    on_path(TEMPLATE)

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"scripts.{name}")

    return load


def ended(error: str) -> subprocess.CompletedProcess[str]:
    code = WRAPPED.format(template=str(TEMPLATE), error=error)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_users_mistake_is_one_line_and_any_other_error_is_whole() -> None:
    done = ended("UserError('epochs: must be 1 or more; got 0.')")
    assert (done.returncode, done.stderr) == (1, "error: epochs: must be 1 or more; got 0.\n")
    assert done.stdout == "alive\n"  # nothing is logged of it
    done = ended("KeyError('bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "KeyError: 'bug'" in done.stderr
    assert "terminating due to exception" in done.stdout


def test_line_is_found_behind_what_wraps_it(scripts: Any) -> None:
    line = scripts("errors").user_line

    class CaseError(UserError):
        pass

    def caused(error: Exception, cause: BaseException) -> Exception:
        error.__cause__ = cause
        return error

    worker = "Caught {} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n{}"
    assert line(UserError("a: b")) == line(caused(KeyError(), UserError("a: b"))) == "a: b"
    assert line(caused(RuntimeError("x"), caused(RuntimeError("y"), ShapeError("shape: c")))) == "shape: c"
    text = worker.format("CaseError", "monai_losses_ext.data.bad_case.CaseError: case 1: cut off\n")
    assert line(CaseError(text)) == "case 1: cut off"
    inner = "monai_losses_ext.errors.UserError: no map: at all\n\nThe above exception\nRuntimeError: applying transform"
    assert line(RuntimeError(worker.format("RuntimeError", inner))) == "no map: at all"
    assert line(ValueError("UserError: a text alone")) is None
    assert line(None) is None
    unrelated = KeyError("bug")
    unrelated.__context__, unrelated.__suppress_context__ = UserError("caught before"), True
    assert line(unrelated) is None


def test_library_never_ends_the_process() -> None:
    """A caught mistake leaves a running Python, in a plain process without any bundle."""
    code = """
import torch
from monai.bundle import ConfigParser
from monai_losses_ext import get_loss
from monai_losses_ext.engine import RunningConfig, check_data, check_processes
from monai_losses_ext.distributed import own_device
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import ScheduledTrainer, WeightSchedule
parser = ConfigParser({"c": {"_target_": "monai_losses_ext.engine.RunningConfig"}, "epoch": 1})
config = parser.get_parsed_content("c")
mistakes = [lambda: get_loss("dise"), lambda: check_data("/nowhere"), lambda: check_processes(1, 2), own_device,
            lambda: WeightSchedule(torch.nn.Identity(), {}), config.check]
for mistake in mistakes:
    try:
        mistake()
    except UserError as error:
        assert "\\n" not in str(error), error
        print("caught")
try:
    RunningConfig().parser
except RuntimeError:
    print("caught")
"""
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["caught"] * 7, done.stderr
    assert done.returncode == 0


def touch(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (seconds, seconds))


def test_weights_are_those_of_the_newest_finished_training(scripts: Any, tmp_path: Path) -> None:
    weights = scripts("runs").trained_weights
    output = tmp_path / "output"

    def taken() -> str:
        return str(Path(weights(str(tmp_path), str(output))).relative_to(tmp_path))

    assert taken() == "models/model.pt"
    for name, second in (("old", 10), ("new", 20), ("killed", 30), ("without", 40)):
        touch(output / name / "training_state.pt", second)
        if name != "without":  # a validation that never had a value
            touch(output / name / "model.pt", second)
    assert taken() == "models/model.pt"
    touch(output / "new" / "finished.json", 25)
    touch(output / "old" / "finished.json", 24)
    touch(output / "without" / "finished.json", 41)
    assert taken() == "output/new/model.pt"


def test_all_processes_take_the_weights_that_the_first_one_finds(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that looks later, when another training has just ended, takes the others' weights all the same."""
    runs = scripts("runs")
    touch(tmp_path / "a" / "model.pt", 10)
    touch(tmp_path / "a" / "finished.json", 10)
    sent: list[Any] = []

    def broadcast(found: list[Any]) -> None:
        if runs.dist.get_rank() == 0:
            sent[:] = found
        found[:] = sent

    monkeypatch.setattr(runs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runs.dist, "broadcast_object_list", broadcast)
    taken = []
    for rank in (0, 1):
        monkeypatch.setattr(runs.dist, "get_rank", lambda rank=rank: rank)
        taken.append(runs.trained_weights(str(tmp_path), str(tmp_path)))
        touch(tmp_path / "b" / "model.pt", 20)
        touch(tmp_path / "b" / "finished.json", 20)
    assert taken == [str(tmp_path / "a" / "model.pt")] * 2


def test_newest_unfinished_training_is_resumed(scripts: Any, tmp_path: Path) -> None:
    runs = scripts("runs")

    def error(work: Any) -> str:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            work()
        return str(caught.value)

    def chosen() -> str:
        return runs.choose_name(str(tmp_path), None, "true")

    assert "no training to resume" in error(chosen)
    touch(tmp_path / "a" / "training_state.pt", 10)
    touch(tmp_path / "b" / "training_state.pt", 20)
    touch(tmp_path / "b" / "finished.json.unfinished", 21)  # killed while it wrote its mark
    assert chosen() == "b"
    runs.finish_run(str(tmp_path / "b"))
    assert chosen() == "a"
    assert "b is finished" in error(lambda: runs.check_run(str(tmp_path), "b", True))
    assert "no training to resume" in error(lambda: runs.check_run(str(tmp_path), "c", True))
    assert "holds a training already" in error(lambda: runs.check_run(str(tmp_path), "a"))
    runs.finish_run(str(tmp_path / "a"))
    assert "nothing to do" in error(chosen)
    touch(tmp_path / "a" / "mlflow_backlog_a.jsonl", 30)
    for line in (error(chosen), error(lambda: runs.check_run(str(tmp_path), "a", True))):
        assert line.endswith(f"to send it: python -m monai_losses_ext send_metrics {tmp_path / 'a'}")


@pytest.mark.parametrize("trace", ["evaluate_config.json", "evaluation.csv", "mlflow_backlog_a.jsonl", "model.pt"])
def test_no_run_begins_in_the_folder_of_another(scripts: Any, tmp_path: Path, trace: str) -> None:
    runs = scripts("runs")
    touch(tmp_path / "a" / "notes.txt", 10)
    runs.check_run(str(tmp_path), "a")  # a folder of the user's, without a run in it
    touch(tmp_path / "a" / trace, 10)
    with pytest.raises(ValueError, match=rf"^run_name: .* holds a run already \({trace}\)\. Give another[^\n]*$"):
        runs.check_run(str(tmp_path), "a")


def test_names_of_runs(scripts: Any) -> None:
    runs = scripts("runs")
    assert len({runs.new_name("train") for _ in range(20)}) == 20
    compound = type("CompoundLoss", (), {"names": ["dice", "Focal loss"]})()
    assert runs.loss_name(compound) == "dice_focal_loss"
    assert runs.loss_name(type("TverskyLoss", (), {})()) == "tversky"
    assert runs.loss_name(type("DiceCELoss", (), {})()) == "dice_ce"
    for name in ("run 1", "träining", "a.b", "train_dice_2026", 7):
        assert runs.check_name(name) == str(name)
    for name in ("", ".", "..", "a/b", "a'b", 'a"b', "a#b", "a::b", "50%", "what?", " a", "a\nb", "@a", "$a"):
        with pytest.raises(ValueError, match="run_name: must be the name of a folder"):
            runs.check_name(name)


def test_names_of_runs_have_an_end(scripts: Any, tmp_path: Path) -> None:
    runs = scripts("runs")
    runs.check_run(str(tmp_path), "a" * 100)
    with pytest.raises(ValueError, match=r"^run_name: must have at most 100 letters; got 101: [^\n]*$"):
        runs.check_run(str(tmp_path), "a" * 101)


def test_full_disk_at_the_last_write_is_one_line(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = scripts("runs")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", full)
        with pytest.raises(ValueError, match=r"^output: .*finished\.json cannot be written \(No space left[^\n]*$"):
            runs.finish_run(str(tmp_path))
    assert not (tmp_path / "finished.json").exists()
    runs.finish_run(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["finished.json"]


def test_store_is_where_the_path_says(scripts: Any, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    for name in ("plain", "what?", "a%20b", "a b"):
        url = make_url(scripts("runs").store_uri(str(tmp_path / name)))
        assert (url.database, dict(url.query)) == (str(tmp_path / name / "mlruns.db"), {})


def test_mirrored_inference_is_the_mean_over_mirror_images(scripts: Any) -> None:
    image, network = torch.randn(1, 1, 4, 5, 6), torch.nn.Conv3d(1, 2, 3, padding=1)
    infer = scripts("inferer").MirrorInferer(lambda x, net: net(x), [[], [2], [2, 3]])
    with torch.no_grad():
        parts = [network(image), network(image.flip(2)).flip(2), network(image.flip(2, 3)).flip(2, 3)]
        assert torch.allclose(infer(image, network), torch.stack(parts).mean(0), atol=1e-6)


def test_options_of_an_optimizer_are_those_that_were_asked_for(scripts: Any) -> None:
    train = scripts("train")
    network, loss = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    groups = train.parameter_groups(network, loss, 0.5)
    assert [len(group["params"]) for group in groups] == [2, 2]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
    before = train.optimizer_settings(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.001)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert train.optimizer_settings(optimizer) == before
    assert (before["class"], before["lr"], before["weight_decay"]) == ("AdamW", [0.1, 0.5], [0.01, 0.0])


@pytest.mark.parametrize(
    "other",
    [
        lambda o: WarmupCosineSchedule(o, warmup_steps=3, t_total=10),
        lambda o: WarmupCosineSchedule(o, warmup_steps=2, t_total=10, end_lr=1e-3),
        lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=3),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.StepLR(o, 2), torch.optim.lr_scheduler.StepLR(o, 3)], milestones=[4]
        ),
    ],
)
def test_resume_with_another_schedule_is_one_line(scripts: Any, tmp_path: Path, other: Any) -> None:
    """Each kind of schedule is known again after a few steps, and told from another one."""

    def training(schedule: Any, resume: bool, epochs: int = 2) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = schedule(optimizer)
        same = {"lr_scheduler": scripts("train").scheduler_settings(scheduler)}
        metric = [1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []
        engine = Engine(lambda *_: (optimizer.step(), scheduler.step(*metric)))
        TrainingState(tmp_path / "state.pt", {"lr_scheduler": scheduler}, same=same, resume=resume).attach(engine)
        engine.run([0], max_epochs=epochs)

    training(other, False)
    training(other, True, 3)
    with pytest.raises(UserError, match=r"^resume: [^\n]* with lr_scheduler[^\n]*; this config has [^\n]*$"):
        training(lambda o: WarmupCosineSchedule(o, warmup_steps=2, t_total=10), True)


def test_fingerprint_tells_data_sets_apart(scripts: Any, tmp_path: Path) -> None:
    task = get_task("Task04_Hippocampus")
    first = make_phantoms(task, tmp_path / "a", 2, 0, 0.5)
    fingerprint = scripts("train").data_fingerprint
    shutil.copytree(first, tmp_path / "moved")
    assert fingerprint(str(first)) == fingerprint(str(tmp_path / "moved")) != ""
    image = next((tmp_path / "moved" / "imagesTr").iterdir())
    image.write_bytes(image.read_bytes() + b"x")
    assert fingerprint(str(first)) != fingerprint(str(tmp_path / "moved"))
