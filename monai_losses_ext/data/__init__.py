# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Data of the Medical Segmentation Decathlon: the tasks' facts, reading and splitting a dataset, synthetic cases."""
