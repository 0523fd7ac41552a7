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
from voxel_problems import problem, terms_of

from monai_losses_ext import _fallback
from monai_losses_ext.sums import voxel_sums
from monai_losses_ext.sums.target import Target

triton = pytest.importorskip("triton")
from monai_losses_ext.sums.triton import launch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, for rows beyond the last class
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
CASES = [
    case
    for case in product(("softmax", "sigmoid", "none"), ("index", "one_hot", "soft"), (None, 1, 255, (2, 255)), (1, 3))
    if case[3] > 1 or (case[1] != "index" and case[0] != "softmax")
]


def some(cases):
    """Return all cases, or on a GPU, where each is compiled for some seconds, every fifth."""
    return cases if DEVICE == "cpu" else cases[::5]


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several programs for a small volume, each of several tiles but the last, whose tile has voxels to spare."""
    monkeypatch.setattr(launch, "SUMS_TILES", dict.fromkeys(launch.SUMS_TILES, (16, 2, 1, 2)))
    monkeypatch.setattr(launch, "GRADIENT_TILES", dict.fromkeys(launch.GRADIENT_TILES, (16, 2, 1)))
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    monkeypatch.setattr(launch, "MOST_TILES", 3)


def value_and_gradient(x, target, activation, ignore, backend, terms=None):
    """Return the sums, and the gradient of a random linear function of them."""
    x = x.detach().clone().requires_grad_()
    sums = voxel_sums(x, target, terms or terms_of(activation), activation, ignore, backend)
    generator = torch.Generator().manual_seed(1)
    weights = {term: torch.randn(value.shape, generator=generator).to(value) for term, value in sums.items()}
    (gradient,) = torch.autograd.grad(sum((value * weights[term]).sum() for term, value in sums.items()), x)
    return sums, gradient


def parts_of(target, phi, weight=None):
    """Return a target's dictionary on the device."""
    parts = {"label": target, "distance": phi, "weight": weight}
    return {name: part.to(DEVICE) for name, part in parts.items() if part is not None}


def voxel_weight(x):
    """Return weights of voxels, of which a third is 0."""
    weight = torch.rand(x.shape[0], 1, *x.shape[2:])
    return weight.where(torch.rand(weight.shape) > 0.3, 0.0)


def agree(x, target, phi, activation, ignore, rounding=1e-5, weight=None):
    """Compare sums and gradient with the definition in float64."""
    x, parts = x.to(DEVICE), parts_of(target, phi, weight)
    sums, gradient = value_and_gradient(x, parts, activation, ignore, "triton")
    expected, expected_gradient = value_and_gradient(x.double(), parts, activation, ignore, "reference")
    for term, value in sums.items():
        torch.testing.assert_close(value.double(), expected[term], rtol=5e-6, atol=5e-6, msg=lambda m, t=term: t + m)
    assert gradient.dtype == x.dtype and gradient.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=rounding)
    return sums, gradient


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("activation", "kind", "ignore", "num_classes", "weighted"),
    some([(*case, i % 3 == 1) for i, case in enumerate(CASES)]),
)
def test_kernels_equal_the_definition(activation, kind, ignore, num_classes, weighted):
    x, target, phi = problem(activation, kind, ignore, num_classes, (3, 3, 5), torch.float32)
    weight = voxel_weight(x) if weighted else None
    _, gradient = agree(x, target, phi, activation, ignore, weight=weight)
    if weighted:
        assert not gradient.movedim(1, -1)[weight[:, 0].to(DEVICE) == 0].any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("activation", some(["sigmoid", "softmax", "none"]))
def test_nothing_that_stands_where_a_mask_is_false_counts(activation, channels):
    x, label, phi = (v.to(DEVICE) for v in problem(activation, "soft", None, 3, (3, 4, 5), torch.float32))
    mask = (torch.rand(2, channels, 3, 4, 5) < 0.6).to(DEVICE)
    weight = voxel_weight(x).to(DEVICE)
    terms = terms_of(activation)

    def broken(volume):
        return torch.where(mask if volume.shape[1] > 1 else mask.any(1, keepdim=True), volume, math.nan)

    whole = Target(label.double(), False, weight=weight.double(), distance=phi.double(), mask=mask)
    marred = Target(broken(label), False, weight=broken(weight), distance=broken(phi), mask=mask)
    expected, expected_gradient = value_and_gradient(x.double(), whole, activation, None, "reference", terms)
    sums, gradient = value_and_gradient(broken(x), marred, activation, None, "triton", terms)
    for term, value in sums.items():
        torch.testing.assert_close(value.double(), expected[term], rtol=5e-6, atol=5e-6, msg=lambda m, t=term: t + m)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)
    assert not gradient[~mask.expand_as(x)].any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", some([torch.int64, torch.uint8, torch.int16, torch.float32]))
