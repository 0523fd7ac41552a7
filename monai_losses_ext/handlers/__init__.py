# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers for MONAI's trainers and evaluators: tracking, evaluation in millimetres, pictures.

They put numbers into ``engine.state.metrics`` and files on the disk, where MONAI's own MLflow, TensorBoard and stats
handlers find them; none of them knows of MLflow.
"""

from __future__ import annotations

from .curves import CurvePicture
from .evaluation import SegmentationReport
from .pictures import PredictionPicture
from .schedule import WeightSchedule
from .tracking import LossTracker

__all__ = ["CurvePicture", "LossTracker", "PredictionPicture", "SegmentationReport", "WeightSchedule"]
