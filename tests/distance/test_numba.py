# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What concerns the compiled distances alone: their cache, threads, and units far from a millimeter."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("numba")
from monai_losses_ext.distance import numba

CODE = """
import numpy as np
from monai_losses_ext.distance import numba
labels = np.zeros((3, 4), np.uint8); labels[0, 0] = 1
print(numba.distances(labels, (3.0, 4.0), False)[1, 1])
"""


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


def test_a_cache_that_is_torn_is_no_error(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run():
        command = [sys.executable, "-c", CODE]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)

    first = run()
    assert float(first.stdout) == 5 and "RuntimeWarning" not in first.stderr
    files = [path for path in tmp_path.rglob("*.nb*") if path.is_file()]
    assert files
    for path in files:  # as a killed process leaves them
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    torn = run()
    assert float(torn.stdout) == 5
    assert torn.stderr.count("RuntimeWarning: distance: the compiled CPU kernels cannot be kept or read") == 1


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
