# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training does with a case that was loaded: give it weights, and stop where it would break or spoil it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Transform

from monai_losses_ext.data.bad_case import FaultError
from monai_losses_ext.data.dataset import WEIGHT
from monai_losses_ext.data.faults import classes_of, faults, make_rules, remedy
from monai_losses_ext.data.labels import LabelMap
from monai_losses_ext.data.volume import Volume, file_fault, place_note


class LoadWeightd(Transform):
    """Load how much each voxel of a case counts, ``weight`` [1, *S], float32, where the case has that key.

    It is a path, or None for a weight of 1, on the grid of ``label``, a MetaTensor [1, *S] that is loaded before.
    :class:`CheckCased` tells what is wrong with a file.

    Args:
        every_case: give a case without the key a weight of 1.
    """

    def __init__(self, every_case: bool = False) -> None:
        self.every_case = every_case
        self.load = LoadImage(image_only=True, ensure_channel_first=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Return the case with its weights as a MetaTensor."""
        if WEIGHT not in data and not self.every_case:
            return data
        path, label = data.get(WEIGHT), data["label"]
        weight = MetaTensor(torch.ones(label.shape), affine=label.affine) if path is None else self.load(path)
        return {**data, WEIGHT: weight}


class CheckCased(Transform):
    """Stop at a case whose image or label would break a training, or spoil it unseen; give the label its classes.

    It belongs right after loading and ``EnsureChannelFirstd``; ``image`` is [C, *S], ``label`` [1, *S], and ``weight``
    [1, *S] where the case has it, all MetaTensors. The rules are those of ``python -m monai_losses_ext data check``:
    files that are whole and of real numbers, the task's number of channels, no NaN, the same shape and place for all,
    no other label values than the task's, no weight below 0. A case without foreground is let through: it can be
    trained on. Label values that a scale in the file's header leaves a hair off whole numbers are rounded.

    Args:
        num_classes: number of labels, background included.
        channels: number of channels of the image.
        ignore_label: value, or values, of voxels that nobody labeled; they stay as they are. None: there are none.
        label_map: value in the file to class; other values stay as they are. The keys may be texts, as in JSON.

    Raises:
        UserError: one line, in the constructor for a setting that cannot be right, and for a case that cannot be used.

    >>> import torch
    >>> from monai.data import MetaTensor
    >>> check = CheckCased(num_classes=2, channels=1, ignore_label=255, label_map={"17": 1})
    >>> image, label = MetaTensor(torch.rand(1, 4, 4, 3)), MetaTensor(torch.zeros(1, 4, 4, 3))
    >>> label[..., 0], label[..., 1] = 17, 255
    >>> check({"image": image, "label": label})["label"].unique().tolist()
    [0.0, 1.0, 255.0]
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        ignore_label: int | Sequence[int] | None = None,
        label_map: LabelMap | None = None,
    ) -> None:
        self.rules = make_rules(channels, num_classes, ignore_label, label_map)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Return the case with the classes of its label, or raise a UserError."""
        image, label = (self._volume(key, data[key]) for key in ("image", "label"))
        weight = self._volume(WEIGHT, data[WEIGHT]) if WEIGHT in data else None
        for fault in faults(image, label, self.rules, weight):
            more = f". {remedy(fault.values, self.rules)}" if fault.values else ""
            raise FaultError(fault.key, f"{fault.what}{more}", self.rules)
        return {**data, "label": classes_of(data["label"], self.rules)}

    def _volume(self, key: str, volume: MetaTensor) -> Volume:
        """Return an array and its place, once its file, where it comes from one, is known to be whole."""
        path, note = volume.meta.get("filename_or_obj"), ""
        if isinstance(path, str) and os.path.isfile(path):
            if what := file_fault(path):
                raise FaultError(key, what, self.rules)
            note = place_note(path)
        return Volume(volume.as_tensor().numpy(), volume.affine.numpy(), note)
