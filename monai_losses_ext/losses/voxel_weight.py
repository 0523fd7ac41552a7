# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of voxels that a loss makes of its target's label, where the target brings none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from monai_losses_ext import arguments, errors
from monai_losses_ext.distance import voxel_size
from monai_losses_ext.losses.base import NonNegative, Positive, TargetLike, VoxelLoss
from monai_losses_ext.losses.compound import CompoundLoss
from monai_losses_ext.maps import voxel_weights
from monai_losses_ext.sums.target import Target


class VoxelWeight:
    """Let a voxel count by its class, and more between two objects; see :func:`monai_losses_ext.maps.voxel_weights`.

    Weights are made at every step, on the CPU, of the labels that the loss is given; a target that brings a ``weight``
    keeps that alone.

    Args:
        class_weight: ``inverse``, so that the classes that a sample has weigh the same; or one number per class, the
            background's first (with sigmoid: that of voxels in no region); none for 1.
        w0: largest weight of the border between two objects; 0 for none.
        sigma: width of the border in mm.

    Example:
        >>> from monai_losses_ext import get_loss
        >>> loss = get_loss({"type": "cross_entropy", "voxel_weight": {"class_weight": [1.0, 3.0]}})
        >>> logits, labels = torch.randn(1, 2, 4), torch.tensor([[0, 0, 0, 1]])
        >>> given = {"label": labels, "weight": torch.tensor([[[1.0, 1.0, 1.0, 3.0]]])}
        >>> torch.allclose(loss(logits, labels), get_loss("cross_entropy")(logits, given))
        True
    """

    def __init__(
        self,
        class_weight: Literal["inverse"] | Sequence[NonNegative] | None = None,
        w0: NonNegative = 0.0,
        sigma: Positive = 5.0,
    ) -> None:
        arguments.check_arguments(VoxelWeight.__init__, locals())
        self.class_weight = class_weight
        self.w0 = float(w0)
        self.sigma = float(sigma)

    def attach(self, loss: nn.Module) -> None:
        """Let a loss see its targets with these weights.

        Raises:
            UserError: for a loss that knows no weights of voxels.
        """
        if not isinstance(loss, (VoxelLoss, CompoundLoss)):
            raise errors.fail("loss: voxel_weight", "is known to the losses of this package alone", type(loss).__name__)
        loss.register_forward_pre_hook(self._weigh, with_kwargs=True)

    def _weigh(self, loss: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        is_sigmoid = any(getattr(part, "activation", "") == "sigmoid" for part in loss.modules())
        return (), given | {"target": self.weighed(given["target"], given["input"], is_sigmoid)}

    def weighed(self, target: TargetLike, input: Tensor, is_sigmoid: bool) -> TargetLike:  # noqa: A002
        """Return a target with weights; one that has them as it is.

        Args:
            target: of a loss.
            input: logits, ``[B, C, *S]``.
            is_sigmoid: whether each channel of a dense label is a region of its own, which may overlap others.
        """
        parsed = Target.parse(target, input)
        if parsed.weight is not None:
            return parsed
        label, num_channels = parsed.label.cpu().numpy(), input.shape[1]
        are_regions = not parsed.is_index and (is_sigmoid or num_channels == 1)
        if parsed.is_index:
            masks = label == np.arange(num_channels).reshape(1, -1, *[1] * (label.ndim - 2))
        else:
            masks = label > 0.5
        if are_regions:
            masks = np.concatenate([~masks.any(1, keepdims=True), masks], 1)
        spacing = voxel_size(parsed.affine, label.ndim - 2)
        sizes = np.broadcast_to(1.0 if spacing is None else np.asarray(spacing, float), (len(label), label.ndim - 2))
        weight = np.ones((len(label), 1, *label.shape[2:]), np.float32)
        for i, size in enumerate(sizes if label.size else ()):
            weight[i] = voxel_weights(masks[i], self.class_weight, self.w0, self.sigma, size.tolist(), are_regions)
        return replace(parsed, weight=torch.from_numpy(weight).to(parsed.label.device))
