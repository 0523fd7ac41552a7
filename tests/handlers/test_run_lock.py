# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A run's folder belongs to one process, as real processes see it."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers.run_lock import LOCK_NAME, lock_run, unlock_run

HOLDER = """
import os, sys, time
from monai_losses_ext.handlers.run_lock import lock_run
lock_run(sys.argv[1])
if os.fork() == 0:  # as a data loader's worker, which outlives its parent for a while
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_second_training_is_told_of_the_first_until_that_is_killed(holder: subprocess.Popen, tmp_path: Path) -> None:
    named = rf"^run: {re.escape(str(tmp_path))} is in use by another training \(process {holder.pid} on "
    with pytest.raises(UserError, match=named + re.escape(socket.gethostname())) as caught:
        lock_run(tmp_path)
    assert "\n" not in str(caught.value)
    holder.kill()  # its child lives on, and does not hold the lock
    holder.wait()
    lock_run(tmp_path)
    lock_run(tmp_path)  # the same process may ask twice
    assert f"process {os.getpid()} on " in (tmp_path / LOCK_NAME).read_text()
    unlock_run(tmp_path)
    assert not (tmp_path / LOCK_NAME).exists()
    unlock_run(tmp_path)


def test_lock_is_gone_after_a_normal_end(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.stdin.close()  # its child lives on and keeps the other end of its output open
    assert holder.wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words in the file count then: those of a dead process, and of none, do not."""
    monkeypatch.setattr("monai_losses_ext.handlers.run_lock.fcntl", None)
    lock = tmp_path / LOCK_NAME
    lock.write_text(f"process {os.getppid()} on {socket.gethostname()}, since now")
    with pytest.raises(UserError, match=f"process {os.getppid()} on"):
        lock_run(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for words in (f"process {ended.pid} on {socket.gethostname()}, since now", "", "nonsense"):
        lock.write_text(words)
        lock_run(tmp_path)
        unlock_run(tmp_path)


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder can be claimed when there is space again."""

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("monai_losses_ext.handlers.run_lock._write", full)
        with pytest.raises(UserError, match=r"^output: .*training\.lock cannot be written \(.*No space left[^\n]*$"):
            lock_run(tmp_path)
    assert not list(tmp_path.iterdir())
    lock_run(tmp_path)
    unlock_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: [^\n]* cannot be written \(.*(Not a directory|File exists)[^\n]*$"):
        lock_run(tmp_path / "file" / "run")
