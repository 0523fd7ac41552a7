# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the definition: on a GPU where there is one, in Triton's interpreter otherwise."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from voxel_problems import problem, terms_of, value_and_gradient

from monai_losses_ext import _fallback
from monai_losses_ext.sums import voxel_sums

triton = pytest.importorskip("triton")
from monai_losses_ext.sums.triton import launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for rows beyond the last class
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
CASES = [
    case
    for case in product(("softmax", "sigmoid", "none"), ("index", "one_hot", "soft"), (None, 1, 255), (1, 3))
    if case[3] > 1 or (case[1] != "index" and case[0] != "softmax")
]


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several programs for a small volume, each of several tiles but the last, whose tile has voxels to spare."""
    monkeypatch.setattr(launch, "tile", lambda c_pad: (16, 2, 1))
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    monkeypatch.setattr(launch, "MOST_TILES", 3)


def agree(x, target, phi, activation, ignore, rounding=1e-5):
    """Compare sums and gradient with the definition in float64."""
    x, target, phi = (None if tensor is None else tensor.to(DEVICE) for tensor in (x, target, phi))
    sums, gradient = value_and_gradient(x, target, phi, activation, ignore, "triton")
    expected, expected_gradient = value_and_gradient(x.double(), target, phi, activation, ignore, "reference")
    for term, value in sums.items():
        torch.testing.assert_close(value.double(), expected[term], rtol=5e-6, atol=5e-6, msg=lambda m, t=term: t + m)
    assert gradient.dtype == x.dtype and gradient.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=rounding)
    return sums, gradient


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(("activation", "kind", "ignore", "num_classes"), CASES)
def test_kernels_equal_the_definition(activation, kind, ignore, num_classes):
    agree(*problem(activation, kind, ignore, num_classes, (3, 4, 5), torch.float32), activation, ignore)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype, activation):
    agree(*problem(activation, "index", None, 5, (6, 7), dtype), activation, None, torch.finfo(dtype).eps)


@pytest.mark.parametrize("num_classes", [2, 118, 129, 256])
def test_up_to_256_classes_in_one_tile(num_classes):
    agree(*problem("softmax", "index", None, num_classes, (5, 7), torch.float32), "softmax", None)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_mark_in_a_dense_target_leaves_a_voxel_out(activation):
    x, target, phi = problem(activation, "soft", None, 3, (6, 9), torch.float32)
    target[:, 1, 2] = 255  # in one channel
    target[:, :, 4] = 0  # no class: left out by softmax alone
    sums, gradient = agree(x, target, phi, activation, 255)
    assert sums["count"].unique().item() == (36 if activation == "softmax" else 45)
    assert not gradient[:, :, 2].any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint16, torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("dense", [False, True])
def test_target_dtypes(dtype, dense):
    x = torch.randn(1, 2, 50, device=DEVICE)
    labels = torch.randint(0, 2, (1, 50), device=DEVICE)
    target = (torch.stack([labels == c for c in range(2)], 1) if dense else labels).to(dtype)
    sums = voxel_sums(x, target, ["tp", "ref", "ce"], backend="triton")
    for term, expected in voxel_sums(x, labels, ["tp", "ref", "ce"], backend="reference").items():
        torch.testing.assert_close(sums[term], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("label", [-1, 3, 300, 0.5, math.nan])
def test_a_label_that_is_none_is_no_class(label):
    x = torch.randn(1, 3, 50, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 3, (1, 50), device=DEVICE)
    one_hot = torch.stack([labels == c for c in range(3)], 1)
    one_hot[..., :20] = False
    labels = labels.float() if isinstance(label, float) else labels
    labels[:, :20] = label
    terms = ["tp", "pred", "ref", "ce", "focal:2.0", "count"]
    sums = [voxel_sums(x, target, terms, backend="triton") for target in (labels, one_hot)]
    gradients = [torch.autograd.grad(sum(value.sum() for value in each.values()), x)[0] for each in sums]
    for term in terms:
        torch.testing.assert_close(sums[0][term], sums[1][term])
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize(("activation", "kind"), [("softmax", "index"), ("softmax", "soft"), ("sigmoid", "one_hot")])
def test_voxels_that_a_thread_reads_at_once(activation, kind, ignore):
    x, target, phi = problem(activation, kind, ignore, 3, (4, 4, 5), torch.float32)
    agree(x, target, phi, activation, ignore)
    dense = target.view(2, -1, 4, 4, 5).to(DEVICE)
    wide = torch.zeros(2, 3, 96)[..., :80].copy_(x.flatten(2)).to(DEVICE)
    odd = torch.zeros(2, 3, 81, device=DEVICE)[..., :80]
    for logits, fold in ((x.to(DEVICE).flatten(2), 2), (wide, 2), (wide[..., :75], 2), (wide[..., ::2], 1), (odd, 1)):
        options = launch._launch(logits, dense, None, ["tp"], activation, ignore)[1]
        assert options["FOLD"] == fold and options["BLOCK"] == 8 * fold
    agree(wide[..., :75], target.flatten(-3)[..., :75], phi.flatten(2)[..., :75], activation, ignore)


@pytest.mark.usefixtures("_small_tiles")
def test_layouts():
    x, target, phi = problem("softmax", "index", 255, 3, (4, 5, 6), torch.float32)
    expected, expected_gradient = agree(x, target, phi, "softmax", 255)
    wide = torch.zeros(2, 3, 4, 5, 12)
    wide[..., ::2] = x
    channels_last, other_order = x.to(memory_format=torch.channels_last_3d), x.transpose(2, 4).contiguous()
    for layout in (channels_last, wide[..., ::2], other_order.transpose(2, 4)):
        sums, gradient = agree(layout, target, phi, "softmax", 255)
        if DEVICE == "cpu":  # a GPU's threads have other voxels in each layout, and add them up in another order
            assert all(torch.equal(sums[term], expected[term]) for term in sums)
            assert torch.equal(gradient, expected_gradient)
    volumes = launch._launch(
        channels_last.to(DEVICE).flatten(2), target.unsqueeze(1).to(DEVICE), None, ["tp"], "none", 1
    )[0]
    assert volumes[0].shape == (2, 3, 120) and volumes[0].stride() == (360, 1, 3)  # a view: nothing is copied
    row = torch.randn(1, 3, 1, 5, requires_grad=True, device=DEVICE)
    voxel_sums(row.expand(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5), device=DEVICE), ["ce"], backend="triton")[
        "ce"
    ].sum().backward()
    assert row.grad.abs().sum() > 0


def test_a_large_volume_is_exact():
    p, side = 0.1, 128 if DEVICE == "cuda" else 64
    logits = torch.zeros(1, 2, side, side, side, device=DEVICE)
    logits[:, 1] = math.log(p / (1 - p))
    target = torch.ones(1, 1, side, side, side, dtype=torch.uint8, device=DEVICE)
    sums = voxel_sums(logits, target, ["tp", "pred", "ce", "ref"], backend="triton")
    number = side**3
    assert sums["tp"][0, 1].item() == pytest.approx(p * number, rel=1e-6)
    assert sums["pred"][0].tolist() == pytest.approx([(1 - p) * number, p * number], rel=1e-6)
    assert sums["ce"][0, 1].item() == pytest.approx(-math.log(p) * number, rel=1e-6)
    assert sums["ref"][0].tolist() == [0, number]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_confident_and_extreme_logits_keep_their_digits(activation):
    x = torch.tensor([[[1e4, -1e4, 0.0, 9.0, -9.0, 0.3, 18.0], [-1e4, 1e4, 0.0, 0.0, 0.0, -0.3, 0.0]]])
    target = torch.tensor([[0, 1, 1, 0, 1, 0, 0]])
    terms = [term for term in terms_of(activation) if "surface" not in term and not term.startswith("focal:0.5")]
    results = {}
    for kind, logits in (("triton", x.to(DEVICE)), ("reference", x.double().to(DEVICE))):
        logits.requires_grad_()
        sums = voxel_sums(logits, target.to(DEVICE), terms, activation, backend=kind)
        (gradient,) = torch.autograd.grad(sum(value.sum() for value in sums.values()), logits)
        results[kind] = {**sums, "gradient": gradient}
    for name, value in results["triton"].items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(
            value.double(), results["reference"][name], rtol=3e-6, atol=1e-12 if "focal:2" in name else 1e-6
        )


def test_a_class_ruled_out_by_minus_infinity_counts_for_nothing():
    x, labels = torch.randn(2, 2, 7, device=DEVICE), torch.randint(0, 2, (2, 7), device=DEVICE)
    ruled_out = torch.cat([x, torch.full((2, 1, 7), -math.inf, device=DEVICE)], 1)
    terms = ["tp", "pred", "ce", "focal:2.0"]
    sums, gradients = [], []
    for logits in (x.requires_grad_(), ruled_out.requires_grad_()):
        sums.append(voxel_sums(logits, labels, terms, backend="triton"))
        gradients.append(torch.autograd.grad(sum(sums[-1][term][:, :2].sum() for term in terms), logits)[0])
    for term in terms:
        torch.testing.assert_close(sums[1][term][:, :2], sums[0][term])
        assert not sums[1][term][:, 2:].any()
    torch.testing.assert_close(gradients[1][:, :2], gradients[0])
    assert not gradients[1][:, 2].any()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_ignored_voxels_may_hold_anything_and_others_show_it(activation):
    x, labels = torch.randn(1, 3, 8, device=DEVICE), torch.tensor([[0, 1, 2, 255, 1, 255, 0, 2]], device=DEVICE)
    broken = x.clone()
    broken[..., labels[0] == 255] = torch.tensor([math.nan, math.inf], device=DEVICE)
    expected, gradient = value_and_gradient(x, labels, x, activation, 255, "triton")
    sums, other = value_and_gradient(broken, labels, broken, activation, 255, "triton")
    assert all(torch.equal(sums[term], expected[term]) for term in sums)
    assert torch.equal(gradient, other)
    x[0, 1, 0] = math.nan
    sums = voxel_sums(x, labels, ["tp", "ce"], activation, 255, backend="triton")
    assert sums["tp"][0].isnan().any() and sums["ce"][0].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 3)])
def test_no_voxels_sum_up_to_zero(shape):
    x = torch.zeros(shape, requires_grad=True, device=DEVICE)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=DEVICE)
    sums = voxel_sums(x, labels, ["tp", "ce", "count"], backend="triton")
    for value in sums.values():
        assert value.shape == shape[:2] and not value.any()
    sum(value.sum() for value in sums.values()).backward()
    assert x.grad.shape == shape


def test_compiles_into_a_training_step_and_autocast_does_not_reach_in():
    x, target, _ = (tensor.to(DEVICE) for tensor in problem("softmax", "index", None, 3, (6, 6), torch.float32))

    def step(x):
        sums = voxel_sums(2 * x, target, ["tp", "pred", "ce"], backend="triton")
        return (sums["tp"] / sums["pred"] - sums["ce"]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (step, compiled):
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            value = function(leaf)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_a_scaled_loss_keeps_gradients_that_float16_would_lose():
    x, target, _ = (tensor.to(DEVICE) for tensor in problem("softmax", "index", None, 3, (9, 10), torch.float16))
    share = 1e-8  # of the voxels' mean in a volume of 1e8 of them; the smallest number of float16 is 6e-8

    def gradient(x, scaler, backend):
        x = x.clone().requires_grad_()
        scaler.scale(share * voxel_sums(x, target, ["ce"], backend=backend)["ce"].sum()).backward()
        return x.grad

    unscaled, scaler = (torch.amp.GradScaler(DEVICE, 2.0**16, enabled=enabled) for enabled in (False, True))
    assert not gradient(x, unscaled, "triton").any()
    expected = 2**16 * gradient(x.double(), unscaled, "reference")
    found = gradient(x, scaler, "triton")
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=6e-8)
    assert found.count_nonzero() > 0.9 * found.numel()


def machine_code(what):
    """Compile kernels in a process that does not interpret them, and return what it says of each."""
    script = Path(__file__).parents[1] / "compile_kernels.py"
    command = [sys.executable, "-W", "ignore", str(script), what]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_compiles_for_a_gpu():
    kernels = machine_code("sums")
    assert {row["kernel"] for row in kernels} == {"sums_kernel", "total_kernel", "gradient_kernel"}
    assert len(kernels) == 3 * 9
    assert max(row["stack"] for row in kernels) < 64  # bytes: registers suffice


def test_a_logit_takes_few_instructions():
    """While an H100's memory hands over a float32 logit, each multiprocessor has time for about 35 instructions.

    It takes up 128 of them a cycle; 132 multiprocessors at 1.7 GHz, 3.3 TB/s.
    """
    kernels = machine_code("steps")
    assert len(kernels) == 3 * 10
    assert max(row["stack"] for row in kernels) < 64
    for row in kernels[: 3 * 6]:
        if row["kernel"] != "total_kernel":
            assert row["instructions"] < 50, row
            assert row["exchanges"] < (2 if row["classes"] > 16 else 0.7), row
    fourteen = [row["instructions"] for row in kernels[: 3 * 6] if row.get("classes") == 14]
    assert max(fourteen[:2]) < 35


def test_what_it_cannot_do_is_said_in_one_line(monkeypatch):
    labels = torch.zeros(1, 4, dtype=torch.long, device=DEVICE)
    rule = r"^backend: 'triton' takes up to 256 classes of float16, bfloat16 or float32; got"
    with pytest.raises(ValueError, match=rf"{rule} '3 classes of float64'\. Take 'chunked'\.$"):
        voxel_sums(torch.zeros(1, 3, 4, dtype=torch.float64, device=DEVICE), labels, ["tp"], backend="triton")
    with pytest.raises(ValueError, match=rf"{rule} '257 classes of float32'"):
        voxel_sums(torch.zeros(1, 257, 4, device=DEVICE), labels, ["tp"], backend="triton")
    code = (
        "import torch; from monai_losses_ext.sums import voxel_sums;"
        "voxel_sums(torch.zeros(1, 3, 4), torch.zeros(1, 4), ['tp'], backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert run.stderr.splitlines()[-1].startswith("ValueError: backend: 'triton' needs a CUDA device")
    with monkeypatch.context() as patch:
        patch.setattr(launch, "VERSION", (3, 3))
        with pytest.raises(ValueError, match=r"^backend: 'triton' needs Triton 3\.4 or newer"):
            voxel_sums(torch.zeros(1, 3, 4, device=DEVICE), labels, ["tp"], backend="triton")
    monkeypatch.setattr(sys.modules[voxel_sums.__module__], "HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' is not installed"):
        voxel_sums(torch.zeros(1, 3, 4, device=DEVICE), labels, ["tp"], backend="triton")


def test_a_machine_where_it_does_not_work_is_told_once_and_goes_on():
    def attempt():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    def compile_error():
        raise RuntimeError("at 54:39:\n    total = tl.sum(p, 0)\n            ^\nunsupported type")

    with pytest.warns(RuntimeWarning, match=r"^Triton does not work here \(Failed to find C compiler\.\); slower\.$"):
        assert not _fallback.works("Triton", attempt, "slower.")
    with pytest.warns(RuntimeWarning, match=r"^Triton does not work here \(at 54:39: unsupported type\); slower\.$"):
        assert not _fallback.works("Triton", compile_error, "slower.")
    assert _fallback.works("Triton", lambda: None, "slower.")


@on_a_gpu
@pytest.mark.parametrize(("num_classes", "dtype"), [(14, torch.float32), (118, torch.float16)])
def test_large_volumes_on_a_gpu(num_classes, dtype):
    x, target, phi = (v.cuda() for v in problem("softmax", "index", 255, num_classes, (96, 97, 98), dtype))
    first = value_and_gradient(x, target, phi, "softmax", 255, "auto")
    second = value_and_gradient(x, target, phi, "softmax", 255, "triton")
    expected, gradient = value_and_gradient(x, target, phi, "softmax", 255, "chunked")
    for term, value in first[0].items():
        assert torch.equal(value, second[0][term])
        torch.testing.assert_close(value, expected[term], rtol=1e-5, atol=1e-2)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@on_a_gpu
def test_a_training_step_never_waits_for_the_gpu():
    x, target, _ = (v.cuda() for v in problem("softmax", "index", None, 3, (32, 32, 32), torch.float32))
    voxel_sums(x.requires_grad_(), target, ["tp", "ce"])["tp"].sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        voxel_sums(x, target, ["tp", "ce"])["tp"].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_inductor_compiles_a_training_step_without_a_break():
    x, target, _ = (v.cuda() for v in problem("softmax", "index", None, 3, (32, 32, 32), torch.float32))
    x.requires_grad_()

    def loss():
        sums = voxel_sums(x, target, ["tp", "pred", "ce"])
        return (sums["ce"] - sums["tp"] / sums["pred"]).sum()

    found, expected = (torch.autograd.grad(f(), x)[0] for f in (torch.compile(loss, fullgraph=True), loss))
    torch.testing.assert_close(found, expected)


@on_a_gpu
def test_a_training_step_in_a_cuda_graph():
    x, target, _ = (v.cuda() for v in problem("softmax", "index", None, 3, (32, 32, 32), torch.float32))
    x.requires_grad_()

    def gradient():
        sums = voxel_sums(x, target, ["tp", "pred", "ce"])
        return torch.autograd.grad((sums["ce"] - sums["tp"] / sums["pred"]).sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gradient()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(replayed, gradient())


@on_a_gpu
def test_offsets_beyond_32_bits():
    num_voxels = 2**31 // 4 + 1000  # 4 classes: more than 2^31 elements, 4 GiB and as much again for the gradient
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    x = torch.zeros(1, 4, num_voxels, dtype=torch.float16, device="cuda", requires_grad=True)
    labels = torch.full((1, num_voxels), 3, dtype=torch.uint8, device="cuda")
    sums = voxel_sums(x, labels, ["tp", "ref"], backend="triton")
    assert sums["tp"][0].tolist() == [0, 0, 0, pytest.approx(num_voxels / 4)]
    sums["tp"].sum().backward()
    assert x.grad[0, :, -1].tolist() == pytest.approx([-1 / 16, -1 / 16, -1 / 16, 3 / 16])
