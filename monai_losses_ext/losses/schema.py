# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of a loss config, generated from the constructors, so that editors complete and check it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from monai_losses_ext import arguments
from monai_losses_ext.losses.base import VoxelLoss
from monai_losses_ext.losses.factory import (
    BALANCED,
    BY_NAME,
    COMPOUNDS,
    SAME,
    VOXEL_WEIGHT,
    VOXEL_WEIGHT_KEYS,
    config_keys,
)
from monai_losses_ext.losses.voxel_weight import VoxelWeight
from monai_losses_ext.losses.weighting_config import LEARNED, WEIGHTINGS, weighting_keys

_BOTH_ACTIVATIONS = [
    {"properties": {"sigmoid": {"const": True}, key: {"const": True}}, "required": ["sigmoid", key]}
    for key in ("softmax", "use_softmax")
]
# One component at least whose weight is not 0.
_NOT_NOTHING = {
    "anyOf": [{"type": "string"}, {"not": {"required": ["weight"], "properties": {"weight": {"const": 0}}}}]
}
_WEIGHTS, _SOFTMAX = ({"required": [*names]} for names in SAME)
CONTRADICTIONS = {
    "one_activation": {"not": {"anyOf": [*_BOTH_ACTIVATIONS, _SOFTMAX]}},
    "one_class_weight": {"not": _WEIGHTS},
}


def loss_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of what :func:`monai_losses_ext.get_loss` takes."""
    plain = [name for name in BY_NAME if name != "compound"]
    losses = {name: _loss(name, BY_NAME[name]) for name in plain}
    single = [name for name in plain if name not in COMPOUNDS]
    components = {f"{name}_component": _component(losses[name]) for name in single}
    weightings = {f"{kind}_weighting": _weighting(kind) for kind in WEIGHTINGS}
    compound = _compound([{"enum": single}, *({"$ref": f"#/$defs/{name}"} for name in components)])
    any_loss = [{"$ref": f"#/$defs/{name}"} for name in [*plain, "compound"]]
    wrapped = {
        "type": "object",
        "properties": {"$schema": {"type": "string"}, "loss": {"anyOf": [{"enum": plain}, *any_loss]}},
        "required": ["loss"],
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Loss of monai_losses_ext",
        "description": 'What monai_losses_ext.get_loss takes, with or without an outer "loss".',
        "anyOf": [*any_loss, wrapped],
        "$defs": losses
        | components
        | {"compound": compound, VOXEL_WEIGHT: _voxel_weight()}
        | weightings
        | CONTRADICTIONS,
    }


def _compound(components: list[dict[str, Any]]) -> dict[str, Any]:
    texts = _argument_texts(BY_NAME["compound"])
    learned = [{"enum": [*LEARNED]}, *({"$ref": f"#/$defs/{kind}_weighting"} for kind in LEARNED)]
    others = [kind for kind in WEIGHTINGS if kind not in LEARNED]
    not_learned = [{"enum": [*others, None]}, *({"$ref": f"#/$defs/{kind}_weighting"} for kind in others)]
    return {
        "type": "object",
        "description": summary(BY_NAME["compound"]),
        "properties": {
            "type": {"const": "compound"},
            "$schema": {"type": "string"},
            "components": {"type": "array", "minItems": 1, "items": {"anyOf": components}, "contains": _NOT_NOTHING},
            "learnable_weights": {"type": "boolean", "description": texts["learnable"]},
            "weighting": {"anyOf": [*learned, *not_learned], "description": texts["weighting"]},
            "mixed_activations": {"type": "boolean", "description": texts["mixed_activations"]},
            VOXEL_WEIGHT: {"$ref": f"#/$defs/{VOXEL_WEIGHT}"},
        },
        "required": ["type", "components"],
        "additionalProperties": False,
        # A weighting of the other kind contradicts it.
        "allOf": [
            _if_learnable(True, {"anyOf": [{"const": None}, *learned]}),
            _if_learnable(False, {"anyOf": not_learned}),
        ],
    }


def _voxel_weight() -> dict[str, Any]:
    properties = _arguments(VoxelWeight, VOXEL_WEIGHT_KEYS)
    properties["class_weight"]["anyOf"] = [*properties["class_weight"]["anyOf"], {"enum": [BALANCED]}]
    return {
        "type": ["object", "null"],
        "description": summary(VoxelWeight),
        "properties": properties,
        "additionalProperties": False,
    }


def _if_learnable(value: bool, weighting: dict[str, Any]) -> dict[str, Any]:
    condition = {"properties": {"learnable_weights": {"const": value}}, "required": ["learnable_weights"]}
    return {"if": condition, "then": {"properties": {"weighting": weighting}}}


def _weighting(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": summary(WEIGHTINGS[kind]),
        "properties": {"type": {"const": kind}} | _arguments(WEIGHTINGS[kind], weighting_keys(kind)),
        "required": ["type"],
        "additionalProperties": False,
    }


def _loss(name: str, loss_class: type[nn.Module]) -> dict[str, Any]:
    properties: dict[str, Any] = {"type": {"const": name}, "$schema": {"type": "string"}}
    properties |= _arguments(loss_class, config_keys(loss_class))
    if "weight" in properties:
        options = [*properties["weight"]["anyOf"], {"enum": [BALANCED]}]
        text = f"Another name of weight; {BALANCED}, in a bundle: by the stored statistics of the dataset."
        properties["class_weight"] = {**properties["weight"], "anyOf": options, "description": text}
    if issubclass(loss_class, VoxelLoss) or name in COMPOUNDS:
        properties[VOXEL_WEIGHT] = {"$ref": f"#/$defs/{VOXEL_WEIGHT}"}
    for key in ("sigmoid", "softmax"):
        properties.setdefault(key, {"type": "boolean", "description": f"Take a {key} of the input."})
    return {
        "type": "object",
        "description": summary(loss_class),
        "properties": properties,
        "required": ["type"],
        "additionalProperties": False,
        "allOf": [{"$ref": f"#/$defs/{name}"} for name in CONTRADICTIONS],
    }


def _component(loss: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the same loss within a compound, where ``weight`` is the component's own."""
    own = {
        "weight": {"type": ["number", "null"], "minimum": 0, "description": "The component's weight in the sum."},
        "name": {"type": ["string", "null"], "maxLength": 64, "description": "The component's name in logs."},
    }
    properties = {key: value for key, value in loss["properties"].items() if key not in ("$schema", VOXEL_WEIGHT)}
    return loss | {"properties": properties | own, "allOf": [{"$ref": "#/$defs/one_activation"}]}


