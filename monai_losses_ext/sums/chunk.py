# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One chunk of voxels, and its arithmetic for the activations sigmoid and none: its sums, and its gradient.

Only multiplications and sums of vectors: on a CPU these are many times faster than masks, gathers and histograms, on a
GPU they are deterministic, and no matrix product means that no precision setting reaches in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monai_losses_ext.sums import terms as T  # noqa: N812

Grads = dict[str, Tensor]  # term -> derivative of the loss with respect to that sum, [S, C, 1]


class Scratch:
    """Named buffers that every chunk of a pass uses again.

    Fresh temporaries of this size come from the system page by page, which costs more than the arithmetic on them.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._empty = like.new_empty(0, dtype=dtype)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}  # cutting a view takes as long as a small sum

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return the buffer ``name`` in ``shape``; its content is whatever was last left there."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            buffer = self._buffers.get(name, self._empty)
            if buffer.numel() < size:
                buffer = self._buffers[name] = self._empty.new_empty(size)
            view = self._views[name, shape] = buffer[:size].view(shape)
        return view


@dataclass(frozen=True)
class Chunk:
    """Some voxels of one sample, or some samples, in the accumulation dtype, ``T`` tiles of ``N`` voxels.

    Attributes:
        logits: ``[T, C, N]``, 0 where a voxel does not count.
        target: ``[T, C, N]``, 0 where a voxel does not count.
        is_one_hot: whether the target is known to hold a single 1 per voxel that counts.
        distance: signed distance map ``[T, C, N]``, or None.
        dropped: ``[T, 1, N]``, True where a voxel does not count, or None where all do.
        scratch: buffers for temporaries.
    """

    logits: Tensor
    target: Tensor
    is_one_hot: bool
    distance: Tensor | None
    dropped: Tensor | None
    scratch: Scratch

    def product_sum(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``sum(a b)`` over the voxels of each tile, ``[T, C]``."""
        return torch.mul(a, b, out=self.scratch("product", *self.logits.shape)).sum(-1)

    def mask_(self, values: Tensor) -> Tensor:
        """Set the voxels that do not count to 0, in place."""
        return values if self.dropped is None else values.masked_fill_(self.dropped, 0.0)


def elementwise_sums(chunk: Chunk, terms: Sequence[str], activation: str) -> dict[str, Tensor]:
    """Return the sums of a chunk with activation sigmoid or none, ``[T, C]`` each."""
    logits, target = chunk.logits, chunk.target
    p = chunk.mask_(torch.sigmoid(logits)) if activation == "sigmoid" else logits
    sums: dict[str, Tensor] = {}
    for term in terms:
        name, gamma = T.split(term)
        if name == "ce":
            sums[term] = -(target * F.logsigmoid(logits)).sum(-1)
        elif name == "ce_neg":
            sums[term] = -chunk.mask_((1 - target) * F.logsigmoid(-logits)).sum(-1)
        elif name == "logp":
            sums[term] = -chunk.mask_(F.logsigmoid(logits)).sum(-1)
        elif name == "focal":
            sums[term] = (target * T.sigmoid_focal(logits, target, gamma)).sum(-1)
        elif name == "focal_neg":
            sums[term] = chunk.mask_((1 - target) * T.sigmoid_focal(logits, target, gamma)).sum(-1)
        else:
            sums[term] = plain_sum(name, chunk, p)
    return sums


def elementwise_gradient(chunk: Chunk, grads: Grads, activation: str) -> Tensor:
    """Return dL/dlogits of a chunk with activation sigmoid, dL/dp with none, ``[T, C, N]``."""
    logits, target = chunk.logits, chunk.target
    p = torch.sigmoid(logits) if activation == "sigmoid" else logits
    gradient = probability_slope(chunk, p, grads)
    if activation == "sigmoid":
        gradient.mul_(p * (1 - p))
    for term, grad in grads.items():
        name, gamma = T.split(term)
        if name == "ce":
            gradient -= grad * target * (1 - p)
        elif name == "ce_neg":
            gradient += grad * (1 - target) * p
        elif name == "logp":
            gradient -= grad * (1 - p)
        elif name in T.FOCAL_TERMS:
            gradient += grad * (target if name == "focal" else 1 - target) * _sigmoid_focal_slope(chunk, p, gamma)
    return gradient


def plain_sum(name: str, chunk: Chunk, p: Tensor) -> Tensor:
    """Sum a term without logarithms; ``p`` and the target are 0 where a voxel does not count."""
    if name == "tp":
        return chunk.product_sum(p, chunk.target)
    if name == "pred":
        return p.sum(-1)
    if name == "pred_sq":
        return chunk.product_sum(p, p)
    if name == "ref":
        return chunk.target.sum(-1)  # exact for whole numbers: a chunk is far below 2^24 voxels
    if name == "ref_sq":
        return chunk.product_sum(chunk.target, chunk.target)
    if name == "abs_diff":
        return (p - chunk.target).abs_().sum(-1)
    if name == "surface" and chunk.distance is not None:
        # p is 0 where a voxel does not count, but 0 times what stands in the map there may be no number
        return chunk.mask_(torch.mul(p, chunk.distance, out=chunk.scratch("product", *p.shape))).sum(-1)
    if name == "surface_min" and chunk.distance is not None:
        return chunk.mask_(torch.clamp_max(chunk.distance, 0, out=chunk.scratch("product", *p.shape))).sum(-1)
    if chunk.dropped is None:
        return p.new_full(p.shape[:2], p.shape[2])
    return (~chunk.dropped).sum(-1).expand(p.shape[:2])


def probability_slope(chunk: Chunk, p: Tensor, grads: Grads) -> Tensor:
    """Return dL/dp of the terms without logarithms, ``[T, C, N]``."""
    out = chunk.scratch("product", *p.shape)  # still in the cache, where there were hits
    if "tp" in grads:
        torch.mul(chunk.target, grads["tp"], out=out)
    else:
        out.zero_()
    if "pred" in grads:
        out += grads["pred"]
    if "pred_sq" in grads:
        out.addcmul_(p, grads["pred_sq"], value=2)
    if "abs_diff" in grads:
        out.addcmul_(torch.sign(p - chunk.target), grads["abs_diff"])
    if "surface" in grads and chunk.distance is not None:
        out.addcmul_(chunk.distance, grads["surface"])
    return out


def _sigmoid_focal_slope(chunk: Chunk, p: Tensor, gamma: float) -> Tensor:
    """Return the derivative of :func:`terms.sigmoid_focal` with respect to the logits.

    ``f = exp(gamma s) b`` with ``s = log sigmoid(-x u)`` and ``u = 2g - 1``, so
    ``f' = exp(gamma s) (b' + gamma s' b)``.
    """
    logits, target = chunk.logits, chunk.target
    u = 2 * target - 1
    bce = F.softplus(-logits) + (1 - target) * logits
    scale = torch.exp(gamma * F.logsigmoid(-logits * u))
    return scale * ((p - target) - gamma * u * torch.sigmoid(logits * u) * bce)
