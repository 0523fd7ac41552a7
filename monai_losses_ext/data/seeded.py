# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Random transforms that depend on nothing but seed, epoch and case: the same in any process, in any worker."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.data import CacheDataset, PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose

from monai_losses_ext.data.bad_case import NamesBadCase


class _Seeded(NamesBadCase):
    """Seeds a dataset's random transforms anew for each case of each epoch.

    So a case looks the same in epoch 7 whether the training ran through or was resumed there, whether the batch comes
    from the trainer's process or from a worker, and whether one process trains or several share the cases.
    :class:`monai_losses_ext.handlers.EpochSeed` tells it the epoch; workers must not outlive an epoch
    (``persistent_workers=False``, as by default).
    """

    transform: Any

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of this epoch from now on."""
        self.epoch = epoch

    def _transform(self, index: int) -> Any:
        if isinstance(self.transform, Compose):
            numbers = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)
            self.transform.set_random_state(seed=int(numbers[0]))
        return super()._transform(index)


class SeededCacheDataset(_Seeded, CacheDataset):
    """MONAI's CacheDataset, in memory, with random transforms that depend on seed, epoch and case alone.

    Args:
        args: see MONAI's CacheDataset.
        seed: of all random numbers.
        kwargs: see MONAI's CacheDataset.
    """


class SeededPersistentDataset(_Seeded, PersistentDataset):
    """MONAI's PersistentDataset, on disk, with random transforms that depend on seed, epoch and case alone.

    A case is prepared once and kept in ``cache_dir``, under a name that changes with the transforms' arguments, the
    versions of MONAI and PyTorch, and the size and time of the case's files, so that nothing stale is used. A file that
    was cut short is made again. None is deleted, since another training may use it: the log says how much there is
    of other settings, and the command that deletes it.

    Args:
        data: cases, dictionaries of paths.
        transform: a ``Compose``; what stands before its first random transform is kept.
        cache_dir: folder of the prepared cases; None, or False on a command line, keeps none.
        seed: of all random numbers.
    """

    def __init__(
        self, data: Sequence[Any], transform: Any, cache_dir: str | Path | bool | None = None, seed: int = 0
    ) -> None:
        # The files are this training's own, so they may hold more than weights: the images' affines.
        stored = {"hash_func": file_hash, "hash_transform": settings_hash, "track_meta": True, "weights_only": False}
        super().__init__(data, transform, cache_dir or None, seed=seed, **stored)
        if self.cache_dir is not None:
            self._tell_of_others()

    def _tell_of_others(self) -> None:
        """Log what the folder holds of other settings."""
        others = [file for file in self.cache_dir.glob("*.pt") if not file.stem.endswith(self.transform_hash)]
        if others:
            gib = sum(file.stat().st_size for file in others) / 2**30
            logging.getLogger(__name__).warning(
                f"cache_dir: {len(others)} prepared cases of other settings take {gib:.1f} GiB. To delete them: "
                f"find {shlex.quote(str(self.cache_dir))} -name '*.pt' ! -name '*{self.transform_hash}.pt' -delete"
            )

    def _cachecheck(self, case: Any) -> Any:
        try:
            return super()._cachecheck(case)
        except (EOFError, OSError, RuntimeError):
            file = self.cache_dir and self.cache_dir / f"{self.hash_func(case).decode()}{self.transform_hash}.pt"
            if not file or not file.is_file():
                raise
            file.unlink()  # cut short by a crash or a full disk
            return super()._cachecheck(case)


def settings_hash(transforms: Any) -> bytes:
    """Return a name for how cases are prepared: the transforms, and the versions that compute them."""
    return pickle_hashing((transforms, monai.__version__, torch.__version__))


def file_hash(case: Mapping[str, Any]) -> bytes:
    """Return a name for a case that changes with its files' paths, sizes and modification times, and its numbers."""
    told: dict[str, Any] = {}
    for key, value in case.items():
        if isinstance(value, (str, os.PathLike)):
            stat = Path(value).stat()
            told[key] = str(value), stat.st_size, stat.st_mtime_ns
        else:
            told[key] = value.tolist() if isinstance(value, np.ndarray) else value
    return pickle_hashing(told)
