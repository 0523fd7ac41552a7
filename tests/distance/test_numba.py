# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What concerns the compiled distances alone: their cache, threads, and units far from a millimeter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("numba")
from monai_losses_ext.distance import numba


def volume():
    rng = np.random.default_rng(0)
    return ndimage.gaussian_filter(rng.standard_normal((30, 40, 35)), 3) > 0.02


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_any_unit(unit):
    mask, spacing = volume(), [2.5 * unit, 0.8 * unit, 0.7 * unit]
    expected = ndimage.distance_transform_edt(mask, sampling=spacing)
    np.testing.assert_allclose(numba.distances(mask.view(np.uint8), spacing, True), expected, rtol=1e-6)
    both = expected + ndimage.distance_transform_edt(~mask, sampling=spacing)
    np.testing.assert_allclose(numba.distances(mask.astype(np.int32), spacing, False), both, rtol=1e-6)


def test_several_threads_at_once():
    mask = volume().view(np.uint8)
    expected = numba.distances(mask, (1, 2, 3), True)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: numba.distances(mask, (1, 2, 3), True), range(8)):
            assert np.array_equal(found, expected)


def test_no_place_for_a_cache_is_no_error(monkeypatch):
    build = numba._build

    def without_a_place(dtype, cache):
        if cache:
            raise RuntimeError("cannot cache function 'along_rows': no locator available for file")
        return build(dtype, cache=True)

    monkeypatch.setattr(numba, "_build", without_a_place)
    numba._compiled.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"^distance: the compiled CPU kernels cannot be kept or read \(cannot ca"):
        numba._kernels(np.dtype(np.uint8))
    numba._compiled.cache_clear()
