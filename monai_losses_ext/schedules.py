# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of a compound loss as functions of the epoch: no state, so that a resumed training needs none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from monai_losses_ext import arguments, errors

Weight = Annotated[float, arguments.Limits(minimum=0)]
Share = Annotated[float, arguments.Limits(minimum=0, maximum=1)]
Step = Annotated[float, arguments.Limits(above=0, maximum=1)]
Epochs = Annotated[int, arguments.Limits(minimum=1)]

Weights = dict[str, float]
Schedule = Callable[[int], Weights]  # epoch, from 1 -> name of a component -> weight


def constant(component: str, value: Weight) -> Schedule:
    """Keep a component at one weight."""
    arguments.check_arguments(constant, locals())
    return lambda epoch: {component: value}


def linear(component: str, start: Weight, end: Weight, epochs: Epochs) -> Schedule:
    """Move a component's weight from ``start`` in the first epoch to ``end`` in epoch ``epochs``, and keep it there."""
    arguments.check_arguments(linear, locals())
    return lambda epoch: {component: start + (end - start) * _progress(epoch, epochs)}


def cosine(component: str, start: Weight, end: Weight, epochs: Epochs) -> Schedule:
    """As :func:`linear`, but along half a wave: slowly at both ends."""
    arguments.check_arguments(cosine, locals())
    return lambda epoch: {component: end + (start - end) * (1 + math.cos(math.pi * _progress(epoch, epochs))) / 2}


def rebalance(
    component: str, regions: str | Sequence[str] | Mapping[str, float], step: Step = 0.01, floor: Share = 0.1
) -> Schedule:
    """Move weight from the losses of regions to the loss of the boundary, one step an epoch.

    In epoch ``e`` the regions together have ``max(floor, 1 - step e)``, the boundary has the rest. Kervadec et al.
    2019, https://arxiv.org/abs/1812.07032 ("rebalance"), with a floor.

    Args:
        component: the boundary loss.
        regions: the region losses; a dictionary gives each its share of what they have together, else equal shares.
        step: what moves in an epoch.
        floor: what the regions keep.
    """
    arguments.check_arguments(rebalance, {"component": component, "step": step, "floor": floor})
    names = [regions] if isinstance(regions, str) else regions
    if not isinstance(names, (Sequence, Mapping)) or not all(isinstance(name, str) for name in names):
        rule = "must be a loss's name, a list of names, or a dictionary of names and their shares"
        raise errors.fail("regions", rule, regions)
    given = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    shares = [arguments.number(f"regions: {name}", given[name], arguments.Limits(minimum=0)) for name in names]
    if sum(shares) == 0:
        raise errors.fail("regions", "must name at least one loss, with a share above 0", regions)
    if len({*names, component}) <= len(names):
        raise errors.fail("regions", f"must differ from each other and from {component!r}", regions)

    def weights(epoch: int) -> Weights:
        region = max(floor, 1 - step * epoch)
        return {name: region * share / sum(shares) for name, share in zip(names, shares, strict=True)} | {
            component: 1 - region
        }

    return weights


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "rebalance": rebalance,
}


def get_schedule(config: Mapping[str, Any]) -> Schedule:
    """Build a schedule from its description, such as ``{"type": "linear", "component": "boundary", "start": 0, ...}``.

    Raises:
        ValueError: one line, for what is no dictionary, an unknown type or argument, a missing one, or a wrong value.
    """
    if not isinstance(config, Mapping):
        raise errors.fail("schedule", "must be a dictionary with a type", config)
    arguments = dict(config)
    kind = errors.one_of("schedule: type", arguments.pop("type", None), SCHEDULES)
    parameters = inspect.signature(SCHEDULES[kind]).parameters
    for key in arguments:
        errors.one_of(f"schedule: {kind}: key", key, parameters)
    required = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in arguments]
    if missing:
        rule, hint = f"takes {', '.join(parameters)}", f" Missing: {', '.join(missing)}."
        raise errors.fail(f"schedule: {kind}", rule, list(arguments), hint)
    try:
        return SCHEDULES[kind](**arguments)
    except ValueError as error:
        raise errors.UserError(f"schedule: {kind}: {error}") from None


def get_schedules(configs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Schedule]:
    """Build schedules from one description or a list of them; see :func:`get_schedule`.

    Raises:
        ValueError: one line, for anything else.
    """
    if isinstance(configs, Mapping):
        return [get_schedule(configs)]
    if not isinstance(configs, Sequence) or isinstance(configs, str):
        raise errors.fail("schedules", "must be a dictionary with a type, or a list of them", configs)
    return [get_schedule(config) for config in configs]


def weights_at(schedules: Sequence[Schedule], epoch: int) -> Weights:
    """Return what the schedules together set in an epoch, the first being 1.

    Raises:
        ValueError: for two schedules of one component.
    """
    weights: Weights = {}
    for schedule in schedules:
        for name, weight in schedule(epoch).items():
            if name in weights:
                raise errors.fail("schedules", "must not set one component twice", name)
            weights[name] = weight
    return weights


def table(schedules: Sequence[Schedule], epochs: int) -> list[Weights]:
    """Return the weights of every epoch, without a training.

    Example:
        >>> table([linear("boundary", 0.0, 0.5, epochs=3)], epochs=4)
        [{'boundary': 0.0}, {'boundary': 0.25}, {'boundary': 0.5}, {'boundary': 0.5}]
    """
    return [weights_at(schedules, epoch) for epoch in range(1, epochs + 1)]


def _progress(epoch: int, epochs: int) -> float:
    """Return how far the first ``epochs`` epochs have come: 0 in the first, 1 in the last and ever after."""
    return min(1.0, (epoch - 1) / (epochs - 1)) if epochs > 1 else 1.0
