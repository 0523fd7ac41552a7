# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What each voxel sum means: the specification, in plain differentiable torch.

Every loss of the package is a smooth function of a few sums over voxels, per sample and class. With ``p`` the
probability of class ``c`` at voxel ``v``, ``g`` the reference (0 or 1, or between for soft labels), ``phi`` a signed
distance map and ``m`` the weight of the voxel, 0 where it does not count:

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
from monai_losses_ext.sums.target import Target

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


def sigmoid_focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Return the voxelwise focal loss of a sigmoid, hard or soft ``target``, of one shape."""
    bce = F.softplus(-logits) + (1 - target) * logits
    return torch.exp(gamma * F.logsigmoid(-logits * (2 * target - 1))) * bce


def voxel_values(
    terms: Sequence[str], activation: str, logits: Tensor, target: Tensor, distance: Tensor | None
) -> dict[str, Tensor]:
    """Return each term's value at each voxel, before the mask: the table of the module's docstring.

    Args:
        terms: names of the terms.
        activation: what makes probabilities of the logits.
        logits: ``[B, C, ...]``.
        target: dense, of the logits' shape.
        distance: signed distance map of that shape, for the surface terms.

    Returns:
        Term to ``[B, C, ...]``.
    """
    if activation == "softmax":
        # Finite, so that a class that was ruled out by a logit of -inf counts as 0 where the target does not have it.
        logp = F.log_softmax(logits, 1).clamp_min(torch.finfo(logits.dtype).min)
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


def voxel_inputs(logits: Tensor, target: Target, activation: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a value per voxel is computed from, checked: logits, dense labels and the multiplier of the values.

    Returns:
        Logits and labels ``[B, C, *S]``, 0 wherever the multiplier is; the multiplier ``[B, 1 or C, *S]``, None where
        it is 1 throughout. Float64 for float64 logits, float32 otherwise.

    Raises:
        UserError: for labels that cannot be right, see :meth:`Target.check_values`.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target.check_values(logits.shape[1])
    multiplier = target.multiplier(dtype)
    x, dense = logits.to(dtype), target.dense(logits.shape[1], dtype)
    if multiplier is None:
        return x, dense, None
    # Nothing that stands where a voxel does not count may reach the others: 0 times NaN is NaN.
    return torch.where(multiplier > 0, x, 0.0), torch.where(multiplier > 0, dense, 0.0), multiplier


def reference_sums(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums by the definition, differentiable by autograd: the oracle of the backends.

    Args:
        logits: ``[B, C, *S]``.
        target: what counts, and the distance map of the surface terms.
        terms: names of the terms.
        activation: softmax, sigmoid or none.

    Returns:
        ``[len(terms), B, C]``, float64 for float64 logits, float32 otherwise.
    """
    x, dense, multiplier = voxel_inputs(logits, target, activation)
    distance = target.distance
    if distance is not None:
        distance = distance.to(x.dtype)
        distance = distance if multiplier is None else torch.where(multiplier > 0, distance, 0.0)
    values = voxel_values(terms, activation, x, dense, distance)
    weighted = [values[term] if multiplier is None else values[term] * multiplier for term in terms]
    return torch.stack([value.flatten(2).sum(2, dtype=torch.float64) for value in weighted]).to(x.dtype)
