# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a bundle's config calls while it runs: a check of what the user gave, and the config as it was run.

MONAI wraps an exception from a config into tracebacks of hundreds of lines. ``SystemExit`` alone passes through, so a
mistake on the command line ends here, with one line on stderr and exit status 1.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from monai.bundle import ConfigWorkflow
from monai.engines.utils import default_prepare_batch
from torch import Tensor, nn

from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.data.dataset import read_cases, split_cases
from monai_losses_ext.data.rows import Count, NotNegative, Number, Share
from monai_losses_ext.data.tasks import check_patch
from monai_losses_ext.errors import fail, nearest
from monai_losses_ext.files import why_unwritable
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.losses.factory import get_loss
from monai_losses_ext.metrics import foreground_labels
from monai_losses_ext.schedules import get_schedules, weights_at
from monai_losses_ext.sums.target import DISTANCE, LABEL

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


def check_options() -> None:
    """Check numbers, patch and labels of the running config, before anything uses them. In a config's ``initialize``.

    Raises:
        SystemExit: with one line: a value of ``OPTIONS`` of another type or beyond its limits, a patch that the network
            cannot take, classes whose names would be the same in the metrics.
    """
    parser = running_workflow().parser
    try:
        given = {name: parser.get_parsed_content(name) for name in OPTIONS.__annotations__ if name in parser}
        check_arguments(OPTIONS, given)
        check_patch_size()
        foreground_labels(parser.get_parsed_content("labels"))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def check_inputs(
    dataset_dir: str | os.PathLike[str],
    loss_config: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    network: nn.Module | None = None,
) -> None:
    """Check what a user sets on the command line, before anything is built. First entry of a bundle's ``run``.

    Args:
        dataset_dir: folder in the Decathlon's layout.
        loss_config: what :func:`monai_losses_ext.get_loss` takes; None is not checked.
        checkpoint: file of trained weights that the run needs; None for a run that needs none.
        network: what the weights are for; with None, they are only looked for.

    Raises:
        SystemExit: with one line that says what is wrong: a name on the command line that nothing in the config uses,
            a dataset or checkpoint that is not there, too few cases, weights of another network, a loss or a weight
            schedule that cannot be built.
    """
    try:
        check_names()
        split_cases(read_cases(dataset_dir))
        if loss_config is not None:
            check_schedules(get_loss(loss_config))
        if checkpoint is not None:
            check_weights(checkpoint, network)
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def check_patch_size() -> None:
    """Check that the running config's network can take its patch, as far as ``spatial_dims`` and ``strides`` tell.

    Raises:
        ValueError: one line with the nearest patch that it can take.
    """
    parser = running_workflow().parser
    network_def, patch = parser.get("network_def"), parser.get_parsed_content("patch_size")
    network_def = network_def if isinstance(network_def, Mapping) else {}
    axes, strides = network_def.get("spatial_dims", len(patch)), network_def.get("strides")
    if len(patch) != axes:
        raise fail("patch_size", f"must have one value for each of the network's {axes} axes", patch)
    if isinstance(strides, list):
        check_patch(patch, strides)


def check_schedules(loss: nn.Module) -> None:
    """Check the running config's weight schedules against the loss that they are for.

    Raises:
        ValueError: one line, for a schedule that cannot be built, or of a component that the loss does not have.
    """
    parser = running_workflow().parser
    target = "monai_losses_ext.handlers.WeightSchedule"
    for i, handler in enumerate(parser.get("train#handlers")):
        if isinstance(handler, Mapping) and handler.get("_target_") == target:
            schedules = get_schedules(parser.get_parsed_content(f"train#handlers#{i}#schedules"))
            if not isinstance(loss, CompoundLoss):
                raise fail("schedules", "must be of a compound loss", type(loss).__name__)
            loss.set_weights(weights_at(schedules, 1))


