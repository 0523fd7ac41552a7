# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What concerns the Triton distance maps alone; ``test_signed.py`` has what they share with the other backends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from monai_losses_ext.distance import signed_distance

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def blobs(shape, num_classes=3):
    """Labels ``[B, 1, *S]``: a few voxels of other classes in a background."""
    labels = torch.randint(1, num_classes, shape)
    return labels.where(torch.rand(shape) < 0.01, 0)


@pytest.mark.parametrize("shape", [(1, 1, 70, 3, 34), (1, 1, 3, 130)])
def test_lines_longer_than_a_block_and_more_than_one_program_has(shape):
    labels, spacing = blobs(shape), [0.7, 3.0, 1.3][: len(shape) - 2]
    expected = signed_distance(labels, 3, spacing, backend="scipy")
    maps = signed_distance(labels.to(DEVICE), 3, spacing, backend="triton")
    assert torch.allclose(maps.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(maps, signed_distance(labels.to(DEVICE), 3, spacing, backend="triton"))


def test_labels_in_another_layout():
    labels = blobs((2, 1, 6, 7, 8))
    expected = signed_distance(labels, 3, backend="scipy")
    permuted = labels.transpose(2, 4).contiguous().transpose(2, 4).to(DEVICE)
    assert torch.allclose(signed_distance(permuted, 3, backend="triton").cpu(), expected, atol=1e-6)
    expanded = labels[:1].expand(2, 1, 6, 7, 8).to(DEVICE)
    assert torch.allclose(signed_distance(expanded, 3, backend="triton").cpu()[1], expected[0], atol=1e-6)


def test_a_label_that_is_no_whole_number_is_no_class():
    labels = torch.tensor([[[0.0, 0.5, 1.0, float("nan")]]], device=DEVICE)
    assert signed_distance(labels, 2, backend="triton")[0].tolist() == [[-1, 1, 2, 3], [2, 1, -1, 1]]


def test_compiles_for_a_gpu():
    script = Path(__file__).parents[1] / "compile_kernels.py"
    command = [sys.executable, "-W", "ignore", str(script), "distance"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]  # one an axis
    assert [(row["kernel"], row["stack"]) for row in kernels] == [("axis_kernel", 0)] * 6  # registers suffice


def test_on_a_cpu_without_the_interpreter_it_says_what_to_do():
    code = (
        "import torch; from monai_losses_ext.distance import signed_distance;"
        "signed_distance(torch.zeros(1, 1, 4), 2, backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "distance backend: 'triton' needs labels on a CUDA device" in run.stderr.splitlines()[-1]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_maps_never_wait_for_the_gpu():
    labels = blobs((2, 1, 32, 32, 32)).cuda()
    expected = signed_distance(labels, 3, [1.0, 0.8, 3.0])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        maps = signed_distance(labels, 3, [1.0, 0.8, 3.0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(maps, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_large_volumes_on_a_gpu():
    labels = blobs((2, 1, 128, 128, 128))
    expected = signed_distance(labels, 3, [[1.0, 1.0, 1.0], [0.8, 0.8, 3.0]], backend="scipy")
    maps = signed_distance(labels.cuda(), 3, [[1.0, 1.0, 1.0], [0.8, 0.8, 3.0]])
    assert maps.is_cuda and torch.allclose(maps.cpu(), expected, rtol=1e-6, atol=1e-5)
