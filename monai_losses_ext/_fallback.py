# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A fast way that may not work on a machine, and what is done about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable


def works(what: str, attempt: Callable[[], object], instead: str) -> bool:
    """Tell whether ``attempt`` succeeds; where it does not, warn with the reason and with what is done ``instead``.

    Triton compiles its kernels when they are first used, which takes a C compiler, Python's headers and a GPU that it
    knows. A training must not end because one of them is missing.
    """
    try:
        attempt()
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        # Triton's compiler says where, quotes the source, and says what last.
        reason = f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") else lines[0]
        warnings.warn(f"{what} does not work here ({reason}); {instead}", RuntimeWarning, stacklevel=2)
        return False
    return True
