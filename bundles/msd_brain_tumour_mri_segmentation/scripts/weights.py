# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A check of trained weights before they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import UserError


def check_weights(ckpt_path: str, network: nn.Module) -> None:
    """Check that a file holds weights, that they are the network's own, and that they are finite numbers.

    Args:
        ckpt_path: a state_dict, or a dictionary with one as ``model``: what MONAI's CheckpointLoader takes.
        network: what the weights are for.

    Raises:
        UserError: with the first entry that is no tensor, or the first parameter that differs, or is NaN or infinite.
    """
    weights = _read(ckpt_path)
    own = network.state_dict()
    for name, value in weights.items():
        if not torch.is_tensor(value):
            raise UserError(
                f"ckpt_path: {ckpt_path} must hold weights alone; its entry {name} is of type {type(value).__name__}. "
                "Save the state_dict alone, or as the entry 'model' beside others."
            )
    for name in [*own, *weights]:
        there, here = (_shape(state.get(name)) for state in (weights, own))
        if there != here:
            raise UserError(
                f"ckpt_path: the weights in {ckpt_path} are of another network: {name} is {there} there and {here} in "
                "network_def. Give the --network_def that was trained, or another --ckpt_path."
            )
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(
            f"ckpt_path: the weights in {ckpt_path} are NaN or infinite in {len(broken)} of {len(weights)} parameters, "
            f"first in {broken[0]}: the training diverged. Give the weights of another one with --ckpt_path."
        )


def _read(path: str) -> dict[str, Any]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of anything else makes torch raise almost anything
        raise UserError(f"ckpt_path: {path} is not a file of weights that torch.load can read.") from None
    if isinstance(weights, dict):
        weights = weights.get("model", weights)
    if not isinstance(weights, dict):
        raise UserError(f"ckpt_path: {path} must hold a state_dict; it holds a {type(weights).__name__}.")
    return weights


def _shape(value: Any) -> Any:
    return tuple(value.shape) if torch.is_tensor(value) else "absent"
