# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The kernels, compiled when they are first used, or read from the cache where an earlier process left them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from numba import njit, types

from monai_losses_ext.sums.numba import kernels as K  # noqa: N812
from monai_losses_ext.sums.numba.cache import compiled

_LOCK = threading.Lock()
SIGNATURE = types.void(
    types.int64[::1],
    types.float32[::1],
    types.float64[:, :, ::1],
    types.float32[:, :, ::1],
    types.float32[:, ::1],
    types.int64[::1],
)
Kernel = Callable[..., None]


def kernel() -> Kernel:
    """Return the compiled kernel, for both passes."""
    with _LOCK:  # functools.cache alone would let two threads compile at once
        return _kernel()


@functools.cache
def _kernel() -> Kernel:
    return build(K.run, SIGNATURE)


def build(function: Callable[..., None], signature: Any) -> Kernel:
    """Compile a function, or read it from the cache; what is wrong with the cache is one warning."""

    def compile_it(cache: bool) -> Kernel:
        kernel: Kernel = njit([signature], cache=cache, **K.ENTRY)(function)
        return kernel

    return compiled("voxel_sums", compile_it)
