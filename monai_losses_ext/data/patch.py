# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Which patches a network with strides can be trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai_losses_ext.errors import fail


def check_patch(
    patch_size: Sequence[int], strides: Sequence[int | Sequence[int]], network_def: Mapping[str, Any] | None = None
) -> None:
    """Check that a network with ``strides`` can be trained on a patch.

    Each axis must be a multiple of the product of its strides. Where the network normalizes each instance, more than
    one voxel must be left at its bottom, of which it takes a mean.

    Args:
        patch_size: voxels per axis.
        strides: of the network's levels.
        network_def: MONAI config of the network, for its ``norm`` or ``norm_name``; without, an instance norm, which is
            what MONAI's networks have where nothing is said.

    Raises:
        UserError: with the nearest patch that it can be trained on.
    """
    product = stride_product(strides, len(patch_size))
    legal = [step * max(1, round(n / step)) for n, step in zip(patch_size, product, strict=True)]
    rules = [f"must be multiples of {product}, the product of the strides"]
    if legal == product and _is_instance_norm(network_def or {}):
        smallest = product.index(min(product))
        legal[smallest] *= 2
        rules.append("must leave more than one voxel at the network's bottom for its instance norm")
    if list(patch_size) != legal:
        is_multiple = all(n % step == 0 for n, step in zip(patch_size, product, strict=True))
        raise fail("patch_size", rules[-1] if is_multiple else rules[0], list(patch_size), f" Try {legal}.")


def smallest_patch(strides: Sequence[int | Sequence[int]], n_axes: int, least: int = 1) -> list[int]:
    """Return the smallest patch that every network with ``strides`` can be trained on, of ``least`` voxels per axis."""
    product = stride_product(strides, n_axes)
    patch = [n * math.ceil(least / n) for n in product]
    if patch == product:
        patch[product.index(min(product))] *= 2
    return patch


def stride_product(strides: Sequence[int | Sequence[int]], n_axes: int) -> list[int]:
    """Return the factor by which a network with ``strides`` shrinks each axis: its patch must be a multiple of it.

    Raises:
        UserError: for strides that are no whole numbers of at least 1, or not one per axis.
    """
    product = [1] * n_axes
    for stride in strides:
        per_axis = [stride] * n_axes if isinstance(stride, int) else stride
        if len(per_axis) != n_axes or not all(isinstance(step, int) and step > 0 for step in per_axis):
            raise fail("strides", f"must be whole numbers above 0, or lists of them, one per axis ({n_axes})", strides)
        product = [n * step for n, step in zip(product, per_axis, strict=True)]
    return product


def _is_instance_norm(network_def: Mapping[str, Any]) -> bool:
    norm = network_def.get("norm_name", network_def.get("norm", "instance"))
    name = norm[0] if isinstance(norm, (list, tuple)) and norm else norm
    return isinstance(name, str) and name.lower().startswith("instance")
