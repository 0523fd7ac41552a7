# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The kernels, compiled when they are first used, or read from numba's cache where an earlier process left them there."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

from numba import njit, types

from monai_losses_ext.sums.numba import kernels as K  # noqa: N812

SECONDS_BEFORE_A_WORD = 1.5
_LOCK = threading.Lock()
SIGNATURE = types.void(types.int64[::1], types.float32[::1], types.float64[:, :, ::1], types.float32[:, :, ::1])
Kernel = Callable[..., None]


def kernel() -> Kernel:
    """Return the compiled kernel, for both passes."""
    with _LOCK:  # functools.cache alone would let two threads compile at once
        return _kernel()


@functools.cache
def _kernel() -> Kernel:
    word = threading.Timer(SECONDS_BEFORE_A_WORD, _say_that_it_takes_a_while)
    word.daemon = True
    word.start()
    try:
        return _build(cache=True)
    except Exception as error:
        # No folder that can be written to, a torn file, a full disk: a training does not end because of a cache.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"voxel_sums: the compiled CPU kernels cannot be kept or read ({reason}); they are compiled in every "
            "process. NUMBA_CACHE_DIR names a folder for them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return _build(cache=False)
    finally:
        word.cancel()


def _build(cache: bool) -> Kernel:
    compiled: Kernel = njit([SIGNATURE], cache=cache, **K.ENTRY)(K.run)
    return compiled


def _say_that_it_takes_a_while() -> None:
    logging.getLogger(__name__).warning("voxel_sums: compiling the CPU kernels, some ten seconds, once.")
