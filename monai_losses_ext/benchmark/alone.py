# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A measurement in a process of its own: what a process has run before changes its times and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run_alone(module: str, *arguments: str | int) -> Any:
    """Run a module of this folder in a fresh process and return what it prints last, which is JSON.

    Args:
        module: its name, such as ``speed``.
        arguments: of its command line.

    Raises:
        RuntimeError: where it fails; with the last line that it wrote to stderr.
    """
    words = [module, *map(str, arguments)]
    command = [sys.executable, "-m", f"{__package__}.{module}", *words[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"{' '.join(words)}: exit status {done.returncode}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])
