# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Any loss class of ``monai.losses``, by name in a config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
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
ALIASES = {"cldice": "SoftclDiceLoss", "dicecldice": "SoftDiceclDiceLoss", "hausdorff": "HausdorffDTLoss"}
ALIASES |= {"gwdl": "GeneralizedWassersteinDiceLoss", "unifiedfocal": "AsymmetricUnifiedFocalLoss"}
# Of the flags of a loss: it acts on logits and takes index labels, as the losses of this package do.
LOGITS = {"softmax": True, "use_softmax": True, "to_onehot_y": True}


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
        hint = errors.nearest(kind.removeprefix(PREFIX), CLASSES).replace("'", f"'{PREFIX}", 1)
        raise errors.fail(f"{where}: type", "must be a loss class of monai.losses", kind, hint or nearest_name(kind))
    loss_class = CLASSES[kind.removeprefix(PREFIX)]
    allowed = list(inspect.signature(loss_class).parameters)
    arguments = {key: value for key, value in config.items() if key != "type"}
    for key in arguments:
        errors.one_of(f"{where}: {kind}: key", key, allowed)
    flags = {} if {"softmax", "use_softmax", "sigmoid", "other_act"} & {*arguments, *defaults} else LOGITS
    flags = {**flags, "to_onehot_y": True, **defaults}
    if arguments.get("sigmoid") or flags.get("sigmoid"):
        flags["to_onehot_y"] = defaults.get("to_onehot_y", False)  # regions are labels of their own
        flags.setdefault("include_background", True)  # and channel 0 is one of them, whatever the class's default
    arguments = {key: value for key, value in flags.items() if key in allowed} | arguments
    try:
        return loss_class(**arguments)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise errors.UserError(f"{where}: {kind}: {' '.join(str(error).split())}") from None


def nearest_name(word: Any) -> str:
    """Return `` Did you mean ...?`` for a loss that MONAI has, or nothing."""
    plain = str(word).lower().removeprefix(PREFIX).replace("_", "").replace("-", "").removesuffix("loss")
    for name in CLASSES:
        if plain in (name.lower(), name.lower().removesuffix("loss"), name.lower().removesuffix("loss")[4:]):
            return f" Did you mean {PREFIX + name!r}?"
    return f" Did you mean {PREFIX + ALIASES[plain]!r}?" if plain in ALIASES else ""


def takes(key: str) -> bool:
    """Tell whether one of MONAI's losses has an argument of that name."""
    return any(key in inspect.signature(loss_class).parameters for loss_class in CLASSES.values())
