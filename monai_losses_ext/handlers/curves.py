# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A picture of a training: loss, terms, weights, learning rate and validation metrics over the epochs."""

from __future__ import annotations

from pathlib import Path

from ignite.engine import Engine, Events


class CurvePicture:
    """Keep every epoch's metrics in a CSV file and draw them as a PNG when the training is completed.

    Reads ``trainer.state.metrics`` (what :class:`LossTracker` writes) and, after each of its runs, the validator's
    metrics, which get the prefix ``val_`` where they have none.

    List it BEFORE MONAI's MLFlowHandler in the trainer's handlers: handlers run in that order when the training is
    completed, and MLFlowHandler then logs the files that its ``artifacts`` name.

    Args:
        path: the PNG; the table is written next to it, with the ending ``.csv``, after every epoch.
        validator: the evaluator that the trainer's ValidationHandler runs.

    Example:
        ``{"_target_": "monai_losses_ext.handlers.CurvePicture", "path": "$@output_dir + '/curves.png'",
        "validator": "@validate#evaluator"}``
    """

    def __init__(self, path: str | Path, validator: Engine | None = None) -> None:
        self.path = Path(path)
        self.validator = validator
        self.history: dict[int, dict[str, float]] = {}

    def attach(self, engine: Engine) -> None:
        """Register on a trainer (and on the validator)."""
        engine.add_event_handler(Events.COMPLETED, self._draw)

    def _draw(self, engine: Engine) -> None:
        """To come."""
