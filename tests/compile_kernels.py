# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU, down to its machine code, where there is none.

The argument says which: ``sums``, ``steps`` (Dice + cross-entropy in the shapes that
matter, and many terms in those that need most registers) or ``distance``.

The interpreter accepts Python that the compiler refuses. So the package's own functions are called with tensors that
say they are on CUDA and hold nothing, and each kernel is compiled with the arguments that it gets, but not started.
Prints a line of JSON for each: the kernel, its classes, its registers and bytes of stack (spilled registers), and the
instructions and the exchanges between threads that a logit takes, in the kernel's loop where it has one.
"""

from __future__ import annotations

import contextlib
import json
import re
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
DICE_CE = ["tp", "pred", "ref", "ce"]
MANY = [*DICE_CE, "focal:2.0", "surface", "surface_min", "count"]
STEPS = [
    (DICE_CE, "softmax", *case)
    for case in (
        (3, torch.float32, torch.int64, False, None, False),
        (14, torch.float32, torch.int64, False, None, False),
        (14, torch.float32, torch.uint8, False, 255, False),
        (14, torch.bfloat16, torch.int64, False, None, True),
        (118, torch.float32, torch.int64, False, None, False),
    )
]
# Samples and space. A number that is 1 is compiled in: one voxel, as the first trial on a machine has.
SHAPES = [(2, 32, 30, 28), (1, 1, 1, 1), (1, 5, 4, 3)]
ODD = (2, 97, 95, 99)  # no row of voxels begins where a read of several of them may
# spatial shape, classes, labels, whether they are masks
DISTANCE = [((128, 128, 64), 3, torch.uint8, False), ((500, 37), 2, torch.float64, True), ((9,), 2, torch.int64, False)]


def compile_sums(problems):
    from monai_losses_ext.sums import triton as backend
    from monai_losses_ext.sums.target import Target

    for (batch, *space), case in problems:
        terms, activation, num_classes, dtype, target_dtype, is_dense, ignore, channels_last = case
        x = torch.empty(batch, num_classes, *space, dtype=dtype, device="cuda")
        x = x.to(memory_format=torch.channels_last_3d) if channels_last else x
        target = torch.empty(batch, num_classes if is_dense else 1, *space, dtype=target_dtype, device="cuda")
        distance = torch.empty_like(x, dtype=torch.float32) if "surface" in terms else None
        ignored, mask = () if ignore is None else (ignore,), None
        if is_dense and ignored:
            channels = num_classes if activation == "sigmoid" else 1
            ignored, mask = (), torch.empty(batch, channels, *space, dtype=torch.bool, device="cuda")
        weight = torch.empty(batch, 1, *space, dtype=dtype, device="cuda") if "focal:2.0" in terms else None
        target = Target(target, not is_dense, None, weight, distance, ignored, mask)
        sums = backend.forward(x, target, terms, activation)
        gradient = backend.backward(sums, x, target, terms, activation)
        assert sums.shape == (len(terms), batch, num_classes) and gradient.stride() == x.stride()


def compile_distance():
    from monai_losses_ext.distance import triton as backend

    for shape, num_classes, dtype, is_dense in DISTANCE:
        target = torch.empty(2, num_classes if is_dense else 1, *shape, dtype=dtype, device="cuda")
        backend.signed_maps(target, None if is_dense else num_classes, [[0.7] * len(shape)] * 2, [9.0] * 2, 0.0, 1)


def machine_code(kernel):
    """Return the registers and the bytes of stack, and the instructions by name, of the loop where there is one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [BINARIES / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    usage = [int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")]
    # address, instruction without what it depends on, its operands
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z]\w*)\S*(.*)", text)
    code = [(int(address, 16), name, operands) for address, name, operands in found if name != "NOP"]
    jumps = [(int(re.search(r"0x(\w+)", rest)[1], 16), address) for address, name, rest in code if name == "BRA"]
    first, last = max(((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0], default=(0, 1e9))
    return (*usage, [name for address, name, _ in code if first <= address <= last])


def compile_only(run):
    def compiled(kernel, *args, grid, warmup, **options):
        args = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        registers, stack, code = machine_code(run(kernel, *args, grid=grid, warmup=True, **options))
        row = {"kernel": kernel.fn.__name__, "registers": registers, "stack": stack}
        if "NUM_CLASSES" in options:
            per_logit = 32 * options["num_warps"] / (options["NUM_CLASSES"] * options["BLOCK"])
            row |= {"classes": options["NUM_CLASSES"], "instructions": len(code) * per_logit}
            row |= {"exchanges": sum(name in ("SHFL", "STS", "BAR") for name in code) * per_logit}
        print(json.dumps(row), flush=True)

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
        if sys.argv[1] == "sums":
            compile_sums([(SHAPES[0], case) for case in SUMS] + [(SHAPES[1], SUMS[0]), (SHAPES[2], SUMS[3])])
        elif sys.argv[1] == "steps":
            many = [(SHAPES[0], (MANY, "softmax", n, torch.float32, torch.int64, False, None, True)) for n in (14, 118)]
            many += [(ODD, (*case[:-1], False)) for _, case in many]
            compile_sums([*((SHAPES[0], case) for case in STEPS), (ODD, STEPS[1]), *many])
        else:
            compile_distance()
