# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw boundary.png: a label, its signed distance map, and the boundary loss's gradient on a wrong prediction."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from monai_losses_ext import BoundaryLoss
from monai_losses_ext.distance import signed_distance

SPACING = (1.0, 1.0)  # mm


def main() -> None:
    """Write the picture beside this file."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    label = (((x - 44) / 24) ** 2 + ((y - 48) / 15) ** 2 < 1).long()
    # The prediction misses the right end, and finds a blob that is not there.
    found = (((x - 38) / 24) ** 2 + ((y - 48) / 15) ** 2 < 1) | ((x - 82) ** 2 + (y - 16) ** 2 < 36)
    # Sure of itself everywhere but near its own boundary, as networks are.
    logit = -0.4 * signed_distance(found.long()[None, None], 2, SPACING)[0, 1]
    logits = torch.stack([-logit / 2, logit / 2]).unsqueeze(0).requires_grad_()
    phi = signed_distance(label[None, None], 2, SPACING)[0, 1]
    loss = BoundaryLoss(softmax=True, include_background=False, spacing=SPACING, normalize="none")
    loss(logits, label[None]).backward()
    gradient = logits.grad[0, 1]

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    axes[0].imshow(label, cmap="gray")
    axes[0].contour(found, [0.5], colors="tab:orange")
    axes[0].set_title("label; prediction in orange")
    for axis, values, title in (
        (axes[1], phi, "signed distance, mm"),
        (axes[2], gradient, "gradient with respect to the logit"),
    ):
        limit = values.abs().max().item()
        image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.contour(label, [0.5], colors="black", linewidths=0.8)
        axis.contour(found, [0.5], colors="tab:orange", linewidths=0.8)
        axis.set_title(title)
        figure.colorbar(image, ax=axis, shrink=0.8)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_name("boundary.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
