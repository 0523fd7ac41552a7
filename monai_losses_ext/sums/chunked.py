# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The definition, chunk of voxels by chunk of voxels, recomputed for the gradient: any device, dtype and term."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from monai_losses_ext.sums import pool
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import Target

# Elements (voxels times classes) of a chunk; a GPU wants few launches instead. A small batch is cut finer, so that the
# temporaries of a chunk stay small beside it.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_ELSEWHERE = 2**18, 2**24
CHUNKS, FEWEST_ELEMENTS = 20, 2**17
Part = tuple[tuple[slice, ...], Tensor, Target]


def forward(logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the sums; arguments and result as in :func:`terms.reference_sums`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    home = "cpu" if logits.device.type == "mps" else logits.device  # which has no float64
    num_rows = sum(T.rows(term, target.num_regions) for term in terms)
    total = torch.zeros(num_rows, *logits.shape[:2], dtype=torch.float64, device=home)
    parts = list(_parts(logits, target))
    sums = logits.new_zeros(len(parts), num_rows, logits.shape[1], dtype=dtype)

    def work(i: int) -> None:
        _, x, part = parts[i]
        part.check_values(logits.shape[1])
        sums[i] = T.definition(x, part, terms, activation)[:, 0]

    _share(work, len(parts), logits)
    for (place, *_), value in zip(parts, sums.to(home), strict=True):  # in this order, whoever computed them
        total[:, place[0]] += value.unsqueeze(1)
    return total.to(dtype).to(logits.device)


def backward(grad_sums: Tensor, logits: Tensor, target: Target, terms: Sequence[str], activation: str) -> Tensor:
    """Compute the gradient with respect to the logits, in their dtype and layout; ``grad_sums`` is ``[T, B, C]``."""
    gradient = torch.empty_like(logits)
    parts = list(_parts(logits, target))

    def work(i: int) -> None:
        place, x, part = parts[i]
        with torch.enable_grad():
            leaf = x.detach().contiguous().requires_grad_()
            sums = T.definition(leaf, part, terms, activation)
        if sums.requires_grad:
            (gradient[place],) = torch.autograd.grad(sums, leaf, grad_sums[:, place[0]])
        else:  # of none of the terms
            gradient[place] = 0

    _share(work, len(parts), logits)
    return gradient


def _parts(logits: Tensor, target: Target) -> Iterator[Part]:
    """Cut a batch along its samples and its longest spatial axis: where a part lies, its logits and its target."""
    length = max(logits.shape[2:])
    axis = 2 + list(logits.shape[2:]).index(length)
    on_cpu = logits.device.type == "cpu"
    most = max(FEWEST_ELEMENTS, min(CHUNK_ELEMENTS, logits.numel() // CHUNKS)) if on_cpu else CHUNK_ELEMENTS_ELSEWHERE
    step = max(1, most * length // max(1, logits[:1].numel()))
    for b in range(logits.shape[0]):
        for start in range(0, length, step):
            place = (slice(b, b + 1), *[slice(None)] * (axis - 1), slice(start, start + step))
            yield place, logits[place], target.part(place)


def _share(work: Callable[[int], None], count: int, logits: Tensor) -> None:
    """Call ``work`` for each number below ``count``: on a CPU by threads, in each of which torch keeps to one."""
    numbers = iter(range(count))  # next() is by one thread at a time

    inference = torch.is_inference_mode_enabled()  # a thread of its own does not know

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for i in numbers:
                work(i)

    threads = torch.get_num_threads()
    limit = _limit_of_this_thread() if logits.device.type == "cpu" and threads > 1 and count > 1 else None
    if logits.device.type != "cpu":
        take()
        return
    if limit is None:
        pool.apart(take)  # within an operator autograd records nothing
        return

    def take_alone() -> None:
        before = torch.get_num_threads()  # also lets torch set its own in a new thread, once
        limit(1)
        try:
            take()
        finally:
            limit(before)

    pool.apart(lambda: pool.spread(take_alone, min(threads, count)))


@functools.cache
def _limit_of_this_thread() -> Callable[[int], None] | None:
    """Return what sets torch's threads for the calling thread alone; None where there is no such thing.

    ``torch.set_num_threads`` leaks into threads that start later. OpenMP's own function does not, where torch uses
    OpenMP and lets others find it.
    """
    try:
        limit: Callable[[int], None] = ctypes.CDLL(None).omp_set_num_threads
    except (OSError, AttributeError, TypeError):
        return None
    before = torch.get_num_threads()
    try:
        limit(1)
        return limit if torch.get_num_threads() == 1 else None
    finally:
        limit(before)
