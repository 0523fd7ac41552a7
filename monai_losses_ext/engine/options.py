# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user sets in a bundle, before the work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.data.dataset import WEIGHT, listed_cases, read_cases, split_cases
from monai_losses_ext.data.labels import ANNOTATED
from monai_losses_ext.data.patch import check_patch
from monai_losses_ext.data.rows import Count, NotNegative, Number, Share
from monai_losses_ext.errors import UserError, fail
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.metrics import foreground_labels
from monai_losses_ext.schedules import get_schedules, weights_at

SCHEDULED = ("monai_losses_ext.handlers.WeightSchedule", "monai_losses_ext.handlers.ScheduledTrainer")

# What the values of the config may be that users set most, by name.
OPTIONS = TypedDict(
    "OPTIONS",
    {
        "seed": Annotated[int, Limits(minimum=0, maximum=2**32 - 1)],  # NumPy takes no other
        "split_seed": int,
        "validation_fraction": Share,
        "epochs": Count,
        "val_interval": Count,
        "batch_size": Count,
        "patches_per_case": Count,
        "patch_size": Sequence[Count],
        "cache_rate": Share,
        "num_workers": Number,
        "loss_lr": NotNegative,
        "optimizer#lr": NotNegative | Tensor,
    },
)


def check_options(parser: ConfigParser) -> None:
    """Check numbers, patch and labels of a config.

    Raises:
        UserError: a value of ``OPTIONS`` of another type or beyond its limits, a patch that the network cannot take,
            labels that do not count their classes from 0 or whose names would be the same in the metrics.
    """
    given = {name: parser.get_parsed_content(name) for name in OPTIONS.__annotations__ if name in parser}
    check_arguments(OPTIONS, given)
    check_patch_size(parser)
    check_labels(parser.get_parsed_content("labels"))


def check_labels(labels: Mapping[int | str, str]) -> None:
    """Check that labels are ``{"0": "background", "1": ..., ...}``: a name for each channel of the network.

    Raises:
        UserError: for values that leave one out, and for names that would be the same in the metrics.
    """
    foreground_labels(labels)
    values = sorted(int(value) for value in labels)
    if values != list(range(len(values))) or len(values) < 2:
        rule = "must name the classes 0 (the background), 1, 2, ... without a gap; a label_map renumbers those of files"
        raise fail("labels", rule, dict(labels))


def check_patch_size(parser: ConfigParser) -> None:
    """Check that a config's network can take its patch, as far as ``spatial_dims``, ``strides`` and norm tell.

    Raises:
        UserError: with the nearest patch that it can take.
    """
    network_def, patch = parser.get("network_def"), parser.get_parsed_content("patch_size")
    network_def = network_def if isinstance(network_def, Mapping) else {}
    axes = network_def.get("spatial_dims", len(patch))
    if len(patch) != axes:
        raise fail("patch_size", f"must have one value for each of the network's {axes} axes", patch)
    if isinstance(network_def.get("strides"), list):
        check_patch(patch, network_def["strides"], network_def)


def check_schedules(parser: ConfigParser, loss: nn.Module) -> None:
    """Check a config's weight schedules, of a trainer or of handlers, against the loss that they are for.

    Raises:
        UserError: for a schedule that cannot be built, or of a component that the loss does not have.
    """
    for place, item in list(parser.ref_resolver.items.items()):
        config = item.get_config()
        if isinstance(config, Mapping) and config.get("_target_") in SCHEDULED and config.get("schedules"):
            schedules = get_schedules(parser.get_parsed_content(f"{place}::schedules"))
            if not isinstance(loss, CompoundLoss):
                raise fail("schedules", "must be of a compound loss", type(loss).__name__)
            loss.set_weights(weights_at(schedules, 1))


def check_target(parser: ConfigParser, loss: nn.Module) -> None:
    """Check that a config's loss takes what the cases of its dataset say beside their labels.

    Raises:
        UserError: for a loss of MONAI or torch itself, which takes labels alone.
    """
    if not type(loss).__module__.startswith(("monai.", "torch.")) or "dataset_dir" not in parser:
        return
    cases = listed_cases(Path(parser.get_parsed_content("dataset_dir")).expanduser().absolute())
    keys = [key for key in (ANNOTATED, WEIGHT) if any(key in case for case in cases)]
    if keys:
        rule = f"must be a loss of this package, since cases of dataset.json have {' and '.join(keys)}"
        raise fail("loss_config", rule, type(loss).__name__)


def check_data(dataset_dir: str | os.PathLike[str]) -> None:
    """Check that a folder in the Decathlon's layout holds cases to train on and to validate with.

    Raises:
        UserError: if it does not.
    """
    try:
        split_cases(read_cases(dataset_dir))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def check_processes(n_cases: int, n_processes: int) -> None:
    """Check that there is a held-out case for every process.

    Raises:
        UserError: if there is not.
    """
    if n_cases < n_processes:
        rule = f"must hold out a case for each of {n_processes} processes"
        raise fail("validation_fraction", rule, f"{n_cases} held-out cases")
