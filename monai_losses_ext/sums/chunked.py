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

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from monai_losses_ext import errors
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.chunk import (
    Chunk,
    Scratch,
    elementwise_gradient,
    elementwise_sums,
)
from monai_losses_ext.sums.softmax import softmax_gradient, softmax_sums

# Elements (voxels times classes) that a thread works on at a time; a GPU wants few launches instead.
TILE_ELEMENTS = 2**19
CHUNK_ELEMENTS_ELSEWHERE = 2**24
# A chunk has four buffers of its size, up to eight for focal on soft labels. On a CPU a small batch is cut finer, so
# that they stay small beside it, but not so fine that to call an operation takes longer than its arithmetic.
MIN_CHUNKS, MIN_CHUNK_ELEMENTS = 20, 2**18
THREAD_ELEMENTS = 2**15  # fewer are not worth a thread, to torch


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
    for samples, _, chunk in _chunks(logits, target, distance, activation, ignore_index, check_labels=True):
        is_softmax = activation == "softmax"
        values = softmax_sums(chunk, terms) if is_softmax else elementwise_sums(chunk, terms, activation)
        of_tiles = torch.stack([values[term] for term in terms])
        sums[:, samples] += of_tiles.unflatten(1, (samples.stop - samples.start, -1)).sum(2, dtype=torch.float64)
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
    grad = torch.empty_like(logits)
    flat_grad = grad.flatten(2) if _flattens(logits, target, distance) else grad
    grad_sums = grad_sums.to(_accumulation_dtype(logits))
    for samples, piece, chunk in _chunks(logits, target, distance, activation, ignore_index):
        grads = {term: grad_sums[i, samples].unsqueeze(2) for i, term in enumerate(terms)}  # term -> S C 1
        if activation == "softmax":
            values = softmax_gradient(chunk, grads)
        else:
            values = elementwise_gradient(chunk, grads, activation)
        place = flat_grad[samples, :, piece]
        values = chunk.mask_(values)
        if len(place) == len(values):
            place.copy_(values.reshape(place.shape))
        elif place.ndim == 3:
            _tiled(place, len(values)).copy_(values)
        else:
            place.copy_(values.movedim(0, 1).reshape(place.shape))
    return grad


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
) -> Iterator[tuple[slice, slice, Chunk]]:
    """Cut a batch into chunks: the samples, where the chunk lies on the third axis, and the chunk.

    A chunk is a part of one sample, or several samples whole.

    Volumes that are not contiguous (channels-last logits, say) are cut along their first spatial axis instead, so that
    a chunk is copied, never a volume.
    """
    num_classes = logits.shape[1]
    if _flattens(logits, target, distance):
        logits, target = logits.flatten(2), target.flatten(2)
        distance = None if distance is None else distance.flatten(2)
    num_samples, length, num_tiles = _chunk_size(logits)
    dtype = _accumulation_dtype(logits)
    is_index = target.shape[1] < num_classes
    scratch = Scratch(logits, dtype)
    classes = torch.arange(num_classes, dtype=dtype, device=logits.device).unsqueeze(1)

    def cast(name: str, values: Tensor, dropped: Tensor | None) -> Tensor:
        """Return tiles in the accumulation dtype, 0 where a voxel is dropped: nothing that stands there may count."""
        if values.dtype != dtype or dropped is not None:
            values = scratch(name, *values.shape).copy_(values)
        return values if dropped is None else values.masked_fill_(dropped, 0.0)

    for first in range(0, logits.shape[0], num_samples):
        samples = slice(first, min(first + num_samples, logits.shape[0]))
        for start in range(0, logits.shape[2], length):
            piece = slice(start, start + length)
            x, g = logits[samples, :, piece].flatten(2), target[samples, :, piece].flatten(2)
            tiles = num_tiles if len(x) == 1 and x.shape[2] % num_tiles == 0 else 1
            kept = [T.kept_voxels(sample, activation, ignore_index) for sample in g]
            masks = [mask for mask in kept if mask is not None]
            dropped = _tiled(~torch.stack(masks).unsqueeze(1), tiles) if masks else None
            x, g = _tiled(x, tiles), _tiled(g, tiles)
            phi = None if distance is None else _tiled(distance[samples, :, piece].flatten(2), tiles)
            if is_index:
                labels = index_labels(g, num_classes, dropped, check_labels)
                g = _one_hot(labels, classes, scratch("target", *x.shape))
            x, g = cast("logits", x, dropped), cast("target", g, dropped)
            if check_labels and not is_index:
                check_dense(g)
            phi = None if phi is None else cast("distance", phi, None)
            yield samples, piece, Chunk(x, g, is_index, phi, dropped, scratch)


