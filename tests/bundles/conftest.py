# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Rendered bundles in a folder of their own, and a small dataset of awkward NIfTI cases."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_losses_ext.bundlekit import render

N_CASES = 6


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Undo what a run within this process leaves: the path of its scripts, its hook, its filters of the log."""
    path, hook, handlers = sys.path[:], sys.excepthook, [*logging.getLogger().handlers, logging.lastResort]
    filters = [handler.filters[:] for handler in handlers if handler]
    yield
    sys.path[:], sys.excepthook = path, hook
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]
    for handler, former in zip(filter(None, handlers), filters, strict=True):
        handler.filters[:] = former


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh rendering of the hippocampus bundle, so that nothing lands in the checkout."""
    out = tmp_path_factory.mktemp("rendered") / "bundles"
    render(out)
    return out / "msd_hippocampus_mri_segmentation"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return six cases in the Decathlon's layout: a bright ball in two halves, of odd shapes, oblique and flipped."""
    folder = tmp_path_factory.mktemp("Task04_Hippocampus")
    rng = np.random.default_rng(0)
    cases = []
    for i in range(N_CASES):
        shape = tuple(int(n) for n in rng.integers(17, 24, 3))
        grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij"))
        ball = np.linalg.norm(grid, axis=0) < 6
        label = (ball * (1 + (grid[1] > 0))).astype(np.uint8)
        image = (10.0**i * (5 + 4 * ball + rng.normal(size=shape))).astype(np.float32)
        signs = np.diag([-1.0, -1.0, 1.0]) if i % 2 else np.diag([1.0, 1.0, -1.0])
        affine = np.eye(4)
        affine[:3, :3] = signs + rng.normal(scale=0.05, size=(3, 3))
        affine[:3, 3] = rng.normal(scale=40, size=3)
        case = {"image": f"imagesTr/case_{i}.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"}
        for path, volume in ((case["image"], image), (case["label"], label)):
            (folder / path).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(volume, affine), folder / path)
        cases.append(case)
    (folder / "dataset.json").write_text(json.dumps({"name": "test", "training": cases}))
    return folder
