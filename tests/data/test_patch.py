# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A patch that is refused comes with one that trains, for every task's network."""

from __future__ import annotations

import re

import pytest
import torch
from monai.bundle import ConfigParser

from monai_losses_ext.data.patch import check_patch, smallest_patch, stride_product
from monai_losses_ext.data.tasks import TASKS, Task
from monai_losses_ext.errors import UserError


def trains(task: Task, patch: list[int]) -> bool:
    """Tell whether the task's own network takes a patch in training: on the meta device, which has no numbers."""
    with torch.device("meta"):
        network = ConfigParser({"network": task.training.network_def}).get_parsed_content("network").train()
        try:
            network(torch.empty(1, len(task.channels), *patch))
        except (ValueError, RuntimeError):
            return False
    return True


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_what_the_error_recommends_trains(task: Task) -> None:
    network = task.training.network_def
    product = stride_product(network["strides"], 3)
    for patch in ([1, 1, 1], [16, 16, 16], product, [n + 1 for n in product]):
        try:
            check_patch(patch, network["strides"], network)
        except UserError as error:  # noqa: PERF203
            found = re.search(r"Try \[(\d+), (\d+), (\d+)\]\.$", str(error))
            assert found is not None
            recommended = [int(n) for n in found.groups()]
            assert trains(task, recommended)
            check_patch(recommended, network["strides"], network)
            assert not trains(task, patch)
        else:
            assert trains(task, patch)
    assert trains(task, smallest_patch(network["strides"], 3))


def test_one_voxel_at_the_bottom_is_refused_for_an_instance_norm_alone() -> None:
    with pytest.raises(UserError, match=r"more than one voxel at the network's bottom .* Try \[16, 8\]\."):
        check_patch([8, 8], [2, 2, 2])
    check_patch([8, 8], [2, 2, 2], {"norm": "batch"})
    with pytest.raises(UserError, match=r"multiples of \[4, 2\].* Try \[4, 4\]\."):
        check_patch([3, 2], [[2, 1], [2, 2]], {"norm_name": ["INSTANCE", {"affine": True}]})
