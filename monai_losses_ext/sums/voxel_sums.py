# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""``voxel_sums``: checks, the choice of a backend, and the operator that autograd and ``torch.compile`` see."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from monai_losses_ext import _fallback, errors
from monai_losses_ext.sums import chunked, terms

# auto: the fastest that the device has. reference: the definition itself, with volume-sized temporaries.
BACKENDS = ("auto", "chunked", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_MAX_CLASSES = 256
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def voxel_sums(
    input: Tensor,  # noqa: A002 - MONAI's name
    target: Tensor,
    terms_: Sequence[str],
    activation: str = "softmax",
    ignore_index: int | None = None,
    distance: Tensor | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Sum each term over the voxels of every sample and class, in one pass over the input.

    Args:
        input: logits (probabilities for activation ``none``), ``[B, C, *S]`` with 1 to 3 spatial axes, or ``[B, C]``;
            float16, bfloat16, float32 or float64.
        target: index labels ``[B, *S]`` or ``[B, 1, *S]`` (C > 1), or dense labels ``[B, C, *S]``, one-hot or soft; any
            dtype. For one channel, ``[B, *S]`` and ``[B, 1, *S]`` are the dense label.
        terms_: names from :mod:`monai_losses_ext.sums.terms`; the exponent of focal terms follows a colon.
        activation: ``softmax`` over the classes, ``sigmoid`` per class, or ``none``.
        ignore_index: label of the voxels that do not count; see :func:`terms.kept_voxels`.
        distance: signed distance map ``[B, C, *S]``, for the surface terms.
        backend: one of :data:`BACKENDS`. ``auto`` is ``triton`` on CUDA where it is installed and works, for up to 256
            classes and input other than float64; ``chunked`` otherwise.

    Returns:
        One ``[B, C]`` tensor per term, differentiable once with respect to ``input`` where it depends on it: float64
        for float64 input, float32 otherwise, whatever autocast says. The same input gives the same bits, on a CPU with
        as many threads.

    Raises:
        ValueError: for an unknown term or activation, a backend that is unknown or cannot do this, and (on a CPU) for
            index labels out of range and dense labels beyond 0 and 1.
        ShapeError: where input and target do not fit; it is also an ``AssertionError``.

    Example:
        >>> import torch
        >>> from monai_losses_ext.sums import voxel_sums
        >>> sums = voxel_sums(torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, 1]]), ["tp", "ref"])
        >>> sums["tp"].tolist(), sums["ref"].tolist()
        ([[0.5, 1.5]], [[1.0, 3.0]])
    """
    errors.one_of("backend", backend, BACKENDS)
    terms_ = list(terms_)
    terms.check(terms_, activation, distance is not None)
    input, target = checked(input, target)  # noqa: A001
    distance = None if distance is None else _checked_distance(input, distance)
    if input.ndim == 2:  # one voxel per sample
        input, target = input.unsqueeze(2), target.unsqueeze(2)  # noqa: A001
        distance = None if distance is None else distance.unsqueeze(2)
    if backend == "reference":
        voxel_inputs(input, target, activation, ignore_index)  # only to check the labels, as the other backend does
        sums = terms.reference_sums(input, target, distance, terms_, activation, ignore_index)
    else:
        backend = _resolved(backend, input)
        sums = _voxel_sums(input, target, distance, ",".join(terms_), activation, ignore_index, backend)
    values = zip(terms_, sums.unbind(0), strict=True)
    return {term: value.detach() if term in terms.CONSTANT_TERMS else value for term, value in values}


def voxel_inputs(
    input: Tensor,  # noqa: A002
    target: Tensor,
    activation: str,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a value per voxel is computed from; arguments and errors are those of :func:`voxel_sums`.

    Returns:
        Logits and dense labels, ``[B, C, *S]``, float64 for float64 input, float32 otherwise, and which voxels do not
        count, ``[B, 1, *S]`` bool or None. Logits and index labels are 0 there, whatever stood there.
    """
    input, target = checked(input, target)  # noqa: A001
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    kept = [terms.kept_voxels(sample, activation, ignore_index) for sample in target]
    masks = [mask for mask in kept if mask is not None]
    dropped = ~torch.stack(masks).unsqueeze(1) if masks else None
    if target.shape[1] < input.shape[1]:
        labels = chunked.index_labels(target, input.shape[1], dropped, check=True)
        target = terms.one_hot(labels[:, 0], input.shape[1], dtype).transpose(0, 1)
    else:
        chunked.check_dense(target if dropped is None else target.masked_fill(dropped, 0))
    logits = input.to(dtype)
    return logits if dropped is None else logits.masked_fill(dropped, 0.0), target.to(dtype), dropped


