# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether values of several losses can be added up."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from monai_losses_ext import errors


def check_axes(terms: Mapping[str, Tensor]) -> None:
    """Refuse terms whose axes differ in what they are, which torch would add up all the same where lengths agree."""
    shapes = {name: list(term.shape) for name, term in terms.items() if term.ndim > 0}
    if not shapes:
        return
    most = max([len(shape) for shape in shapes.values()])
    samples = next(shape[0] for shape in shapes.values() if len(shape) == most)
    # Dice of a whole batch, [C', 1, ...], has no axis of samples.
    full = [
        [samples, *shape] if len(shape) == most - 1 and all(length == 1 for length in shape[1:]) else shape
        for shape in shapes.values()
    ]
    fits = all(len(shape) == most for shape in full) and all(
        len({length for length in lengths if axis < 2 or length != 1}) <= 1
        for axis, lengths in enumerate(zip(*full, strict=True))
    )
    if not fits:
        rule = "values of reduction='none' must have the same axes (samples, classes, voxels) to be added up"
        raise errors.fail("losses", rule, shapes)
