# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The ``lambda_...`` of a bundle's own loss, as the weights of the loss that replaces it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from monai_losses_ext.arguments import Limits, number
from monai_losses_ext.losses import monais

# MONAI's names of the weights, and the component that each belongs to.
PARTS = {"lambda_dice": "dice", "lambda_gdl": "dice", "lambda_ce": "cross_entropy", "lambda_focal": "focal"}
PAIRS = {"dice_ce": {"dice": "lambda_dice", "cross_entropy": "lambda_ce"}}
PAIRS["dice_focal"] = {"dice": "lambda_dice", "focal": "lambda_focal"}


def with_lambdas(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a loss with a bundle's own weights, where it leaves its weights open.

    A loss of Dice and cross-entropy, or of Dice and focal loss, leaves them open where it has none or equal ones. If
    its parts are those of the bundle's loss, the ratio and the sum of the bundle's become its own; if they are not,
    the sum alone. A weight that the bundle does not name counts 1, as it does in MONAI.

    Args:
        config: what describes the loss, without an outer ``loss``.
        defaults: the flags of the bundle's loss.

    Raises:
        UserError: for a weight that is no number of at least 0.
    """
    given = {
        PARTS[key]: number(f"get_loss: {key}", defaults[key], Limits(minimum=0)) for key in PARTS if key in defaults
    }
    kind = config.get("type")
    if isinstance(kind, str) and kind.removeprefix(monais.PREFIX) in monais.CLASSES:  # has weights of these names
        takes = inspect.signature(monais.CLASSES[kind.removeprefix(monais.PREFIX)]).parameters
        return {**{key: defaults[key] for key in PARTS if key in defaults and key in takes}, **config}
    parts = _open_parts(config) if given else []
    if not parts:
        return config
    if set(given) <= set(parts):
        weights = [given.get(part, 1.0) for part in parts]
    else:
        weights = [(sum(given.values()) + 2 - len(given)) / 2] * 2
    if config["type"] in PAIRS:
        names = PAIRS[config["type"]]
        return {**config, **{names[part]: weight for part, weight in zip(parts, weights, strict=True)}}
    components = [{"type": item} if isinstance(item, str) else item for item in config["components"]]
    return {**config, "components": [{**c, "weight": w} for c, w in zip(components, weights, strict=True)]}


def _open_parts(config: Mapping[str, Any]) -> list[str]:
    """Return the two parts of a loss whose weights are open; nothing for any other loss."""
    kind, components = config.get("type"), config.get("components")
    if isinstance(kind, str) and kind in PAIRS:
        return [] if set(PAIRS[kind].values()) & set(config) else list(PAIRS[kind])
    if kind != "compound" or not isinstance(components, list):
        return []
    items = [{"type": item} if isinstance(item, str) else item for item in components]
    if not all(isinstance(item, Mapping) for item in items) or any(
        i.get("weight") != items[0].get("weight") for i in items
    ):
        return []
    parts = [item.get("type") for item in items]
    is_pair = any(sorted(map(str, parts)) == sorted(pair) for pair in PAIRS.values())
    return [str(part) for part in parts] if is_pair else []
