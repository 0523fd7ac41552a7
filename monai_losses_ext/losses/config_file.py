# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The description of a loss as a user gives it: a dictionary, a name, or a JSON or YAML file, read in bounded time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_losses_ext import errors
from monai_losses_ext.extras import need

SUFFIXES = (".json", ".yaml", ".yml")
MAX_BYTES, MAX_ENTRIES = 2**20, 10_000  # of a file, and of what it says once aliases are written out
_BRACE = " It begins as a dictionary does: is a brace or a quote missing?"


def read_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Return the loss's dictionary from a dictionary, a bare name or a file; see :func:`monai_losses_ext.get_loss`."""
    if isinstance(config, (str, Path)):
        if str(config).lstrip()[:1] in ("{", "["):
            raise errors.fail("loss", "must be a name, a dictionary or a file's path", str(config), _BRACE)
        if Path(config).suffix.lower() not in SUFFIXES:
            return {"type": str(config)}
        config = _read_file(Path(config))
    if not isinstance(config, Mapping):
        raise errors.fail("loss", "must be a name, a dictionary or the path of a JSON or YAML file", config)
    if _is_too_large(config):
        raise errors.fail("loss", f"must hold at most {MAX_ENTRIES} entries", "more")
    config = _without_schema(config)
    if set(config) == {"loss"} and isinstance(config["loss"], (Mapping, str)):
        loss = config["loss"]
        return {"type": loss} if isinstance(loss, str) else _without_schema(loss)
    return config


def _without_schema(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "$schema"}


def _is_too_large(config: Mapping[str, Any]) -> bool:
    try:
        return _size(config, MAX_ENTRIES, {}) > MAX_ENTRIES
    except RecursionError:
        return False  # one entry within another: the check of that value refuses it


def _size(value: Any, limit: int, known: dict[int, int]) -> int:
    """Return how many entries a structure has, each as often as it is said; beyond the limit it may stop counting.

    A YAML file of a few lines can say an entry a billion times, by aliases of aliases.
    """
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # of a structure that holds itself
        total = 1
        for item in value.values() if isinstance(value, Mapping) else value:
            total += _size(item, limit, known)
            if total > limit:
                break
        known[id(value)] = total
    return known[id(value)]


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        if "\0" in str(path):
            raise errors.fail("loss", "a path must not hold a null character", str(path))
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would never end
            raise errors.fail("loss", "the config must be a regular file", str(path))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise errors.fail("loss", "the config file must exist", str(path)) from None
    except OSError as error:
        raise errors.fail("loss", f"{path} must be a file that can be read", error.strerror) from None
    if len(raw) > MAX_BYTES:
        raise errors.fail("loss", f"{path} must have at most {MAX_BYTES} bytes", "more")
    try:
        text = raw.decode("utf-8-sig")  # Windows editors begin a file with a byte order mark
    except ValueError as error:
        raise errors.fail("loss", f"{path} must be text in UTF-8", str(error)) from None
    config = _parse_json(path, text) if path.suffix.lower() == ".json" else _parse_yaml(path, text)
    if not isinstance(config, Mapping):
        raise errors.fail("loss", f"{path} must hold a dictionary", config)
    return config


def _parse_json(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(path, [key for key, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except errors.UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.fail("loss", f"{path} must hold valid JSON", str(error)) from None


def _parse_yaml(path: Path, text: str) -> Any:
    need(f"loss: {path}", "bundles", "yaml")
    import yaml  # only YAML files need it

    class Loader(yaml.SafeLoader):
        """A safe loader that refuses a key that stands twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _check_once(path, [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a safe loader
    except errors.UserError:
        raise
    # The last three: a date or a tag whose value does not fit it.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise errors.fail("loss", f"{path} must hold valid YAML", str(error)) from None


def _check_once(path: Path, keys: list[Any]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise errors.fail("loss", f"{path} must say each key of a dictionary once", f"{key!r} twice")
        if key == "<<":  # in YAML: merges of merges can say an entry a billion times
            raise errors.fail("loss", f"{path} must not merge dictionaries; write their entries out", key)
        seen.add(key)