def checked(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Return input and target as plain tensors, the target with a channel axis; all but the labels' values is checked.

    Sums and maps over voxels have no affine, so a MetaTensor's is dropped.
    """
    check_input(input)
    if not isinstance(target, Tensor):
        raise errors.fail("target", "must be a tensor", type(target).__name__)
    input, target = _plain(input), _plain(target)  # noqa: A001
    target = with_channel_axis(input, target)
    if target.device != input.device:
        raise errors.fail("target", f"must be on the input's device, {input.device}", str(target.device))
    if target.requires_grad:
        raise errors.fail("target", "must not require a gradient (none is computed for it); detach it", "requires_grad")
    if target.is_complex():
        raise errors.fail("target", "must be real", target.dtype)
    # torch has no arithmetic for these
    return input, target.long() if target.dtype in (torch.uint16, torch.uint32, torch.uint64) else target


def check_input(input: Tensor) -> None:  # noqa: A002
    """Refuse what is no tensor of floating point numbers ``[B, C, *S]``."""
    if not isinstance(input, Tensor):
        raise errors.fail("input", "must be a tensor", type(input).__name__)
    if not input.is_floating_point():
        raise errors.fail("input", "must be floating point", input.dtype)
    if input.ndim < 2 or input.shape[1] == 0:
        raise errors.ShapeError(f"input: must be [B, C, *S] with at least one channel; got {list(input.shape)}.")


def _checked_distance(input: Tensor, distance: Tensor) -> Tensor:  # noqa: A002
    if distance.shape != input.shape:
        raise errors.ShapeError(
            f"distance: must have the input's shape {list(input.shape)}; got {list(distance.shape)}."
        )
    if distance.device != input.device:
        raise errors.fail("distance", f"must be on the input's device, {input.device}", str(distance.device))
    if distance.requires_grad:
        rule = "must not require a gradient (none is computed for it); detach it"
        raise errors.fail("distance", rule, "requires_grad")
    return _plain(distance)


def _plain(tensor: Tensor) -> Tensor:
    # torch.compile stops at as_subclass, so it is called only where there is something to do.
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def with_channel_axis(input: Tensor, target: Tensor) -> Tensor:  # noqa: A002
    """Return the target with a channel axis, ``[B, 1, *S]`` or ``[B, C, *S]``, as it is where it has one.

    Raises:
        ShapeError: where the target is neither an index map nor a dense target of this input.
    """
    if target.ndim == input.ndim - 1:
        target = target.unsqueeze(1)
    fits = target.ndim == input.ndim and target.shape[1] in (1, input.shape[1])
    if not fits or target.shape[0] != input.shape[0] or target.shape[2:] != input.shape[2:]:
        raise errors.ShapeError(
            f"target: must be [B, *S], [B, 1, *S] or [B, C, *S] of the input's shape {list(input.shape)}; "
            f"got {list(target.shape)}."
        )
    return target


def _resolved(backend: str, input: Tensor) -> str:  # noqa: A002
    """Return the backend for this input; what was asked for by name is that or an error."""
    fits = input.shape[1] <= TRITON_MAX_CLASSES and input.dtype in TRITON_DTYPES
    if backend == "auto":
        return "auto" if input.is_cuda and HAS_TRITON and fits else "chunked"
    if backend == "triton" and not HAS_TRITON:
        raise errors.fail("backend", "'triton' is not installed (pip install triton)", backend, " Take 'chunked'.")
    if backend == "triton" and not fits:
        got = f"{input.shape[1]} classes of {str(input.dtype).removeprefix('torch.')}"
        rule = f"'triton' takes up to {TRITON_MAX_CLASSES} classes of float16, bfloat16 or float32"
        raise errors.fail("backend", rule, got, " Take 'chunked'.")
    return backend


def _module(backend: str) -> ModuleType:
    if backend == "chunked" or (backend == "auto" and not _triton_works()):
        return chunked
    from monai_losses_ext.sums import triton  # only where it is installed

    return triton


@functools.cache
def _triton_works() -> bool:
    def attempt() -> None:
        logits, target = torch.zeros(1, 2, 1, device="cuda"), torch.zeros(1, 1, 1, dtype=torch.uint8, device="cuda")
        kernels = _module("triton")
        sums = kernels.forward(logits, target, None, ["pred"], "softmax", None)
        kernels.backward(sums, logits, target, None, ["pred"], "softmax", None)

    return _fallback.works("voxel_sums: Triton", attempt, "the slower backend 'chunked' is used.")


# A custom operator rather than an autograd.Function: torch.compile keeps it whole instead of tracing into it.
@torch.library.custom_op("monai_losses_ext::voxel_sums", mutates_args=())
def _voxel_sums(
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    term_list: str,
    activation: str,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        names = term_list.split(",")
        return _module(backend).forward(logits, target, distance, names, activation, ignore_index)


@torch.library.custom_op("monai_losses_ext::voxel_sums_backward", mutates_args=())
def _voxel_sums_backward(
    grad_sums: Tensor,
    logits: Tensor,
    target: Tensor,
    distance: Tensor | None,
    term_list: str,
    activation: str,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        names = term_list.split(",")
        return _module(backend).backward(grad_sums, logits, target, distance, names, activation, ignore_index)


@_voxel_sums.register_fake
def _(logits: Tensor, target: Tensor, distance: Tensor | None, term_list: str, *_: Any) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((term_list.count(",") + 1, *logits.shape[:2]), dtype=dtype)


@_voxel_sums_backward.register_fake
def _(grad_sums: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, distance, *ctx.options = inputs
    ctx.save_for_backward(logits, target, distance)


def _backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    grad = _voxel_sums_backward(grad_sums, *ctx.saved_tensors, *ctx.options)
    return grad, None, None, None, None, None, None


def _second_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("voxel_sums: differentiable once; the backend 'reference' is differentiable twice.")


_voxel_sums.register_autograd(_backward, setup_context=_save_for_backward)
_voxel_sums_backward.register_autograd(_second_backward)
