# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle's training that is told to stop, and one that finds its folder in use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from bundles.helpers import REPOSITORY, only_run

from monai_losses_ext.handlers.run_lock import LOCK_NAME

NETWORK = (
    "{'_target_': 'UNet', 'spatial_dims': 3, 'in_channels': 1, 'out_channels': 3, 'channels': [4, 8], 'strides': [2]}"
)


def start(bundle: Path, dataset: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(bundle / "configs" / "train.json")]
    command += ["--dataset_dir", str(dataset), "--output_dir", str(output), "--run_name", "mine"]
    command += ["--network_def", NETWORK, "--patch_size", "[16,16,16]", "--epochs", "1000", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    return subprocess.Popen(
        command, cwd=output, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_second_training_of_a_folder_is_refused_and_sigterm_ends_the_first(
    bundle: Path, dataset: Path, tmp_path: Path
) -> None:
    first = start(bundle, dataset, tmp_path)
    try:
        state = tmp_path / "mine" / "training_state.pt"
        end = time.monotonic() + 240
        while not state.is_file() and time.monotonic() < end and first.poll() is None:
            time.sleep(0.2)
        owner = (tmp_path / "mine" / LOCK_NAME).read_text()
        assert owner.startswith(f"process {first.pid} on ")
        second = start(bundle, dataset, tmp_path, "--resume", "true")
        errors = [line for line in second.communicate()[1].splitlines() if line.startswith("error: ")]
        assert second.returncode == 1
        assert len(errors) == 1
        assert f"is in use by another training ({owner})" in errors[0]
        first.send_signal(signal.SIGTERM)
        _, printed = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGTERM
    assert [line for line in printed.splitlines() if line.startswith("stopped by SIGTERM in epoch ")]
    assert "Traceback" not in printed
    assert "trainer" in torch.load(state, weights_only=True)
    assert not (tmp_path / "mine" / LOCK_NAME).exists()
    run = only_run(f"sqlite:///{tmp_path}/mlruns.db").run
    assert run.info.status == "KILLED"
    assert {"loss_components", "learning_rate", "dataset_fingerprint", "seed", "version_torch"} <= set(run.data.params)
