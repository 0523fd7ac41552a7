# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""A kernel is chosen where it was seen to give the right numbers: a compiler may fail, or not mean what it was told."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from monai_losses_ext.sums import pool
from monai_losses_ext.sums import terms as T  # noqa: N812
from monai_losses_ext.sums.target import Target

TOLERANCE = 1e-4
_LOCK = threading.RLock()


def proven(backend: ModuleType | str, device: str) -> bool:
    """Tell whether a backend computes every kind of term as the definition does; where it does not, warn once.

    The first call of a process compiles the kernels or reads them from their cache; threads that come at the same time
    wait for it.

    Args:
        backend: a module with ``forward`` and ``backward``, or its name in this folder.
        device: type of the device, such as ``cuda``.
    """
    with _LOCK:
        return _proven(backend, device)


@functools.cache
def _proven(backend: ModuleType | str, device: str) -> bool:
    name = backend if isinstance(backend, str) else backend.__name__.rpartition(".")[2]
    try:
        # What is installed may be broken, or not fit the other packages.
        module = importlib.import_module(f"{__package__}.{name}") if isinstance(backend, str) else backend
        wrong = pool.apart(lambda: _first_difference(module, device))
        reason = f"it gives other numbers than the definition for {wrong}" if wrong else None
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        # Compilers say where, quote the source, and say what last.
        reason = f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") else lines[0]
    if reason is not None:
        message = f"voxel_sums: {name} does not work here ({reason}); the slower backend 'chunked' is used."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return reason is None


def _first_difference(backend: ModuleType, device: str) -> str | None:
    return next((wrong for wrong in (_difference(backend, device, a) for a in T.ACTIVATIONS) if wrong), None)


def _difference(backend: ModuleType, device: str, activation: str) -> str | None:
    """Return what a backend computes otherwise than the definition, in words, or None."""
    logits, target, terms = _problem(device, activation)
    terms = tuple(term for term in terms if T.split(term)[0] in getattr(backend, "TERMS", T.split(term)))
    num_rows = [T.rows(term, target.num_regions) for term in terms]
    slopes = torch.linspace(-1, 2, sum(num_rows) * 6, device=device).reshape(-1, 2, 3)
    leaf = logits.clone()
    with torch.autocast(device, enabled=False), torch.inference_mode(False):
        expected, pull = torch.func.vjp(lambda x: T.reference_sums(x, target, terms, activation), leaf)  # type: ignore[misc]
        sums = backend.forward(logits, target, terms, activation)
        gradient = backend.backward(slopes, logits, target, terms, activation)
        for term, mine, right in zip(terms, sums.split(num_rows), expected.split(num_rows), strict=True):
            if not torch.allclose(mine, right, rtol=TOLERANCE, atol=TOLERANCE):
                return f"{term} of {activation}"
        if not torch.allclose(gradient, pull(slopes)[0], rtol=TOLERANCE, atol=TOLERANCE):
            return f"the gradient of {activation}"
    return None


def _problem(device: str, activation: str) -> tuple[Tensor, Target, tuple[str, ...]]:
    """Return a small problem of every term: index labels for softmax, soft ones for the others; ignored voxels."""
    shape = (2, 3, 5, 31)
    count = torch.arange(2 * 3 * 5 * 31, device=device).reshape(shape)
    values = ((count * 37 % 101).float() / 25 - 2).to(device)
    label = count[:, :1] * 11 % 4  # 3 is ignored
    target = Target(
        label,
        True,
        weight=(count[:, :1] * 29 % 7).float() / 3,  # a seventh of the voxels does not count
        distance=(count * 53 % 97).float() / 20 - 2,
        ignored=(3,),
        regions=count[:, 1:] * 7 % 4,
        skeleton=label * (count[:, :1] % 2),
        num_regions=3,
    )
    terms = (*T.PLAIN_TERMS, *T.REGION_TERMS, *(f"{name}:{gamma}" for name in T.FOCAL_TERMS for gamma in (0.5, 2.0)))
    terms = (*terms, T.bins(3))
    if activation != "sigmoid":
        terms = tuple(term for term in terms if T.split(term)[0] not in T.SIGMOID_TERMS)
    if activation == "none":
        terms = tuple(term for term in terms if T.split(term)[0] not in T.LOG_TERMS)
    if activation == "softmax":
        return values, target, terms
    soft = (count * 17 % 23).float() / 22
    return values, replace(target, label=soft, is_index=False, ignored=(), mask=label != 3), terms
