# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Signed distance maps of a label, once per case."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.arguments import Limits, check_arguments
from monai_losses_ext.distance import signed_distance, voxel_size
from monai_losses_ext.losses.base import Positive
from monai_losses_ext.sums.target import DISTANCE

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class SignedDistanceMapd(MapTransform):
    """Add the signed distance map of every class of a label, in millimeters, for a boundary loss.

    It belongs after the transforms that fix the voxel grid (orientation, spacing, padding) and before the random ones:
    then the distances are those of the whole volume, and a cached dataset computes them once. Add the new key to the
    random *spatial* transforms, with interpolation ``bilinear`` and padding ``border``.

    What random transforms do to a map: crops, flips, rotations and shifts move it with the label. A zoom leaves its
    values alone, and rightly so, since they are millimeters of the patient: the zoom is in the patch's affine, as it is
    for the label. Elastic deformation has no such affine, so the map is right only as far as the deformation is small.

    Args:
        keys: the labels, each ``[1, *S]`` of whole numbers, or ``[C, *S]`` with one mask per class, which may overlap.
        num_classes: C for whole numbers, background included; None for masks.
        names: keys of the maps; ``distance`` for one label, ``<key>_distance`` for several, unless given.
        dtype: ``float32``; or ``float16``, for half the cache and a relative error of 0.0005.
        absent: see :func:`monai_losses_ext.distance.signed_distance`, as are the next three.
        convention: ``signed`` or ``kervadec``.
        spacing: voxel size in mm; of the label's affine unless given; 1 mm, with a warning, for a label without one.
        backend: ``auto``, ``numba`` or ``scipy``.
        allow_missing_keys: pass over labels that a case lacks.

    Example:
        >>> import torch
        >>> case = {"label": MetaTensor(torch.tensor([[0, 0, 1, 1]]), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))}
        >>> SignedDistanceMapd("label", num_classes=2)(case)["distance"].tolist()
        [[-4.0, -2.0, 2.0, 4.0], [4.0, 2.0, -2.0, -4.0]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_classes: Annotated[int, Limits(minimum=1)] | None = None,
        names: str | Sequence[str] | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        absent: Literal["far", "zero"] = "far",
        convention: Literal["signed", "kervadec"] = "signed",
        spacing: Positive | Sequence[Positive] | None = None,
        backend: Literal["auto", "numba", "scipy"] = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "keys", "names", "__class__")}
        check_arguments(SignedDistanceMapd.__init__, arguments)
        super().__init__(keys, allow_missing_keys)
        default = [DISTANCE] if len(self.keys) == 1 else [f"{key}_{DISTANCE}" for key in self.keys]
        self.names = default if names is None else [names] if isinstance(names, str) else list(names)
        if len(self.names) != len(self.keys):
            raise errors.fail("names", f"must hold one name per key ({len(self.keys)})", self.names)
        self.num_classes = num_classes
        self.dtype = DTYPES[dtype]
        self.absent = absent
        self.convention = convention
        self.spacing = spacing
        self.backend = backend

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the case with the maps of its labels, ``[C, *S]``, with the labels' affine."""
        case = dict(data)
        for key, name in self.key_iterator(case, self.names):
            label = torch.as_tensor(np.ascontiguousarray(case[key])) if isinstance(case[key], np.ndarray) else case[key]
            if not isinstance(label, Tensor):
                rule = "must be a tensor or an array (LoadImaged makes one of a path)"
                raise errors.fail(f"SignedDistanceMapd: {key!r}", rule, label)
            spacing = (
                self.spacing
                if self.spacing is not None
                else voxel_size(label.affine if isinstance(label, MetaTensor) else None, label.ndim - 1)
            )
            if spacing is None:
                warnings.warn(
                    f"SignedDistanceMapd: {key!r} has no affine, so its voxels count as 1 mm. Give spacing to say how "
                    "large they are.",
                    stacklevel=2,
                )
            distance = signed_distance(
                label.unsqueeze(0),
                self.num_classes,
                spacing,
                self.absent,
                self.convention,
                backend=self.backend,
            )[0].to(self.dtype)
            case[name] = MetaTensor(distance, meta=dict(label.meta)) if isinstance(label, MetaTensor) else distance
        return case
