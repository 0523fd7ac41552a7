# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A warning for logits that are taken for probabilities."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from monai_losses_ext.losses.base import Sums

PROBABILITY_TERMS = ("pred", "pred_sq", "count")


class RangeCheck:
    """Warn once where a loss without activation sees what cannot be probabilities: logits, most likely.

    Within 0 and 1 a sum of squares is at most the sum itself, and neither is below 0 or above the number of voxels. The
    first few passes are asked. On a GPU the answer is copied to the CPU beside the other work and read at a later call,
    so that nothing waits.

    Args:
        name: the loss, for the warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._answer: Tensor | None = None
        self._event: Any = None
        self._calls_left = 3

    def __deepcopy__(self, memo: dict[int, Any]) -> RangeCheck:
        return RangeCheck(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return RangeCheck, (self._name,)

    def is_due(self, input: Tensor) -> bool:  # noqa: A002
        """Tell whether it has yet to look; it does not while ``torch.compile`` traces or a CUDA graph is captured."""
        if self._calls_left == 0 or torch.compiler.is_compiling():
            return False
        return not (input.is_cuda and torch.cuda.is_current_stream_capturing())

    @torch.no_grad()
    def look_at(self, sums: Sums, input: Tensor) -> None:  # noqa: A002
        """Look at the sums :data:`PROBABILITY_TERMS` of a pass."""
        if not self.is_due(input):
            return
        if self._answer is None:
            pred, squares, count = (sums[term].detach() for term in PROBABILITY_TERMS)
            slack = 1e-3 * count
            outside = ((pred < -slack) | (pred > count + slack) | (squares > pred + slack)).any()
            if outside.is_cuda:
                answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
                self._answer = answer.copy_(outside, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
                return
            self._answer = outside
        if self._event is not None and not self._event.query():
            return
        self._calls_left -= 1
        is_outside, self._answer, self._event = bool(self._answer), None, None
        if is_outside:
            self._calls_left = 0
            warnings.warn(
                f"{self._name}: the input should be probabilities between 0 and 1, since no activation is set, and it "
                "is not. For logits, set softmax=True or sigmoid=True.",
                stacklevel=5,
            )
