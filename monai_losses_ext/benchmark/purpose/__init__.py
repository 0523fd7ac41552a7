# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What each loss is for, shown: phantoms made for it, short trainings beside Dice + CE, the metric that it is for."""

from monai_losses_ext.benchmark.purpose.purposes import PURPOSES, Purpose
from monai_losses_ext.benchmark.purpose.table import purpose_tables, save_purposes
from monai_losses_ext.benchmark.purpose.training import measure_purpose

__all__ = ["PURPOSES", "Purpose", "measure_purpose", "purpose_tables", "save_purposes"]
