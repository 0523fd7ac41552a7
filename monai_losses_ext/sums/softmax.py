# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one chunk of voxels with softmax: its sums, and its gradient.

Gradients go through derivatives with respect to the logarithm of the probabilities: with ``R_c = dL/d(log p_c)``, the
gradient with respect to softmax logits is ``R_c - p_c sum_k R_k``. Nothing divides by a probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.chunk import Chunk, Grads, Scratch, plain_sum, probability_slope

LN_2 = math.log(2)
LOG2_E = 1 / LN_2
_ON_TARGET = ("tp", "ce", "focal")
SMALLEST_P = 2.0**-100  # far above the numbers with fewer digits


class _Softmax:
    """Softmax over the classes of a chunk. Written out, it is twice as fast here as ``torch.softmax`` over axis 0.

    It works with binary logarithms, since torch.exp takes twice the time of exp2 on some CPUs. Without ``keeps_log``
    there are no log-probabilities, and their buffer holds ``p``.
    """

    def __init__(self, chunk: Chunk, keeps_log: bool) -> None:
        scratch, (tiles, num_classes, length) = chunk.scratch, chunk.logits.shape
        self.chunk = chunk
        highest = torch.amax(chunk.logits, 1, keepdim=True, out=scratch("highest", tiles, 1, length))
        # The difference first: exactly 0 for the highest, so that no log-probability rounds to more than 0.
        shifted = torch.sub(chunk.logits, highest, out=scratch("shifted", tiles, num_classes, length))
        self.log2_shifted = shifted.mul_(LOG2_E)
        if keeps_log:  # finite, since 0 times -inf, of a class that a logit of -inf has ruled out, is not 0
            self.log2_shifted.clamp_min_(torch.finfo(shifted.dtype).min / 2)
        self.p = torch.exp2(self.log2_shifted, out=scratch("p", *shifted.shape) if keeps_log else shifted)
        self.total = torch.sum(self.p, 1, keepdim=True, out=highest)
        self.p.div_(self.total)

    @cached_property
    def log2_total(self) -> Tensor:
        """The binary logarithm of the sum that normalises, ``[T, 1, N]``; only terms with a logarithm pay for it."""
        return self.total.log2_()

    def log2_p(self, buffer: str = "product") -> Tensor:
        """Return the binary logarithms of ``p``, ``[T, C, N]``."""
        return torch.sub(self.log2_shifted, self.log2_total, out=self.chunk.scratch(buffer, *self.p.shape))

    def own(self) -> _Own:
        """Return what terms ``g f(log p)`` need, from the logarithms."""
        if not self.chunk.is_one_hot:
            return _Own(self.p, self.log2_p("log2_own"))
        own = torch.mul(self.log2_shifted, self.chunk.target, out=self.chunk.scratch("product", *self.p.shape))
        log2_own = torch.sum(own, 1, keepdim=True, out=self.chunk.scratch("log2_own", *self.total.shape))
        return _Own(torch.exp2(log2_own.sub_(self.log2_total)), log2_own)


@dataclass(frozen=True)
class _Own:
    """The probabilities that a term ``g f(log p)`` needs, and their binary logarithms.

    For a one-hot target these are each voxel's own, ``[T, 1, N]``, so that ``f`` is taken once per voxel; otherwise
    all, ``[T, C, N]``.
    """

    p: Tensor
    log2_p: Tensor

    def focal(self, scratch: Scratch, gamma: float) -> Tensor:
        """Return ``(1 - p)^gamma log2 p``."""
        return self.log2_p if gamma == 0 else _power_(self._miss(scratch), gamma).mul_(self.log2_p)

    def focal_slope(self, scratch: Scratch, gamma: float) -> Tensor:
        """Return the derivative of ``(1 - p)^gamma log p`` with respect to ``log p``."""
        slope = scratch("focal_slope", *self.p.shape)
        if gamma == 0:
            return slope.fill_(1)
        miss = self._miss(scratch)
        if gamma < 1:
            miss.clamp_min_(torch.finfo(miss.dtype).tiny)
        torch.addcmul(miss, self.log2_p, self.p, value=-gamma * LN_2, out=slope)
        return slope.mul_(_power_(miss, gamma - 1))

    def _miss(self, scratch: Scratch) -> Tensor:
        return torch.sub(1, self.p, out=scratch("miss", *self.p.shape))


@dataclass(frozen=True)
class _Probabilities:
    """What the terms of a chunk are made from.

    Attributes:
        softmax: the probabilities.
        own: for terms with a logarithm and a target, None without such terms.
        hits: ``p`` times the target where ``own`` came from it, in the buffer ``product``.
    """

    softmax: _Softmax
    own: _Own | None = None
    hits: Tensor | None = None


