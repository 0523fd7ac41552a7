# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Problems that every backend of the voxel sums has to solve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

from monai_losses_ext.sums import Target, terms, voxel_sums

PLAIN = ["tp", "pred", "pred_sq", "ref", "ref_sq", "abs_diff", "count", "surface", "surface_min"]
LOGS = ["ce", "logp", "focal:2.0", "focal:0.5", "focal:0.0"]
SIGMOID = ["ce_neg", "focal_neg:2.0", "focal_neg:0.5"]
DENSE = ("one_hot", "soft", "half", "bytes")
INDEX = {"int64": torch.int64, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int8": torch.int8,
         "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}  # fmt: skip
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
LAYOUTS = ("contiguous", "channels_last", "permuted", "strided", "cropped", "expanded")


def terms_of(activation):
    """Return all terms that the activation allows."""
    return PLAIN + (LOGS if activation != "none" else []) + (SIGMOID if activation == "sigmoid" else [])


def problem(activation, kind, ignore, num_classes, shape, dtype=torch.float64, batch=2):
    """Return input, target and a distance map; labels 255 stand in index targets that ignore them."""
    x = torch.randn(batch, num_classes, *shape, dtype=torch.float64)
    x = (x.sigmoid() if activation == "none" else x).to(dtype)
    labels = torch.randint(0, max(num_classes, 2), (batch, *shape))
    target = labels.clone()
    if kind == "index" and ignore == 255:
        target[torch.rand(target.shape) < 0.2] = 255
    elif kind == "one_hot":
        target = torch.stack([labels == (c if num_classes > 1 else 1) for c in range(num_classes)], 1)
    elif kind == "soft":
        target = torch.rand(batch, num_classes, *shape)
    return x, target, torch.randn(x.shape)


def value_and_gradient(x, target, phi, activation, ignore, backend):
    """Return all sums, and the gradient of a random linear function of them."""
    x = x.detach().clone().requires_grad_()
    given = {"label": target, "distance": phi}
    sums = voxel_sums(x, given, terms_of(activation), activation, ignore, backend)
    generator = torch.Generator().manual_seed(1)
    weights = {term: torch.randn(value.shape, generator=generator).to(value) for term, value in sums.items()}
    (gradient,) = torch.autograd.grad(sum((value * weights[term]).sum() for term, value in sums.items()), x)
    return sums, gradient


@dataclass(frozen=True)
class Case:
    """A row of the table of parity.

    Attributes:
        layout: how the logits lie in memory; of the other volumes, every second one lies the same way.
        kind: dtype of index labels, or what the dense ones are.
        leaves_out: nothing; index labels (``some``) or voxels of a mask (``some``, ``channels``); ``all`` of them.
        weighted: whether voxels have weights, some of them 0.
    """

    activation: str = "softmax"
    kind: str = "int64"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    num_classes: int = 3
    shape: tuple[int, ...] = (5, 6, 7)
    leaves_out: str = "nothing"
    weighted: bool = False
    batch: int = 2

    def __str__(self):
        """Name the case as pytest prints it."""
        shape = "x".join(map(str, (self.batch, self.num_classes, *self.shape)))
        words = [self.activation, self.kind, str(self.dtype)[6:], self.layout, shape, self.leaves_out]
        return "-".join([*words, *["weighted"] * self.weighted])

    def is_possible(self):
        """Tell whether the contract knows such a case."""
        dense = self.kind in DENSE
        if self.num_classes == 1 and (not dense or self.activation == "softmax"):
            return False
        if self.layout in ("channels_last", "permuted") and len(self.shape) < 2:
            return False
        return not (self.leaves_out == "channels" and (not dense or self.activation == "softmax"))

    def problem(self, device="cpu"):
        """Return logits and target, with values wherever a voxel does not count that must not reach the sums."""
        generator = torch.Generator().manual_seed(0)

        def random(channels, dtype=torch.float64):
            return torch.randn(self.batch, channels, *self.shape, generator=generator, dtype=torch.float64).to(dtype)

        x = random(self.num_classes)
        x = (x.sigmoid() if self.activation == "none" else 3 * x).to(self.dtype)
        label, ignored, mask = self._label(generator)
        weight = random(1, torch.float32).clamp_min(0) if self.weighted else None
        distance = random(self.num_classes, torch.float32)
        if self.leaves_out != "nothing":
            chance = 1.1 if self.leaves_out == "all" else 0.3
            channels = self.num_classes if self.leaves_out == "channels" else 1
            gone = torch.rand(self.batch, channels, *self.shape, generator=generator) < chance
            if self.kind in DENSE:
                mask = ~gone
                if label.is_floating_point():
                    label = label.masked_fill(gone, float("nan"))
            else:
                ignored = (-1, 100) if label.dtype != torch.uint8 else (255, 100)
                label = torch.where(gone, ignored[0], label).to(label.dtype)
                label.flatten()[:: 5 if self.leaves_out == "some" else 10**9] = ignored[1]
                gone = (label == ignored[0]) | (label == ignored[1])
            x, distance = (v.masked_fill(gone, float("nan")) for v in (x, distance))
        if weight is not None:
            x = x.masked_fill(weight == 0, float("inf"))
        volumes = (x, label, weight, distance, mask)
        laid = [None if v is None else lay_out(v.to(device), self.layout) for v in volumes]
        return laid[0], Target(laid[1], self.kind not in DENSE, None, laid[2], laid[3], ignored, laid[4])

    def _label(self, generator):
        shape = (self.batch, self.num_classes, *self.shape)
        index = torch.randint(0, max(self.num_classes, 2), (self.batch, 1, *self.shape), generator=generator)
        if self.kind in INDEX:
            return index.to(INDEX[self.kind]), (), None
        classes = torch.arange(self.num_classes).view(1, -1, *[1] * len(self.shape))
        one_hot = index == (classes if self.num_classes > 1 else 1)
        soft = torch.rand(shape, generator=generator)
        return (
            {"one_hot": one_hot, "bytes": one_hot.to(torch.uint8), "soft": soft, "half": soft.half()}[self.kind],
            (),
            None,
        )


def lay_out(volume, layout):
    """Return the same values in another layout."""
    axes = volume.ndim
    if layout == "channels_last":
        return volume.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return volume.transpose(2, axes - 1).contiguous().transpose(2, axes - 1)
    if layout in ("strided", "cropped"):
        factor = 2 if layout == "strided" else 1
        wide = volume.new_zeros(*volume.shape[:-1], factor * volume.shape[-1] + 3)
        view = wide[..., 3::2] if layout == "strided" else wide[..., 3:]
        view = view[..., : volume.shape[-1]]
        return view.copy_(volume)
    return volume.contiguous()


def cases():
    """Return the table: each property with each activation and kind of target, then in pairs that meet in a kernel."""
    base = [Case(a, k) for a in terms.ACTIVATIONS for k in ("int64", "one_hot", "soft")]
    rows = list(base)
    for row in base:
        rows += [replace(row, shape=shape) for shape in ((7,), (5, 6), (1,), (1, 1, 1), (129, 9), (17, 19, 23))]
        rows += [replace(row, num_classes=n, shape=(40, 33)) for n in (1, 2, 14, 70)]
        rows += [replace(row, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float64)]
        rows += [replace(row, layout=layout, shape=s) for layout in LAYOUTS[1:5] for s in ((6, 5), (4, 9, 11))]
        leave = ("some", "channels", "all")
        rows += [replace(row, leaves_out=o, weighted=w) for o, w in product(leave, (False, True))]
        rows += [replace(row, weighted=True), replace(row, layout="cropped", dtype=torch.bfloat16, leaves_out="some")]
        rows += [replace(row, layout="channels_last", dtype=torch.float16, weighted=True, batch=3)]
    for activation in ("softmax", "sigmoid"):
        rows += [Case(activation, kind, leaves_out=o) for kind in INDEX for o in ("nothing", "some")]
        rows += [Case(activation, kind, layout=layout) for kind in ("half", "bytes") for layout in LAYOUTS[:3]]
    return list(dict.fromkeys(row for row in rows if row.is_possible()))
