# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One process of several that share a batch: ``ranks_dice.py RANK WORLD FOLDER``, for test_partial.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from monai_losses_ext import get_loss

LOSSES = [{"type": "dice"}, {"type": "tversky", "beta": 0.7}, {"type": "dice", "absent": "skip", "squared_pred": True}]


def whole_batch():
    """Return images, labels and annotations of a batch that two processes share, one and two samples each."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 1, 6, 7, generator=generator)
    labels = (image[:, 0] > 0).long() + (image[:, 0] > 1).long()
    return image, labels, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 0]])


def network():
    torch.manual_seed(0)
    return nn.Conv2d(1, 4, 3, padding=1)


def gradients(net, samples, batch):
    """Return value and weight gradient of each loss for a part of the batch."""
    image, labels, annotated = (part[samples] for part in whole_batch())
    results = []
    for config in LOSSES:
        net.zero_grad()
        value = get_loss({**config, "batch": batch})(net(image), {"label": labels, "annotated": annotated})
        value.backward()
        results.append((value.detach(), next(net.parameters()).grad.clone()))
    return results


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    net = nn.parallel.DistributedDataParallel(network())
    torch.save(gradients(net, slice(0, 1) if rank == 0 else slice(1, 3), "all_ranks"), folder / f"{rank}.pt")
    dist.barrier()
    del net
    dist.destroy_process_group()
