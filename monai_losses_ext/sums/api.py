# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend, and the operator that autograd and ``torch.compile`` see."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from monai_losses_ext.errors import fail, one_of
from monai_losses_ext.extras import is_installed
from monai_losses_ext.sums import chunked, proof, terms
from monai_losses_ext.sums.target import IgnoreIndex, Target, plain

# auto: the fastest that the device has. reference: the definition itself, with volume-sized temporaries.
BACKENDS = ("auto", "chunked", "numba", "triton", "reference")
HAS_NUMBA = is_installed("numba")
HAS_TRITON = is_installed("triton")
TRITON_MAX_CLASSES = 256
NUM_VOLUMES = 8  # that the operator is handed, the logits first
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def voxel_sums(
    input: Tensor,  # noqa: A002 - MONAI's name
    target: Tensor | Mapping[str, Any] | Target,
    terms_: Sequence[str],
    activation: str = "softmax",
    ignore_index: IgnoreIndex = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Sum each term over the voxels of every sample and class, in one pass over the input.

    Args:
        input: logits (probabilities for activation ``none``), ``[B, C, *S]`` with 1 to 3 spatial axes, or ``[B, C]``;
            float16, bfloat16, float32 or float64.
        target: index labels ``[B, *S]`` or ``[B, 1, *S]`` (C > 1), or dense labels ``[B, C, *S]``, one-hot or soft; any
            dtype. For one channel, ``[B, *S]`` and ``[B, 1, *S]`` are the dense label. Or a dictionary with such a
            ``label`` and what belongs to it: a ``distance`` map, a ``weight`` per voxel, ``regions``, a ``skeleton``,
            ``annotated`` classes; see :class:`Target`.
        terms_: names from :mod:`monai_losses_ext.sums.terms`; the exponent of focal terms follows a colon.
        activation: ``softmax`` over the classes, ``sigmoid`` per class, or ``none``.
        ignore_index: one label or several whose voxels do not count; see :meth:`Target.ignoring`.
        backend: one of :data:`BACKENDS`. ``auto`` is ``triton`` on CUDA, for up to 256 classes, and ``numba`` on a CPU,
            where they are installed and give the right numbers and the input is not float64; ``chunked`` otherwise.

    Returns:
        One ``[B, C]`` tensor per term, ``[B, C, R + 1]`` for a term of regions, ``[3, B, C, N]`` for ``bins:N``;
        differentiable once with respect to ``input`` where it depends on it: float64 for float64 input, float32
        otherwise, whatever autocast says. The same input gives the same bits.

    Raises:
        UserError: for an unknown term or activation, a backend that is unknown or cannot do this, and (on a CPU) for
            index labels out of range and dense labels beyond 0 and 1.
        ShapeError: where input and target do not fit; it is also an ``AssertionError``.

    Example:
        >>> import torch
        >>> from monai_losses_ext.sums import voxel_sums
        >>> sums = voxel_sums(torch.zeros(1, 2, 4), torch.tensor([[0, 1, 1, 1]]), ["tp", "ref"])
        >>> sums["tp"].tolist(), sums["ref"].tolist()
        ([[0.5, 1.5]], [[1.0, 3.0]])
    """
    one_of("backend", backend, BACKENDS)
    target = target if isinstance(target, Target) else Target.parse(target, input)
    terms_ = tuple(dict.fromkeys(terms_))
    terms.check(terms_, activation, target)
    target = target.ignoring(ignore_index, activation).folded(activation)
    sums = compute(input, target, terms_, activation, backend)
    values = zip(terms_, sums.split([terms.rows(term, target.num_regions) for term in terms_]), strict=True)
    return {term: _as_named(term, value) for term, value in values}


def _as_named(term: str, value: Tensor) -> Tensor:
    """Return the rows of a term in the shape that a user gets."""
    name, number = terms.split(term)
    value = value.detach() if name in terms.CONSTANT_TERMS else value
    if name in terms.REGION_TERMS:
        return value.permute(1, 2, 0)
    return value.unflatten(0, (3, int(number))).permute(0, 2, 3, 1) if name == terms.BINS else value[0]


def compute(input: Tensor, target: Target, terms_: tuple[str, ...], activation: str, backend: str = "auto") -> Tensor:  # noqa: A002
    """Return the sums of checked arguments as one tensor, ``[T, B, C]`` in the order of the terms."""
    logits = input if type(input) is Tensor else plain(input)
    if logits.ndim == 2:  # one voxel per sample
        logits, target = logits.unsqueeze(2), target.part((..., None))
    if backend == "reference":
        return terms.reference_sums(logits, target, terms_, activation)
    return _voxel_sums(
        logits,
        target.label,
        target.weight,
        target.distance if not terms.SURFACE_TERMS.isdisjoint(terms_) else None,
        target.mask,
        target.annotated,
        target.regions if any(term in terms.REGION_TERMS for term in terms_) else None,
        target.skeleton if not terms.SKELETON_TERMS.isdisjoint(terms_) else None,
        target.ignored,
        target.is_index,
        target.num_regions,
        ",".join(terms_),
        activation,
        _resolved(backend, logits),
    )


def _resolved(backend: str, logits: Tensor) -> str:
    """Return the backend for this input; what was asked for by name is that or an error."""
    if backend not in BACKENDS:
        one_of("backend", backend, BACKENDS)
    on_cpu, few = logits.device.type == "cpu", logits.shape[1] <= TRITON_MAX_CLASSES
    if backend == "auto":
        has_kernels = HAS_NUMBA if on_cpu else HAS_TRITON and logits.is_cuda and few
        return "auto" if has_kernels and logits.dtype in KERNEL_DTYPES else "chunked"
    installed = {"numba": HAS_NUMBA, "triton": HAS_TRITON}.get(backend, True)
    if not installed:
        raise fail("backend", f"{backend!r} is not installed (pip install {backend})", backend, " Take 'chunked'.")
    fits = logits.dtype in KERNEL_DTYPES and (on_cpu if backend == "numba" else few)
    if backend in ("numba", "triton") and not fits:
        got = f"{logits.shape[1]} classes of {str(logits.dtype).removeprefix('torch.')} on {logits.device.type}"
        limits = "on a CPU" if backend == "numba" else f"of up to {TRITON_MAX_CLASSES} classes"
        rule = f"{backend!r} takes float16, bfloat16 or float32 {limits}"
        raise fail("backend", rule, got, " Take 'chunked'.")
    return backend


def _module(backend: str, logits: Tensor, target: Target, terms_: list[str], activation: str) -> ModuleType:
    """Return the backend that computes this: where ``auto`` may choose, kernels that were seen to be right."""
    name = ("numba" if logits.device.type == "cpu" else "triton") if backend == "auto" else backend
    if name == "chunked":
        return chunked
    if backend == "auto" and not proof.proven(name, logits.device.type):
        return chunked
    module = importlib.import_module(f"monai_losses_ext.sums.{name}")  # only where it is installed
    supports = getattr(module, "supports", None)
    if supports is None or supports(logits, target, terms_, activation):
        return module
    if backend == "auto":
        return chunked
    rule = f"{backend!r} must know the terms, the types of all volumes, and labels of up to 2^24"
    raise fail("backend", rule, ",".join(terms_), " Take 'chunked'.")


# A custom operator rather than an autograd.Function: torch.compile keeps it whole instead of tracing into it.
@torch.library.custom_op("monai_losses_ext::voxel_sums", mutates_args=())
def _voxel_sums(
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
    distance: Tensor | None,
    mask: Tensor | None,
    annotated: Tensor | None,
    regions: Tensor | None,
    skeleton: Tensor | None,
    ignored: Sequence[int],
    is_index: bool,
    num_regions: int,
    term_list: str,
    activation: str,
    backend: str,
) -> Tensor:
    maps = annotated, regions, skeleton, num_regions
    target = Target(label, is_index, None, weight, distance, tuple(ignored), mask, True, *maps)
    with torch.autocast(logits.device.type, enabled=False):
        names = term_list.split(",")
        return _module(backend, logits, target, names, activation).forward(logits, target, names, activation)


@torch.library.custom_op("monai_losses_ext::voxel_sums_backward", mutates_args=())
def _voxel_sums_backward(
    grad_sums: Tensor,
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None,
    distance: Tensor | None,
    mask: Tensor | None,
    annotated: Tensor | None,
    regions: Tensor | None,
    skeleton: Tensor | None,
    ignored: Sequence[int],
    is_index: bool,
    num_regions: int,
    term_list: str,
    activation: str,
    backend: str,
) -> Tensor:
    maps = annotated, regions, skeleton, num_regions
    target = Target(label, is_index, None, weight, distance, tuple(ignored), mask, True, *maps)
    with torch.autocast(logits.device.type, enabled=False):
        names = term_list.split(",")
        module = _module(backend, logits, target, names, activation)
        return module.backward(grad_sums, logits, target, names, activation)


@_voxel_sums.register_fake
def _(logits: Tensor, *inputs: Any) -> Tensor:
    num_regions, term_list, *_ = inputs[-4:]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_rows = sum(terms.rows(term, num_regions) for term in term_list.split(","))
    return logits.new_empty((num_rows, *logits.shape[:2]), dtype=dtype)


@_voxel_sums_backward.register_fake
def _(grad_sums: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:NUM_VOLUMES])
    ctx.options = inputs[NUM_VOLUMES:]


def _backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    grad = _voxel_sums_backward(grad_sums, *ctx.saved_tensors, *ctx.options)
    return grad, *[None] * (NUM_VOLUMES - 1 + len(ctx.options))


def _second_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("voxel_sums: differentiable once; the backend 'reference' is differentiable twice.")


_voxel_sums.register_autograd(_backward, setup_context=_save_for_backward)
_voxel_sums_backward.register_autograd(_second_backward)
