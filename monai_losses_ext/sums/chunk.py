# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one chunk: its sums, and its gradient.

Two forms. *Labels*: softmax and index labels, where what the reference adds to a voxel sits at its own class only, so
that it is computed once per voxel instead of once per class. *Dense*: any activation, one-hot or soft targets.

Gradients go through derivatives with respect to the logarithm of the probabilities: with ``R_c = dL/d(log p_c)``, the
gradient with respect to softmax logits is ``R_c - p_c sum_k R_k``. Nothing divides by a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monai_losses_ext.sums import terms as T  # noqa: N812

Grads = dict[str, Tensor]  # term -> derivative of the loss with respect to that sum, [C, 1]


@dataclass(frozen=True)
class Chunk:
    """Some voxels of one sample, in the accumulation dtype; exactly one of ``labels`` and ``target`` is set.

    Attributes:
        logits: ``[C, N]``, 0 where a voxel does not count.
        labels: index labels ``[N]`` within 0..C-1, 0 where a voxel does not count.
        target: dense labels ``[C, N]``, 0 where a voxel does not count.
        distance: signed distance map ``[C, N]``, or None.
        dropped: ``[N]``, True where a voxel does not count, or None where all do.
    """

    logits: Tensor
    labels: Tensor | None
    target: Tensor | None
    distance: Tensor | None
    dropped: Tensor | None

    def mask_(self, values: Tensor) -> Tensor:
        """Set the voxels that do not count to 0, in place."""
        return values if self.dropped is None else values.masked_fill_(self.dropped, 0.0)

    def count(self) -> Tensor:
        """Return the number of voxels that count, once per class, ``[C]``."""
        number = self.logits.shape[1] if self.dropped is None else (~self.dropped).sum()
        return torch.as_tensor(number, device=self.logits.device).expand(self.logits.shape[0])


def label_sums(chunk: Chunk, terms: Sequence[str]) -> dict[str, Tensor]:
    """Return the sums of a chunk with softmax and index labels, ``[C]`` each."""
    labels, num_classes = chunk.labels, chunk.logits.shape[0]
    assert labels is not None  # noqa: S101

    def per_class(values: Tensor | None) -> Tensor:
        weights = None if values is None else values.double()
        return torch.bincount(labels, weights=weights, minlength=num_classes)

    logp = F.log_softmax(chunk.logits, 0)
    logq = chunk.mask_(logp.gather(0, labels.unsqueeze(0)).squeeze(0))  # at each voxel's own class
    sums: dict[str, Tensor] = {}
    if "logp" in terms:
        sums["logp"] = -chunk.mask_(logp).sum(1)
    p = chunk.mask_(logp.exp_())
    for term in _with_parts_of_abs_diff(terms):
        name, gamma = T.split(term)
        if name == "tp":
            sums[term] = per_class(chunk.mask_(logq.exp()))
        elif name == "pred":
            sums[term] = p.sum(1)
        elif name == "pred_sq":
            sums[term] = p.square().sum(1)
        elif name in ("ref", "ref_sq"):
            sums[term] = per_class(None if chunk.dropped is None else ~chunk.dropped)
        elif name == "ce":
            sums[term] = -per_class(logq)
        elif name == "focal":
            sums[term] = -per_class(_one_minus_exp(logq) ** gamma * logq)
        elif name == "surface":
            sums[term] = (p * _distance(chunk)).sum(1)
        elif name == "surface_min":
            sums[term] = chunk.mask_(_distance(chunk).clamp_max(0)).sum(1)
        elif name == "count":
            sums[term] = chunk.count()
    if "abs_diff" in terms:
        sums["abs_diff"] = sums["pred"] + sums["ref"] - 2 * sums["tp"]
    return sums


def label_gradient(chunk: Chunk, grads: Grads) -> Tensor:
    """Return dL/dlogits of a chunk with softmax and index labels, ``[C, N]``."""
    labels = chunk.labels
    assert labels is not None  # noqa: S101
    index = labels.unsqueeze(0)  # 1 N
    if "abs_diff" in grads:
        outer = grads["abs_diff"]
        zero = torch.zeros_like(outer)
        grads = grads | {"pred": grads.get("pred", zero) + outer, "tp": grads.get("tp", zero) - 2 * outer}
    has_focal = any(T.split(term)[0] == "focal" for term in grads)
    logp = F.log_softmax(chunk.logits, 0) if has_focal else None
    p = F.softmax(chunk.logits, 0) if logp is None else logp.exp()
    q = p.gather(0, index)

    at_label = torch.zeros_like(q)  # the part of R that sits at the voxel's own class: 1 N
    for term, grad in grads.items():
        name, gamma = T.split(term)
        if name == "tp":
            at_label.addcmul_(grad[:, 0][labels], q)
        elif name == "ce":
            at_label -= grad[:, 0][labels]
        elif name == "focal" and logp is not None:
            at_label.addcmul_(grad[:, 0][labels], _focal_slope(logp.gather(0, index), q, gamma))

    slope = _slope_without_reference(chunk, p, grads)
    total = at_label  # sum over the classes of R
    if slope is not None:
        total = at_label + (slope.T @ p if slope.shape[1] == 1 else (slope * p).sum(0, keepdim=True))
    if "logp" in grads:
        total = total - grads["logp"].sum()
    gradient = p.mul_(-total if slope is None else slope - total)
    if "logp" in grads:
        gradient -= grads["logp"]
    return chunk.mask_(gradient.scatter_add_(0, index, at_label))


