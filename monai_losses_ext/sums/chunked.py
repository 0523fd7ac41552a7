# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The definition, chunk of voxels by chunk of voxels, recomputed for the gradient: any device, dtype and term."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import Target

CHUNK_ELEMENTS = 2**18


def forward(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    total = torch.zeros(len(terms), *logits.shape[:2], dtype=torch.float64, device=logits.device)
    for _, x, part in _chunks(logits, target):
        total += T.reference_sums(x, part, terms, activation)
    return total.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def backward(grad_sums: Tensor, logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the gradient with respect to the logits, in their dtype and layout; ``grad_sums`` is ``[T, B, C]``."""
    grad = torch.empty_like(logits)
    for piece, x, part in _chunks(logits, target):
        # Within an operator autograd records nothing; a functional vector-Jacobian product works there.
        sums, vjp = torch.func.vjp(functools.partial(_sums, part, terms, activation), x)
        grad[:, :, piece] = vjp(grad_sums.to(sums))[0]
    return grad


def _sums(target: Target, terms: Sequence[str], activation: str, logits: Tensor) -> Tensor:
    return T.reference_sums(logits, target, terms, activation)


def _chunks(logits: Tensor, target: Target) -> Iterator[tuple[slice, Tensor, Target]]:
    length = max(1, CHUNK_ELEMENTS * logits.shape[2] // max(1, logits.numel()))
    for start in range(0, logits.shape[2], length):
        piece = slice(start, start + length)
        yield piece, logits[:, :, piece], target.part((slice(None), slice(None), piece))