def test_several_labels_that_do_not_count(dtype):
    x, target, phi = problem("softmax", "index", None, 3, (3, 4, 5), torch.float32)
    wide = 2**32 + 1 if dtype == torch.int64 else 77  # in 32 bits that is the label 1
    target[:, 0], target[:, 1, 0] = wide, 100
    sums, gradient = agree(x, target.to(dtype), phi, "softmax", (wide, 0, 100))
    assert sums["count"][0].tolist() == [((target[0] == 1) | (target[0] == 2)).sum().item()] * 3
    assert not gradient[:, :, 0].any()


@pytest.mark.usefixtures("_small_tiles")
def test_a_label_of_64_bits_is_not_cut_to_32():
    x = torch.randn(1, 3, 50, device=DEVICE)
    labels = torch.randint(0, 3, (1, 50), device=DEVICE)
    labels[:, :20] = 2**32 + 1
    sums = voxel_sums(x, labels, ["ref", "count"], backend="triton")
    assert sums["ref"].sum().item() == 30 and sums["count"][0].tolist() == [50] * 3


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("activation", some(["softmax", "sigmoid", "none"]))
def test_maps_and_weights_of_lower_precision(activation):
    x, target, phi = problem(activation, "index", None, 3, (4, 5), torch.float32)
    agree(x, target, phi.half(), activation, None, weight=voxel_weight(x).bfloat16())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(dtype, activation):
    agree(*problem(activation, "index", None, 5, (6, 7), dtype), activation, None, torch.finfo(dtype).eps)


