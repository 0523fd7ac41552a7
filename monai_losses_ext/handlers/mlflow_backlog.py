# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The file in which a run keeps what MLflow could not be told."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from monai_losses_ext.errors import describe

Entry = dict[str, Any]  # one of {"metrics", "step", "time"}, {"params"}, {"tags"}, {"artifact"}, {"status"}
PATTERN = "mlflow_backlog_*.jsonl"


class Backlog:
    """A line of JSON for each entry that waits; the first line, ``{"run": ...}``, tells whose they are.

    The file is whole whenever the process ends. Where it cannot be written, that is said once, and the entries wait in
    the memory of the training alone.

    Args:
        file: where the entries wait; None keeps them in the memory.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.is_whole = False  # whether the file has all that waits
        self._has_warned = False

    def read(self) -> list[Entry]:
        """Return what an earlier process left, the line about its run included."""
        if self.file is None or not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [entry for entry in map(_parsed, lines) if entry]

    def write(self, run: dict[str, Any], entries: Iterable[Entry]) -> None:
        """Replace the file by one with these entries."""
        if self.file is None:
            return
        unfinished = self.file.with_name(f"{self.file.name}.unfinished")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = (f"{json.dumps(entry)}\n" for entry in ({"run": run}, *entries))
            unfinished.write_text("".join(lines), encoding="utf-8")
            unfinished.replace(self.file)
            self.is_whole = True
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self._warn(error)

    def append(self, entry: Entry) -> None:
        """Add an entry; where the file is not whole, it waits for the next :meth:`write`."""
        if self.file is None or not self.is_whole:
            return
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(entry)}\n")
        except OSError as error:
            self._warn(error)

    def remove(self) -> None:
        """Remove the file: nothing waits any more."""
        self.is_whole = False
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink(missing_ok=True)

    def how_to_send(self) -> str:
        """Return the command that sends what waits in the file."""
        folder = self.file.parent if self.file is not None else Path()
        return f"python -m monai_losses_ext send_metrics {shlex.quote(str(folder))}"

    def _warn(self, error: OSError) -> None:
        self.is_whole = False
        if not self._has_warned:
            why = describe(error.strerror or type(error).__name__)
            logging.getLogger(__name__).warning(
                f"tracking: {self.file} cannot be written ({why}). What MLflow is not told waits in the memory alone."
            )
        self._has_warned = True


def _parsed(line: str) -> Entry | None:
    """Return an entry; None for a line that was cut off when its training was killed."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
