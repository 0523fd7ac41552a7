# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Fetching a task of the Medical Segmentation Decathlon from where MONAI fetches it."""

from __future__ import annotations

from pathlib import Path
from urllib.request import Request, urlopen

from monai.apps import DecathlonDataset, download_url, extractall

from monai_losses_ext.data.dataset import DatasetError, read_cases, read_index
from monai_losses_ext.data.tasks import Task, get_task
from monai_losses_ext.errors import UserError, fail

TIMEOUT_S = 20


def download(task: str | Task, out_dir: str | Path) -> Path:
    """Fetch and unpack a task, checked by MONAI's checksum, and print its size and license before.

    What is there is not fetched again: a complete folder is left alone, and an archive whose unpacking was interrupted
    is unpacked. The archive is deleted when it is unpacked.

    Args:
        task: the task or its name.
        out_dir: the folder in which the task's own folder is made.

    Returns:
        The task's folder, with ``dataset.json``, ``imagesTr`` and ``labelsTr``.

    Raises:
        ValueError: for an unknown task, an archive that is damaged or does not hold the task, or phantoms in its place.
        OSError: where there is no network or no space. Either is one line.
    """
    task = get_task(task) if isinstance(task, str) else task
    out_dir = Path(out_dir).expanduser().absolute()
    folder, archive = out_dir / task.name, out_dir / f"{task.name}.tar"
    if _holds_phantoms(folder):
        raise fail("out", "must hold no phantoms where the task's data go (delete that folder)", str(folder))
    if folder.is_dir() and not archive.exists() and _is_complete(folder):
        return folder
    if task.name not in DecathlonDataset.resource:
        raise UserError(f"task: {task.name} is not one of those that MONAI knows where to fetch.")
    address, checksum = DecathlonDataset.resource[task.name], DecathlonDataset.md5[task.name]
    if not archive.exists():
        size = _size(address, task)
        print(f"{task.name}: {size} from {address}, license {task.license} ({task.license_url})", flush=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        download_url(address, archive, checksum, "md5")
        extractall(archive, out_dir)
    except (RuntimeError, ValueError) as error:  # a checksum that differs
        raise UserError(f"download: {archive} is damaged; delete it and try again ({error}).") from error
    read_cases(folder)
    archive.unlink()
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        read_cases(folder)
    except DatasetError:
        return False
    return True


def _holds_phantoms(folder: Path) -> bool:
    try:
        return "phantoms" in read_index(folder)
    except DatasetError:
        return False


def _size(address: str, task: Task) -> str:
    """Ask the server how large a file is, which also tells whether there is a network."""
    head = Request(address, method="HEAD")  # noqa: S310 (MONAI's own address)
    try:
        with urlopen(head, timeout=TIMEOUT_S) as answer:  # noqa: S310
            length = answer.headers["Content-Length"]  # which a server need not tell
            return f"{int(length) / 1e9:.2f} GB" if length else "size unknown"
    except OSError as error:
        raise OSError(
            f"download: {address} cannot be reached ({error}). Without a network, make synthetic cases: "
            f"python -m monai_losses_ext data phantoms --task {task.name} --out DIR"
        ) from error
