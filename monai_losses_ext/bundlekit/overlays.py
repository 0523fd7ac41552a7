# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What follows from the table of the losses: an overlay per loss, the schema of a config, README's list.

A loss that needs no more than its name gets its overlay by itself, with its docstring's first paragraph as the note.
``overlays.json`` holds what differs from that: another note or other values, and the overlays that combine losses.
None of them sets ``include_background``: a bundle's own flag holds, so that no region of a sigmoid is left out.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from monai_losses_ext.losses import LOSSES, MONAI_LOSSES
from monai_losses_ext.losses.schema import loss_schema, summary

TABLE = Path(__file__).with_name("overlays.json")
CONFIGS = "configs"  # beside the folder of the bundles
# How an overlay swaps the class of a bundle's loss and keeps its flags; config is what the loss becomes.
SWAP = {"loss#_target_": "monai_losses_ext.get_loss", "+loss": {"config": "@loss_config", "device": "@device"}}
MARKS = ("<!-- losses-table -->\n", "<!-- /losses-table -->")


def generated_configs() -> dict[str, str]:
    """Return the generated files of ``configs/``: path inside of it -> content."""
    files = {f"losses/{name}.json": _json(content, 4) for name, content in loss_overlays().items()}
    return {**files, "loss.schema.json": _json(loss_schema(), 2)}


def loss_overlays() -> dict[str, dict[str, Any]]:
    """Return the overlay of each loss and of each combination of the table, by name."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    classes = {name: loss for name, loss in (LOSSES | MONAI_LOSSES).items() if _needs_its_name_alone(loss)}
    overlays = {}
    for name in [*classes, *(name for name in table if name not in classes)]:
        row = dict(table.get(name, {}))
        note = row.pop("_note_", None) or summary(classes[name])
        config = row.pop("loss_config", {"type": name})
        overlays[name] = {"_note_": note, "loss_config": config, **SWAP, **row}
    return overlays


def with_losses(readme: str) -> str:
    """Return README's text with the table of the losses between its marks; a text without marks stays as it is."""
    start, end = (readme.find(mark) for mark in MARKS)
    return f"{readme[:start]}{MARKS[0]}{losses_table()}{readme[end:]}" if 0 <= start < end else readme


def losses_table() -> str:
    """Return a Markdown table of the losses: name in a config, class, what it is."""
    lines = ["| name | class | |", "|---|---|---|"]
    for name, loss in (LOSSES | MONAI_LOSSES).items():
        lines.append(f"| `{name}` | `{loss.__name__}` | {summary(loss)} |")
    return "\n".join(lines) + "\n"


def _needs_its_name_alone(loss: type[nn.Module]) -> bool:
    """Tell whether all arguments of a loss have a default."""
    return all(argument.default is not argument.empty for argument in inspect.signature(loss).parameters.values())


def _json(content: dict[str, Any], indent: int) -> str:
    return json.dumps(content, indent=indent, ensure_ascii=indent == 2) + "\n"
