# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The loader of a training, whose errors are one line in the process that iterates, whichever worker met them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from monai.data import DataLoader

from monai_losses_ext.data.bad_case import CaseError
from monai_losses_ext.errors import UserError, fail


class CaseLoader(DataLoader):
    """MONAI's DataLoader, which raises a bad case's one line also where a worker met it.

    A worker hands over its error as a traceback in text; a worker that the system ended as a RuntimeError.

    Raises:
        UserError: while iterating; a CaseError for a bad case.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            kind = CaseError if isinstance(error, CaseError) else UserError
            raise kind(str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or isinstance(error.__cause__, UserError):
                raise
            rule = "must be fewer, or the cases smaller: the system ended a process that loads them, as it does for"
            raise fail("num_workers", f"{rule} want of memory", self.num_workers) from error
