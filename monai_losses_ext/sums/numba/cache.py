# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""numba's cache of compiled kernels, which must never be what ends a training."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

SECONDS_BEFORE_A_WORD = 1.5
Compiled = TypeVar("Compiled")


def compiled(what: str, build: Callable[[bool], Compiled]) -> Compiled:
    """Return what ``build`` compiles, or reads from the cache where an earlier process left it.

    Args:
        what: whose kernels they are, for messages.
        build: compiles, with numba's cache or without.

    Warns:
        RuntimeWarning: where the cache can be neither written nor read: no folder for it, a torn file, a full disk.
    """
    word = threading.Timer(SECONDS_BEFORE_A_WORD, _say_that_it_takes_a_while, [what])
    word.daemon = True
    word.start()
    try:
        return build(True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"{what}: the compiled CPU kernels cannot be kept or read ({reason}); they are compiled in every process. "
            "NUMBA_CACHE_DIR names a folder for them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return build(False)
    finally:
        word.cancel()


def _say_that_it_takes_a_while(what: str) -> None:
    logging.getLogger(__name__).warning(f"{what}: compiling the CPU kernels, some ten seconds, once.")
