# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The rows of the committed results in which what a user would otherwise run does better than ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from monai_losses_ext.benchmark import conditions
from monai_losses_ext.benchmark.picture import DICE_ALONE
from monai_losses_ext.data.tasks import TASKS


class Contest(NamedTuple):
    """Ours beside another: what is measured, how many times as much ours takes, and of what."""

    what: str
    ratio: float
    of: str


def losing_list(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return each row in which ours takes more time or memory than the baseline, as a Markdown list.

    Rows that compare ours with ours, and the floor, are no contest.

    Args:
        results: what was measured, by its file's name without the suffix, such as ``speed--cpu``.
    """
    lines = []
    for name, result in results.items():
        suite, _, device = name.partition("--")
        lines += [
            f"- {device.upper().replace('CUDA', 'GPU')}, {contest.what}: {_times(contest.ratio)} {contest.of}"
            for contest in _CONTESTS[suite](result)
            if contest.ratio > 1
        ]
    return "\n".join(lines or ["- nowhere in what was measured"]) + "\n"


def _times(ratio: float) -> str:
    return "does not fit, unlike" if math.isinf(ratio) else f"{ratio:.2f} times"


def _speed(result: Mapping[str, Any]) -> Iterator[Contest]:
    for row in result["speed"]:
        case = f"{row['loss']}, {row['shape']}"
        if "sides" in row:
            yield from _sides(case, row["sides"])
        elif row["loss"] != "floor":
            yield Contest(case, row["ratio"]["median"], f"the time of {row['baseline']}")
            if "compiled_ratio" in row:
                yield Contest(case, row["compiled_ratio"]["median"], f"the time of {row['baseline']}, compiled")
    for row in result.get("maps", []):
        ratio = row["ours"]["median"] / row["MONAI compute_distance_map"]["median"]
        yield Contest(f"signed maps, {row['shape']}", ratio, "the time of MONAI compute_distance_map")


def _sides(case: str, sides: Mapping[str, Any]) -> Iterator[Contest]:
    """Compare ours with the other sides of a GPU's row that fitted."""
    ours = sides["ours"]
    for name, side in sides.items():
        if name in ("ours", DICE_ALONE) or "error" in side:
            continue
        if "error" in ours:
            yield Contest(case, math.inf, name)
            continue
        yield Contest(case, ours["ms"]["both"]["median"] / side["ms"]["both"]["median"], f"the time of {name}")
        if side["copies"]:
            yield Contest(case, ours["copies"] / side["copies"], f"the memory of {name}")


def _conditions(result: Mapping[str, Any]) -> Iterator[Contest]:
    for row in result["conditions"]:
        sides = row["sides"]
        where = f"{row['shape']}, threads: {row['threads']}, {conditions.WORDS[row['condition']]}"
        for ours in (conditions.OURS, conditions.CHUNKED, conditions.BOUNDARY):
            for theirs in (conditions.BASELINE, conditions.CROSS_ENTROPY):
                if ours != conditions.OURS and theirs == conditions.CROSS_ENTROPY:
                    continue
                ratio = sides[ours]["median"] / sides[theirs]["median"]
                yield Contest(f"{ours}, {where}", ratio, f"the time of {theirs}")


def _memory(result: Mapping[str, Any]) -> Iterator[Contest]:
    for row in result["memory"]:
        case = f"{row['loss']}, {row['shape']}"
        if "sides" in row:
            yield from _sides(case, row["sides"])
        else:
            yield Contest(case, row["ours_copies"] / row["baseline_copies"], "the memory of the baseline")


def _distance(result: Mapping[str, Any]) -> Iterator[Contest]:
    for row in result["distance"]:
        if not row["baseline"].startswith("ours"):
            what = f"signed maps by {row['backend']}, {row['shape']}"
            yield Contest(what, row["ratio"]["median"], f"the time of {row['baseline']}")


def _step(result: Mapping[str, Any]) -> Iterator[Contest]:
    for row in result["step"]:
        times = {name: side["loss_ms"]["median"] for name, side in row["sides"].items()}
        ours = times.pop("ours")
        for name, theirs in times.items():
            what = f"{row['loss']} in a step of {TASKS[row['task']].bundle}"
            yield Contest(what, ours / theirs, f"the time of {name}")


_CONTESTS = {"speed": _speed, "conditions": _conditions, "memory": _memory, "distance": _distance, "step": _step}