def dense_sums(chunk: Chunk, terms: Sequence[str], activation: str) -> dict[str, Tensor]:
    """Return the sums of a chunk with a dense target, ``[C]`` each."""
    assert chunk.target is not None  # noqa: S101
    values = T.voxel_values(terms, activation, chunk.logits, chunk.target, chunk.distance)
    if chunk.dropped is None:
        return {term: value.sum(1) for term, value in values.items()}
    return {term: value.masked_fill(chunk.dropped, 0.0).sum(1) for term, value in values.items()}


def dense_gradient(chunk: Chunk, grads: Grads, activation: str) -> Tensor:
    """Return dL/dlogits of a chunk with a dense target, ``[C, N]``; for activation none, dL/dp."""
    target = chunk.target
    assert target is not None  # noqa: S101
    logp = F.log_softmax(chunk.logits, 0) if activation == "softmax" else F.logsigmoid(chunk.logits)
    p = chunk.logits if activation == "none" else logp.exp()

    parts = [_slope_without_reference(chunk, p, grads)]
    if "tp" in grads:
        parts.append(grads["tp"] * target)
    if "abs_diff" in grads:
        parts.append(grads["abs_diff"] * torch.sign(p - target))
    slope = reduce(torch.add, (part for part in parts if part is not None), torch.zeros_like(p))
    if activation == "none":
        return chunk.mask_(slope)
    if activation == "sigmoid":
        return chunk.mask_(slope * p * (1 - p) + _sigmoid_log_gradient(chunk.logits, target, p, grads))

    log_slope = slope * p  # R, with the derivatives of the logarithmic terms added as they are
    for term, grad in grads.items():
        name, gamma = T.split(term)
        if name == "ce":
            log_slope -= grad * target
        elif name == "logp":
            log_slope -= grad
        elif name == "focal":
            log_slope += grad * target * _focal_slope(logp, p, gamma)
    return chunk.mask_(log_slope - p * log_slope.sum(0, keepdim=True))


def _sigmoid_log_gradient(logits: Tensor, target: Tensor, p: Tensor, grads: Grads) -> Tensor:
    """Return the gradient of the logarithmic terms with respect to sigmoid logits, ``[C, N]``."""
    gradient = torch.zeros_like(p)
    for term, grad in grads.items():
        name, gamma = T.split(term)
        if name == "ce":
            gradient -= grad * target * (1 - p)
        elif name == "ce_neg":
            gradient += grad * (1 - target) * p
        elif name == "logp":
            gradient -= grad * (1 - p)
        elif name in T.FOCAL_TERMS:
            # f = exp(gamma s) b with s = log sigmoid(-x u), u = 2g - 1, so f' = exp(gamma s) (b' - gamma u sigmoid(x u) b)
            u = 2 * target - 1
            bce = F.softplus(-logits) + (1 - target) * logits
            slope = torch.exp(gamma * F.logsigmoid(-logits * u))
            slope = slope * ((p - target) - gamma * u * torch.sigmoid(logits * u) * bce)
            gradient += grad * (target if name == "focal" else 1 - target) * slope
    return gradient


def _slope_without_reference(chunk: Chunk, p: Tensor, grads: Grads) -> Tensor | None:
    """Return dL/dp of the terms without a reference: ``[C, N]``, ``[C, 1]`` where constant, None where there are none."""
    parts = []
    if "pred" in grads:
        parts.append(grads["pred"])
    if "pred_sq" in grads:
        parts.append(2 * grads["pred_sq"] * p)
    if "surface" in grads:
        parts.append(grads["surface"] * _distance(chunk))
    return reduce(torch.add, parts) if parts else None


def _with_parts_of_abs_diff(terms: Sequence[str]) -> list[str]:
    """Add the sums that ``|p - g| = p + g - 2 p g`` (true for hard labels) is made of."""
    return list(dict.fromkeys([*terms, *(("tp", "pred", "ref") if "abs_diff" in terms else ())]))


def _distance(chunk: Chunk) -> Tensor:
    assert chunk.distance is not None  # noqa: S101
    return chunk.distance


def _one_minus_exp(logq: Tensor) -> Tensor:
    """Return ``1 - exp(logq)`` with the digits that a subtraction would lose, and never zero."""
    return (-torch.expm1(logq)).clamp_min(torch.finfo(logq.dtype).tiny)


def _focal_slope(logq: Tensor, q: Tensor, gamma: float) -> Tensor:
    """Return the derivative of ``-(1 - q)^gamma log q`` with respect to ``log q``."""
    miss = _one_minus_exp(logq)
    return gamma * q * miss ** (gamma - 1) * logq - miss**gamma
