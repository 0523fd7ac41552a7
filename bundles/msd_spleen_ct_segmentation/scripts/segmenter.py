# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's evaluator, over a folder in which not every image can be segmented."""

from __future__ import annotations

from typing import Any

from monai.engines import SupervisedEvaluator

from .images import ImageError

FULL = ("out of memory", "not enough memory", "can't allocate memory")  # what torch says on GPUs and on CPUs


class Segmenter(SupervisedEvaluator):
    """Goes on after an image that is too large for the memory, or whose segmentation does not lie on it.

    Those images are named at the end with the ones that the loader, an ``ImageLoader``, passed over. Where another
    error ends the run before, such as a full disk, they are named too.
    """

    def run(self) -> None:
        """Segment the folder."""
        try:
            super().run()
        except BaseException:
            self.data_loader.say_others()
            raise

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        try:
            return super()._iteration(engine, batchdata)
        except Exception as error:
            reason = _reason(error)
            if reason is None:
                raise
        self.data_loader.pass_over(reason)
        engine.state.output = {}
        return engine.state.output


def _reason(error: BaseException | None) -> str | None:
    """Return why one image cannot be segmented, None for another kind of error; MONAI wraps what transforms raise."""
    while error is not None:
        if isinstance(error, ImageError):
            return str(error)
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_full(str(error))):
            return "is too large for the memory; give a smaller --patch_size that the network takes, or --device cpu"
        error = error.__cause__
    return None


def _is_full(text: str) -> bool:
    return any(words in text.lower() for words in FULL)
