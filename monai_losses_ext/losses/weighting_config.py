# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weightings by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from monai_losses_ext import errors
from monai_losses_ext.errors import UserError
from monai_losses_ext.losses.weighting import (
    DWAWeighting,
    FixedWeighting,
    SoftmaxWeighting,
    UncertaintyWeighting,
    Weighting,
)

WEIGHTINGS: dict[str, type[Weighting]] = {
    weighting.kind: weighting for weighting in (FixedWeighting, SoftmaxWeighting, UncertaintyWeighting, DWAWeighting)
}
LEARNED = tuple(kind for kind, weighting in WEIGHTINGS.items() if weighting.learned)


def get_weighting(
    weighting: str | Mapping[str, Any] | Weighting | None, learnable: bool, weights: Sequence[float]
) -> Weighting:
    """Build a weighting from its description.

    Args:
        weighting: a name, a dictionary ``{"type": name, ...options}``, None (``softmax`` where the weights are to be
            learned, else ``fixed``), or an object, which is returned as it is.
        learnable: whether they are to be learned; a mode that learns need not be told.
        weights: the initial weights.

    Raises:
        ValueError: one line, for an unknown name or option, a wrong value, or a mode that learns nothing where weights
            are to be learned.
    """
    if weighting is None:
        weighting = "softmax" if learnable else "fixed"
    if not isinstance(weighting, Weighting):
        weighting = _build(weighting, weights)
    if learnable and not weighting.learned:
        rule = f"must be {' or '.join(LEARNED)} where weights are to be learned; no other learns by gradient"
        raise errors.fail("weighting", rule, weighting.kind)
    return weighting


def _build(config: str | Mapping[str, Any], weights: Sequence[float]) -> Weighting:
    if not isinstance(config, (str, Mapping)):
        raise errors.fail("weighting", "must be a name, a dictionary with a type, or a Weighting", config)
    options = {"type": config} if isinstance(config, str) else dict(config)
    kind = errors.one_of("weighting", options.pop("type", None), WEIGHTINGS)
    for key in options:
        if not weighting_keys(kind):
            raise errors.fail(f"weighting: {kind}", "takes no options", key)
        errors.one_of(f"weighting: {kind}: key", key, weighting_keys(kind))
    try:
        return WEIGHTINGS[kind](weights, **options)
    except UserError as error:
        raise UserError(f"weighting: {kind}: {error}") from None


def weighting_keys(kind: str) -> list[str]:
    """Return the options that a mode takes beside the weights."""
    return [key for key in inspect.signature(WEIGHTINGS[kind]).parameters if key != "weights"]
