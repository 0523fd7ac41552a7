# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference over an image and its mirror images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer


class MirrorInferer(Inferer):
    """Return the mean of what a network says of an image and of its mirror images, each turned back.

    Args:
        inferer: what runs the network, such as MONAI's SlidingWindowInferer.
        mirrors: axes of the tensor [B, C, *S] that are mirrored together; ``[[]]`` is the image alone.
    """

    def __init__(self, inferer: Callable[..., Any], mirrors: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.inferer = inferer
        self.mirrors = [list(axes) for axes in mirrors]

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the network's scores, [B, C, *S]."""
        total: Any = 0
        for axes in self.mirrors:
            total = total + self.inferer(inputs.flip(axes), network, *args, **kwargs).flip(axes)
        return total / len(self.mirrors)