def _chunk_size(logits: Tensor) -> tuple[int, int, int]:
    """Return the samples of a chunk, its length on the third axis, and the tiles of a sample in it.

    On a CPU a chunk has a tile for each thread, or whole samples. Torch splits the outermost axis
    among its threads, so whatever the operation, a thread meets the voxels that lie in its own core's cache. Without
    tiles it splits the classes of ``[C, N]`` in one operation and the voxels in the next, and the volume moves from
    core to core, which took up to three times as long on two virtual cores.
    """
    num_samples, num_classes, num_slices, *rest = logits.shape
    per_voxel = max(1, num_classes * math.prod(rest))
    is_cpu = logits.device.type == "cpu"
    num_tiles = torch.get_num_threads() if is_cpu else 1
    elements = CHUNK_ELEMENTS_ELSEWHERE
    if is_cpu:
        elements = min(num_tiles * TILE_ELEMENTS, max(MIN_CHUNK_ELEMENTS, logits.numel() // MIN_CHUNKS))
    sample = max(1, per_voxel * num_slices)
    together = round(elements / sample)  # rather half as large again than twice as many operations
    if together >= num_tiles:
        together -= together % num_tiles
    elif sample >= num_tiles * THREAD_ELEMENTS:
        together = 1  # a sample alone keeps all threads busy
    if min(together, num_samples) > 1:
        return min(together, num_samples), max(1, num_slices), num_tiles
    length = max(1, elements // per_voxel)
    if not rest and length > num_tiles:  # voxels, not slices, which would be many times a tile
        length -= length % num_tiles
    return 1, length, num_tiles


def _tiled(values: Tensor, tiles: int) -> Tensor:
    """View ``[S, C, N]`` as it is, or that of one sample as ``[tiles, C, N / tiles]``."""
    return values if tiles == 1 else values[0].unflatten(-1, (tiles, -1)).movedim(-2, 0)


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
            raise errors.fail("target", "index labels must be whole numbers", labels[broken][0].item(), _INTERPOLATED)
    low, high = torch.aminmax(labels)
    if low < 0 or high >= num_classes:
        wrong = torch.unique(labels[(labels < 0) | (labels >= num_classes)]).tolist()
        rule = f"index labels must lie in 0..{num_classes - 1} (the input has {num_classes} channels)"
        raise errors.fail("target", rule, wrong, _IGNORE)
    return labels


def check_dense(target: Tensor) -> None:
    """Refuse dense labels beyond 0 and 1, on a CPU; interpolation may overshoot by less than a half.

    While torch.compile traces there are no values, and to ask for them would break its graph.
    """
    if target.device.type != "cpu" or not target.numel() or target.dtype == torch.bool:
        return
    if torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(target)
    if not (low >= -0.5 and high <= 1.5):  # NaN is neither
        wrong = target[~((target >= -0.5) & (target <= 1.5))][0].item()
        raise errors.fail("target", "dense labels (a channel per class) must be 0, 1 or between", wrong, _RESCALE)


def _one_hot(labels: Tensor, classes: Tensor, out: Tensor) -> Tensor:
    """Write the one-hot encoding of ``[N]`` labels to ``out``, ``[C, N]``; ``classes`` are 0..C-1, ``[C, 1]``.

    From floats to floats a comparison on a CPU is six times faster than from integers, or to bools.
    """
    return torch.eq(labels.to(out.dtype), classes, out=out)


_INTERPOLATED = " Were labels resampled with an interpolation other than nearest?"
_RESCALE = " A mask of 0 and 255 is divided by 255; a label map needs an input with a channel per class."
_IGNORE = " A label that should not count goes into ignore_index."
