# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Any loss class of ``monai.losses``, by name in a config."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import monai.losses
from torch import nn

from monai_losses_ext import errors

PREFIX = "monai."
CLASSES: dict[str, type[nn.Module]] = {
    name: value
    for name, value in vars(monai.losses).items()
    if inspect.isclass(value) and issubclass(value, nn.Module) and name == value.__name__
}
# What people call a loss that has another name in MONAI.
ALIASES = {
    "cldice": "SoftclDiceLoss",
    "dicecldice": "SoftDiceclDiceLoss",
    "softcldice": "SoftclDiceLoss",
    "gwdl": "GeneralizedWassersteinDiceLoss",
}
ACTIVATIONS = frozenset({"softmax", "use_softmax", "sigmoid", "other_act"})


def build(kind: str, where: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> nn.Module:
    """Build the class that is named, exactly that, from keywords of its signature.

    Args:
        kind: ``monai.`` and the name of the class.
        where: the place, for an error.
        config: its keywords, beside the type.
        defaults: keywords for where the config has none; those that the class does not take are left out.

    Raises:
        UserError: one line, for a class or a keyword that does not exist, or values that the class refuses.
    """
    names = [PREFIX + name for name in CLASSES]
    if kind not in names:
        nearest = errors.nearest(kind.removeprefix(PREFIX), CLASSES).replace("'", f"'{PREFIX}", 1)
        raise errors.fail(f"{where}: type", "must be a loss class of monai.losses", kind, nearest)
    loss_class = CLASSES[kind.removeprefix(PREFIX)]
    allowed = list(inspect.signature(loss_class).parameters)
    arguments = {key: value for key, value in config.items() if key != "type"}
    for key in arguments:
        errors.one_of(f"{where}: {kind}: key", key, allowed)
    arguments = _flags(arguments, defaults, allowed) | arguments
    try:
        return loss_class(**arguments)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise errors.UserError(f"{where}: {kind}: {' '.join(str(error).split())}") from None


def _flags(arguments: Mapping[str, Any], defaults: Mapping[str, Any], allowed: Collection[str]) -> dict[str, Any]:
    """Return what the config leaves open: a bundle's flags, and a softmax where nobody chose an activation."""
    sigmoid, other_act, chosen = arguments.get("sigmoid", False), None, {}
    if not ACTIVATIONS & set(arguments):
        sigmoid, other_act = bool(defaults.get("sigmoid")), defaults.get("other_act")
        chosen = {"sigmoid": True} if sigmoid else {"softmax": True, "use_softmax": True}
        chosen = chosen if other_act is None else {"other_act": other_act}
    flags: dict[str, Any] = {"to_onehot_y": not sigmoid}  # regions are labels of their own, classes are indices
    if sigmoid:
        flags["include_background"] = True  # channel 0 is a region, whatever the class's default
    flags |= {key: value for key, value in defaults.items() if key not in ACTIVATIONS} | chosen
    return {key: value for key, value in flags.items() if key in allowed}


def hint(word: Any, ours: Collection[str]) -> str:
    """Return `` Did you mean ...?`` for the loss that a name was meant to be, ours or one of MONAI's; or nothing."""
    if not isinstance(word, str):
        return ""
    plain = _plain(word)
    theirs = {_plain(name): name for name in CLASSES}
    if plain in ALIASES:
        return f" Did you mean {PREFIX + ALIASES[plain]!r}?"
    if plain in theirs and plain not in map(_plain, ours):
        return f" Did you mean {PREFIX + theirs[plain]!r}?"
    return errors.nearest(word, ours)


def _plain(name: str) -> str:
    return name.lower().removeprefix(PREFIX).replace("_", "").replace("-", "").removesuffix("loss")


def takes(key: str) -> bool:
    """Tell whether one of MONAI's losses has an argument of that name."""
    return any(key in inspect.signature(loss_class).parameters for loss_class in CLASSES.values())
