# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What each voxel sum means: the specification, in plain differentiable torch.

Every loss of the package is a smooth function of a few sums over voxels, per sample and class. With ``p`` the
probability of class ``c`` at voxel ``v``, ``g`` the reference (0 or 1, or between for soft labels), ``phi`` a signed
distance map and ``m`` the mask of voxels that count:

=============== ===============================================================
term            sum over the voxels ``v`` of
=============== ===============================================================
``tp``          ``m p g``
``pred``        ``m p``
``pred_sq``     ``m p^2``
``ref``         ``m g``
``ref_sq``      ``m g^2``
``abs_diff``    ``m |p - g|``
``ce``          ``-m g log p``
``ce_neg``      ``-m (1 - g) log(1 - p)`` (sigmoid only)
``logp``        ``-m log p``
``focal:G``     softmax: ``-m g (1 - p)^G log p``; sigmoid: ``m g f``
``focal_neg:G`` ``m (1 - g) f`` (sigmoid only)
``surface``     ``m p phi``
``surface_min`` ``m min(phi, 0)``
``count``       ``m``
=============== ===============================================================

The sigmoid focal term is ``f = exp(G log sigmoid(-x (2g - 1))) BCE(x, g)``: for hard labels the focal loss of its paper
(Lin et al. 2017, https://arxiv.org/abs/1708.02002), for soft labels MONAI's extension of it.

The backends compute the same sums without the volume-sized tensors that this file makes freely; they are tested
against it, value and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monai_losses_ext import errors

Activation = Literal["softmax", "sigmoid", "none"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

PLAIN_TERMS = (
    "tp",
    "pred",
    "pred_sq",
    "ref",
    "ref_sq",
    "abs_diff",
    "ce",
    "ce_neg",
    "logp",
    "surface",
    "surface_min",
    "count",
)
FOCAL_TERMS = ("focal", "focal_neg")
# Terms of the logarithm need logits: the logarithm of a probability that was rounded to 0 cannot be brought back.
LOG_TERMS = frozenset({"ce", "ce_neg", "logp", *FOCAL_TERMS})
SIGMOID_TERMS = frozenset({"ce_neg", "focal_neg"})
SURFACE_TERMS = frozenset({"surface", "surface_min"})
CONSTANT_TERMS = frozenset({"ref", "ref_sq", "surface_min", "count"})  # whatever the input


def focal(gamma: float) -> str:
    """Return the name of the focal term with exponent ``gamma``."""
    return f"focal:{float(gamma)!r}"


def focal_neg(gamma: float) -> str:
    """Return the name of the focal term's negative part with exponent ``gamma``."""
    return f"focal_neg:{float(gamma)!r}"


def split(term: str) -> tuple[str, float]:
    """Split ``"focal:2.0"`` into its name and exponent; a term without one has exponent 0."""
    name, _, gamma = term.partition(":")
    return name, float(gamma) if gamma else 0.0


def check(terms: Iterable[str], activation: str, has_distance: bool) -> None:
    """Refuse a term that does not exist, or that the activation or the missing distance map rules out."""
    errors.one_of("activation", activation, ACTIVATIONS)
    names = list(terms)
    if not names:
        raise errors.fail("terms", f"must name at least one of {', '.join((*PLAIN_TERMS, *FOCAL_TERMS))}", names)
    for term in names:
        name, colon, exponent = term.partition(":")
        errors.one_of("terms", name, FOCAL_TERMS if colon else (*PLAIN_TERMS, *FOCAL_TERMS))
        if name in FOCAL_TERMS:
            _check_exponent(term, exponent)
        if name in LOG_TERMS and activation == "none":
            raise errors.fail("terms", f"{name} needs logits, so activation must be softmax or sigmoid", activation)
        if name in SIGMOID_TERMS and activation != "sigmoid":
            raise errors.fail("terms", f"{name} exists for activation sigmoid only", activation)
        if name in SURFACE_TERMS and not has_distance:
            raise errors.fail("distance", f"{name} needs a signed distance map", None)


def _check_exponent(term: str, exponent: str) -> None:
    try:
        fits = 0 <= float(exponent) < math.inf
    except ValueError:
        fits = False
    if not fits:
        raise errors.fail("terms", "the exponent of a focal term is a number of at least 0, as in 'focal:2.0'", term)


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return the one-hot encoding of index labels along a new axis 0; a label out of range becomes all zero.

    Args:
        labels: integers of any shape ``[*S]``.
        num_classes: length of the new axis.
        dtype: dtype of the result.
    """
    classes = torch.arange(num_classes, device=labels.device).view(-1, *[1] * labels.ndim)
    return (labels.long() == classes).to(dtype)


def kept_voxels(target: Tensor, activation: str, ignore_index: int | None) -> Tensor | None:
    """Return which voxels count, ``[*S]`` bool, or None where all do.

    Args:
        target: one sample: index labels ``[*S]``, or dense labels ``[C, *S]`` where ``C`` counts as an axis.
        activation: decides what an all-zero voxel of a dense target means.
        ignore_index: the label that is left out. In a dense target of several channels the voxels of that channel are
            left out; a value that is no channel marks them instead, in any channel, and for softmax and none
            (where every voxel has a class) an all-zero voxel is left out too.
    """
    if ignore_index is None:
        return None
    if not can_hold(target.dtype, ignore_index):
        return None
    if target.shape[0] == 1:
        return target[0] != ignore_index
    if 0 <= ignore_index < target.shape[0]:
        return target[ignore_index] <= 0.5
    kept = (target != ignore_index).all(0)
    return kept if activation == "sigmoid" else kept & (target != 0).any(0)


def can_hold(dtype: torch.dtype, value: int) -> bool:
    """Tell whether labels of this type can equal ``value``; torch would wrap 256 to 0 to compare it with uint8."""
    if dtype.is_floating_point or dtype == torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return limits.min <= value <= limits.max


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Return the voxelwise focal loss of a sigmoid, hard or soft ``target``, both ``[C, *S]``."""
    bce = F.softplus(-logits) + (1 - target) * logits
    return torch.exp(gamma * F.logsigmoid(-logits * (2 * target - 1))) * bce


def voxel_values(
    terms: Sequence[str], activation: str, logits: Tensor, target: Tensor, distance: Tensor | None
) -> dict[str, Tensor]:
    """Return each term's value at each voxel, ``[C, V]``, before the mask: the table of the module's docstring.

    Args:
        terms: names of the terms.
        activation: what makes probabilities of the logits.
        logits: ``[C, V]``.
        target: dense, ``[C, V]``.
        distance: signed distance map ``[C, V]``, for the surface terms.
    """
    if activation == "softmax":
        # Finite, so that a class that was ruled out by a logit of -inf counts as 0 where the target does not have it.
        logp = F.log_softmax(logits, 0).clamp_min(torch.finfo(logits.dtype).min)
        p = logp.exp()
    elif activation == "sigmoid":
        logp = F.logsigmoid(logits)
        p = torch.sigmoid(logits)
    else:
        p, logp = logits, logits
    values: dict[str, Tensor] = {}
    for term in terms:
        name, gamma = split(term)
        if name == "tp":
            values[term] = p * target
        elif name == "pred":
            values[term] = p
        elif name == "pred_sq":
            values[term] = p * p
        elif name == "ref":
            values[term] = target
        elif name == "ref_sq":
            values[term] = target * target
        elif name == "abs_diff":
            values[term] = (p - target).abs()
        elif name == "ce":
            values[term] = -target * logp
        elif name == "ce_neg":
            values[term] = -(1 - target) * F.logsigmoid(-logits)
        elif name == "logp":
            values[term] = -logp
        elif name == "focal" and activation == "softmax":
            # -expm1 keeps the digits of 1 - p near p = 1, and the clamp the gradient finite where gamma < 1.
            values[term] = -target * (-torch.expm1(logp)).clamp_min(torch.finfo(p.dtype).tiny) ** gamma * logp
        elif name == "focal":
            values[term] = target * sigmoid_focal(logits, target, gamma)
        elif name == "focal_neg":
            values[term] = (1 - target) * sigmoid_focal(logits, target, gamma)
        elif name == "surface" and distance is not None:
            values[term] = p * distance
        elif name == "surface_min" and distance is not None:
            values[term] = distance.clamp_max(0)
        else:
            values[term] = torch.ones_like(p)
    return values


def reference_sums(
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """Compute the sums by the definition, differentiable by autograd: the oracle of the backends.

    Args:
        logits: ``[B, C, *S]``.
        target: index labels ``[B, 1, *S]`` (where C > 1) or dense labels ``[B, C, *S]``.
        distance: signed distance map ``[B, C, *S]``, or None.
        terms: names of the terms.
        activation: softmax, sigmoid or none.
        ignore_index: see :func:`kept_voxels`.

    Returns:
        ``[len(terms), B, C]``, float64 for float64 logits, float32 otherwise.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = []
    for b in range(logits.shape[0]):
        x = logits[b].flatten(1).to(dtype)
        g = target[b].flatten(1)
        kept = kept_voxels(g, activation, ignore_index)
        g = one_hot(g[0], x.shape[0], dtype) if g.shape[0] < x.shape[0] else g.to(dtype)
        phi = None if distance is None else distance[b].flatten(1).to(dtype)
        if kept is not None:
            x, g = x[:, kept], g[:, kept]
            phi = None if phi is None else phi[:, kept]
        values = voxel_values(terms, activation, x, g, phi)
        rows.append(torch.stack([values[term].sum(1, dtype=torch.float64) for term in terms]))
    return torch.stack(rows, 1).to(dtype)
