# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How a compound's terms become its total: by fixed weights, weights learned by gradient, or weights of past epochs."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from monai_losses_ext import arguments, errors
from monai_losses_ext.distributed import average_gradient, has_many_ranks, mean_over_ranks
from monai_losses_ext.losses.base import Fraction, NonNegative, Positive, as_list

Ratio = Annotated[float, arguments.Limits(above=1)]


class Weighting(nn.Module):
    """Turns the terms of a compound into its total, by weights that start as they were given.

    Weights, parameters too, are float64, since they are a handful of numbers: 0.3 stays 0.3, totals are as exact as
    their terms, and optimizers, gradient scaling and clipping take float64 beside a network of any other precision.

    A subclass takes the initial weights, and options if it has any, and writes two methods.

    Attributes:
        kind: its name in a config.
        learned: whether it has parameters for an optimizer.
        takes_zero: whether an initial weight may be 0.
        takes_negative: whether a term may be negative.
    """

    kind: ClassVar[str] = "custom"
    learned: ClassVar[bool] = False
    takes_zero: ClassVar[bool] = True
    takes_negative: ClassVar[bool] = True

    def checked(self, weights: Sequence[float]) -> Tensor:
        """Return initial weights as a tensor ``[N]``.

        Raises:
            ValueError: for a negative one, or a 0 that the mode cannot take.
        """
        weights = as_list("weights", "must be a list of numbers", weights)
        for weight in weights:
            arguments.number("weights", weight, arguments.Limits(minimum=0))
            if weight == 0 and not self.takes_zero:
                rule = f"must be above 0 for weighting {self.kind!r}, which could never raise a weight of 0"
                raise errors.fail("weights", rule, weights)
        return torch.tensor([float(weight) for weight in weights], dtype=torch.float64)

    @abstractmethod
    def effective(self) -> Tensor:
        """Return the weights ``[N]`` that the terms have now."""

    @abstractmethod
    def combine(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the total of the terms, which are scalars unless a mode says otherwise."""

    def end_epoch(self, means: Sequence[float] | Tensor) -> None:
        """Take note of each term's mean over an epoch; for a mode without history, nothing happens."""


class FixedWeighting(Weighting):
    """``sum w_i L_i`` with weights that nothing but :meth:`CompoundLoss.set_weights` changes.

    The one mode that takes terms other than numbers, see :class:`monai_losses_ext.CompoundLoss`.

    Args:
        weights: the weight of each term.
    """

    kind = "fixed"
    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", self.checked(weights))

    def effective(self) -> Tensor:
        """Return the weights."""
        return self.weights

    def combine(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum, in the terms' dtype."""
        dtype = common_dtype(terms)
        weights = self.weights.to(torch.promote_types(dtype, torch.float32))
        weighed = [term.to(weights.dtype) * weight for term, weight in zip(terms, weights, strict=True)]
        return functools.reduce(torch.add, weighed).to(dtype)


class SoftmaxWeighting(Weighting):
    """Learned weights that sum to 1, kept from draining into the smallest term.

    Minimized over its weights, ``sum w_i L_i`` puts all of them on the smallest term, whatever the others need. Here
    ``w = floor pi + (1 - floor) softmax(theta)`` with the prior ``pi``, the initial weights over their sum, and the
    total is ``sum w_i L_i + pull KL(pi || w)`` with ``KL = sum pi_i log(pi_i / w_i)``, which is 0 at the prior, never
    negative, and does not change the network's gradient. So at the first step ``w = pi``, no weight falls below
    ``floor pi_i``, and for terms that do not change the best weights are ``w_i = pull pi_i / (L_i + mu)``, or the
    floor where that is larger, with the ``mu`` for which they sum to 1: the larger a term, the smaller its weight, as
    with every learned weight. Terms may be negative.

    Args:
        weights: the initial weight of each term, above 0.
        floor: share of the prior that a weight keeps, below 1.
        pull: strength of the pull to the prior, in the unit of the terms: raise it for terms far above 1. With 0 and
            no floor this is the plain softmax, which collapses.
    """

    kind = "softmax"
    learned = True
    takes_zero = False
    prior: Tensor

    def __init__(self, weights: Sequence[float], floor: Fraction = 0.1, pull: NonNegative = 1.0) -> None:
        arguments.check_arguments(SoftmaxWeighting.__init__, {"floor": floor, "pull": pull})
        if floor >= 1:
            raise errors.fail("floor", "must be below 1, or nothing could be learned", floor)
        super().__init__()
        initial = self.checked(weights)
        self.register_buffer("prior", initial / initial.sum())
        self.theta = nn.Parameter(self.prior.log())
        self.floor = floor
        self.pull = pull

    def effective(self) -> Tensor:
        """Return the weights, which sum to 1."""
        return self.floor * self.prior + (1 - self.floor) * self.theta.softmax(0)

    def combine(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of scalar terms and the pull to the prior."""
        total = (stacked(terms, self.kind) * average_gradient(self.effective())).sum()
        if self.pull > 0:
            # In logarithms, so that a weight that underflows to 0 (there may be no floor) still has a gradient.
            free = self.theta.log_softmax(0) + torch.log1p(torch.full_like(self.theta, -self.floor))
            log_weights = torch.logaddexp((self.floor * self.prior).log(), free)
            total = total + self.pull * (self.prior * (self.prior.log() - log_weights)).sum()
        return total.to(common_dtype(terms))


class UncertaintyWeighting(Weighting):
    """Learned weights ``1 / (2 sigma_i^2)``, one uncertainty per task: ``sum w_i L_i + log(1 + 1 / (2 w_i))``.

    ``log(1 + sigma^2)`` cannot go negative, unlike the first paper's ``log sigma``. A term near 0 would take its
    weight to infinity, so weights are bounded smoothly, ``w_i = w0_i max_ratio^tanh(u_i)`` with ``u_i = 0`` at the
    start: between ``w0_i / max_ratio`` and ``w0_i max_ratio`` always. The gradient fades near a bound, so a weight that
    stayed there for long leaves it slowly. They do not sum to 1. For terms that do not change the best weights solve
    ``w_i (2 w_i + 1) = 1 / L_i`` within the bounds.

    Args:
        weights: the initial weight of each term, above 0.
        max_ratio: how many times its initial value a weight may become, and how many times smaller.

    Source:
        Kendall et al. 2018, https://arxiv.org/abs/1705.07115; Liebel and Koerner 2018,
        https://arxiv.org/abs/1805.06334. The bounds are ours.
    """

    kind = "uncertainty"
    learned = True
    takes_zero = False
    takes_negative = False
    initial: Tensor

    def __init__(self, weights: Sequence[float], max_ratio: Ratio = 10.0) -> None:
        arguments.check_arguments(UncertaintyWeighting.__init__, {"max_ratio": max_ratio})
        super().__init__()
        self.register_buffer("initial", self.checked(weights))
        self.u = nn.Parameter(torch.zeros_like(self.initial))
        self.max_ratio = float(max_ratio)

    def effective(self) -> Tensor:
        """Return the weights."""
        return self.initial * self.max_ratio ** self.u.tanh()

    def combine(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of scalar terms and the price of small weights."""
        weights = average_gradient(self.effective())
        total = (stacked(terms, self.kind) * weights).sum() + torch.log1p(0.5 / weights).sum()
        return total.to(common_dtype(terms))


class DWAWeighting(Weighting):
    """Dynamic weight average: more weight to the terms that fall slowly; nothing is learned by gradient.

    After epoch t, with ``r_k = L_k(t) / L_k(t - 1)``, the weights are
    ``w_k = (sum_j w0_j) w0_k exp(r_k / T) / sum_j w0_j exp(r_j / T)``. Through the first two epochs, as long as there
    is nothing to compare, they are the initial ones. ``r_k`` is clipped to [0, 2]; two means of 0 count as 1 (nothing
    changed), a mean that is not finite too. So a weight stays between ``w0_k exp(-2 / T)`` and ``w0_k exp(2 / T)``,
    and one of 0 stays 0.

    Args:
        weights: the initial weight of each term, at least one above 0.
        temperature: T; the larger, the more alike the weights.

    Source:
        Liu et al. 2019, https://arxiv.org/abs/1803.10704, where all initial weights are 1. The clipping is ours.
    """

    kind = "dwa"
    takes_negative = False
    initial: Tensor
    weights: Tensor
    history: Tensor

    def __init__(self, weights: Sequence[float], temperature: Positive = 2.0) -> None:
        arguments.check_arguments(DWAWeighting.__init__, {"temperature": temperature})
        super().__init__()
        self.register_buffer("initial", self.checked(weights))
        if not self.initial.any():
            raise errors.fail("weights", "must hold one above 0 for weighting 'dwa'", list(weights))
        self.register_buffer("weights", self.initial.clone())
        # The means of the last epoch and of the one before it: infinite, as long as there was none.
        self.register_buffer("history", torch.full((2, len(self.initial)), torch.inf, dtype=torch.float64))
        self.temperature = float(temperature)

    def effective(self) -> Tensor:
        """Return the weights of this epoch."""
        return self.weights

    def combine(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the weighted sum of scalar terms."""
        return (stacked(terms, self.kind) * self.weights).sum().to(common_dtype(terms))

    @torch.no_grad()
    def end_epoch(self, means: Sequence[float] | Tensor) -> None:
        """Set the weights of the next epoch from each term's mean over this one, averaged over the ranks."""
        last = torch.as_tensor(means, dtype=torch.float64, device=self.history.device)
        if last.shape != self.initial.shape:
            raise errors.fail("means", f"must hold one mean per term ({len(self.initial)})", list(last.shape))
        if has_many_ranks():
            last = mean_over_ranks(last)
        self.history.copy_(torch.stack([last, self.history[0]]))
        ratio = torch.where(self.history.isfinite().all(0), self.history[0] / self.history[1], torch.nan)
        ratio = ratio.nan_to_num(nan=1.0).clamp(0, 2)
        # exp(r - 1) rather than exp(r): with nothing to compare the initial weights come out to the last bit.
        raised = self.initial * ((ratio - 1) / self.temperature).exp()
        self.weights.copy_(raised * (self.initial.sum() / raised.sum()))


def stacked(terms: Sequence[Tensor], kind: str) -> Tensor:
    """Return scalar terms as one float64 tensor ``[N]``.

    Raises:
        ValueError: for a term of another shape.
    """
    for term in terms:
        if term.ndim > 0:
            rule = f"must give one number each with weighting {kind!r} (reduction='none' goes with 'fixed')"
            raise errors.fail("losses", rule, list(term.shape))
    return torch.stack(list(terms)).double()


def common_dtype(terms: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of the terms."""
    return functools.reduce(torch.promote_types, [term.dtype for term in terms])
