# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Python with MONAI imported already: ``python -m MODULE ...`` as ever, less the seconds of its imports.

A process imports what every run of a bundle does, computes nothing, and forks for each command: the child has the
working directory, the environment and the arguments of the command, and ends as Python does. It is what the tests run
tens of bundles with, each in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What MONAI's and this package's configs import when a bundle runs.
IMPORTS = (
    "monai.bundle",
    "monai.engines",
    "monai.handlers",
    "monai.networks.nets",
    "monai_losses_ext.handlers",
    "ignite.handlers",
    "matplotlib.pyplot",
    "mlflow",
    "nibabel",
    "torch._dynamo",
    "torch.utils.tensorboard",
)


class WarmPython:
    """A process that runs modules, one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(
        self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python -m module`` and return its exit status and what it printed.

        Raises:
            TimeoutExpired: after that many seconds; the process is killed.
        """
        command = [sys.executable, "-m", module, *arguments]
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/stdout", f"{folder}/stderr"]
            self._send({"module": module, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env),
                        "files": files, "timeout": timeout})  # fmt: skip
            status = self._receive()["status"]
            out, err = (Path(file).read_text() for file in files)
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, status, out, err)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm Python ended with exit status {self._server.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@functools.cache
def warm_python() -> WarmPython:
    """Return this process's own, started when it is first asked for; it ends with the process."""
    return WarmPython()


def _serve() -> dict[str, Any]:
    """Answer requests until they end; in a child, return the one that it is for."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, it is no answer
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            return request
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, request["timeout"])
        _, status = os.waitpid(child, 0)
        in_time = signal.setitimer(signal.ITIMER_REAL, 0)[0] > 0
        answers.write(json.dumps({"status": os.waitstatus_to_exitcode(status) if in_time else None}) + "\n")
        answers.flush()
    raise SystemExit(0)


def _become(request: Mapping[str, Any]) -> None:
    """Make of this process what a fresh one would be."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number, file in enumerate(request["files"], 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    added = [part for part in request["env"].get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [request["cwd"], *added, *(part for part in sys.path if part not in (str(Path(__file__).parent), ""))]
    sys.argv = [request["module"], *request["arguments"]]


if __name__ == "__main__":
    import importlib
    import runpy

    for name in IMPORTS:
        importlib.import_module(name)
    request = _serve()
    _become(request)
    del sys.modules["__main__"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
