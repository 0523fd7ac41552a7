# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""One table of problems, and every backend beside the definition: values, gradients, inputs left alone."""

from __future__ import annotations

import importlib

import pytest
import torch
from voxel_problems import TOLERANCE, cases, terms_of

from monai_losses_ext.sums import chunked, terms

BACKENDS = ["chunked", pytest.param("numba", marks=pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"))]  # fmt: skip


def module(name):
    return importlib.import_module(f"monai_losses_ext.sums.{name}")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr(chunked, "FEWEST_ELEMENTS", 200)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_computes_the_definition(backend, case):
    backend = module(backend)
    logits, target = case.problem()
    names = terms_of(case.activation)
    if backend is not chunked and not backend.supports(logits, target, names, case.activation):
        assert case.dtype == torch.float64
        return
    before = [v.clone() for v in (logits, target.label, target.distance)]
    slopes = torch.randn(len(names), *logits.shape[:2], dtype=torch.float64)
    sums = backend.forward(logits, target, names, case.activation)
    gradient = backend.backward(slopes.to(sums.dtype), logits, target, names, case.activation)
    expected, pull = torch.func.vjp(lambda x: terms.reference_sums(x, target, names, case.activation), logits.double())
    expected_gradient = pull(slopes)[0]
    assert sums.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[case.dtype]
    for name, mine, right in zip(names, sums.double(), expected, strict=True):
        scale = right.abs().max().clamp_min(1)
        assert (mine - right).abs().max() <= tolerance * scale, name
    assert gradient.dtype == logits.dtype and gradient.stride() == torch.empty_like(logits).stride()
    rounding = 0 if case.dtype == torch.float64 else torch.finfo(case.dtype).eps
    error = (gradient.double() - expected_gradient).norm()
    assert error <= max(tolerance, rounding) * expected_gradient.norm()
    assert not gradient[expected_gradient == 0].any() or case.activation != "none"
    again = backend.backward(65536 * slopes.to(sums.dtype), logits, target, names, case.activation)
    if case.dtype == torch.float32:  # exact: scaled by a power of two, as a gradient scaler does
        torch.testing.assert_close(again, 65536 * gradient, rtol=1e-5, atol=1e-2)
    for v, old in zip((logits, target.label, target.distance), before, strict=True):
        assert torch.equal(torch.nan_to_num(v), torch.nan_to_num(old))
