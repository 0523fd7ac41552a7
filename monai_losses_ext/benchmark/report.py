# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The docs' tables, generated from the committed JSON between two marks, losing rows included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_tables(result: Path, docs: Path) -> None:
    """Replace what stands between the marks of ``docs`` by the tables of ``result``."""
    docs.write_text(with_tables(docs.read_text(), json.loads(result.read_text())))


def with_tables(text: str, result: dict[str, Any]) -> str:
    """Return the text with fresh tables between ``<!-- speed -->`` and ``<!-- /speed -->``, and likewise memory.

    Raises:
        ValueError: where a mark is missing.
    """
    for name, table in (("speed", _speed_table(result)), ("memory", _memory_table(result))):
        start, end = text.find(f"<!-- {name} -->\n"), text.find(f"<!-- /{name} -->")
        if not 0 <= start < end:
            raise ValueError(f"docs: must hold the marks <!-- {name} --> and <!-- /{name} -->; got neither or one.")
        text = f"{text[:start]}<!-- {name} -->\n{table}{text[end:]}"
    return text


def _speed_table(result: dict[str, Any]) -> str:
    about = result["about"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}, "
        f"MONAI {about['versions']['monai']}, {about['date']}, commit {about['commit']}; "
        "float32, forward + backward, medians.",
        "",
        "| shape | loss | baseline | ours, ms | baseline, ms | ours / baseline (p20 to p80) |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_speed_row, result["speed"])]) + "\n"


def _speed_row(row: dict[str, Any]) -> str:
    ours, theirs, ratio = row["ours_ms"]["both"]["median"], row["baseline_ms"]["both"]["median"], row["ratio"]
    spread = f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    return f"| {row['shape']} | {row['loss']} | {row['baseline']} | {ours:.0f} | {theirs:.0f} | {spread} |"


def _memory_table(result: dict[str, Any]) -> str:
    lines = ["| shape | loss | ours, copies of the logits | baseline, copies |", "|---|---|---|---|"]
    rows = result["memory"]
    row = "| {shape} | {loss} | {ours_copies:.2f} | {baseline_copies:.2f} |"
    return "\n".join([*lines, *(row.format(**values) for values in rows)]) + "\n"
