# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the losses beside MONAI's, as a committed JSON and tables generated from it."""
