# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Random numbers as a function of seed and epoch, so that a resumed training draws what it would have drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from ignite.utils import manual_seed


class EpochSeed:
    """Seed what is random in a training at the start of every epoch, from the seed, the epoch and the rank.

    Python's, NumPy's and torch's global generators get a seed of the epoch's own; datasets and samplers are told the
    epoch.

    Args:
        seed: of the training.
        tell: what has ``set_epoch(epoch)``: the sampler that shuffles
            (``monai.data.DistributedSampler``, for a single process too), and
            :class:`monai_losses_ext.data.seeded.SeededCacheDataset`.
        rank: of this process, so that dropout differs between them.
    """

    def __init__(self, seed: int, tell: Sequence[Any] = (), rank: int = 0) -> None:
        self.seed = seed
        self.tell = list(tell)
        self.rank = rank

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch of the engine."""
        epoch = engine.state.epoch
        manual_seed(int(np.random.SeedSequence([self.seed, epoch, self.rank]).generate_state(1)[0]))
        for item in self.tell:
            item.set_epoch(epoch)
