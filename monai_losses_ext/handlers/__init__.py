# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers for MONAI's trainers and evaluators: tracking, evaluation in millimetres, pictures.

They put numbers into ``engine.state.metrics`` and files on the disk, where MONAI's own MLflow, TensorBoard and stats
handlers find them; only ResumableMLFlowHandler knows of MLflow.
"""

from __future__ import annotations

from monai_losses_ext.extras import need

need("handlers", "bundles", "ignite", "matplotlib", "nibabel")

from .curves import CurvePicture
from .epoch_seed import EpochSeed
from .evaluation import SegmentationReport
from .group import HandlerGroup
from .mlflow_run import ResumableMLFlowHandler
from .pictures import PredictionPicture
from .schedule import WeightSchedule
from .scheduled_trainer import ScheduledTrainer
from .tracking import LossTracker
from .training_state import BestModel, FinalModel, TrainingState

__all__ = [
    "BestModel",
    "CurvePicture",
    "EpochSeed",
    "FinalModel",
    "HandlerGroup",
    "LossTracker",
    "PredictionPicture",
    "ResumableMLFlowHandler",
    "ScheduledTrainer",
    "SegmentationReport",
    "TrainingState",
    "WeightSchedule",
]
