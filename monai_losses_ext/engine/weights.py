# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A check of trained weights against the network that they are for."""

from __future__ import annotations

import os

import torch
from torch import nn

from monai_losses_ext.errors import UserError
from monai_losses_ext.weights import check_finite


def check_weights(path: str | os.PathLike[str], network: nn.Module) -> None:
    """Check that a file holds weights, and that they are the network's own.

    Args:
        path: a state_dict, or a dictionary with one as ``model``: what MONAI's CheckpointLoader takes.
        network: what the weights are for.

    Raises:
        UserError: with the first parameter that differs, or that is NaN or infinite.
    """
    if not os.path.isfile(path):
        raise UserError(f"ckpt_path: there are no trained weights at {path}. Train first, or give --ckpt_path.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of anything else makes torch raise almost anything
        raise UserError(f"ckpt_path: {path} is not a file of weights that torch.load can read.") from None
    if isinstance(weights, dict):
        weights = weights.get("model", weights)
    if not isinstance(weights, dict):
        raise UserError(f"ckpt_path: {path} must hold a state_dict; it holds a {type(weights).__name__}.")
    ours = network.state_dict()
    for name in [*ours, *weights]:
        there, here = (
            tuple(state[name].shape) if torch.is_tensor(state.get(name)) else "absent" for state in (weights, ours)
        )
        if there != here:
            raise UserError(
                f"ckpt_path: the weights in {path} are of another network: {name} is {there} there and {here} in "
                "network_def. Give the --network_def that was trained, or another --ckpt_path."
            )
    check_finite(weights, f"ckpt_path: the weights in {path}", " Their training diverged; give another --ckpt_path.")
