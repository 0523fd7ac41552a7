# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Several handlers as one entry of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine


class HandlerGroup:
    """Attach handlers in their order.

    As the first entry of a bundle's handlers it keeps together what every process of a training needs: the model zoo's
    configs for several GPUs cut handlers off the end of the list. It also lets handlers have a name in the config, by
    which others refer to them, while each entry of the list stays a component, as MONAI's check of a bundle wants it.

    Args:
        handlers: each with ``attach(engine)``.
    """

    def __init__(self, handlers: Sequence[Any]) -> None:
        self.handlers = list(handlers)

    def attach(self, engine: Engine) -> None:
        """Register all of them on an engine."""
        for handler in self.handlers:
            handler.attach(engine)
