# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels of ``sums`` or ``distance`` for a GPU, down to its machine code, where there is none.

The interpreter accepts Python that the compiler refuses. So the package's own functions are called with tensors that
say they are on CUDA and hold nothing, and each kernel is compiled with the arguments that it gets, but not started.
Prints the name of each compiled kernel and the bytes of stack that spilled registers take.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
PLAIN = ["tp", "pred", "pred_sq", "ref", "ref_sq", "abs_diff", "count", "surface", "surface_min"]
# terms, activation, classes, logits, target (its dtype, and whether it is dense), ignored label, channels last
SUMS = [
    (["tp", "pred", "ref", "ce", "focal:2.0", "surface"], "softmax", 14, torch.float32, torch.uint8, False, 255, False),
    (["tp", "pred", "ref", "ce"], "softmax", 118, torch.bfloat16, torch.int64, False, None, True),
    ([*PLAIN, "ce", "logp", "focal:0.5", "focal:0.0"], "softmax", 3, torch.float16, torch.float32, True, 255, False),
    (["tp", "ce", "ce_neg", "focal:2.0", "focal_neg:2.0"], "sigmoid", 3, torch.float16, torch.bool, True, 255, True),
    (["logp", "focal:1.5", "focal_neg:3.0"], "sigmoid", 1, torch.float32, torch.float16, True, 255, False),
    (PLAIN, "none", 256, torch.float32, torch.float64, False, 1, False),
    (["pred_sq", "ref"], "none", 4, torch.float32, torch.int16, True, 0, False),
]
# Samples and space. A number that is 1 is compiled in: one voxel, as the first trial on a machine has, and one block.
SHAPES = [(2, 32, 30, 28), (1, 1, 1, 1), (1, 5, 4, 3)]
# spatial shape, classes, labels, whether they are masks
DISTANCE = [((128, 128, 64), 3, torch.uint8, False), ((500, 37), 2, torch.float64, True), ((9,), 2, torch.int64, False)]


def compile_sums():
    from monai_losses_ext.sums import triton as backend

    problems = [(SHAPES[0], case) for case in SUMS] + [(SHAPES[1], SUMS[0]), (SHAPES[2], SUMS[3])]
    for (batch, *space), case in problems:
        terms, activation, num_classes, dtype, target_dtype, is_dense, ignore, channels_last = case
        x = torch.empty(batch, num_classes, *space, dtype=dtype, device="cuda")
        x = x.to(memory_format=torch.channels_last_3d) if channels_last else x
        target = torch.empty(batch, num_classes if is_dense else 1, *space, dtype=target_dtype, device="cuda")
        distance = torch.empty_like(x, dtype=torch.float32) if "surface" in terms else None
        sums = backend.forward(x, target, distance, terms, activation, ignore)
        gradient = backend.backward(sums, x, target, distance, terms, activation, ignore)
        assert sums.shape == (len(terms), batch, num_classes) and gradient.stride() == x.stride()


def compile_distance():
    from monai_losses_ext.distance import triton as backend

    for shape, num_classes, dtype, is_dense in DISTANCE:
        target = torch.empty(2, num_classes if is_dense else 1, *shape, dtype=dtype, device="cuda")
        backend.signed_maps(target, None if is_dense else num_classes, [[0.7] * len(shape)] * 2, [9.0] * 2, 0.0, 1)


def stack_bytes(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [BINARIES / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def compile_only(run):
    def compiled(kernel, *args, grid, warmup, **kwargs):
        args = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        result = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        print(kernel.fn.__name__, stack_bytes(result), flush=True)
        return result

    return compiled


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    JITFunction.run = compile_only(JITFunction.run)
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        {"sums": compile_sums, "distance": compile_distance}[sys.argv[1]]()
