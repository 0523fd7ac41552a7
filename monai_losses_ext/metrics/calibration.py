# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""How far a class's probabilities are from the frequency with which they come true."""

from __future__ import annotations

import math

import torch

from monai_losses_ext.errors import fail

CHUNK = 2**22  # voxels at a time, so that the temporaries stay small
ROUNDING = 1e-3  # by which a sum of exponentials, or an interpolation, may leave 0 to 1


def bin_sums(
    probability: torch.Tensor, reference: torch.Tensor, bins: int = 20, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Sort voxels into equal intervals of their probability, and add up each interval's count, p and reference.

    Sums of several cases may be added: those of a whole evaluation take no more memory than those of one case.

    Args:
        probability: of one class, ``[*S]``, 0 to 1.
        reference: boolean mask of that class, ``[*S]``.
        bins: number of intervals, ``((i - 1) / bins, i / bins]``, the first closed.
        known: boolean mask ``[*S]`` of the voxels that count; all unless given.

    Returns:
        ``[3, bins]``, float64: in each interval, the number of voxels, the sum of their probabilities, and how many of
        them are in the reference.

    Raises:
        ValueError: one line, for values that are no probabilities.
    """
    probability, reference = probability.cpu(), reference.cpu()
    if known is not None:
        probability, reference = probability[known], reference[known]
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for p, r in zip(probability.flatten().split(CHUNK), reference.flatten().split(CHUNK), strict=True):
        p = p.float()
        if p.numel() and (p.min() < -ROUNDING or p.max() > 1 + ROUNDING):
            raise fail("probability", "must be between 0 and 1", [p.min().item(), p.max().item()])
        place = ((p * bins).ceil() - 1).nan_to_num(0.0).clamp(0, bins - 1).long()
        sums[0] += torch.bincount(place, minlength=bins)
        sums[1] += torch.bincount(place, p.double(), minlength=bins)
        sums[2] += torch.bincount(place[r], minlength=bins)
    return sums


def calibration_errors(sums: torch.Tensor) -> dict[str, float]:
    """Return the expected and the average calibration error of one class.

    With ``gap`` the difference of mean probability and frequency in a bin: ``ece``, the mean of ``gap`` over the
    voxels, and ``ace``, its mean over the bins that hold any. Most voxels of a volume are background that is far from
    everything, so ``ece`` is small for any network that knows this; ``ace`` gives every probability the same say, and
    is what :class:`monai_losses_ext.losses.L1ACELoss` trains.

    Args:
        sums: ``[3, bins]`` of :func:`bin_sums`, of one case or added up over several.

    Returns:
        ``ece`` and ``ace``, 0 to 1; NaN where no voxel counts.

    Source:
        Barfoot et al. 2024, https://arxiv.org/abs/2403.06759, hard bins; 2025, https://arxiv.org/abs/2506.03942.

    Example:
        >>> p, r = torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([True, False, False, False])
        >>> errors = calibration_errors(bin_sums(p, r, bins=5))  # the gaps are 0.4 and 0.1
        >>> round(errors["ece"], 6), round(errors["ace"], 6)
        (0.25, 0.25)
    """
    count, p, r = sums[:, sums[0] > 0]
    if not len(count):
        return {"ece": math.nan, "ace": math.nan}
    gaps = (p - r).abs()
    return {"ece": (gaps.sum() / count.sum()).item(), "ace": (gaps / count).mean().item()}
