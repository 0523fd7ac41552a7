# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of predictions beside references."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ignite.engine import Engine, Events


class PredictionPicture:
    """Draw predictions beside references, in three planes, for a few cases from the worst to the best.

    Cases come from the last evaluation. In a training, attach it to the trainer and name the validator; the picture is
    drawn when the training is completed. In an evaluation, attach it to the evaluator itself.

    List it BEFORE MONAI's MLFlowHandler: handlers run in that order when the engine is completed, and MLFlowHandler
    then logs the files that its ``artifacts`` name.

    Args:
        path: the PNG.
        labels: value in the label map -> name, as for :class:`SegmentationReport`.
        validator: the evaluator that the trainer's ValidationHandler runs; None where this is attached to an evaluator.
        n_cases: number of cases, spread evenly over the ranking by mean Dice: the worst, the best, and between.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.PredictionPicture", "path": "$@output_dir + '/predictions.png'",
        "labels": "@labels", "validator": "@validate#evaluator"}``
    """

    def __init__(
        self, path: str | Path, labels: Mapping[int | str, str], validator: Engine | None = None, n_cases: int = 4
    ) -> None:
        self.path = Path(path)
        self.labels = dict(labels)
        self.validator = validator
        self.n_cases = n_cases

    def attach(self, engine: Engine) -> None:
        """Register on a trainer (and on its validator), or on an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def _draw(self, engine: Engine) -> None:
        """To come."""