@pytest.mark.parametrize("num_classes", some([2, 118, 129, 256, 32, 64]))
def test_up_to_256_classes_in_one_tile(num_classes):
    agree(*problem("softmax", "index", None, num_classes, (5, 7), torch.float32), "softmax", None)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_mark_in_a_dense_target_leaves_a_voxel_out(activation):
    x, target, phi = problem(activation, "soft", None, 3, (6, 9), torch.float32)
    target[:, 1, 2] = 255  # in one channel
    target[:, :, 4] = 0  # no class: left out by softmax alone
    sums, gradient = agree(x, target, phi, activation, 255)
    softmax, sigmoid = [[36.0, 36.0, 36.0]] * 2, [[54.0, 45.0, 54.0]] * 2  # a region is silenced on its own
    assert sums["count"].tolist() == (softmax if activation == "softmax" else sigmoid)
    assert not gradient[:, :, 2].any() if activation == "softmax" else not gradient[:, 1, 2].any()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    "dtype", some([torch.bool, torch.int8, torch.uint16, torch.int32, torch.float16, torch.float64])
)
@pytest.mark.parametrize("dense", [False, True])
def test_target_dtypes(dtype, dense):
    x = torch.randn(1, 2, 50, device=DEVICE)
    labels = torch.randint(0, 2, (1, 50), device=DEVICE)
    target = (torch.stack([labels == c for c in range(2)], 1) if dense else labels).to(dtype)
    sums = voxel_sums(x, target, ["tp", "ref", "ce"], backend="triton")
    for term, expected in voxel_sums(x, labels, ["tp", "ref", "ce"], backend="reference").items():
        torch.testing.assert_close(sums[term], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("label", some([-1, 3, 300, 0.5, math.nan]))
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
    label = Target(target.view(2, -1, 80).to(DEVICE), kind == "index").ignoring(ignore, activation)
    wide = torch.zeros(2, 3, 96)[..., :80].copy_(x.flatten(2)).to(DEVICE)
    odd = torch.zeros(2, 3, 81, device=DEVICE)[..., :80]
    for logits, fold in ((x.to(DEVICE).flatten(2), 2), (wide, 2), (wide[..., :75], 2), (wide[..., ::2], 1), (odd, 1)):
        options = launch._launch(logits, label, ["tp"], activation, (16, 2, 1))[1]
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
    label = Target(target.unsqueeze(1).to(DEVICE), is_index=True)
    volumes = launch._launch(channels_last.to(DEVICE).flatten(2), label, ["tp"], "none", (16, 2, 1))[0]
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
    expected, gradient = value_and_gradient(x, parts_of(labels, x), activation, 255, "triton")
    sums, other = value_and_gradient(broken, parts_of(labels, broken), activation, 255, "triton")
    assert all(torch.equal(sums[term], expected[term]) for term in sums)
    assert torch.equal(gradient, other)
    x[0, 1, 0] = math.nan
    sums = voxel_sums(x, labels, ["tp", "ce"], activation, 255, backend="triton")
    assert sums["tp"][0].isnan().any() and sums["ce"][0].isnan().any()


def test_a_nan_reaches_no_sum_that_does_not_depend_on_it():
    x, labels = torch.randn(1, 3, 8, device=DEVICE), torch.tensor([[0, 1, 2, 1, 1, 0, 0, 2]], device=DEVICE)
    x[0, 1, 0] = math.nan
    for activation in ("softmax", "sigmoid"):
        sums = voxel_sums(x, labels, ["pred", "ref", "count"], activation, backend="triton")
        assert sums["ref"][0].tolist() == [3, 3, 2] and sums["count"][0].tolist() == [8, 8, 8]
        assert sums["pred"][0].isnan().tolist() == ([True] * 3 if activation == "softmax" else [False, True, False])


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
    # Bytes: registers suffice, but for 14 classes with a map and six terms, which are faster so than in smaller tiles.
    stacks = sorted(row["stack"] for row in kernels)
    assert stacks[-2] < 64 and stacks[-1] < 400


def test_a_logit_takes_few_instructions():
    """While the memory hands over a float32 logit, each multiprocessor has time for about 28 instructions.

    It takes up 128 of them a cycle; 132 multiprocessors at 1.7 GHz, 4.1 TB/s as measured on an H200.
    """
    kernels = machine_code("steps")
    assert len(kernels) == 3 * 10
    # A few bytes, and exchanges: with 118 classes the tiles that have them are the fastest of those measured.
    assert max(row["stack"] for row in kernels) < 128
    for row in kernels[: 3 * 6]:
        if row["kernel"] != "total_kernel":
            assert row["instructions"] < 50, row
            assert row["exchanges"] < (2.2 if row["classes"] > 16 else 0.7), row
    fourteen = [row["instructions"] for row in kernels[: 3 * 6] if row.get("classes") == 14]
    assert max(fourteen[:2]) < 28


def test_what_it_cannot_do_is_said_in_one_line(monkeypatch):
    labels = torch.zeros(1, 4, dtype=torch.long, device=DEVICE)
    rule = r"^backend: 'triton' takes float16, bfloat16 or float32 of up to 256 classes; got"
    with pytest.raises(ValueError, match=rf"{rule} '3 classes of float64 on (cpu|cuda)'\. Take 'chunked'\.$"):
        voxel_sums(torch.zeros(1, 3, 4, dtype=torch.float64, device=DEVICE), labels, ["tp"], backend="triton")
    with pytest.raises(ValueError, match=rf"{rule} '257 classes of float32"):
        voxel_sums(torch.zeros(1, 257, 4, device=DEVICE), labels, ["tp"], backend="triton")
    code = (
        "import torch; from monai_losses_ext.sums import voxel_sums;"
        "voxel_sums(torch.zeros(1, 3, 4), torch.zeros(1, 4), ['tp'], backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "backend: 'triton' needs a CUDA device" in run.stderr.splitlines()[-1]
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


GPU_TARGETS = ["index", "ignored and weighted", "masked"]
DICE_CE = ["tp", "pred", "ce", "count"]


def gpu_target(kind, x, label):
    """Return a target of all that it may hold besides a map, and what is ignored."""
    if kind == "masked":
        dense = torch.stack([label == c for c in range(x.shape[1])], 1).float()
        return Target(dense, False, weight=voxel_weight(x).cuda(), mask=label.unsqueeze(1) != 1), None
    if kind == "index":
        return label, None
    return {"label": label, "weight": voxel_weight(x).cuda()}, (0, 255, 300)


def gpu_problem(kind, shape, num_classes=3, dtype=torch.float32):
    x, label, _ = (v.cuda() for v in problem("softmax", "index", None, num_classes, shape, dtype))
    return x, *gpu_target(kind, x, label)


@on_a_gpu
@pytest.mark.parametrize("kind", GPU_TARGETS)
@pytest.mark.parametrize(("num_classes", "dtype"), [(14, torch.float32), (118, torch.float16)])
def test_large_volumes_on_a_gpu(num_classes, dtype, kind):
    x, target, ignore = gpu_problem(kind, (96, 97, 98), num_classes, dtype)
    first = value_and_gradient(x, target, "softmax", ignore, "auto", DICE_CE)
    second = value_and_gradient(x, target, "softmax", ignore, "triton", DICE_CE)
    expected, gradient = value_and_gradient(x, target, "softmax", ignore, "chunked", DICE_CE)
    for term, value in first[0].items():
        assert torch.equal(value, second[0][term])
        torch.testing.assert_close(value, expected[term], rtol=1e-5, atol=1e-2)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@on_a_gpu
@pytest.mark.parametrize("kind", GPU_TARGETS)
def test_a_training_step_never_waits_for_the_gpu(kind):
    x, target, ignore = gpu_problem(kind, (32, 32, 32))
    expected = value_and_gradient(x, target, "softmax", ignore, "auto", DICE_CE)  # compiles
    x.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = voxel_sums(x, target, DICE_CE, ignore_index=ignore)
        sums["tp"].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(sums[term], expected[0][term]) for term in DICE_CE)


def training_step(x, target, ignore):
    sums = voxel_sums(x, target, DICE_CE, ignore_index=ignore)
    return ((sums["ce"] - sums["tp"] / sums["pred"]) / sums["count"]).sum()


@on_a_gpu
@pytest.mark.parametrize("kind", GPU_TARGETS)
def test_inductor_compiles_a_training_step_without_a_break(kind):
    x, target, ignore = gpu_problem(kind, (32, 32, 32))
    x.requires_grad_()

    def loss():
        return training_step(x, target, ignore)

    torch._dynamo.reset()
    found, expected = (torch.autograd.grad(f(), x)[0] for f in (torch.compile(loss, fullgraph=True), loss))
    torch.testing.assert_close(found, expected)


@on_a_gpu
@pytest.mark.parametrize("kind", GPU_TARGETS)
def test_a_training_step_in_a_cuda_graph(kind):
    x, target, ignore = gpu_problem(kind, (32, 32, 32))
    x.requires_grad_()

    def gradient():
        return torch.autograd.grad(training_step(x, target, ignore), x)[0]

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
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x = torch.zeros(1, 4, num_voxels, dtype=torch.float16, device="cuda", requires_grad=True)
    labels = torch.full((1, 1, num_voxels), 3, dtype=torch.uint8, device="cuda")
    weight = torch.ones(1, 1, num_voxels, dtype=torch.float16, device="cuda")
    labels[..., 5], weight[..., -2] = 200, 0
    target = {"label": labels, "weight": weight}
    sums = voxel_sums(x, target, ["tp", "ref"], ignore_index=(199, 200), backend="triton")
    assert sums["tp"][0].tolist() == [0, 0, 0, pytest.approx(num_voxels / 4)]
    sums["tp"].sum().backward()
    assert x.grad[0, :, -1].tolist() == pytest.approx([-1 / 16, -1 / 16, -1 / 16, 3 / 16])
    assert not x.grad[0, :, [5, -2]].any()
    x.grad = None
    dense = torch.zeros_like(x, dtype=torch.bool)
    dense[:, 3] = True
    mask = torch.ones_like(dense)
    mask[..., -3:-1] = False
    sums = voxel_sums(x, Target(dense, False, mask=mask), ["tp"], "sigmoid", backend="triton")
    assert sums["tp"][0].tolist() == [0, 0, 0, pytest.approx(num_voxels / 2)]
    sums["tp"].sum().backward()
    assert x.grad[0, :, -1].tolist() == [0, 0, 0, 0.25] and not x.grad[0, :, -3:-1].any()
