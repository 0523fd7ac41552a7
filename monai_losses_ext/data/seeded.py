# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Random transforms that depend on nothing but seed, epoch and case: the same in any process, in any worker."""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.data import CacheDataset
from monai.transforms import Compose


class SeededCacheDataset(CacheDataset):
    """MONAI's CacheDataset, whose random transforms are seeded anew for each case of each epoch.

    So a case looks the same in epoch 7 whether the training ran through or was resumed there, whether the batch comes
    from the trainer's process or from a worker, and whether one process trains or several share the cases.
    :class:`monai_losses_ext.handlers.EpochSeed` tells it the epoch; workers must not outlive an epoch
    (``persistent_workers=False``, as by default).

    Args:
        args: see MONAI's CacheDataset.
        seed: of all random numbers.
        kwargs: see MONAI's CacheDataset.
    """

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
