# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights of voxels that a label alone makes, once per case."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from numpy.typing import NDArray

from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.losses.base import NonNegative, Positive
from monai_losses_ext.maps import voxel_weights
from monai_losses_ext.sums.target import WEIGHT
from monai_losses_ext.transforms.label_maps import OfLabeld, classes

PerClass = Literal["inverse"] | Sequence[NonNegative] | Callable[[], Sequence[float]]


class _Weightd(OfLabeld):
    """Weights by class and border, multiplied with those that a case has."""

    default_name = WEIGHT

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: int | None,
        names: str | Sequence[str] | None,
        class_weight: PerClass | None,
        w0: float,
        sigma: float,
        spacing: float | Sequence[float] | None,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, num_classes, names, spacing, allow_missing_keys)
        self.class_weight = list(class_weight()) if callable(class_weight) else class_weight
        self.w0 = float(w0)
        self.sigma = float(sigma)

    def masks_of(self, volume: NDArray[Any]) -> NDArray[np.bool_]:
        """Return the masks of the background and of all other classes, ``[1 + K, *S]``."""
        if self.num_classes is not None:
            return volume == classes(0, self.num_classes, volume.ndim)
        masks = volume > 0.5
        return np.concatenate([~masks.any(0, keepdims=True), masks])

    def of_masks(self, masks: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[Any]:
        """Return the weights, ``[1, *S]``."""
        overlapping = self.num_classes is None
        return voxel_weights(masks, self.class_weight, self.w0, self.sigma, spacing, overlapping)[None]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the weights of its labels, with the labels' affine."""
        case = super().__call__(data)
        for key, name in zip(self.keys, self.names, strict=True):
            if key in data and name in data:
                case[name] = case[name] * torch.as_tensor(data[name])
        return case


class BoundaryWeightMapd(_Weightd):
    """Let voxels between two objects count more, ``weight``, so that a network learns to keep them apart.

    ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))``, with ``d1`` and ``d2`` the distances in mm to the nearest and the
    second nearest object: a component of a class. With fewer than two objects in the case, the weight is ``w_c``. It is
    multiplied with the ``weight`` that the case already has.

    It belongs after the transforms that fix the voxel grid and before the random ones: then the weights are those of
    the whole volume, and a cached dataset computes them once. Add the key to the random *spatial* transforms, with
    interpolation ``bilinear`` and padding ``zeros``.

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks. A voxel whose number is no class, such as
            one to ignore, gets 0.
        names: keys of the weights; ``weight`` for one label, ``<key>_weight`` for several, unless given.
        w0: largest weight of a border.
        sigma: its width in mm.
        class_weight: ``w_c``: None for 1; otherwise as for :class:`ClassBalanceMapd`.
        spacing: voxel size in mm; of the label's affine unless given; 1 mm for a label without one.
        allow_missing_keys: pass over labels that a case lacks.

    The map is ``[1, *S]``, float32. Objects of whole numbers are those of all classes; of masks, which may lie within
    each other, those of one mask, and the largest border of all masks counts.

    Source:
        Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, equation 2; see
        :func:`monai_losses_ext.maps.voxel_weights`.

    Example:
        >>> case = {"label": torch.tensor([[0, 1, 0, 1, 255]])}
        >>> weight = BoundaryWeightMapd("label", num_classes=2, sigma=2.0)(case)["weight"]
        >>> [round(w, 1) for w in weight[0].tolist()]
        [2.4, 7.1, 7.1, 7.1, 0.0]
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        w0: NonNegative = 10.0,
        sigma: Positive = 5.0,
        class_weight: PerClass | None = None,
        spacing: Positive | Sequence[Positive] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        given = {"num_classes": num_classes, "w0": w0, "sigma": sigma, "class_weight": class_weight, "spacing": spacing}
        check_arguments(BoundaryWeightMapd.__init__, given)
        super().__init__(keys, num_classes, names, class_weight, w0, sigma, spacing, allow_missing_keys)


class ClassBalanceMapd(_Weightd):
    """Let each voxel count as its class does, ``weight``: in every loss, whatever class weights it knows.

    It belongs where :class:`BoundaryWeightMapd` does, and is multiplied with the ``weight`` that the case already has.

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks. A voxel whose number is no class, such as
            one to ignore, gets 0.
        names: keys of the weights; ``weight`` for one label, ``<key>_weight`` for several, unless given.
        class_weight: ``inverse``: one over the number of the class's voxels in the case, so that all classes that it
            has weigh the same in sum, and a voxel 1 in the mean. Or one number per class, the background's first (for
            masks, that of voxels in none); or a function that returns them, such as that of the stored statistics of a
            dataset. Of several masks that hold a voxel the largest counts.
        allow_missing_keys: pass over labels that a case lacks.

    Example:
        >>> ClassBalanceMapd("label", num_classes=3)({"label": torch.tensor([[0, 0, 0, 1]])})["weight"].tolist()
        [[0.6666666865348816, 0.6666666865348816, 0.6666666865348816, 2.0]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        class_weight: PerClass = "inverse",
        allow_missing_keys: bool = False,
    ) -> None:
        check_arguments(ClassBalanceMapd.__init__, {"num_classes": num_classes, "class_weight": class_weight})
        super().__init__(keys, num_classes, names, class_weight, 0.0, 1.0, None, allow_missing_keys)
