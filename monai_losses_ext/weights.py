# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What makes trained weights unusable, whoever reads or writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monai_losses_ext.errors import UserError


def check_finite(state: Mapping[str, Any], what: str, hint: str = "") -> None:
    """Check that weights can be used: none is NaN or infinite, as after a training that diverged.

    Args:
        state: a ``state_dict``; what is no tensor of floating-point numbers is passed over.
        what: what the weights are, for the message: ``ckpt_path: the weights in model.pt``.
        hint: a sentence that says what to do, with a space before it.

    Raises:
        UserError: one line with the first weight that is not finite and how many others there are.
    """
    spoiled = [
        name
        for name, value in state.items()
        if torch.is_tensor(value) and value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if spoiled:
        others = f" (and {len(spoiled) - 1} others)" if len(spoiled) > 1 else ""
        raise UserError(f"{what}: must be finite numbers; {spoiled[0]}{others} holds NaN or infinity.{hint}")
