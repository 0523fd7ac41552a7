# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The config of the run that is going on, as a whole: to check it, to keep it, to let it go."""

from __future__ import annotations

import gc
import json
import os
import re
from functools import cached_property
from pathlib import Path

from monai.bundle import ConfigParser
from torch import nn

from monai_losses_ext.engine.options import check_options, check_schedules, check_target
from monai_losses_ext.errors import fail, nearest
from monai_losses_ext.files import why_unwritable


class RunningConfig:
    """The config that this object is an entry of, with the overlays and the command line's values in it.

    MONAI gives the entries of a config no access to the whole. An entry of this class finds it, as the one whose parser
    holds the entry: ``"running_config": {"_target_": "monai_losses_ext.engine.RunningConfig", ...}``.

    Args:
        configs: folder of the bundle's config files, whose names are known ones; None for no folder.
    """

    def __init__(self, configs: str | os.PathLike[str] | None = None) -> None:
        self.configs = None if configs is None else Path(configs)

    @cached_property
    def parser(self) -> ConfigParser:
        """The parser of the config.

        Raises:
            RuntimeError: for an object that no config built.
        """
        for found in gc.get_objects():
            if type(found) is ConfigParser and any(
                self is item for item in found.ref_resolver.resolved_content.values()
            ):
                return found
        raise RuntimeError("RunningConfig: must be an entry of a config; no config built this one")

    def check(self) -> None:
        """Check names and values before anything is built.

        Raises:
            UserError: for a name that nothing uses, a value of another type or beyond its limits, a patch that the
                network cannot take, classes whose names would be the same in the metrics.
        """
        self.check_names()
        check_options(self.parser)

    def check_names(self) -> None:
        """Check that something uses every top-level name.

        MONAI adds a misspelt ``--epoch 5`` to the config and trains with the default. A name counts as used if one of
        the bundle's config files has it or if another entry refers to it; one that starts with ``_`` is a note.

        Raises:
            UserError: for the first name that is of no use, with the nearest known one.
        """
        config = self.parser.get()
        known = set(re.findall(r"@(\w+)", json.dumps(config, default=str)))
        for file in self.configs.glob("*.json") if self.configs else ():
            known.update(re.split("#|::", name.lstrip("+"))[0] for name in json.loads(file.read_text(encoding="utf-8")))
        for name in config:
            if name not in known and not name.startswith("_"):
                raise fail("option", "must be a name that the config uses", f"--{name}", nearest(name, known))

    def check_loss(self, loss: nn.Module) -> None:
        """Check a loss against its weight schedules and the dataset; see ``check_schedules`` and ``check_target``."""
        check_schedules(self.parser, loss)
        check_target(self.parser, loss)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the config as JSON.

        Raises:
            UserError: if the file cannot be written.
        """
        text = json.dumps(self.parser.get(), indent=4, default=str)
        try:
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            reason = why_unwritable(Path(path).parent) or error.strerror
            raise fail("config_path", f"must be a file that can be written ({reason})", str(path)) from None

    def release(self) -> None:
        """Let go of everything that the config built."""
        self.parser.ref_resolver.resolved_content.clear()
        self.parser.ref_resolver.items.clear()
