# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a segmentation is measured by: masks, their components, and how well probabilities are calibrated."""

from monai_losses_ext.metrics.calibration import bin_sums, calibration_errors
from monai_losses_ext.metrics.instances import Components, instance_scores, match_components, median_volume, pooled
from monai_losses_ext.metrics.masks import bounding_box, check_extras, class_metrics, cldice
from monai_losses_ext.metrics.names import (
    ALL,
    ALL_METRICS,
    CALIBRATION_METRICS,
    INSTANCE_METRICS,
    MASK_METRICS,
    METRICS,
    foreground_labels,
    ignored_labels,
    known_voxels,
    metric_name,
    nan_mean,
    numbers,
)

__all__ = [
    "ALL",
    "ALL_METRICS",
    "CALIBRATION_METRICS",
    "INSTANCE_METRICS",
    "MASK_METRICS",
    "METRICS",
    "Components",
    "bin_sums",
    "bounding_box",
    "calibration_errors",
    "check_extras",
    "class_metrics",
    "cldice",
    "foreground_labels",
    "ignored_labels",
    "instance_scores",
    "known_voxels",
    "match_components",
    "median_volume",
    "metric_name",
    "nan_mean",
    "numbers",
    "pooled",
]
