# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One process of a training on several: ``weighting_rank.py RANK WORLD FOLDER``, for test_weighting.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from monai_losses_ext import get_loss
from monai_losses_ext.losses import weighting
from monai_losses_ext.losses.weighting_config import WEIGHTINGS

COMPONENTS = ["dice", "focal", "cross_entropy"]


def train(kind, rank):
    """Return the weighting's state after some steps on this rank's own data."""
    torch.manual_seed(0)
    network = nn.parallel.DistributedDataParallel(nn.Conv2d(1, 3, 3, padding=1))
    loss = copy.deepcopy(get_loss({"type": "compound", "components": COMPONENTS, "weighting": kind}))
    groups = [{"params": network.parameters()}, {"params": list(loss.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=0.05)
    torch.manual_seed(1 + rank)
    for epoch in range(3):
        for _ in range(4):
            image = torch.randn(2, 1, 8, 8)
            label = (image > rank).long() + (image > 1.5).long()
            optimizer.zero_grad()
            loss(network(image), label).backward()
            optimizer.step()
        loss.end_epoch({name: 1 + rank / (1 + epoch) + i for i, name in enumerate(COMPONENTS)})
    return loss.weighting.state_dict()


def main(rank, world, folder):
    """Train with each kind of weights, with the hook and without, and save them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({kind: train(kind, rank) for kind in WEIGHTINGS}, Path(folder) / f"with-{rank}.pt")
    weighting.average_gradient = lambda weights: weights
    torch.save({kind: train(kind, rank) for kind in WEIGHTINGS}, Path(folder) / f"without-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
