# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training is, for whoever looks at its MLflow run later: loss, optimizer, data, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import monai_losses_ext
from monai_losses_ext.data.dataset import dataset_fingerprint
from monai_losses_ext.errors import UserError
from monai_losses_ext.losses.factory import read_config

MAX_LABEL = 40  # characters, so that a run's name stays a name
MAX_VALUE = 500  # characters of a parameter that every version of MLflow takes


def loss_label(config: Any) -> str:
    """Return a short name of a loss for file names and run names: ``dice_focal``, ``tversky``, ``dice_3_more``.

    Args:
        config: what :func:`monai_losses_ext.get_loss` takes.

    Returns:
        At most 40 letters, digits, ``_`` and ``-``; ``loss`` for a config that describes no loss, which is reported
        where the loss is built.
    """
    names = _component_names(config)
    label = "_".join(names)
    if len(label) > MAX_LABEL and len(names) > 1:
        label = f"{names[0][: MAX_LABEL - 10]}_{len(names) - 1}_more"
    return label[:MAX_LABEL].strip("_-") or "loss"


def run_params(
    loss_config: Any = None,
    loss: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    dataset_dir: str | os.PathLike[str] | None = None,
    **others: Any,
) -> dict[str, str]:
    """Return the parameters of an MLflow run: what was trained, how, on which data, with which versions.

    Args:
        loss_config: what :func:`monai_losses_ext.get_loss` takes; None for a run without a loss.
        loss: the loss that was built of it; a compound's weights at the start are told.
        optimizer: its class, learning rate and weight decay are told.
        dataset_dir: folder in the Decathlon's layout; see :func:`dataset_fingerprint`.
        others: further parameters by name, such as ``seed``, ``batch_size``, ``patch_size``; None is left out.

    Returns:
        name -> text, each of at most 500 characters, as every version of MLflow takes.
    """
    params: dict[str, Any] = {}
    if loss_config is not None:
        params |= {"loss": loss_label(loss_config), "loss_config": loss_config}
    if hasattr(loss, "get_weights"):
        weights = {name: round(float(weight), 6) for name, weight in loss.get_weights().items()}
        params |= {"loss_components": ", ".join(weights), "loss_weights": weights}
    if optimizer is not None:
        first = optimizer.param_groups[0]
        params |= {"optimizer": type(optimizer).__name__}
        # The first learning rate that is asked for, not what a warm-up begins with.
        params |= {"learning_rate": first.get("initial_lr", first.get("lr")), "weight_decay": first.get("weight_decay")}
    if dataset_dir is not None:
        params |= dataset_fingerprint(dataset_dir)
    params |= others | versions()
    return {name: _text(value) for name, value in params.items() if value is not None}


def versions() -> dict[str, str]:
    """Return the versions of what computes, and the commit of this package where it runs from a git checkout."""
    found = {"version_python": platform.python_version(), "version_monai_losses_ext": monai_losses_ext.__version__}
    found |= {f"version_{name}": metadata.version(name) for name in ("torch", "monai", "numpy", "mlflow")}
    commit = commit_of(Path(monai_losses_ext.__file__))
    return found | ({"commit": commit} if commit else {})


def commit_of(file: Path) -> str:
    """Return the commit of the git repository that tracks a file, with ``-dirty`` for uncommitted changes, or ""."""
    git = shutil.which("git")
    if git is None:
        return ""

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [git, "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        # An environment may lie in a repository of somebody else's, which does not track what is installed in it.
        if ask("ls-files", "--error-unmatch", file.name).returncode:
            return ""
        return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _component_names(config: Any) -> list[str]:
    try:
        config = read_config(config)
    except UserError:
        return []
    parts = config.get("components")
    parts = parts if isinstance(parts, list) and parts else [config]
    names = []
    for part in parts:
        name = (part.get("name") or part.get("type")) if isinstance(part, Mapping) else part
        names.append(re.sub(r"[^A-Za-z0-9_-]+", "-", str(name)).strip("-"))
    return [name for name in names if name]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."
