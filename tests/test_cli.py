# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: each command does its one thing, and a mistake is one line on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from monai_losses_ext import __version__
from monai_losses_ext.bundlekit.render import render_task
from monai_losses_ext.cli import main
from monai_losses_ext.data.dataset import read_cases
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import TASKS, get_task
from monai_losses_ext.quickstart import cache_dir

BUNDLE = "msd_hippocampus_mri_segmentation"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what stands on stderr, which must be one line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


def write_bundle(root: Path, train: str, evaluate: str) -> Path:
    """Write a bundle whose two configs evaluate the given expressions."""
    configs = root / BUNDLE / "configs"
    configs.mkdir(parents=True)
    for name, expression in (("train", train), ("evaluate", evaluate)):
        content = {"dataset_dir": "", "output_dir": "", "run_name": "", "epochs": 0, "run": [f"${expression}"]}
        (configs / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_module_runs_and_lists_its_commands() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "monai_losses_ext", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(command in help_text for command in ("quickstart", "data", "bundles", "overlays", "benchmark"))


@pytest.mark.parametrize("arguments", [[], ["train"], ["data", "phantoms"], ["quickstart", "--epochs", "many"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_data_phantoms_writes_cases_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "phantoms"
    assert main(["data", "phantoms", "--task", "Task04_Hippocampus", "--out", str(out), "--cases", "2"]) == 0
    assert len(read_cases(out)) == 2
    assert main(["data", "phantoms", "--task", "Task04_Hippocampus", "--out", str(out), "--scale", "0.5"]) == 0
    assert len(read_cases(out)) == 40
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "synthetic" in printed


@pytest.mark.parametrize(("typed", "meant"), [("Task4_Hippocampus", "Task04_Hippocampus"), ("Liver", "Task03_Liver")])
@pytest.mark.parametrize("command", ["data phantoms", "data download", "bundles verify", "data check"])
def test_unknown_task_is_one_line_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, typed: str, meant: str
) -> None:
    option = "--out"
    if command == "data check":
        make_phantoms("Task04_Hippocampus", tmp_path, n_cases=1, scale=0.1)
        option = "--dataset_dir"
    assert main([*command.split(), "--task", typed, option, str(tmp_path)]) == 1
    assert error_line(capsys).endswith(f"got {typed!r}. Did you mean {meant!r}?\n")


def test_folder_whose_task_is_not_told_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_phantoms("Task04_Hippocampus", tmp_path, n_cases=1, scale=0.1)
    content = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    (tmp_path / "dataset.json").write_text(json.dumps({"training": content["training"]}), encoding="utf-8")
    assert main(["data", "check", "--dataset_dir", str(tmp_path)]) == 1
    assert "or --task must be given; " in error_line(capsys)


@pytest.mark.parametrize("command", ["data phantoms --task Task04_Hippocampus", "bundles render"])
@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    (tmp_path / "file").touch()
    assert main([*command.split(), "--out", str(tmp_path / name)]) == 1
    line = error_line(capsys)
    assert line.startswith("error: out: must be a folder that can be written to (")
    assert str(tmp_path / name) in line


def test_folder_without_bundles_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundles", "check", "--out", str(tmp_path)]) == 1
    assert error_line(capsys).startswith("error: out: must hold the bundles")


def test_bundles_check_fails_on_one_changed_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundles"
    assert main(["bundles", "render", "--out", str(out)]) == 0
    for path in (out / BUNDLE / "configs" / "train.json", tmp_path / "configs" / "losses" / "dice.json"):
        assert main(["bundles", "check", "--out", str(out)]) == 0
        path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
        assert main(["bundles", "check", "--out", str(out)]) == 1
        assert error_line(capsys) == f"{path}: differs from the template\n"
        path.write_text(path.read_text(encoding="utf-8")[:-1], encoding="utf-8")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"monai_losses_ext {__version__}\n"


def test_overlays_says_where_they_are_and_what_each_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlays"]) == 0
    folder, *lines = capsys.readouterr().out.splitlines()
    notes = dict(line.split(maxsplit=1) for line in lines)
    found = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.json")}
    assert found - notes.keys() == {"loss.schema.json"} and not notes.keys() - found
    for name, note in notes.items():
        assert json.loads((Path(folder) / name).read_text(encoding="utf-8"))["_note_"] == note


def test_bundles_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lists the names, copies what is shipped without what a run left in it, and overwrites nothing."""
    assert main(["bundles", "copy"]) == 0
    assert capsys.readouterr().out.split() == sorted(task.bundle for task in TASKS.values())
    assert main(["bundles", "copy", BUNDLE, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a' / BUNDLE}\n"
    names = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert names == render_task(get_task("Task04_Hippocampus")).keys()
    assert main(["bundles", "copy", "Task04_Hippocampus", "--out", str(tmp_path / "a")]) == 1
    assert error_line(capsys).startswith(f"error: out: must not hold {BUNDLE} yet, since nothing is overwritten; got ")
    assert main(["bundles", "copy", "msd_hippocampus", "--out", str(tmp_path / "b")]) == 1
    assert error_line(capsys).endswith(f"got 'msd_hippocampus'. Did you mean {BUNDLE!r}?\n")
    assert not (tmp_path / "b" / "msd_hippocampus").exists()


def test_benchmark_gets_its_options_untouched(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "speed", "--help"])
    assert stop.value.code == 0
    assert "python -m monai_losses_ext.benchmark" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["report"], ["quality"]])
def test_benchmark_that_fails_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 1
    assert error_line(capsys).startswith("error: ")


def test_quickstart_without_bundles_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--bundles", str(tmp_path)]) == 1
    assert error_line(capsys) == f"error: bundles: must be a folder with {BUNDLE}; got {tmp_path}.\n"
    assert not (tmp_path / "out").exists()


def test_quickstart_stops_at_the_step_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundles = write_bundle(tmp_path / "bundles", train="1/0", evaluate="1")
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--bundles", str(bundles), "--cases", "2"]) == 1
    printed = capfd.readouterr()
    assert "ZeroDivisionError" in printed.err  # the step's own message is shown
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: exit status 1")
    assert "train.json" in last
    assert "[2/3]" in printed.out
    assert "[3/3]" not in printed.out


def test_cache_folder_honours_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "monai_losses_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "monai_losses_ext"


def test_quickstart_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A short real one: trains, evaluates, and says where everything is."""
    short = ["quickstart", "--out", str(tmp_path), "--epochs", "1", "--cases", "4"]
    assert main(short) == 0
    printed = capfd.readouterr().out
    (results,) = tmp_path.glob("run_*")
    for name in ("train/curves.png", "train/predictions.png", "evaluate/evaluation.csv", "train/model.pt"):
        assert (results / name).is_file()
        assert str(results / name) in printed
    assert f"sqlite:///{results / 'mlruns.db'}" in printed
    assert "anterior" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"phantoms", results.name}
