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
``skeleton``    ``m p s``, with ``s`` a skeleton of the reference
``skeleton_ref`` ``m s``
``count``       ``m``
=============== ===============================================================

Some terms have a row of sums for each part of the volume:

================ ==============================================================
term             sums over the voxels of each region ``r = 0, ..., R`` of
================ ==============================================================
``region_tp``    ``m p g``
``region_pred``  ``m p``
``region_ref``   ``m g``
``region_ce``    softmax: ``-m sum_k g_k log p_k`` over the classes; sigmoid: the cross-entropy of the channel
``region_count`` ``m``
``bins:N``       three times N rows: ``m``, ``m p`` and ``m g`` where ``p`` lies in ``((i - 1) / N, i / N]``, the
                 first closed
================ ==============================================================

A class that a case was not annotated for has no sums: 0, and no gradient. With softmax and ``none`` it is one with the
background: the marginal loss, in which ``p_0`` is the sum of the probabilities of both (Shi et al. 2021,
https://arxiv.org/abs/2007.03868).

The sigmoid focal term is ``f = exp(G log sigmoid(-x (2g - 1))) BCE(x, g)``: for hard labels the focal loss of its paper
(Lin et al. 2017, https://arxiv.org/abs/1708.02002), for soft labels MONAI's extension of it.

The backends compute the same sums without the volume-sized tensors that this file makes freely; they are tested
against it, value and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    "skeleton",
    "skeleton_ref",
    "count",
)
REGION_TERMS = ("region_tp", "region_pred", "region_ref", "region_ce", "region_count")
FOCAL_TERMS = ("focal", "focal_neg")
BINS = "bins"
# Terms of the logarithm need logits: the logarithm of a probability that was rounded to 0 cannot be brought back.
LOG_TERMS = frozenset({"ce", "ce_neg", "logp", "region_ce", *FOCAL_TERMS})
SIGMOID_TERMS = frozenset({"ce_neg", "focal_neg"})
SURFACE_TERMS = frozenset({"surface", "surface_min"})
SKELETON_TERMS = frozenset({"skeleton", "skeleton_ref"})
# Whatever the input.
CONSTANT_TERMS = frozenset({"ref", "ref_sq", "surface_min", "skeleton_ref", "region_ref", "region_count", "count"})


def focal(gamma: float) -> str:
    """Return the name of the focal term with exponent ``gamma``."""
    return f"focal:{float(gamma)!r}"


def focal_neg(gamma: float) -> str:
    """Return the name of the focal term's negative part with exponent ``gamma``."""
    return f"focal_neg:{float(gamma)!r}"


def bins(number: int) -> str:
    """Return the name of the sums in ``number`` bins of the probability."""
    return f"{BINS}:{number}"


def split(term: str) -> tuple[str, float]:
    """Split ``"focal:2.0"`` into its name and what follows the colon, 0 where nothing does."""
    name, _, number = term.partition(":")
    return name, float(number) if number else 0.0


def rows(term: str, num_regions: int = 0) -> int:
    """Return how many rows of ``[B, C]`` sums a term has."""
    name, number = split(term)
    return 3 * int(number) if name == BINS else num_regions + 1 if name in REGION_TERMS else 1


def check(terms: Iterable[str], activation: str, target: Target) -> None:
    """Refuse a term that does not exist, or that the activation or what the target lacks rules out."""
    errors.one_of("activation", activation, ACTIVATIONS)
    names = list(terms)
    known = (*PLAIN_TERMS, *REGION_TERMS, *FOCAL_TERMS, BINS)
    if not names:
        raise errors.fail("terms", f"must name at least one of {', '.join(known)}", names)
    for term in names:
        name, colon, number = term.partition(":")
        errors.one_of("terms", name, (*FOCAL_TERMS, BINS) if colon else known)
        if name in FOCAL_TERMS:
            _check_exponent(term, number)
        if name == BINS and not (number.isdecimal() and int(number)):
            raise errors.fail("terms", "the number of bins is a whole number of at least 1, as in 'bins:20'", term)
        if name in LOG_TERMS and activation == "none":
            raise errors.fail("terms", f"{name} needs logits, so activation must be softmax or sigmoid", activation)
        if name in SIGMOID_TERMS and activation != "sigmoid":
            raise errors.fail("terms", f"{name} exists for activation sigmoid only", activation)
        if name in SURFACE_TERMS and target.distance is None:
            raise errors.fail("distance", f"{name} needs a signed distance map", None)
        if name in SKELETON_TERMS and target.skeleton is None:
            raise errors.fail("skeleton", f"{name} needs a skeleton of the reference", None)
        if name in REGION_TERMS and target.regions is None:
            raise errors.fail("regions", f"{name} needs a map of regions", None)


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
    terms: Sequence[str],
    activation: str,
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None = None,
    skeleton: Tensor | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each term and its value at each voxel, before the mask: the tables of the module's docstring.

    Args:
        terms: names of the terms.
        activation: what makes probabilities of the logits.
        logits: ``[B, C, ...]``.
        target: dense, of the logits' shape.
        distance: signed distance map of that shape, for the surface terms.
        skeleton: mask of that shape, for the skeleton terms.

    Yields:
        A term and its values, ``[B, C, ...]``; of :data:`BINS`, the probability. One at a time, so that no more than
        one of these volumes need be there at once.
    """
    if activation == "softmax":
        logp = F.log_softmax(logits, 1)
        if _may_be_infinite(logits):
            # Finite, so that a class that a logit of -inf rules out counts as 0 where the target does not have it.
            logp = logp.clamp_min(torch.finfo(logits.dtype).min)
        p = logp.exp()
    elif activation == "sigmoid":
        logp = F.logsigmoid(logits)
        p = torch.sigmoid(logits)
    else:
        p, logp = logits, logits
    for term in terms:
        name, gamma = split(term)
        if name in ("tp", "region_tp"):
            yield term, p * target
        elif name in ("pred", "region_pred", BINS):
            yield term, p
        elif name == "pred_sq":
            yield term, p * p
        elif name in ("ref", "region_ref"):
            yield term, target
        elif name == "ref_sq":
            yield term, target * target
        elif name == "abs_diff":
            yield term, (p - target).abs()
        elif name == "ce":
            yield term, -target * logp
        elif name == "ce_neg":
            yield term, -(1 - target) * F.logsigmoid(-logits)
        elif name == "region_ce" and activation == "softmax":
            yield term, -(target * logp).sum(1, keepdim=True).expand_as(p)
        elif name == "region_ce":
            yield term, -target * logp - (1 - target) * F.logsigmoid(-logits)
        elif name == "logp":
            yield term, -logp
        elif name == "focal" and activation == "softmax":
            # -expm1 keeps the digits of 1 - p near p = 1, and the clamp the gradient finite where gamma < 1.
            yield term, -target * (-torch.expm1(logp)).clamp_min(torch.finfo(p.dtype).tiny) ** gamma * logp
        elif name == "focal":
            yield term, target * sigmoid_focal(logits, target, gamma)
        elif name == "focal_neg":
            yield term, (1 - target) * sigmoid_focal(logits, target, gamma)
        elif name == "surface" and distance is not None:
            yield term, p * distance
        elif name == "surface_min" and distance is not None:
            yield term, distance.clamp_max(0)
        elif name == "skeleton" and skeleton is not None:
            yield term, p * skeleton
        elif name == "skeleton_ref" and skeleton is not None:
            yield term, skeleton
        else:
            yield term, torch.ones((), dtype=p.dtype, device=p.device).expand_as(p)


def _may_be_infinite(logits: Tensor) -> bool:
    """Tell whether a logit is -inf, where a look at the values costs little: a GPU would wait for it."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling() or not logits.numel():
        return True
    return not bool(logits.detach().amin() >= torch.finfo(logits.dtype).min)


def voxel_inputs(logits: Tensor, target: Target, activation: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a value per voxel is computed from: logits, dense labels and the multiplier of the values.

    Returns:
        Logits and labels ``[B, C, *S]``, 0 wherever the multiplier is; the multiplier ``[B, 1 or C, *S]``, None where
        it is 1 throughout. Float64 for float64 logits, float32 otherwise. Logits of classes that a case was not
        annotated for are in its background's.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    multiplier = target.multiplier(dtype)
    x, dense = logits.to(dtype), target.dense(logits.shape[1], dtype)
    if multiplier is not None:  # nothing that stands where a voxel does not count may reach the others: 0 NaN is NaN
        x, dense = torch.where(multiplier > 0, x, 0.0), torch.where(multiplier > 0, dense, 0.0)
    if target.annotated is not None and activation != "sigmoid":
        x = fold(x, target.annotated, activation)
    return x, dense, multiplier


def voxel_maps(
    logits: Tensor, target: Target, terms: Sequence[str], activation: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return terms voxel by voxel, differentiable by autograd: for a loss that is no formula on sums.

    Returns:
        Term to ``[B, C, *S]``, 0 for classes that a case was not annotated for; and the multiplier of these values,
        ``[B, 1 or C, *S]``, None where it is 1 throughout.

    Raises:
        UserError: for labels that cannot be right, see :meth:`Target.check_values`.
    """
    target.check_values(logits.shape[1])
    x, dense, multiplier = voxel_inputs(logits, target, activation)
    values = dict(voxel_values(terms, activation, x, dense))
    if target.annotated is not None:
        annotated = target.annotated.view(*target.annotated.shape, *[1] * (x.ndim - 2))
        values = {term: torch.where(annotated, value, 0.0) for term, value in values.items()}
    return values, multiplier


def fold(logits: Tensor, annotated: Tensor, activation: str) -> Tensor:
    """Add the probabilities of classes that a case was not annotated for to its background's.

    Args:
        logits: ``[B, C, *S]``; probabilities for the activation ``none``.
        annotated: ``[B, C]``.
        activation: ``softmax`` or ``none``.

    Returns:
        Logits of the same shape, those of such classes -inf (0 for ``none``), of which a softmax makes these
        probabilities: the background's is the logarithm of a sum of exponentials, which neither overflows nor vanishes.
    """
    own = annotated.view(*annotated.shape, *[1] * (logits.ndim - 2)).expand_as(logits)[:, 1:]
    background, others = logits[:, :1], logits[:, 1:]
    if activation == "none":
        return torch.cat([background + torch.where(own, 0.0, others).sum(1, True), torch.where(own, others, 0.0)], 1)
    group = torch.cat([background, torch.where(own, -torch.inf, others)], 1)
    return torch.cat([group.logsumexp(1, keepdim=True), torch.where(own, others, -torch.inf)], 1)


def definition(
    logits: Tensor, target: Target, terms: Sequence[str], activation: str, accumulate: torch.dtype | None = None
) -> Tensor:
    """Compute the sums by the tables above, differentiable by autograd; the target's values are not checked.

    Args:
        logits: ``[B, C, *S]``.
        target: what counts, folded, and the maps that terms need.
        terms: names of the terms.
        activation: softmax, sigmoid or none.
        accumulate: the type in which voxels are added up; that of the arithmetic unless given. Regions and bins are
            added up in float64 where the device has it: voxel by voxel, which in float32 loses digits.

    Returns:
        ``[rows, B, C]``, see :func:`rows`; float64 for float64 logits, float32 otherwise.
    """
    x, dense, multiplier = voxel_inputs(logits, target, activation)
    known = [
        None if volume is None else volume.to(x.dtype) if multiplier is None else _where(multiplier, volume, x.dtype)
        for volume in (target.distance, target.dense_skeleton(logits.shape[1]))
    ]
    totals = []
    for term, value in voxel_values(terms, activation, x, dense, *known):
        name, number = split(term)
        if name == BINS:
            totals.append(_bin_rows(int(number), value, dense, multiplier))
            continue
        counted = value if multiplier is None else value * multiplier
        if name in REGION_TERMS and target.regions is not None:
            totals.append(_region_rows(counted, target.regions, target.num_regions))
        else:
            totals.append(counted.flatten(2).sum(2, dtype=accumulate).unsqueeze(0))
    total = torch.cat(totals).to(x.dtype)
    return total if target.annotated is None else torch.where(target.annotated, total, 0.0)


def _where(multiplier: Tensor, volume: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(multiplier > 0, volume.to(dtype), 0.0)


def _region_rows(value: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Return the sums over each region, ``[R + 1, B, C]``; a background that has no regions has sums of 0."""
    num_samples, num_classes = value.shape[:2]
    first = num_classes - regions.shape[1]
    value = _widest(value[:, first:].flatten(2))
    sums = value.new_zeros(num_samples, num_classes - first, num_regions + 1)
    sums = sums.scatter_add(2, regions.flatten(2).long(), value)
    return F.pad(sums, (0, 0, first, 0)).permute(2, 0, 1)


def _bin_rows(number: int, p: Tensor, dense: Tensor, multiplier: Tensor | None) -> Tensor:
    """Return the count, the sum of the probability and that of the reference in each bin, ``[3 N, B, C]``."""
    place = ((p.detach() * number).ceil() - 1).nan_to_num(0.0).clamp(0, number - 1).long().flatten(2)
    weight = torch.ones_like(p) if multiplier is None else multiplier.expand_as(p)
    values = _widest(torch.stack([weight, weight * p, weight * dense]).flatten(3))
    sums = values.new_zeros(3, *p.shape[:2], number).scatter_add(3, place.expand_as(values), values)
    return sums.movedim(3, 1).flatten(0, 1)


def _widest(values: Tensor) -> Tensor:
    return values if values.device.type == "mps" else values.double()  # which has no float64


def reference_sums(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums with the target checked, added up in float64: the oracle of the backends.

    Args:
        logits: ``[B, C, *S]``.
        target: what counts, and the maps that terms need.
        terms: names of the terms.
        activation: softmax, sigmoid or none.

    Returns:
        ``[rows, B, C]``, float64 for float64 logits, float32 otherwise.

    Raises:
        UserError: for labels that cannot be right, see :meth:`Target.check_values`.
    """
    target.check_values(logits.shape[1])
    return definition(logits, target, terms, activation, torch.float64)
