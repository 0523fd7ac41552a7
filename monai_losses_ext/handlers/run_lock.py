# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One training at a time in a run's folder, and one process at a time at a file.

The operating system releases a file lock when its process ends, however it ends. So no lock is ever left behind by a
process that was killed, and nobody has to judge whether a process id of another host or container still lives.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from monai_losses_ext.errors import UserError, describe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = "training.lock"
_held: dict[Path, IO[str]] = {}


def lock_run(folder: str | os.PathLike[str], make: bool = True) -> None:
    """Claim a run's folder for this process, until the process ends or :func:`unlock_run` gives it back.

    The file ``training.lock`` in the folder tells who writes there; it is removed in the end. A process may claim a
    folder several times. The lock is the operating system's, so that of a process that was killed counts no more. It
    also holds between hosts that share a folder, where the file system has such locks; where it has none, as on
    Windows, the file's own words count for processes of this host.

    Args:
        folder: the run's folder.
        make: make the folder where it is not there; if False, nothing happens then.

    Raises:
        UserError: one line with the process id and the host of the training that writes there; where the disk is full,
            or the file cannot be written for another reason.
    """
    try:
        _claim(folder, make)
    except OSError as error:
        why = describe(error.strerror or type(error).__name__)
        raise UserError(f"output: {Path(folder) / LOCK_NAME} cannot be written ({why}).") from None


def _claim(folder: str | os.PathLike[str], make: bool) -> None:
    path = Path(folder).resolve() / LOCK_NAME
    if path in _held:
        return
    if not make and not path.parent.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open as long as the folder is claimed)
        if not _lock(file):
            owner = _read(file)
            file.close()
            raise _in_use(folder, owner)
        # The owner before may have removed the file between our opening it and its lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        _write(file)
    except OSError:
        with suppress(OSError):  # closing it tries to write once more
            file.close()
        path.unlink(missing_ok=True)
        raise
    if not _held:
        atexit.register(_unlock_all)
    _held[path] = file


def unlock_run(folder: str | os.PathLike[str]) -> None:
    """Give a folder back; nothing happens if this process has not claimed it."""
    path = Path(folder).resolve() / LOCK_NAME
    file = _held.pop(path, None)
    if file is not None:
        if _read(file).startswith(f"process {os.getpid()} "):  # not in a fork, which holds no lock
            path.unlink(missing_ok=True)
        file.close()


@contextmanager
def locked(path: Path, timeout: float = 120.0) -> Iterator[None]:
    """Hold the lock file ``path`` meanwhile; other processes wait for it.

    Raises:
        TimeoutError: if another process holds it for longer than ``timeout`` seconds.
    """
    with open(path, "a+", encoding="utf-8") as file:
        end = time.monotonic() + timeout
        while not _lock(file):
            if time.monotonic() > end:
                raise TimeoutError(f"{path} is locked by another process.")
            time.sleep(0.05)
        yield


def _lock(file: IO[str]) -> bool:
    """Lock an open file without waiting; False if another process has it.

    The kind of lock that belongs to a process: a data loader's workers, which are forks, do not hold it on.
    """
    try:
        if fcntl is None:
            return not _is_alive(_read(file))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return not _is_alive(_read(file))
    return True


def _write(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip()


def _is_alive(owner: str) -> bool:
    """Tell from a lock file's words whether a process of this host holds it."""
    match = re.match(r"process (\d+) on ([^,]+),", owner)
    if match is None or match[2] != socket.gethostname() or int(match[1]) == os.getpid():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _in_use(folder: str | os.PathLike[str], owner: str) -> UserError:
    who = owner or "another process"
    return UserError(
        f"run: {os.fspath(folder)} is in use by another training ({who}). Wait for its end, or give another --run_name."
    )


def _unlock_all() -> None:
    for path in list(_held):
        unlock_run(path.parent)
