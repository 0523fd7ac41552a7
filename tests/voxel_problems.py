# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Problems that every backend of the voxel sums has to solve."""

from __future__ import annotations

import torch

from monai_losses_ext.sums import voxel_sums

PLAIN = ["tp", "pred", "pred_sq", "ref", "ref_sq", "abs_diff", "count", "surface", "surface_min"]
LOGS = ["ce", "logp", "focal:2.0", "focal:0.5", "focal:0.0"]
SIGMOID = ["ce_neg", "focal_neg:2.0", "focal_neg:0.5"]


def terms_of(activation):
    """Return all terms that the activation allows."""
    return PLAIN + (LOGS if activation != "none" else []) + (SIGMOID if activation == "sigmoid" else [])


def problem(activation, kind, ignore, num_classes, shape, dtype=torch.float64, batch=2):
    """Return input, target and a distance map; labels 255 stand in index targets that ignore them."""
    x = torch.randn(batch, num_classes, *shape, dtype=torch.float64)
    x = (x.sigmoid() if activation == "none" else x).to(dtype)
    labels = torch.randint(0, max(num_classes, 2), (batch, *shape))
    target = labels.clone()
    if kind == "index" and ignore == 255:
        target[torch.rand(target.shape) < 0.2] = 255
    elif kind == "one_hot":
        target = torch.stack([labels == (c if num_classes > 1 else 1) for c in range(num_classes)], 1)
    elif kind == "soft":
        target = torch.rand(batch, num_classes, *shape)
    return x, target, torch.randn(x.shape)


def value_and_gradient(x, target, phi, activation, ignore, backend):
    """Return all sums, and the gradient of a random linear function of them."""
    x = x.detach().clone().requires_grad_()
    sums = voxel_sums(x, {"label": target, "distance": phi}, terms_of(activation), activation, ignore, backend)
    generator = torch.Generator().manual_seed(1)
    weights = {term: torch.randn(value.shape, generator=generator).to(value) for term, value in sums.items()}
    (gradient,) = torch.autograd.grad(sum((value * weights[term]).sum() for term, value in sums.items()), x)
    return sums, gradient
