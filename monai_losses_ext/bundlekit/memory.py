# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training step needs, computed without running it: the network is built on the meta device, without numbers."""

from __future__ import annotations

import torch
from monai.bundle import ConfigParser

from monai_losses_ext.data.tasks import Training

FLOAT_BYTES = 4
COPIES_OF_PARAMETERS = 4  # weight, gradient, and the two moments of Adam


def training_memory_gb(training: Training) -> float:
    """Return the memory of one training step in float32, in GB (10^9 bytes).

    It counts what the network keeps for its backward pass, the parameters with their gradients and Adam's moments, and
    the logits with their gradient. Workspace of the convolutions and the fragmentation of the allocator come on top;
    mixed precision needs less.

    Args:
        training: the recipe; a step has ``batch_size * patches_per_case`` patches.
    """
    parser = ConfigParser({"network": training.network_def})
    with torch.device("meta"):
        network = parser.get_parsed_content("network").to(memory_format=torch.channels_last_3d)
        in_channels = training.network_def["in_channels"]
        image = torch.empty(training.batch_size * training.patches_per_case, in_channels, *training.patch_size)
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # by identity: one that two operations keep counts once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(image)
    saved = sum(storage.nbytes() for identity, storage in kept.items() if identity not in own)
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    return (saved + FLOAT_BYTES * (COPIES_OF_PARAMETERS * n_parameters + 2 * logits.numel())) / 1e9
