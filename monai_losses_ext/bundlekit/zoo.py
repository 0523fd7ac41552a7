# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a bundle's files must be for the MONAI model zoo, found without running it: each function lists the problems.

The zoo's own checks download their schema and run the network in full. Here the schema is the project's own statement
of the specification's rules, and shapes are computed on PyTorch's meta device, so all of it works offline in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import ID_SEP_KEY

from monai_losses_ext.data.patch import smallest_patch
from monai_losses_ext.errors import nearest

SCHEMA = Path(__file__).with_name("metadata.schema.json")
# The config files of each workflow, in the order in which they are merged.
WORKFLOWS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "evaluate": ("train", "evaluate"),
    "inference": ("inference",),
    "multi_gpu_train": ("train", "multi_gpu_train"),
    "multi_gpu_evaluate": ("train", "evaluate", "multi_gpu_evaluate"),
}
CONFIGS = tuple(dict.fromkeys(name for names in WORKFLOWS.values() for name in names))
FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/logging.conf",
    *(f"configs/{name}.json" for name in CONFIGS),
    "docs/README.md",
    "docs/data_license.txt",
)


def config_files(bundle: Path, workflow: str) -> list[str]:
    """Return the paths of a workflow's config files, as MONAI takes them."""
    return [str(bundle / "configs" / f"{name}.json") for name in WORKFLOWS[workflow]]


def check_files(bundle: Path) -> Iterator[str]:
    """Check that every file is there, and holds something."""
    for name in FILES:
        path = bundle / name
        if not path.is_file():
            yield f"{name} is absent"
        elif not path.read_text(encoding="utf-8").strip():
            yield f"{name} is empty"


def check_metadata(bundle: Path) -> Iterator[str]:
    """Check ``metadata.json`` against the schema, its version against its changelog, its channels against their number.

    Raises:
        RuntimeError: one line, if the package jsonschema is not installed.
    """
    try:
        import jsonschema  # for contributors: comes with the extra "test"
    except ImportError:
        raise RuntimeError("jsonschema is needed; install it with: pip install jsonschema") from None
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for error in jsonschema.Draft202012Validator(schema).iter_errors(metadata):
        yield f"metadata.json: {'#'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}"
    version, changelog = metadata.get("version"), metadata.get("changelog", {})
    if version not in changelog:
        yield f"metadata.json: version {version!r} is not in the changelog, which has {', '.join(changelog)}"
    for side, tensors in metadata.get("network_data_format", {}).items():
        for name, tensor in tensors.items():
            n_channels, channels = tensor.get("num_channels"), list(tensor.get("channel_def", {}))
            if isinstance(n_channels, int) and channels != [str(i) for i in range(n_channels)]:
                yield f"metadata.json: {side}#{name}: channel_def must name channels 0 to {n_channels - 1}"


def check_references(bundle: Path) -> Iterator[str]:
    """Check that every ``@reference`` of every workflow leads to something; what several share is said once."""
    seen: set[str] = set()
    for workflow in WORKFLOWS:
        parser = ConfigParser()
        parser.read_config(config_files(bundle, workflow))
        new = [problem for problem in unresolved(parser) if problem not in seen]
        seen.update(new)
        yield from (f"{workflow}: {problem}" for problem in new)


def unresolved(parser: ConfigParser) -> Iterator[str]:
    """Yield a line for each ``@reference`` of a config that leads nowhere; nothing is built."""
    parser.parse(reset=True)
    items = parser.ref_resolver.items
    for place, item in items.items():
        if isinstance(item.get_config(), str):  # MONAI lists the containers around it too
            for name in sorted(ReferenceResolver.find_refs_in_config(item.get_config(), place)):
                if name not in items:
                    at, to = (text.replace(ID_SEP_KEY, "#") for text in (place, name))
                    yield f"{at} refers to @{to}, which is not there.{nearest(name, items)}"


def check_network(bundle: Path) -> Iterator[str]:
    """Check that the network turns the input of the metadata into its output: channels, type and spatial shape.

    Raises:
        ValueError: if channels or type of the output differ.
    """
    metadata = bundle / "configs" / "metadata.json"
    shapes = json.loads(metadata.read_text(encoding="utf-8"))["network_data_format"]
    image, pred = shapes["inputs"]["image"], shapes["outputs"]["pred"]
    for workflow in ("train", "inference"):
        files = config_files(bundle, workflow)
        with torch.device("meta"):
            verify_net_in_out("network_def", str(metadata), files, device="meta")
            network = ConfigParser(ConfigParser.load_config_files(files)).get_parsed_content("network_def")
            output = network.eval()(torch.empty(1, image["num_channels"], *image["spatial_shape"]))
        if list(output.shape[2:]) != pred["spatial_shape"]:
            yield f"{workflow}: the network's output is {list(output.shape[2:])}, not {pred['spatial_shape']}"


def small_patch(network_def: dict[str, Any], patch_size: Sequence[int], least: int) -> tuple[int, ...]:
    """Return the smallest patch that a network with ``strides`` takes, in voxels; for another network ``patch_size``.

    It is a multiple of the product of the strides per axis, at least ``least``, and holds two voxels at the network's
    bottom, since a norm needs more than one.
    """
    if "strides" not in network_def:
        return tuple(patch_size)
    return tuple(smallest_patch(network_def["strides"], len(patch_size), least))
