# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a run writes, which training is resumed, and whose weights are evaluated and used.

Every run has a folder of its own, ``output/<run_name>/``. A training keeps there its state after each epoch, its best
and its last weights, its curves, pictures and config. It is finished when ``finished.json`` is there, which is written
after everything else and as a whole: a training that is killed at any time before is an unfinished one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import UserError

STATE, BEST, MARK = "training_state.pt", "model.pt", "finished.json"
BACKLOG = "mlflow_backlog_*.jsonl"
TRACES = (STATE, BEST, MARK, "*_config.json", "evaluation.csv", BACKLOG)  # of a run, in its folder
MAX_NAME = 100  # letters: the folder's name and those of files with it in theirs stay below the systems' 255 bytes
T = TypeVar("T")


def new_name(kind: str, loss: Any = None) -> str:
    """Return a name that no other run has, with the loss in it: ``train_dice_focal_20260131_235959_1a2b``."""
    parts = [
        kind,
        *([loss_name(loss)] if loss is not None else []),
        time.strftime("%Y%m%d_%H%M%S"),
        uuid.uuid4().hex[:4],
    ]
    return _of_first_rank(lambda: "_".join(parts))


def loss_name(loss: Any) -> str:
    """Return what a loss is called in a run's name: the components of a compound, else its class without ``Loss``."""
    names = list(getattr(loss, "names", ())) or [type(loss).__name__.removesuffix("Loss")]
    text = "_".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower() for name in names)
    return re.sub(r"\W+", "_", text)[:60].strip("_") or "loss"


def choose_name(output_dir: str, loss: Any, resume: Any = False) -> str:
    """Return a new training's name or, with ``resume``, that of the newest training that is not finished.

    Raises:
        UserError: if there is none to resume.
    """
    if not flag("resume", resume):
        return new_name("train", loss)
    return _of_first_rank(lambda: _newest_unfinished(Path(output_dir)))


def check_run(output_dir: str, run_name: str, resume: Any = False) -> None:
    """Check that a run can be what its options say, before anything is read or written.

    Args:
        output_dir: folder of the bundle's runs.
        run_name: name of the run's folder.
        resume: whether the run goes on from its state.

    Raises:
        UserError: for a path or a name that cannot be one, a run to resume that is not there or is finished, a new run
            whose folder holds another one already.
    """
    check_path("output_dir", output_dir)
    folder, going_on = Path(output_dir) / check_name(run_name), flag("resume", resume)
    _of_first_rank(lambda: _check_folder(folder, going_on))


def begin_run(run_dir: str, resume: Any = False, save: bool = True) -> None:
    """Make the run's folder, and say in one line where the run writes.

    Args:
        run_dir: the run's folder.
        resume: whether the run goes on from its state.
        save: whether this process writes; of several, the first one does.

    Raises:
        UserError: for a folder that cannot be written to.
    """
    if save:
        make_folder(run_dir)
        print(f"{'resuming' if flag('resume', resume) else 'run'}: {run_dir}", flush=True)


