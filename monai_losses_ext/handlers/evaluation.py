# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Masks, components and probabilities per class and case, in millimeters and in the label's own space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from monai_losses_ext.arguments import Limits, check_arguments, number
from monai_losses_ext.data.dataset import case_names
from monai_losses_ext.errors import fail, one_of
from monai_losses_ext.handlers._engine import (
    annotated_classes,
    case_file,
    check_shapes,
    class_mask,
    decollated,
    is_last_iteration,
    label_spacing,
    numbered,
)
from monai_losses_ext.metrics import (
    ALL,
    ALL_METRICS,
    CALIBRATION_METRICS,
    INSTANCE_METRICS,
    MASK_METRICS,
    METRICS,
    bin_sums,
    check_extras,
    class_metrics,
    foreground_labels,
    ignored_labels,
    known_voxels,
    match_components,
    metric_name,
    numbers,
)
from monai_losses_ext.metrics.table import BINS, COMPONENTS, summarize, write_csv

NOT_ANNOTATED = "not annotated"


class SegmentationReport:
    """Measure every class of every case, write a CSV, and put the means into ``evaluator.state.metrics``.

    Reads the evaluator's output after post-processing, one case at a time (``decollate=True``, MONAI's default):
    ``label`` is a label map ``[1, *S]``, ``pred`` a label map ``[1, *S]`` or one-hot ``[C, *S]``. For figures in native
    space, load the label untouched and bring the prediction back to the image's space (MONAI's ``Invertd``) first.
    The voxel size comes from the label's affine.

    - ``dice``, ``nsd``, ``hd95``, ``cldice``: see :func:`monai_losses_ext.metrics.class_metrics`. The value of a class
      is the mean over the cases.
    - ``recall``, ``precision``, ``f1``, ``small_recall`` of connected components: see
      :func:`monai_losses_ext.metrics.match_components`. The value of a class is of the components of all cases
      together, so that each component counts alike, not each case. Small are those below the class's median volume in
      this evaluation.
    - ``ece``, ``ace``: see :func:`monai_losses_ext.metrics.calibration_errors`. They read ``probability``, ``[C, *S]``,
      of the output, or ``[1, *S]`` for a single class: in postprocessing, copy the scores (MONAI's ``CopyItemsd``)
      before they are made discrete, and apply softmax or sigmoid to the copy (``Activationsd``). The value of a class
      is of the voxels of all cases together.

    Keys: ``mean_dice`` and ``dice_<class>``, and so on for each metric. ``mean_*`` is the mean of the classes' values,
    so that each class counts alike. They are written in the last iteration, so that MONAI's MLFlowHandler, StatsHandler
    and CheckpointSaver (``key_metric_name="mean_dice"``) find them at the end of the epoch, wherever this handler
    stands in the list.

    Args:
        labels: value in the label map -> name; keys may be strings, as in JSON. 0, the background, is left out.
        csv_path: file to write, once an evaluation: a row per case and class in the order of case names and labels,
            then a row ``mean`` per class and for all, with the values above. ``n_reference``, ``n_predicted`` and
            ``n_found`` are numbers of components, in the rows ``mean`` of all cases. None writes no file.
        tolerance_mm: tolerance of the NSD; one number, or one per class in the order of ``labels``.
        metrics: which of those above. ``["dice"]`` is the fast choice for validation while training.
        spacing: voxel size in mm along each axis, for labels that are plain tensors. Overrides the affine.
        use_subvoxels: see :func:`monai_losses_ext.metrics.class_metrics`.
        across_ranks: gather the cases of all processes of a distributed evaluation, each of which must have this
            handler then. Without, each reports its own.
        ignore_label: label value, or a list of them, of voxels whose class is not known. They count neither as
            reference nor as prediction, in any metric. A component is what is left of it without them.
        iou_threshold: intersection over union above which a component is found, 0 to 1.
        bins: number of intervals of the probability, for ``ece`` and ``ace``.

    Edge:
        A class that neither reference nor prediction has is ``nan`` in the CSV and does not count in the means; its
        probabilities count all the same, since they should be low. A class that only one of them has scores Dice, NSD
        and clDice 0 and, as HD95, the diagonal of the volume. The CSV's column ``empty`` says which one was empty. A
        class that no case has gets a NaN mean. A class that a case was not annotated for (``annotated`` ``[C]`` in the
        batch) is ``nan`` in all metrics, whatever is predicted there, and ``empty`` says ``not annotated``.

    Raises:
        UserError: for a wrong argument, such as two classes whose names would be the same in the metrics; a label
            without affine and no ``spacing``; shapes of prediction and label that differ; ``cldice`` without the extra
            ``maps``; ``ece`` or ``ace`` without probabilities in the output.
    """

    def __init__(
        self,
        labels: Mapping[int | str, str],
        csv_path: str | Path | None = None,
        tolerance_mm: float | Sequence[float] = 1.0,
        metrics: Sequence[str] = METRICS,
        spacing: Sequence[float] | None = None,
        use_subvoxels: bool = True,
        across_ranks: bool = False,
        ignore_label: int | Sequence[int] | None = None,
        iou_threshold: float = 0.5,
        bins: Annotated[int, Limits(minimum=1)] = 20,
    ) -> None:
        check_arguments(SegmentationReport.__init__, {"bins": bins})
        self.ignored = ignored_labels(ignore_label)
        self.labels = {v: name for v, name in foreground_labels(labels).items() if v not in self.ignored}
        self.csv_path = None if csv_path is None else Path(csv_path)
        tolerances = tolerance_mm if isinstance(tolerance_mm, Iterable) else [tolerance_mm] * len(self.labels)
        self.tolerances = numbers("tolerance_mm", tolerances, Limits(minimum=0))
        if len(self.tolerances) != len(self.labels):
            rule = f"must be one number, or one for each of {len(self.labels)} classes"
            raise fail("tolerance_mm", rule, self.tolerances)
        self.metrics = [one_of("metrics", name, ALL_METRICS) for name in metrics]
        check_extras(self.metrics)
        self.mask_metrics = [name for name in self.metrics if name in MASK_METRICS]
        self.counts_instances = not set(INSTANCE_METRICS).isdisjoint(self.metrics)
        self.reads_probability = not set(CALIBRATION_METRICS).isdisjoint(self.metrics)
        self.iou_threshold = number("iou_threshold", iou_threshold, Limits(minimum=0, maximum=1))
        self.bins = bins
        self.spacing = None if spacing is None else numbers("spacing", spacing, Limits(above=0))
        self.use_subvoxels = use_subvoxels
        self.across_ranks = across_ranks
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine, name: str | None = None) -> None:
        """Register on an evaluator, also as its ``key_val_metric``, whose ``name`` is one of the keys above."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        # Only for an epoch whose length was not known beforehand.
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows, self._finished = [], False

    def _measure(self, engine: Engine) -> None:
        outputs = decollated(engine)
        for output, annotated in zip(outputs, annotated_classes(engine, len(outputs)), strict=True):
            prediction, reference = output["pred"], output["label"]
            index = len(self.rows) // len(self.labels)
            case = case_file(reference)
            check_shapes(case or numbered(index), prediction, reference)
            spacing = self.spacing or label_spacing(reference)
            if spacing is None:
                raise fail("spacing", "must be given for labels without an affine, that is, plain tensors", None)
            known = known_voxels(reference, self.ignored).cpu() if self.ignored else None
            probability = self._probability(output, case or numbered(index)) if self.reads_probability else None
            for (value, name), tolerance in zip(self.labels.items(), self.tolerances, strict=True):
                row: dict[str, Any] = {"case": case or index, "class": name, "empty": NOT_ANNOTATED}
                self.rows.append(row)
                if annotated is not None and not annotated[value]:
                    continue
                predicted, true = (class_mask(volume, value).cpu() for volume in (prediction, reference))
                if known is not None:
                    predicted, true = predicted & known, true & known
                row["empty"] = empty_masks(predicted, true)
                row |= class_metrics(predicted, true, spacing, tolerance, self.mask_metrics, self.use_subvoxels)
                if self.counts_instances:
                    row[COMPONENTS] = match_components(predicted, true, spacing, self.iou_threshold)
                if probability is not None:
                    of_class = probability[0 if len(probability) == 1 else value]
                    row[BINS] = bin_sums(of_class, true, self.bins, known)
        if is_last_iteration(engine):
            self._finish(engine)

    def _probability(self, output: Mapping[str, Any], case: str) -> torch.Tensor:
        """Return the probabilities of a case, ``[C, *S]`` with a channel per class or the only one."""
        if "probability" not in output:
            rule = "must be in the evaluator's output for ece and ace: a copy of the scores, after softmax or sigmoid"
            raise fail("probability", rule, sorted(map(str, output)))
        volume = output["probability"]
        values: torch.Tensor = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
        check_shapes(case, values, output["label"], "probability")
        if len(values) <= max(self.labels) and not len(values) == len(self.labels) == 1:
            raise fail("probability", f"must have a channel per label, up to {max(self.labels)}", len(values))
        return values

    def _finish(self, engine: Engine) -> None:
        if self._finished:
            return
        self._finished = True
        self.rows = self._rows_of_all_ranks()
        names = case_names(row["case"] for row in self.rows)
        for row in self.rows:
            row["case"] = names[row["case"]]
        self.rows.sort(key=lambda row: row["case"])  # stable: the classes keep the order of the labels
        means = summarize(self.rows, self.labels.values(), self.metrics)
        for row in means[-1:] + means[:-1]:
            for metric in self.metrics:
                key = f"mean_{metric}" if row["class"] == ALL else f"{metric}_{metric_name(row['class'])}"
                engine.state.metrics[key] = row[metric]
        if self.csv_path is not None:
            write_csv(self.csv_path, self.rows + means, self.metrics)

    def _rows_of_all_ranks(self) -> list[dict[str, Any]]:
        """Return the rows with a name for every case, also for one whose label was not read from a file."""
        of_ranks: list[list[dict[str, Any]]] = [self.rows]
        if self.across_ranks and dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.rows)
            of_ranks = gathered
        for rank, rows in enumerate(of_ranks):
            for row in rows:
                if isinstance(row["case"], int):  # a distributed sampler deals the cases out in turn
                    row["case"] = numbered(row["case"] * len(of_ranks) + rank)
        return [row for rows in of_ranks for row in rows]


def empty_masks(prediction: torch.Tensor, reference: torch.Tensor) -> str:
    """Say which of the masks is empty: ``prediction``, ``reference``, ``both``, or nothing."""
    if prediction.any():
        return "" if reference.any() else "reference"
    return "prediction" if reference.any() else "both"
