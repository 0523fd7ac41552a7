# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's trainer with weight schedules of its own, so that every process of a training has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.engines import SupervisedTrainer

from monai_losses_ext.handlers.schedule import WeightSchedule


class ScheduledTrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer, which also sets weights of its compound loss at the start of every epoch.

    The model zoo's configs for several GPUs cut handlers off the end of the list on every rank but the first. A
    schedule must run on all of them, or their weights differ; as a part of the trainer it does.

    Args:
        args: see MONAI's SupervisedTrainer.
        schedules: see :class:`WeightSchedule`; none for a loss of any kind.
        kwargs: see MONAI's SupervisedTrainer.

    Raises:
        UserError: for a schedule that the trainer's loss cannot have.
    """

    def __init__(
        self, *args: Any, schedules: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if schedules:
            WeightSchedule(self.loss_function, schedules).attach(self)
