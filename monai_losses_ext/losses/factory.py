# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Losses from a name, a dictionary or a file, with one-line errors for what a user may get wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_losses_ext import errors
from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.losses import LOSSES, MONAI_LOSSES, monais
from monai_losses_ext.losses.base import VoxelLoss
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.losses.config_file import read_config
from monai_losses_ext.losses.lambdas import with_lambdas
from monai_losses_ext.losses.voxel_weight import VoxelWeight

# Arguments of the constructors that are not for a config, and why.
NOT_IN_CONFIG = {
    "other_act": "losses act on logits, with softmax or sigmoid",
    "reduction": "losses give the mean, since a training needs a scalar that does not grow with the batch",
}
ACTIVATION_KEYS = frozenset({"sigmoid", "softmax", "use_softmax"})
COMPOUND_KEYS = ("type", "components", "learnable_weights", "weighting", "mixed_activations")
MAX_NAME = 64
SAME = (("weight", "class_weight"), ("softmax", "use_softmax"))  # two names of one thing
BALANCED = "balanced"
VOXEL_WEIGHT = "voxel_weight"
VOXEL_WEIGHT_KEYS = tuple(inspect.signature(VoxelWeight).parameters)
BY_NAME = LOSSES | MONAI_LOSSES
COMPOUNDS = frozenset(name for name, loss_class in LOSSES.items() if issubclass(loss_class, CompoundLoss))
NOT_NEGATIVE = Limits(minimum=0)
_CLASS_WEIGHT = " Weights of classes go into class_weight."


def get_loss(
    config: Mapping[str, Any] | str | Path,
    device: torch.device | str | None = None,
    balanced: Sequence[float] | Callable[[], Sequence[float]] | None = None,
    **defaults: Any,
) -> nn.Module:
    """Build a loss from its description.

    Losses act on logits with a softmax over the classes and take index labels, unless the config or the defaults say
    otherwise. Nothing in a config is ever evaluated as code.

    Args:
        config: a dictionary such as ``{"type": "tversky", "beta": 0.7}``, with or without an outer ``{"loss": ...}``; a
            bare name, ``"tversky"``; or the path of a JSON or YAML file with such a dictionary. The keys are the
            constructor's arguments; class weights may also be called ``class_weight``. A compound is
            ``{"type": "compound", "components": [{"type": ..., "weight": 0.5, "name": ...}, ...]}``, where ``weight``
            is the component's weight and ``class_weight`` its class weights; with ``"learnable_weights": true`` the
            weights are learned, and ``"weighting": "softmax"`` or ``{"type": "softmax", "floor": 0.1, ...}`` says how
            (see :class:`CompoundLoss`). ``{"type": "monai.SoftclDiceLoss", ...}`` is exactly that class of
            ``monai.losses``; its keywords are checked by its signature. Any loss of this package may have
            ``"voxel_weight": {"w0": 10.0, ...}``, see :class:`monai_losses_ext.losses.voxel_weight.VoxelWeight`.
        device: where the loss's buffers and learned weights go.
        balanced: the class weights that ``"class_weight": "balanced"`` in the config stands for, one per class; or a
            function that returns them, which is called where a config says so.
        defaults: arguments for every loss that takes them and whose config does not set them; what only another of
            MONAI's losses takes (``w_type``) is dropped, and ``reduction`` may only be ``"mean"``. So a bundle's own
            flags (``sigmoid``, ``include_background``, ``batch``, ...) reach the loss that replaces its own; its
            ``lambda_...`` become the weights of Dice and cross-entropy, or Dice and focal loss, whose config leaves
            them open (none, or equal ones).

    Returns:
        A module called with ``(input, target)``.

    Raises:
        UserError: one line, for an unknown type or key, a value of the wrong kind, a negative weight, no components, a
            nested compound or a file that cannot be read; it names the place, what is allowed and the nearest name.

    Example:
        >>> config = {"type": "compound", "components": [{"type": "dice"}, {"type": "focal", "gamma": 1.5}]}
        >>> get_loss(config).get_weights()
        {'dice': 0.5, 'focal': 0.5}
        >>> get_loss({"type": "focal", "gamma": -1})
        Traceback (most recent call last):
        monai_losses_ext.errors.UserError: loss: focal: gamma: must be a number of at least 0; got -1.
    """
    config = dict(with_lambdas(read_config(config), defaults))
    weighed = _voxel_weight(config.pop(VOXEL_WEIGHT, None), balanced)
    defaults = {key: value for key, value in defaults.items() if not key.startswith("lambda_")}
    single = [loss for name, loss in BY_NAME.items() if name != "compound"]
    known = sorted({key for loss in single for key in inspect.signature(loss).parameters})
    for key in defaults:
        if key not in known and not monais.takes(key):
            raise errors.fail("get_loss", f"defaults must be arguments of a loss ({', '.join(known)})", key)
    if defaults.get("other_act") is not None:
        rule = f"defaults must not have it: {NOT_IN_CONFIG['other_act']}"
        raise errors.fail("get_loss: other_act", rule, defaults["other_act"])
    if defaults.get("reduction", "mean") != "mean":
        rule = f"defaults must not have another than mean: {NOT_IN_CONFIG['reduction']}"
        hint = " To replace a bundle's own: --loss#reduction mean."
        raise errors.fail("get_loss: reduction", rule, defaults["reduction"], hint)
    loss = _build(_with_balanced(config, "loss", balanced), "loss", defaults)
    if isinstance(loss, CompoundLoss) and not any(loss.get_weights().values()):
        rule = "must hold one above 0, or nothing is trained"
        raise errors.fail(f"loss: {config['type']}: weights", rule, list(loss.get_weights().values()))
    if weighed is not None:
        weighed.attach(loss)
    return loss if device is None else loss.to(device)