def check_weights(path: str | os.PathLike[str], network: nn.Module | None = None) -> None:
    """Check that a file holds weights, and that they are the network's own.

    Args:
        path: a state_dict, or a dictionary with one as ``model``: what MONAI's CheckpointLoader takes.
        network: what the weights are for; with None, the file is only looked for.

    Raises:
        ValueError: one line, with the first parameter that differs.
    """
    if not os.path.isfile(path):
        raise ValueError(f"ckpt_path: there are no trained weights at {path}. Train first, or give --ckpt_path.")
    if network is None:
        return
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of anything else makes torch raise almost anything
        raise ValueError(f"ckpt_path: {path} is not a file of weights that torch.load can read.") from None
    if isinstance(weights, dict):
        weights = weights.get("model", weights)
    if not isinstance(weights, dict):
        raise ValueError(f"ckpt_path: {path} must hold a state_dict; it holds a {type(weights).__name__}.")
    ours = network.state_dict()
    for name in [*ours, *weights]:
        there, here = (
            tuple(state[name].shape) if torch.is_tensor(state.get(name)) else "absent" for state in (weights, ours)
        )
        if there != here:
            raise ValueError(
                f"ckpt_path: the weights in {path} are of another network: {name} is {there} there and {here} in "
                "network_def. Give the --network_def that was trained, or another --ckpt_path."
            )


def prepare_batch_with_distance(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hand the labels and their distance map to the loss together: a trainer's ``prepare_batch``.

    Args:
        batchdata: with ``image``, ``label`` and ``distance``.
        device: where the tensors go.
        non_blocking: whether the copy may run beside what follows.
        kwargs: further arguments of the copy.

    Returns:
        The image, and ``{"label": ..., "distance": ...}``. The trainer keeps that as the batch's ``label``; where it
        has post-processing or metrics, :class:`monai_losses_ext.transforms.UnpackLabeld` comes first there.

    Raises:
        SystemExit: one line, if there is no map.
    """
    if DISTANCE not in batchdata:
        raise SystemExit(
            "error: prepare_batch: the batch has no distance map. Add monai_losses_ext.transforms.SignedDistanceMapd "
            "to the transforms, after those that change the spacing and before the random ones, and 'distance' to the "
            f"keys of the random spatial ones; got {', '.join(sorted(map(str, batchdata)))}."
        )
    image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
    distance = batchdata[DISTANCE].to(device=device, non_blocking=non_blocking, **kwargs)
    return image, {LABEL: label, DISTANCE: distance}


def flag(name: str, value: Any) -> bool:
    """Return a switch of the config as true or false; from the command line ``--resume true`` comes as a text.

    Raises:
        SystemExit: one line, if it is neither.
    """
    words = {"true": True, "false": False}
    if isinstance(value, bool) or str(value).lower() in words:
        return words[str(value).lower()]
    raise SystemExit(f"error: {fail(name, 'must be true or false', value)}")


def check_names() -> None:
    """Check that something uses every top-level name of the running config.

    MONAI adds a misspelt ``--epoch 5`` to the config and trains with the default. A name counts as used if a config
    file next to the running one has it or if another entry refers to it; one that starts with ``_`` is a note.

    Raises:
        ValueError: for the first name that is of no use, with the nearest known one.
    """
    workflow = running_workflow()
    config = workflow.parser.get()
    known = set(re.findall(r"@(\w+)", json.dumps(config, default=str)))
    for file in Path(workflow.config_root_path).glob("*.json"):
        known.update(re.split("#|::", name.lstrip("+"))[0] for name in json.loads(file.read_text(encoding="utf-8")))
    for name in config:
        if name not in known and not name.startswith("_"):
            raise fail("option", "must be a name that the config uses", f"--{name}", nearest(name, known))


def check_outputs(*folders: str | os.PathLike[str]) -> None:
    """Make the folders that a run writes to, and check that it can: before the first epoch, not after it.

    Raises:
        SystemExit: one line, with the folder.
    """
    for folder in folders:
        if reason := why_unwritable(folder):
            raise SystemExit(f"error: output: {folder} cannot be written to ({reason}).")


def save_config(path: str | os.PathLike[str]) -> None:
    """Write the running config as JSON, with the overlays and the command line's values in it.

    Args:
        path: file to write; its folder is made.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(running_workflow().parser.get(), indent=4, default=str)
    Path(path).write_text(text + "\n", encoding="utf-8")


def running_workflow() -> ConfigWorkflow:
    """Return the workflow that is evaluating the config which called.

    MONAI gives a config no name for it, so it is looked up in the callers.

    Raises:
        RuntimeError: if the caller is not run by a ``ConfigWorkflow``.
    """
    for frame in inspect.stack(0):
        workflow = frame.frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
    raise RuntimeError("no bundle is running: call this from a config that monai.bundle runs")
