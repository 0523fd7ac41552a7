# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The transform that stops a training at a case that would break it, or spoil it unseen."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.data import MetaTensor
from monai.transforms import Transform

from monai_losses_ext.data.bad_case import FaultError
from monai_losses_ext.data.faults import LabelMap, classes_of, faults, make_rules, remedy
from monai_losses_ext.data.volume import Volume, file_fault, place_note


class CheckCased(Transform):
    """Stop at a case whose image or label would break a training, or spoil it unseen; give the label its classes.

    It belongs right after loading and ``EnsureChannelFirstd``; ``image`` is [C, *S], ``label`` [1, *S], both are
    MetaTensors. The rules are those of ``python -m monai_losses_ext data check``: files that are whole and of real
    numbers, the task's number of channels, no NaN, the same shape and place for image and label, no other label values
    than the task's. A case without foreground is let through: it can be trained on. Label values that a scale in the
    file's header leaves a hair off whole numbers are rounded.

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
        for fault in faults(image, label, self.rules):
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
