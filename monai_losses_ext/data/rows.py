# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What the objects inside a row of ``tasks.json`` may hold, and a check of one of them.

The type hints are the one description: ``check_arguments`` reads them. What the entries of a phantom mean stands in
:mod:`monai_losses_ext.data.phantoms` and, for its structures, in :mod:`monai_losses_ext.data.canvas`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.errors import fail, nearest, one_of

Count = Annotated[int, Limits(minimum=1)]
Number = Annotated[int, Limits(minimum=0)]
Share = Annotated[float, Limits(minimum=0, maximum=1)]
Positive = Annotated[float, Limits(above=0)]
NotNegative = Annotated[float, Limits(minimum=0)]


class ZScore(TypedDict):
    """Zero mean and unit deviation of each case and channel (MRI)."""

    rule: str
    nonzero: bool


class Window(TypedDict):
    """Clip to [low, high], then a fixed z-score (CT, in HU)."""

    rule: str
    low: float
    high: float
    mean: float
    std: Positive


class _Result(TypedDict):
    method: str
    dice: dict[str, Any]
    source: str


class Result(_Result, total=False):
    """What others published."""

    mean_dice: Share


class _Structure(TypedDict):
    shape: Literal["tube", "ellipsoid"]
    radii: Sequence[Positive]
    intensity: Sequence[float]


class Structure(_Structure, total=False):
    """What is painted into a phantom."""

    points: Sequence[Sequence[float]]
    center: Sequence[float]
    labels: Sequence[Number]
    cuts: Sequence[Share]
    cut_jitter: NotNegative
    rim: dict[str, Any]
    name: str
    inside: str
    clip: bool
    around: str
    count: Sequence[Number]
    size: Sequence[Positive]
    spread_mm: NotNegative


class Tissues(TypedDict):
    """Tissues that alternate."""

    tissues: Sequence[Sequence[float]]
    scale_mm: Positive


class Rim(Tissues):
    """Tissues around a structure."""

    width_mm: NotNegative


class Pose(TypedDict):
    """How cases differ in place and form."""

    rotation_deg: NotNegative
    scale: Share
    shift_mm: NotNegative
    bend_mm: NotNegative
    bend_scale_mm: Positive
    mirror: bool


class _Phantom(TypedDict):
    shape_jitter: Number
    pose: dict[str, Any]
    background: dict[str, Any]
    structures: Sequence[dict[str, Any]]
    contrast_jitter: NotNegative
    noise: NotNegative
    bias: NotNegative
    gain: Sequence[Positive]


class Phantom(_Phantom, total=False):
    """What a task's synthetic cases look like."""

    stripped: bool


def check_object(kind: Any, values: Any, where: str = "") -> None:
    """Check that an object has the keys of ``kind``, all that are not optional, with values of its type hints.

    Args:
        kind: a class with type hints, such as those above.
        values: the object.
        where: put before a key in an error, such as ``"phantom: "``.

    Raises:
        UserError: one line, with the key.
    """
    check_names(kind, values, where)
    check_arguments(kind, values, where)


def check_names(kind: Any, values: Any, where: str = "") -> None:
    """Check the keys of an object alone; see :func:`check_object`.

    Raises:
        UserError: one line, with the key.
    """
    if not isinstance(values, Mapping):
        raise fail(where.removesuffix(": ") or "row", "must be an object", values)
    for key in values:
        if key not in kind.__annotations__:
            raise fail(f"{where}field", "must be one that a row knows", key, nearest(key, kind.__annotations__))
    missing = set(kind.__annotations__) - set(values) - getattr(kind, "__optional_keys__", set())
    if missing:
        raise fail(f"{where}fields", "must all be given", f"none for {', '.join(sorted(missing))}")


def check_phantom(plan: Any) -> None:
    """Check a row's ``phantom``.

    Raises:
        UserError: one line, with the place and the key.
    """
    check_object(Phantom, plan, "phantom: ")
    check_object(Pose, plan["pose"], "phantom: pose: ")
    check_object(Tissues, plan["background"], "phantom: background: ")
    ranges = {"phantom: gain": plan["gain"]}
    names: set[str] = set()
    for i, structure in enumerate(plan["structures"]):
        place = f"phantom: structure {i}: "
        check_object(Structure, structure, place)
        if "rim" in structure:
            check_object(Rim, structure["rim"], f"{place}rim: ")
        ranges |= {f"{place}{key}": structure[key] for key in ("count", "size") if key in structure}
        needed = "points" if structure["shape"] == "tube" else "center"
        if needed not in structure:
            raise fail(f"{place}{needed}", f"must be given for the shape {structure['shape']}", "none")
        for key in ("inside", "around"):
            if key in structure:
                one_of(f"{place}{key}", structure[key], names)
        names |= {structure["name"]} if "name" in structure else set()
    for place, bounds in ranges.items():
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise fail(place, "must be [least, most]", bounds)
