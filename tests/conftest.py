# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the same seed for each, and two threads; one where pytest itself works in several processes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import torch

# Without a GPU, Triton interprets its kernels; it must know before it is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# A shell that starts the tests in the background has them ignore these, and so would every process that they start.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config):
    """Compile the CPU kernels once, before several processes would, each for itself; they find them in the cache."""
    is_first = "PYTEST_XDIST_WORKER" not in os.environ and getattr(config.option, "numprocesses", None)
    if is_first and importlib.util.find_spec("numba") is not None:
        code = "from monai_losses_ext.sums.numba import compiled; compiled.kernel()"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