def _voxel_weight(config: Any, balanced: Any) -> VoxelWeight | None:
    """Return what a config says of the weights of voxels."""
    where = f"loss: {VOXEL_WEIGHT}"
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise errors.fail(where, f"must be a dictionary with {', '.join(VOXEL_WEIGHT_KEYS)}", config)
    _check_keys(where, config, VOXEL_WEIGHT_KEYS)
    try:
        return VoxelWeight(**_with_balanced(config, where, balanced))
    except errors.UserError as error:
        raise errors.UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def _with_balanced(config: Mapping[str, Any], where: str, balanced: Any) -> dict[str, Any]:
    """Return the config with the class weights that ``balanced`` stands for, in its components too."""
    config = dict(config)
    if isinstance(config.get("components"), list):
        config["components"] = [
            _with_balanced(part, f"{where}: components[{i}]", balanced) if isinstance(part, Mapping) else part
            for i, part in enumerate(config["components"])
        ]
    given = config.get("class_weight")
    if isinstance(given, str) and given == BALANCED:
        if balanced is None:
            rule = f"{BALANCED!r} is known where a dataset is, in a bundle; in Python, give get_loss balanced=[...]"
            raise errors.fail(f"{where}: class_weight", rule, "none")
        try:
            config["class_weight"] = list(balanced() if callable(balanced) else balanced)
        except errors.UserError as error:
            raise errors.UserError(f"{where}: class_weight: {error}") from None
    return config


