# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""From a batch to a trainer's loss, and back to what metrics expect."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from monai.config import KeysCollection
from monai.engines.utils import default_prepare_batch
from monai.transforms import MapTransform
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.sums.target import DISTANCE, KEYS, LABEL


class UnpackLabeld(MapTransform):
    """Put the labels back where a batch carries them in a dictionary with their distance map.

    The first of a trainer's post-processing transforms, for metrics and transforms that expect the label itself.

    Args:
        keys: what to unpack; what is no such dictionary is left as it is.
        allow_missing_keys: pass over keys that a case lacks.
    """

    def __init__(self, keys: KeysCollection = LABEL, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with its labels as tensors."""
        case = dict(data)
        for key in self.key_iterator(case):
            if isinstance(case[key], Mapping):
                case[key] = case[key][LABEL]
        return case


def prepare_batch(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | dict[str, Tensor]]:
    """Hand the labels and all that belongs to them to the loss: a trainer's ``prepare_batch``.

    Args:
        batchdata: with ``image`` and ``label``, and any other key of a target: see
            :class:`monai_losses_ext.sums.Target`.
        device: where the tensors go.
        non_blocking: whether the copy may run beside what follows.
        kwargs: further arguments of the copy.

    Returns:
        The image, and the label, or ``{"label": ..., "weight": ...}`` where the batch has more. The trainer keeps that
        as the batch's ``label``; where it has post-processing or metrics, :class:`UnpackLabeld` comes first there.

    Example:
        >>> batch = {"image": torch.zeros(1), "label": torch.ones(1), "annotated": torch.tensor([[True, False]])}
        >>> prepare_batch(batch)[1]
        {'label': tensor([1.]), 'annotated': tensor([[ True, False]])}
    """
    image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
    others = {key: batchdata[key] for key in KEYS if key != LABEL and key in batchdata}
    if not others:
        return image, label
    moved = {key: part.to(device=device, non_blocking=non_blocking, **kwargs) for key, part in others.items()}
    return image, {LABEL: label, **moved}


def prepare_batch_with_distance(
    batchdata: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hand the labels and their distance map to the loss together: a trainer's ``prepare_batch``.

    Args:
        batchdata: with ``image``, ``label`` and ``distance``.
        device: where the tensors go.
        non_blocking: whether the copy may run beside what follows.
        kwargs: further arguments of the copy.

    Returns:
        The image, and ``{"label": ..., "distance": ...}`` with all else that :func:`prepare_batch` finds. The trainer
        keeps that as the batch's ``label``; where it has post-processing or metrics, :class:`UnpackLabeld` comes first
        there.

    Raises:
        UserError: if there is no map.
    """
    if DISTANCE not in batchdata:
        raise errors.UserError(
            "prepare_batch: the batch has no distance map. Add monai_losses_ext.transforms.SignedDistanceMapd "
            "to the transforms, after those that change the spacing and before the random ones, and 'distance' to the "
            f"keys of the random spatial ones; got {', '.join(sorted(map(str, batchdata)))}."
        )
    image, target = prepare_batch(batchdata, device, non_blocking, **kwargs)
    return image, cast(dict[str, Tensor], target)
