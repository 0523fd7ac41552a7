# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A bad case ends a run with one line that names it and its file, whenever and in whichever process it turns up.

In the threads that fill a cache and in a loader's workers, a bad case is a :class:`CaseError`. Where it reaches the
run's own process, in the dataset's constructor or in :class:`CaseLoader`, it becomes ``SystemExit``: that alone passes
through MONAI and Ignite without hundreds of lines of traceback, but would kill a thread or a worker unseen.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from monai.data import DataLoader, MetaTensor
from monai.transforms import Transform

from monai_losses_ext.data.check import check_command, faults, read
from monai_losses_ext.data.dataset import Case, case_names


class CaseError(ValueError):
    """A case that cannot be used; one line with the case, the file and what is wrong."""


class _FaultError(ValueError):
    """What is wrong with one of a case's arrays, which knows no file."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{key}: {what}")
        self.key, self.what = key, what


class CheckCased(Transform):
    """Stop at a case whose image or label would break a training, or spoil it unseen; give the label whole numbers.

    It belongs right after loading and ``EnsureChannelFirstd``. The rules are those of ``python -m monai_losses_ext data
    check``: the task's number of channels, no NaN, the same shape and place for image and label, no other label values
    than the task's. A case without foreground is let through: it can be trained on. Label values that a scale in the
    file's header leaves a hair off whole numbers are rounded.

    Args:
        num_classes: number of labels, background included.
        channels: number of channels of the image.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        self.task_size = (channels, num_classes)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Return the case with its label rounded, or raise a ValueError."""
        volumes: list[MetaTensor] = [data["image"], data["label"]]
        arrays = [volume.as_tensor().numpy() for volume in volumes]
        affines = [volume.affine.numpy() for volume in volumes]
        for key, what in faults(arrays[0], arrays[1], (affines[0], affines[1]), self.task_size):
            raise _FaultError(key, what)
        return {**data, "label": data["label"].round()}


class NamesBadCase:
    """Mix-in for a MONAI dataset of cases: what a bad case raises names the case and the file.

    Raises:
        CaseError: when an item is asked for.
        SystemExit: in the constructor, where that fills the cache.
    """

    data: Any
    _failures: list[Exception] | None = None  # of the cache that is being filled

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except CaseError as error:
            raise SystemExit(f"error: {error}") from None

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


class CaseLoader(DataLoader):
    """MONAI's DataLoader, which ends the run with one line at a bad case.

    Raises:
        SystemExit: while iterating, in the process that iterates.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except CaseError as error:  # from a worker, its message is a traceback that ends with the message
            raise SystemExit(f"error: {str(error).rsplit(f'{CaseError.__name__}: ', 1)[-1].strip()}") from None


@contextmanager
def naming(case: Case) -> Iterator[None]:
    """Turn what a case's files are to blame for into a CaseError; other errors pass, since they are no bad data."""
    try:
        yield
    except CaseError:
        raise
    except Exception as error:
        key, what = _blame(error, case)
        if key is None:
            raise
        (name,) = case_names([case["image"]]).values()
        raise CaseError(f"case {name}: {case[key]} {what}. To find every such case: {check_command(case)}") from error


def _blame(error: BaseException, case: Case) -> tuple[str | None, str]:
    """Return the key of the file that is to blame for an error, and what is wrong with it; None for no file."""
    cause: BaseException | None = error
    while cause is not None:  # MONAI wraps what a transform raises
        if isinstance(cause, _FaultError):
            return cause.key, cause.what
        cause = cause.__cause__
    for key in ("image", "label"):
        read_or_reason = read(case[key]) if key in case else None
        if isinstance(read_or_reason, str):
            return key, read_or_reason
    return None, ""