def finish_run(run_dir: str, save: bool = True) -> None:
    """Mark a training as finished. Last entry of ``run``.

    Raises:
        UserError: where the mark cannot be written, for a full disk or another reason.
    """
    if not save:
        return
    mark = Path(run_dir) / MARK
    unfinished = mark.with_name(f"{MARK}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump({"finished": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(mark)
    except OSError as error:
        raise UserError(
            f"output: {mark} cannot be written ({error.strerror}). The training is complete but for this mark; free "
            "some space, then write it with --resume true."
        ) from None


def trained_weights(bundle_root: str, output_dir: str) -> str:
    """Return the path of the weights to evaluate or to use where the user names none.

    They are the best ones of the newest finished training in ``output_dir``, else ``models/model.pt`` of the bundle,
    whether that is there or not. Of several processes the first one looks, so that all take the same.
    """
    return _of_first_rank(lambda: _newest_weights(Path(bundle_root), Path(output_dir)))


def say_weights(ckpt_path: str, save: bool = True) -> None:
    """Say in one line which weights are used; of several processes, the first one does.

    Raises:
        UserError: if they are not there.
    """
    check_path("ckpt_path", ckpt_path)
    if not os.path.isfile(ckpt_path):
        raise UserError(f"ckpt_path: there are no trained weights at {ckpt_path}. Train first, or give --ckpt_path.")
    if save:
        print(f"weights: {ckpt_path}", flush=True)


def flag(name: str, value: Any) -> bool:
    """Return a switch of the config as true or false; from the command line ``--resume true`` comes as a text.

    Raises:
        UserError: if it is neither.
    """
    words = {"true": True, "false": False}
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise UserError(f"{name}: must be true or false; got {value!r}.")


def check_name(name: Any) -> str:
    """Return the name of a run if it can be that of a folder, of an MLflow run and of a value in a config.

    Raises:
        UserError: if it cannot.
    """
    text = str(name)
    if len(text) > MAX_NAME:
        raise UserError(f"run_name: must have at most {MAX_NAME} letters; got {len(text)}: {text[:40]!r}...")
    if not re.fullmatch(r"[^\s./\\'\"#:?%*<>|@$][^/\\'\"#:?%*<>|\n]*", text) or text != text.strip():
        rule = "must be the name of a folder, without any of / \\ ' \" # : ? % * < > |"
        raise UserError(f"run_name: {rule}; got {text!r}.")
    return text


def check_path(option: str, path: Any) -> None:
    """Check that a path has come through MONAI's config as it was typed.

    Raises:
        UserError: for one with ``#``, which MONAI takes for a separator of names and turns into ``::``.
    """
    if "::" in str(path):
        raise UserError(
            f"{option}: must be a path without '#' or '::', which MONAI's configs read as names; got {path!r}."
        )


def store_uri(output_dir: str) -> str:
    """Return the address of the MLflow store in a folder, with what such an address reads otherwise escaped."""
    path = os.path.join(os.path.abspath(os.path.expanduser(output_dir)), "mlruns.db")
    return "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder, and check that files can be written there: before the work, not after it.

    Raises:
        UserError: if they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        trial = Path(folder) / f".{uuid.uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"output: {folder} cannot be written to ({error.strerror}).") from None


def _check_folder(folder: Path, going_on: bool) -> None:
    """Check that a run can go on in its folder, or begin there."""
    if going_on:
        if not (folder / STATE).is_file():
            raise UserError(f"resume: there is no training to resume in {folder}. Train without --resume.")
        if (folder / MARK).is_file():
            raise _nothing_to_do(folder)
    else:
        taken = [path.name for pattern in TRACES for path in sorted(folder.glob(pattern))]
        if taken:
            what, else_do = "run", "remove that folder"
            if STATE in taken:
                what, else_do = "training", "--resume true with this one to go on with it"
            raise UserError(
                f"run_name: {folder} holds a {what} already ({taken[0]}). Give another --run_name, or {else_do}."
            )


def _newest_unfinished(output: Path) -> str:
    states = _newest_first(output, STATE)
    unfinished = [state.parent.name for state in states if not state.with_name(MARK).is_file()]
    if unfinished:
        return unfinished[0]
    if states:
        folders = [state.parent for state in states]
        raise _nothing_to_do(next((folder for folder in folders if any(folder.glob(BACKLOG))), folders[0]))
    raise UserError(f"resume: there is no training to resume in {output}. Train without --resume.")


def _nothing_to_do(folder: Path) -> UserError:
    """Return the error for a finished training, with the command that sends what MLflow was not told."""
    hint = "Train without --resume for a new run."
    if any(folder.glob(BACKLOG)):
        command = f"python -m monai_losses_ext send_metrics {shlex.quote(str(folder))}"
        hint = f"What MLflow was not told waits there; to send it: {command}"
    return UserError(f"resume: nothing to do: {folder} is finished. {hint}")


def _newest_weights(bundle_root: Path, output: Path) -> str:
    found = [mark.with_name(BEST) for mark in _newest_first(output, MARK) if mark.with_name(BEST).is_file()]
    return str(found[0] if found else bundle_root / "models" / BEST)


def _newest_first(output: Path, name: str) -> list[Path]:
    """Return the files of a name in the runs' folders, the newest first."""
    found = [folder / name for folder in output.iterdir()] if output.is_dir() else []
    return sorted(
        (path for path in found if path.is_file()), key=lambda path: (path.stat().st_mtime_ns, path), reverse=True
    )


def _of_first_rank(work: Callable[[], T]) -> T:
    """Return what the first of several processes finds, in all of them; what it raises, all raise."""
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]
