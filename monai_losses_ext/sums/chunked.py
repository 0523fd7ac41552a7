# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The voxel sums on any device, over chunks of voxels that fit the cache.

Forward reads the logits once; backward reads them once more, recomputes the probabilities and writes the gradient.
Nothing of the volume's size is made but that gradient. Sums that run across chunks are kept in float64, counts are
exact integers: a running float32 sum is 1 % off at 128^3 voxels.

The backward pass works with derivatives with respect to the logarithm of the probabilities, so it never divides by one:
with ``R_c = dL/d(log p_c)``, the gradient with respect to softmax logits is ``R_c - p_c sum_k R_k``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from monai_losses_ext import _checks
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.chunk import (
    Chunk,
    Scratch,
    elementwise_gradient,
    elementwise_sums,
    softmax_gradient,
    softmax_sums,
)

# Elements (voxels times classes) of a chunk. On two cores with 512 KiB of second-level cache each, 2^19 was the best
# of 2^16..2^21 for 3 and for 14 classes; a GPU wants few launches instead.
CHUNK_ELEMENTS = {"cpu": 2**19}
CHUNK_ELEMENTS_ELSEWHERE = 2**24
# A chunk has up to four buffers of its size; on a CPU a small volume is cut finer, so that they stay small beside it.
MIN_CHUNKS, MIN_CHUNK_ELEMENTS = 24, 2**16


def forward(
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    num_samples, num_classes = logits.shape[:2]
    sums = torch.zeros(len(terms), num_samples, num_classes, dtype=torch.float64, device=logits.device)
    for b, _, chunk in _chunks(logits, target, distance, activation, ignore_index, check_labels=True):
        is_softmax = activation == "softmax"
        values = softmax_sums(chunk, terms) if is_softmax else elementwise_sums(chunk, terms, activation)
        sums[:, b] += torch.stack([values[term] for term in terms])
    return sums.to(_accumulation_dtype(logits))


def backward(
    grad_sums: Tensor,
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    terms: Sequence[str],
    activation: str,
    ignore_index: int | None,
) -> Tensor:
    """Compute the gradient with respect to the logits, in their dtype and memory layout.

    ``grad_sums``, ``[len(terms), B, C]``, is the loss's derivative with respect to each sum; the other arguments are
    those that :func:`forward` had.
    """
    grad = _empty_gradient(logits)
    flattens = _flattens(logits, target, distance)
    flat_grad = grad.flatten(2) if flattens else grad
    grad_sums = grad_sums.to(_accumulation_dtype(logits))
    for b, piece, chunk in _chunks(logits, target, distance, activation, ignore_index):
        grads = {term: grad_sums[i, b].unsqueeze(1) for i, term in enumerate(terms)}  # term -> C 1
        place = flat_grad[b, :, piece]
        in_place = flattens and place.dtype == grad_sums.dtype
        out = place if in_place else chunk.scratch("gradient", *chunk.logits.shape)
        if activation == "softmax":
            softmax_gradient(chunk, grads, out)
        else:
            elementwise_gradient(chunk, grads, activation, out)
        chunk.mask_(out)
        if not in_place:
            place.copy_(out.view(place.shape))
    return grad


def _empty_gradient(logits: Tensor) -> Tensor:
    """Return uninitialised memory like the logits.

    On Linux a large one asks for huge pages: a volume that is written for the first time in pages of 4 KiB spends more
    time in the kernel than in the arithmetic (44 ms against 8 ms for 100 MB, two cores).
    """
    size = logits.numel() * logits.element_size()
    if logits.device.type != "cpu" or not logits.is_contiguous() or size < 2**24 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(logits)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=logits.dtype).view(logits.shape)


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _flattens(logits: Tensor, target: Tensor, distance: Tensor | None) -> bool:
    """Tell whether all volumes can be seen as rows of voxels without a copy."""
    return all(volume is None or volume.is_contiguous() for volume in (logits, target, distance))


def _chunks(
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    activation: str,
    ignore_index: int | None,
    check_labels: bool = False,
) -> Iterator[tuple[int, slice, Chunk]]:
    """Cut every sample into chunks: the sample, where the chunk lies on the third axis, and the chunk.

    Volumes that are not contiguous (channels-last logits, say) are cut along their first spatial axis instead, so that
    a chunk is copied, never a volume.
    """
    num_classes = logits.shape[1]
    if _flattens(logits, target, distance):
        logits, target = logits.flatten(2), target.flatten(2)
        distance = None if distance is None else distance.flatten(2)
    elements = CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    if logits.device.type == "cpu":
        elements = min(elements, max(MIN_CHUNK_ELEMENTS, logits.numel() // MIN_CHUNKS))
    length = max(1, elements // max(1, num_classes * math.prod(logits.shape[3:])))
    dtype = _accumulation_dtype(logits)
    is_index = target.shape[1] < num_classes
    scratch = Scratch(logits, dtype)
    classes = torch.arange(num_classes, dtype=dtype, device=logits.device).unsqueeze(1)
    for b in range(logits.shape[0]):
        for start in range(0, logits.shape[2], length):
            piece = slice(start, start + length)
            g = target[b, :, piece].flatten(1)
            kept = T.kept_voxels(g, activation, ignore_index)
            dropped = None if kept is None else ~kept
            x = _filled(logits[b, :, piece].flatten(1).to(dtype), dropped)
            phi = None if distance is None else distance[b, :, piece].flatten(1).to(dtype)
            if is_index:
                labels = index_labels(g[0], num_classes, dropped, check_labels)
                g = _one_hot(labels, classes, scratch("target", num_classes, labels.numel()))
            yield b, piece, Chunk(x, _filled(g.to(dtype), dropped), is_index, phi, dropped, scratch)


def _filled(values: Tensor, dropped: Tensor | None) -> Tensor:
    """Return the values with 0 where a voxel does not count, so that nothing that stands there can reach a sum."""
    return values if dropped is None else values.masked_fill(dropped, 0.0)


def index_labels(target: Tensor, num_classes: int, dropped: Tensor | None, check: bool) -> Tensor:
    """Return the labels, of any shape, ignored ones as 0; on a CPU, check that they are whole and within range.

    The check reads values, which would make a GPU wait, so there a label out of range counts as no class at all.
    """
    labels = target if dropped is None else target.masked_fill(dropped, 0)
    if not check or target.device.type != "cpu" or not labels.numel():
        return labels
    if labels.is_floating_point():
        broken = labels != labels.round()
        if broken.any():
            raise _checks.fail("target", "index labels must be whole numbers", labels[broken][0].item(), _INTERPOLATED)
    low, high = torch.aminmax(labels)
    if low < 0 or high >= num_classes:
        wrong = torch.unique(labels[(labels < 0) | (labels >= num_classes)]).tolist()
        rule = f"index labels must lie in 0..{num_classes - 1} (the input has {num_classes} channels)"
        raise _checks.fail("target", rule, wrong, _IGNORE)
    return labels


def _one_hot(labels: Tensor, classes: Tensor, out: Tensor) -> Tensor:
    """Write the one-hot encoding of ``[N]`` labels to ``out``, ``[C, N]``; ``classes`` are 0..C-1, ``[C, 1]``.

    From floats to floats a comparison on a CPU is six times faster than from integers, or to bools.
    """
    return torch.eq(labels.to(out.dtype), classes, out=out)


_INTERPOLATED = " Were labels resampled with an interpolation other than nearest?"
_IGNORE = " A label that should not count goes into ignore_index."
