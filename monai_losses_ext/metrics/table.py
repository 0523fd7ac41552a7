# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of an evaluation: a row per case and class, and what all cases of a class say together."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_losses_ext.metrics.calibration import calibration_errors
from monai_losses_ext.metrics.instances import instance_scores, median_volume, pooled
from monai_losses_ext.metrics.names import ALL, INSTANCE_METRICS, nan_mean

COUNTS = ("n_reference", "n_predicted", "n_found")
# What a row may hold beside its columns: from these its scores are made, for a case and for all of them alike.
COMPONENTS, BINS = "components", "bins"

Row = dict[str, Any]


def summarize(rows: Sequence[Row], classes: Iterable[str], metrics: Sequence[str]) -> list[Row]:
    """Complete the rows of cases with the scores of their components and bins; return a row per class, then one of all.

    Args:
        rows: with ``case``, ``class`` and metrics that are means over cases; ``components``
            (:class:`~monai_losses_ext.metrics.Components`) and ``bins`` (:func:`~monai_losses_ext.metrics.bin_sums`)
            where the class was measured. Metrics that a row lacks become NaN.
        classes: their names.
        metrics: the names of the metrics.

    Returns:
        Rows whose ``case`` is ``mean``. A class's components and bins are those of all its cases together, any other
        metric is the mean over the cases; a metric of all is the mean over the classes.
    """
    means = [_of_class([row for row in rows if row["class"] == name], name, metrics) for name in classes]
    of_all = {metric: nan_mean(row[metric] for row in means) for metric in metrics}
    counts = {count: sum(row[count] for row in means) for count in COUNTS if count in means[0]}
    return [*means, {"case": "mean", "class": ALL, **of_all, **counts}]


def _of_class(rows: Sequence[Row], name: str, metrics: Sequence[str]) -> Row:
    whole: Row = {"case": "mean", "class": name}
    if not set(INSTANCE_METRICS).isdisjoint(metrics):
        whole[COMPONENTS] = pooled(row[COMPONENTS] for row in rows if COMPONENTS in row)
    if bins := [row[BINS] for row in rows if BINS in row]:
        whole[BINS] = torch.stack(bins).sum(0)
    for row in (*rows, whole):
        if COMPONENTS in row:
            row |= instance_scores(row[COMPONENTS], median_volume(whole[COMPONENTS]))
            row |= {count: getattr(row[COMPONENTS], count) for count in COUNTS}
        if BINS in row:
            row |= calibration_errors(row[BINS])
    for row in rows:
        row |= {metric: math.nan for metric in metrics if metric not in row}
    return {metric: nan_mean(row[metric] for row in rows) for metric in metrics} | whole


def write_csv(path: Path, rows: Iterable[Row], metrics: Sequence[str]) -> None:
    """Write a line per row; numbers with six digits."""
    counts = () if set(INSTANCE_METRICS).isdisjoint(metrics) else COUNTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "class", *metrics, *counts, "empty"], extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