def _build(config: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> nn.Module:
    if "type" not in config:
        raise errors.fail(where, f"needs a type, one of {', '.join(BY_NAME)}", dict(config))
    kind = config["type"]
    if isinstance(kind, str) and kind.startswith(monais.PREFIX):
        return monais.build(kind, where, config, defaults)
    if not isinstance(kind, str) or kind not in BY_NAME:
        rule = f"must be one of {', '.join(BY_NAME)} (or a loss class of MONAI, with the prefix {monais.PREFIX[:-1]})"
        raise errors.fail(f"{where}: type", rule, kind, monais.hint(kind, BY_NAME))
    place = f"{where}: {kind}"
    if kind == "compound":
        return _build_compound(config, where, defaults)
    allowed = config_keys(BY_NAME[kind])
    arguments = {key: value for key, value in config.items() if key != "type"}
    _check_keys(place, arguments, sorted({*allowed, "sigmoid", "softmax", *_class_weight_keys(allowed)}))
    for one, other in SAME:
        if one in arguments and other in arguments:
            raise errors.fail(place, f"{one} and {other} are the same; give one of them", "both")
    if "class_weight" in arguments:
        arguments["weight"] = arguments.pop("class_weight")
    arguments = {key: value for key, value in defaults.items() if key in allowed} | arguments
    activation = _activation(place, config, defaults)
    arguments = {key: value for key, value in arguments.items() if key not in ACTIVATION_KEYS}
    if activation["sigmoid"] and "include_background" in allowed:
        # MONAI's Hausdorff losses leave channel 0 out by default; of a sigmoid it is a class like the others.
        arguments.setdefault("include_background", True)
    arguments |= {"use_softmax": activation["softmax"]} if "use_softmax" in allowed else activation
    try:
        loss = BY_NAME[kind](**arguments)
    except (ValueError, TypeError) as error:
        raise errors.UserError(f"{place}: {error}") from None
    strict = loss.losses[0] if isinstance(loss, CompoundLoss) else loss
    if isinstance(strict, VoxelLoss):
        strict.strict = True
    return loss


def _build_compound(config: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> nn.Module:
    _check_keys(f"{where}: compound", config, COMPOUND_KEYS)
    components = config.get("components")
    if not isinstance(components, list) or not components:
        raise errors.fail(f"{where}: compound: components", "must be a list of at least one loss", components)
    losses, weights, names = [], [], []
    for i, component in enumerate(components):
        place = f"{where}: components[{i}]"
        component = {"type": component} if isinstance(component, str) else component
        if not isinstance(component, Mapping):
            raise errors.fail(place, "must be a loss's name or dictionary", component)
        kind = component.get("type")
        if isinstance(kind, str) and kind in COMPOUNDS:
            raise errors.fail(place, "compounds do not nest; list the single losses instead", kind)
        arguments = dict(component)
        weight = arguments.pop("weight", None)
        if isinstance(weight, list):
            raise errors.fail(f"{place}: weight", "must be the component's weight", weight, _CLASS_WEIGHT)
        weights.append(weight if weight is None else number(f"{place}: weight", weight, NOT_NEGATIVE))
        name = arguments.pop("name", None)
        if name is not None and not isinstance(name, str):
            raise errors.fail(f"{place}: name", "must be a text", name)
        if name is not None and len(name) > MAX_NAME:
            raise errors.fail(f"{place}: name", f"must have at most {MAX_NAME} letters", name)
        names.append(name)
        losses.append(_build(arguments, place, defaults))
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise errors.fail(f"{where}: compound: components", "must all have a weight, or none of them", weights)
    return _weighted(config, f"{where}: compound", losses, given or None, names)


def _weighted(
    config: Mapping[str, Any], place: str, losses: list[nn.Module], weights: list[float] | None, names: list[Any]
) -> CompoundLoss:
    """Return the compound, with its weights fixed or learned as the config says."""
    learnable = config.get("learnable_weights", False)
    if not isinstance(learnable, bool):
        raise errors.fail(f"{place}: learnable_weights", "must be true or false", learnable)
    mixed = config.get("mixed_activations", False)
    if not isinstance(mixed, bool):
        raise errors.fail(f"{place}: mixed_activations", "must be true or false", mixed)
    try:
        loss = CompoundLoss(losses, weights, names, learnable, config.get("weighting"), mixed)
    except errors.UserError as error:
        raise errors.UserError(f"{place}: {error}") from None
    if loss.weighting.learned and not config.get("learnable_weights", True):
        rule = f"must be true, or left out, with weighting {loss.weighting.kind!r}"
        raise errors.fail(f"{place}: learnable_weights", rule, learnable)
    return loss


def _check_keys(place: str, config: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key, value in config.items():
        if key in NOT_IN_CONFIG:
            raise errors.fail(f"{place}: {key}", f"is no key of a config: {NOT_IN_CONFIG[key]}", value)
        errors.one_of(f"{place}: key", key, allowed)


def config_keys(loss_class: type[nn.Module]) -> list[str]:
    """Return the constructor's arguments that a config may set."""
    return [key for key in inspect.signature(loss_class).parameters if key not in NOT_IN_CONFIG]


def _class_weight_keys(allowed: Sequence[str]) -> list[str]:
    """Return the second name of a loss's class weights, if it has any."""
    return ["class_weight"] if "weight" in allowed else []


def _activation(where: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, bool]:
    """Return the activation: the config's choice, else the defaults', else softmax."""
    chosen = {key: value for key, value in config.items() if key in ACTIVATION_KEYS}
    chosen = chosen or {key: value for key, value in defaults.items() if key in ACTIVATION_KEYS}
    for key, value in chosen.items():
        if not isinstance(value, bool):
            raise errors.fail(f"{where}: {key}", "must be true or false", value)
    sigmoid = chosen.get("sigmoid", False)
    softmax = chosen.get("softmax", chosen.get("use_softmax", not sigmoid))
    if softmax and sigmoid:
        raise errors.fail(where, "at most one of sigmoid and softmax may be set", "both")
    return {"softmax": softmax, "sigmoid": sigmoid}
