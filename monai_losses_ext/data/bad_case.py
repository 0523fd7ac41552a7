# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a bad case raises names the case, its file and what is wrong, whenever and in whichever thread it turns up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from monai_losses_ext.data.check import check_command
from monai_losses_ext.data.dataset import Case, case_files, case_names
from monai_losses_ext.data.faults import Rules
from monai_losses_ext.data.volume import file_fault
from monai_losses_ext.errors import UserError


class CaseError(UserError):
    """A case that cannot be used; one line with the case, the file and what is wrong."""


class FaultError(UserError):
    """What is wrong with one of a case's arrays, of which the transform that raises it knows no file.

    Args:
        key: of the array, such as ``label``.
        what: is wrong; continues a sentence that begins with the file.
        rules: that the case breaks.
    """

    def __init__(self, key: str, what: str, rules: Rules | None = None) -> None:
        super().__init__(f"{key}: {what}")
        self.key, self.what, self.rules = key, what, rules


class NamesBadCase:
    """Mix-in for a MONAI dataset of cases: what a bad case raises names the case and the file.

    Raises:
        CaseError: when an item is asked for; in the constructor, where that fills the cache.
    """

    data: Any
    _failures: list[Exception] | None = None  # of the cache that is being filled

    def _transform(self, index: int) -> Any:
        with naming(self.data[index]):
            return super()._transform(index)  # type: ignore[misc]

    def _fill_cache(self, indices: Any = None) -> list[Any]:
        # Python aborts (SIGABRT) if it ends while threads still load cases: so let all come to rest, and raise then.
        failures: list[Exception] = []
        self._failures = failures
        cache: list[Any] = super()._fill_cache(indices)  # type: ignore[misc]
        self._failures = None
        if failures:
            raise failures[0]
        return cache

    def _load_cache_item(self, idx: int) -> Any:
        failures = self._failures
        if failures:
            return None
        try:
            with naming(self.data[idx]):
                return super()._load_cache_item(idx)  # type: ignore[misc]
        except Exception as error:
            if failures is None:
                raise
            failures.append(error)


@contextmanager
def naming(case: Case) -> Iterator[None]:
    """Turn what a case is to blame for into a CaseError; other errors pass, since they are no bad data."""
    try:
        yield
    except CaseError:
        raise
    except Exception as error:
        what = _blame(error, case)
        if what is None:
            raise
        (name,) = case_names([case["image"]]).values()
        raise CaseError(f"case {name}: {what}") from error


def _blame(error: BaseException, case: Case) -> str | None:
    """Return what is wrong with which of a case's files; None where the case is not to blame."""
    cause: BaseException | None = error
    while cause is not None:  # MONAI wraps what a transform raises
        if isinstance(cause, FaultError):
            return f"{case[cause.key]} {cause.what}. To find every such case: {check_command(case, cause.rules)}"
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    for path in case_files(case):
        what = file_fault(path)
        if what:
            return f"{path} {what}. To find every such case: {check_command(case)}"
    return None
