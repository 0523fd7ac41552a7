# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What is measured: losses as their users call them, and shapes as they train on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import monai
import monai.losses as theirs
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import monai_losses_ext as ours

PARITY_SIDE = 32  # voxels along each axis of the small volume on which losses must agree before large ones are timed
LossFunction = Callable[[Tensor, Tensor], Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "2x3x96^3": (2, 3, 96, 96, 96),
    "2x3x128^3": (2, 3, 128, 128, 128),
    "2x14x96^3": (2, 14, 96, 96, 96),
    "16x2x512^2": (16, 2, 512, 512),
    "2x14x128^3": (2, 14, 128, 128, 128),
    "1x118x128^3": (1, 118, 128, 128, 128),
}
# All losses are measured but here: on a CPU several of MONAI's need more than 16 GiB, on a GPU one tells enough.
FEWER_LOSSES = {"1x118x128^3": ("dice_ce", "floor")}
CUDA_SHAPES = ("2x3x96^3", "2x3x128^3", "2x14x128^3", "1x118x128^3")


@dataclass(frozen=True)
class Pair:
    """A loss of ours and what a user would otherwise run, which computes the same number."""

    ours: LossFunction
    baseline: LossFunction
    baseline_name: str


def _index_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels[:, 0])


def loss_pairs() -> dict[str, Pair]:
    """Return the losses by name, built as a training would build them: softmax, index labels."""
    flags = {"softmax": True, "to_onehot_y": True}
    focal = ours.FocalLoss(use_softmax=True)
    compound = ours.CompoundLoss([ours.DiceLoss(softmax=True), focal, ours.CrossEntropyLoss()], [1.0, 1.0, 1.0])
    their_dice_focal = LossSum(theirs.DiceLoss(**flags), theirs.FocalLoss(use_softmax=True, to_onehot_y=True))
    their_compound = LossSum(*their_dice_focal.parts, _index_cross_entropy)
    return {
        "dice": Pair(ours.DiceLoss(softmax=True), theirs.DiceLoss(**flags), "MONAI DiceLoss"),
        "tversky": Pair(ours.TverskyLoss(softmax=True), theirs.TverskyLoss(**flags), "MONAI TverskyLoss"),
        "cross_entropy": Pair(ours.CrossEntropyLoss(), _index_cross_entropy, "torch cross_entropy"),
        "focal": Pair(focal, theirs.FocalLoss(use_softmax=True, to_onehot_y=True), "MONAI FocalLoss"),
        "dice_ce": Pair(ours.DiceCELoss(softmax=True), theirs.DiceCELoss(**flags), "MONAI DiceCELoss"),
        # MONAI's own DiceFocalLoss takes a sigmoid here, so the right number is the sum of its two losses.
        "dice_focal": Pair(ours.DiceFocalLoss(softmax=True), their_dice_focal, "MONAI DiceLoss + FocalLoss"),
        "dice_focal_ce": Pair(compound, their_compound, "MONAI DiceLoss + FocalLoss + torch cross_entropy"),
        "floor": Pair(_read_and_write, _read_and_write, "one read of the logits, one write of a gradient"),
    }


def with_backend(loss: Any, side: str) -> LossFunction:
    """Return a loss of ours as users have it (``ours``), or without the extra ``fast`` (``chunked``)."""
    if side == "chunked":
        loss = copy.deepcopy(loss)
        loss.backend = "chunked"
    function: LossFunction = loss
    return function


def their_maps() -> Callable[[Tensor], Tensor]:
    """Return what makes MONAI's distance maps, of binary masks ``[B, C, *S]``.

    Raises:
        RuntimeError: where this MONAI has none yet.
    """
    if not hasattr(theirs, "BoundaryLoss"):
        raise RuntimeError(f"maps: are measured beside those of MONAI 1.6 or newer; got MONAI {monai.__version__}.")
    maps: Callable[[Tensor], Tensor] = theirs.BoundaryLoss().compute_distance_map
    return maps


class LossSum:
    """The sum of several losses, each with its own pass.

    Args:
        parts: losses, or functions of logits and labels.
    """

    def __init__(self, *parts: LossFunction) -> None:
        self.parts = parts

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum."""
        total = self.parts[0](logits, labels)
        for part in self.parts[1:]:
            total = total + part(logits, labels)
        return total


def _read_and_write(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the logits: its forward and backward are the least that any loss does."""
    return logits.sum()


def make_batch(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return random logits ``[B, C, *S]`` that require a gradient, and blob-like index labels ``[B, 1, *S]``."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(shape, generator=generator, device=device)
    sizes = (shape[0], 1, *[n // 8 for n in shape[2:]])
    coarse = torch.randint(0, 4 * shape[1], sizes, generator=generator, device=device)
    coarse = torch.where(coarse < shape[1], coarse, 0)  # most of a medical image is background
    labels = F.interpolate(coarse.float(), size=shape[2:], mode="nearest").long()
    return logits.to(dtype).requires_grad_(), labels
