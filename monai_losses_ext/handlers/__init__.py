# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers for MONAI's trainers and evaluators: tracking, evaluation in millimeters, pictures.

They put numbers into ``engine.state.metrics`` and files on the disk, where MONAI's own MLflow, TensorBoard and stats
handlers find them; only ResumableMLFlowHandler knows of MLflow. What a user can mend is a ``UserError`` of one line;
nothing here ends the process.
"""

from __future__ import annotations

from monai_losses_ext.extras import need

need("handlers", "bundles", "ignite", "matplotlib", "nibabel")

from .curves import CurvePicture
from .divergence import StopOnDivergence
from .epoch_seed import EpochSeed
from .evaluation import SegmentationReport
from .group import HandlerGroup
from .mlflow_run import ResumableMLFlowHandler
from .pictures import PredictionPicture
from .progress import ProgressLog
from .schedule import WeightSchedule
from .scheduled_trainer import ScheduledTrainer
from .signals import StopOnSignal
from .stopping import Interrupted
from .tracking import LossTracker
from .training_state import BestModel, FinalModel, TrainingState

__all__ = [
    "BestModel",
    "CurvePicture",
    "EpochSeed",
    "FinalModel",
    "HandlerGroup",
    "Interrupted",
    "LossTracker",
    "PredictionPicture",
    "ProgressLog",
    "ResumableMLFlowHandler",
    "ScheduledTrainer",
    "SegmentationReport",
    "StopOnDivergence",
    "StopOnSignal",
    "TrainingState",
    "WeightSchedule",
]
