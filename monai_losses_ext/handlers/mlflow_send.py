# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training or an evaluation that is over could not tell MLflow, sent afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers.mlflow_backlog import PATTERN, Backlog
from monai_losses_ext.handlers.mlflow_outbox import Outbox
from monai_losses_ext.handlers.mlflow_store import release
from monai_losses_ext.handlers.run_lock import lock_run, unlock_run


def send_metrics(folder: str | os.PathLike[str], tracking_uri: str | None = None) -> int:
    """Send MLflow what waits in a run's folder: metrics, parameters, files and how the run ended.

    Args:
        folder: the run's folder, of a training or an evaluation that is over.
        tracking_uri: store to send it to; default ``MLFLOW_TRACKING_URI``, else the run's own.

    Returns:
        The number of entries that were sent; 0 where none waited.

    Raises:
        UserError: for a folder that is not there or is in use, and where the store, or a file's place in it, cannot be
            used; what was not sent still waits.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"folder: must be the folder of a run; there is none at {path}.")
    lock_run(path)
    try:
        return sum(_send(file, tracking_uri) for file in sorted(path.glob(PATTERN)))
    finally:
        unlock_run(path)


def _send(file: Path, tracking_uri: str | None) -> int:
    backlog = Backlog(file)
    lines = backlog.read()
    run = lines[0].get("run") if lines else None
    if not isinstance(run, dict):
        raise UserError(f"folder: {file} does not tell in its first line whose run it is.")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or run["uri"]
    outbox = Outbox(uri, run["experiment"], run["run_name"], file, artifact_location=run["artifact_location"])
    outbox.new_run = run["new_run"]
    outbox.waiting.extend(lines[1:])
    try:
        outbox.send()
    except UserError:
        raise
    except Exception as error:  # clients of servers and databases raise whatever they like
        raise UserError(f"{outbox.what(error)} Everything still waits in {file}.") from error
    finally:
        if outbox.client is not None:
            release(outbox.client)
    if outbox.parked:
        paths = ", ".join(entry["artifact"] for entry in outbox.parked)
        raise UserError(f"tracking: MLflow does not take {paths}; everything else is sent.")
    return len(lines) - 1
