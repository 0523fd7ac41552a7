# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw weights.png: what learned weights do with two terms that the network can no longer change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from monai_losses_ext import CompoundLoss

TERMS = (0.8, 0.05)
STEPS = 150
MODES: dict[str, dict[str, Any]] = {
    "plain softmax: collapses": {"type": "softmax", "floor": 0, "pull": 0},
    "softmax, with floor and pull": {"type": "softmax"},
    "uncertainty, at most 10 x its start": {"type": "uncertainty"},
}


class Constant(nn.Module):
    """A term that does not change."""

    non_negative = True

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - MONAI's name
        """Return the value."""
        return input.new_tensor(self.value)


def learned_weights(weighting: dict[str, Any]) -> Tensor:
    """Return the weights ``[STEPS, 2]`` as Adam learns them, from equal ones."""
    loss = CompoundLoss([Constant(value) for value in TERMS], weighting=weighting)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    nothing = torch.zeros(1)
    rows = []
    for _ in range(STEPS):
        rows.append(list(loss.get_weights().values()))
        optimizer.zero_grad()
        loss(nothing, nothing).backward()
        optimizer.step()
    return torch.tensor(rows)


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = plt.subplots(1, len(MODES), figsize=(12, 3.6), layout="constrained")
    for axis, (title, weighting) in zip(axes, MODES.items(), strict=True):
        for values, term, color in zip(learned_weights(weighting).T, TERMS, ("tab:blue", "tab:orange"), strict=True):
            axis.plot(values, color=color, label=f"of the term at {term}")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_ylim(top=1.02)
    axes[0].set_ylabel("weight")
    axes[0].legend(frameon=False, loc="center right")
    figure.savefig(Path(__file__).with_name("weights.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