def _arguments(built: type[nn.Module] | type[VoxelWeight], keys: Sequence[str]) -> dict[str, Any]:
    """Return the schema of each of a constructor's arguments: type, limits, default and what its docstring says."""
    hints = get_type_hints(built.__init__, include_extras=True)
    texts = _argument_texts(built)
    schemas = {}
    for key in keys:
        schemas[key] = _argument(hints[key]) | {"default": inspect.signature(built).parameters[key].default}
        if key in texts:
            schemas[key]["description"] = texts[key]
    return schemas


def _argument(hint: Any) -> dict[str, Any]:
    schemas = [schema for option in arguments.options(hint) if (schema := _option(option)) is not None]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _option(option: Any) -> dict[str, Any] | None:
    kind, limits = arguments.with_limits(option)
    if kind is Tensor:
        return None  # cannot be written in JSON
    if kind is None or kind is type(None):
        return {"type": "null"}
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is Sequence:
        return {"type": "array", "items": _argument(get_args(kind)[0])}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[kind]} | limits.schema()


def summary(loss_class: type) -> str:
    """Return the first paragraph of a class's docstring, as plain text on one line."""
    text = (inspect.getdoc(loss_class) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "")
    return re.sub(r":\w+:`([^`]+)`", r"\1", text)


def _argument_texts(loss_class: type) -> dict[str, str]:
    """Return what the docstring's ``Args:`` section says of each argument."""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(loss_class) or "", re.MULTILINE | re.DOTALL)
    entries = re.split(r"\n {4}(?=\S)", "\n" + section.group(1))[1:] if section else []
    pairs = (entry.partition(":") for entry in entries)
    return {name.strip(): " ".join(text.replace("``", "").split()) for name, _, text in pairs}
