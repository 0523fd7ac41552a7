# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training step needs, against a count by hand and against the rows."""

from __future__ import annotations

import dataclasses

import pytest

from monai_losses_ext.bundlekit.memory import training_memory_gb
from monai_losses_ext.data.tasks import TASKS, Task, get_task


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_rows_say_what_a_step_needs(task: Task) -> None:
    assert task.training.memory_gb == pytest.approx(training_memory_gb(task.training), rel=0.1)


@pytest.mark.parametrize(("batch_size", "patches_per_case"), [(1, 1), (3, 2)])
def test_a_convolution_keeps_its_input(batch_size: int, patches_per_case: int) -> None:
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 2, "out_channels": 5, "kernel_size": 3, "padding": 1}
    training = dataclasses.replace(
        get_task("Task04_Hippocampus").training,
        network_def=network,
        patch_size=(8, 9, 10),
        batch_size=batch_size,
        patches_per_case=patches_per_case,
    )
    patches = batch_size * patches_per_case * 8 * 9 * 10
    parameters = 5 * 2 * 3**3 + 5
    expected = 4 * (patches * 2 + 4 * parameters + 2 * patches * 5)
    assert training_memory_gb(training) == pytest.approx(expected / 1e9, rel=1e-6)
