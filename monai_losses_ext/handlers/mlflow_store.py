# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MLflow's stores: a SQLite file that is whole or absent, and a server that is not waited for."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mlflow import MlflowClient

from monai_losses_ext.errors import describe
from monai_losses_ext.handlers.run_lock import locked

# MLflow asks a server that is away eight times, with growing pauses, for minutes.
REQUEST_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_FILE_UPLOAD_DOWNLOAD_TIMEOUT": "60",
}
LOUD = ("mlflow", "urllib3", "alembic")  # libraries that log each attempt, some with tracebacks


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite store; None for a server or another database."""
    match = re.match(r"sqlite(\+\w+)?:///([^?]+)", uri)
    return Path(unquote(match[2])) if match else None


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite store in a file, whose name may have any characters."""
    return f"sqlite:///{quote(path.absolute().as_posix(), safe='/:')}"


def make_store(uri: str) -> None:
    """Create the tables of a SQLite store that is not there yet; nothing happens for other stores.

    The file gets its name when it is complete, under a lock. So neither an interruption nor two trainings that begin at
    once leave one with half of the tables, which MLflow could never open again.
    """
    path = sqlite_file(uri)
    if path is None or _is_there(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with locked(lock):
        if _is_there(path):
            return
        for left in path.parent.glob(f"{glob.escape(path.name)}.unfinished*"):
            left.unlink()
        unfinished = path.with_name(f"{path.name}.unfinished")
        try:
            client = MlflowClient(sqlite_uri(unfinished))
            client.search_experiments(max_results=1)
            release(client)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        lock.unlink(missing_ok=True)  # whoever waits for it finds the store


def release(client: Any) -> None:
    """Close a client's connections to a SQLite file."""
    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    for engine in (getattr(store, name, None) for name in ("engine", "read_engine")):
        if engine is not None:
            engine.dispose()


@contextmanager
def briefly() -> Iterator[None]:
    """Let MLflow's client give up early and keep quiet meanwhile; limits that the user has set are left."""
    ours = {name: value for name, value in REQUEST_LIMITS.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in LOUD}
    os.environ.update(ours)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def why_away(error: BaseException) -> str:
    """Return in a few words why a store cannot be used."""
    text = str(error)
    known = re.search(r"\[Errno -?\d+\] ([^'\")\\]+)|((?:read |connect )?timed? ?out)", text, re.IGNORECASE)
    lines = text.splitlines() or [type(error).__name__]
    return known[1] or known[2].lower() if known else describe(lines[0]).strip("'\"")


def shown(uri: str) -> str:
    """Return a store's URI without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