def _probabilities(chunk: Chunk, terms: Sequence[str]) -> _Probabilities:
    """Take the softmax, and what the terms with a logarithm need of it.

    Where each voxel has one class, the logarithm is that of its own probability, a by-product of ``tp``. One that is
    too small for that sends the chunk the long way, over the logarithms of all; that is rare, and only a CPU is asked,
    for a GPU would have to wait for the answer.
    """
    names = {T.split(term)[0] for term in terms} & T.LOG_TERMS
    if chunk.is_one_hot and chunk.logits.is_cpu and names and "logp" not in names:
        softmax = _Softmax(chunk, keeps_log=False)
        hits = torch.mul(softmax.p, chunk.target, out=chunk.scratch("product", *softmax.p.shape))
        own_p = torch.sum(hits, 1, keepdim=True, out=chunk.scratch("own_p", *softmax.total.shape))
        if chunk.dropped is not None:
            own_p.masked_fill_(chunk.dropped, 1.0)
        if own_p.numel() == 0 or own_p.amin() > SMALLEST_P:
            log2_own = torch.log2(own_p, out=chunk.scratch("log2_own", *own_p.shape))
            return _Probabilities(softmax, _Own(own_p, log2_own), hits)
    softmax = _Softmax(chunk, keeps_log=bool(names))
    return _Probabilities(softmax, softmax.own() if names - {"logp"} else None)


def softmax_sums(chunk: Chunk, terms: Sequence[str]) -> dict[str, Tensor]:
    """Return the sums of a chunk with softmax, ``[T, C]`` each.

    A product that is the last to need ``p``, or a target of our own making, takes its place: that is a third faster
    than to write to one more buffer. So ``surface`` comes last, and the terms with a target in the order of _ON_TARGET.
    """
    sums: dict[str, Tensor] = {}
    found = _probabilities(chunk, terms)
    p, target = chunk.mask_(found.softmax.p), chunk.target
    if "tp" in terms and found.hits is not None:
        sums["tp"] = found.hits.sum(-1)  # before another term needs the buffer
    on_target = [term for name in _ON_TARGET for term in terms if T.split(term)[0] == name and term not in sums]
    for term in terms:
        if term == "logp":
            sums[term] = -LN_2 * chunk.mask_(found.softmax.log2_p()).sum(-1)
        elif term not in (*sums, *on_target, "surface"):
            sums[term] = plain_sum(term, chunk, p)
    for term in on_target:
        name, gamma = T.split(term)
        out = target if chunk.is_one_hot and term == on_target[-1] else chunk.scratch("product", *p.shape)
        if name == "tp":
            sums[term] = torch.mul(target, p, out=out).sum(-1)
        elif found.own is not None:
            sums[term] = -LN_2 * torch.mul(target, found.own.focal(chunk.scratch, gamma), out=out).sum(-1)
    if "surface" in terms and chunk.distance is not None:
        sums["surface"] = chunk.mask_(p.mul_(chunk.distance)).sum(-1)
    return sums


def softmax_gradient(chunk: Chunk, grads: Grads) -> Tensor:
    """Return dL/dlogits of a chunk with softmax, ``[T, C, N]``."""
    found = _probabilities(chunk, [term for term in grads if T.split(term)[0] == "focal"])
    p, target = found.softmax.p, chunk.target
    log_slope = probability_slope(chunk, p, grads).mul_(p)
    on_target = sorted(term for term in grads if T.split(term)[0] in ("ce", "focal"))
    for term in on_target:  # ce first: the last focal takes the target's place
        grad, (name, gamma) = grads[term], T.split(term)
        if name == "ce":
            log_slope.addcmul_(target, grad, value=-1)
        elif found.own is not None:
            out = target if chunk.is_one_hot and term == on_target[-1] else chunk.scratch("own_slope", *p.shape)
            log_slope.addcmul_(torch.mul(target, found.own.focal_slope(chunk.scratch, gamma), out=out), grad, value=-1)
    if "logp" in grads:
        log_slope -= grads["logp"]
    return log_slope.addcmul_(p, log_slope.sum(1, keepdim=True), value=-1)


def _power_(base: Tensor, exponent: float) -> Tensor:
    """Raise in place; torch has quick ways for some exponents, but 1 and 0 it raises the long way."""
    if exponent == 0:
        return base.fill_(1)
    return base if exponent == 1 else base.pow_(exponent)
