# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What every loss of the table must do, whatever it computes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from monai.data import MetaTensor

from monai_losses_ext import CompoundLoss, CrossEntropyLoss, DiceLoss, FocalLoss, TverskyLoss, get_loss
from monai_losses_ext.losses import LOSSES

PLAIN = [name for name in LOSSES if name != "compound"]
SINGLE = [name for name in PLAIN if not issubclass(LOSSES[name], CompoundLoss)]
MAKE_MAPS = ("boundary", "cc_dice", "blob", "skeleton_recall")  # by libraries that torch.compile does not see into
OF_FOREGROUND = MAKE_MAPS[1:]  # a background has no components
ALIKE = [name for name in SINGLE if name not in OF_FOREGROUND]
SINGLE_OUT_BACKGROUND = ("unified_focal",)  # to which class 0 is another than the rest
COMPOUND = {"type": "compound", "components": [{"type": name, "weight": 0.1 + i} for i, name in enumerate(ALIKE)]}
CONFIGS = {name: {"type": name} for name in PLAIN} | {"compound": COMPOUND}
CONFIGS |= {f"compound, {kind}": COMPOUND | {"weighting": kind} for kind in ("softmax", "dwa")}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}

every_loss = pytest.mark.parametrize("name", CONFIGS)


def batch(shape=(2, 3, 4, 5), num_classes=3, dtype=torch.float64):
    x = torch.randn(shape[0], num_classes, *shape[1:], dtype=torch.float64).to(dtype)
    return x, torch.randint(0, max(2, num_classes), shape)


def gradient_of(loss, x, target):
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@every_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradcheck(name, activation):
    x, target = batch((2, 3, 2))
    loss = get_loss(CONFIGS[name], **{activation: True})
    assert torch.autograd.gradcheck(lambda x: loss(x, target), x.requires_grad_())


@every_loss
@pytest.mark.parametrize("shape", [(2, 7), (2, 6, 5), (1, 3, 4, 5)])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_all_forms_of_a_target_give_the_same_value(name, shape, num_classes):
    x, target = batch(shape, num_classes)
    dense = torch.stack([target == c for c in range(num_classes)], 1)
    loss = get_loss(CONFIGS[name])
    expected, gradient = gradient_of(loss, x, target)
    assert expected.ndim == 0
    for other in (
        target.unsqueeze(1),
        target.to(torch.uint8),
        target.float(),
        dense,
        dense.double(),
        MetaTensor(target),
    ):
        value, slope = gradient_of(loss, x, other)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(slope, gradient)


@every_loss
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lower_precision_against_float64(name, dtype):
    x, target = batch((2, 9, 8, 7), dtype=dtype)
    loss = get_loss(CONFIGS[name])
    value, gradient = gradient_of(loss, x, target)
    expected, expected_gradient = gradient_of(loss, x.double(), target)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < max(TOLERANCE[dtype], torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OF_FOREGROUND])
def test_order_of_classes_does_not_matter(name):
    x, target = batch(num_classes=4)
    config = copy.deepcopy(CONFIGS[name])
    if "components" in config:
        config["components"] = [part for part in config["components"] if part["type"] not in SINGLE_OUT_BACKGROUND]
    order = torch.tensor([0, 2, 3, 1] if name in SINGLE_OUT_BACKGROUND else [2, 0, 3, 1])
    loss = get_loss(config)
    value = loss(x[:, order], torch.argsort(order)[target])
    assert value.item() == pytest.approx(loss(x, target).item(), rel=1e-12)


@every_loss
def test_an_absent_class_is_finite(name):
    x, target = batch()
    value, gradient = gradient_of(get_loss(CONFIGS[name]), x, torch.zeros_like(target))
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@every_loss
def test_a_perfect_prediction_is_finite_and_best(name):
    x, target = batch()
    perfect = 60 * torch.stack([target == c for c in range(3)], 1).double() - 30
    loss = get_loss(CONFIGS[name])
    value, gradient = gradient_of(loss, perfect, target)
    assert torch.isfinite(gradient).all()
    assert value < 1e-3 * loss(x, target)


@every_loss
def test_ignored_voxels_do_not_count(name):
    x, target = batch()
    ignored = torch.rand(target.shape) < 0.3
    config = json.loads(json.dumps(CONFIGS[name]))
    loss = get_loss(config, ignore_index=255)
    value, gradient = gradient_of(loss, x, target.masked_fill(ignored, 255))
    assert not gradient.movedim(1, 0)[:, ignored].any()
    changed = torch.where(ignored.unsqueeze(1), torch.randn_like(x), x)
    assert loss(changed, target.masked_fill(ignored, 255)).item() == value.item()
    assert loss(x, target).item() == pytest.approx(get_loss(config)(x, target).item(), rel=1e-12)
    assert torch.isfinite(loss(x, torch.full_like(target, 255)))


@every_loss
def test_a_forward_changes_nothing(name):
    x, target = batch()
    loss = get_loss(CONFIGS[name])
    before = copy.deepcopy(loss.state_dict())
    value = loss(x, target)
    after = loss.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, target), value)
    get_loss(CONFIGS[name]).load_state_dict(after)


@every_loss
def test_a_config_survives_json(name):
    x, target = batch()
    again = json.loads(json.dumps({"loss": CONFIGS[name]}))
    assert torch.equal(get_loss(again)(x, target), get_loss(CONFIGS[name])(x, target))


@every_loss
def test_layouts_and_meta_tensors(name):
    x, target = batch((2, 4, 5, 6), dtype=torch.float32)
    loss = get_loss(CONFIGS[name])
    value, gradient = gradient_of(loss, x, target)
    for other in (x.to(memory_format=torch.channels_last_3d), MetaTensor(x)):
        result, slope = gradient_of(loss, other, target)
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, value)
        torch.testing.assert_close(torch.Tensor(slope.contiguous()), gradient)


@every_loss
def test_autocast_does_not_reach_in(name):
    x, target = batch((2, 8, 8, 8), dtype=torch.float32)
    loss = get_loss(CONFIGS[name])
    value = loss(x, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(x, target), value)


@pytest.mark.parametrize(
    "loss",
    [
        TverskyLoss(softmax=True, alpha=[0.1, 0.2, 0.3], beta=[0.5, 0.6, 0.7], weight=[1.0, 2.0, 3.0]),
        FocalLoss(alpha=[0.1, 0.2, 0.3], weight=[1.0, 2.0, 3.0]),
        DiceLoss(softmax=True, weight=[1.0, 2.0, 3.0]),
        CrossEntropyLoss(weight=[1.0, 2.0, 3.0]),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_values_per_class_keep_the_type_and_follow_the_device(loss):
    x, target = batch(dtype=torch.float32)
    assert loss(x, target).dtype == torch.float32
    assert loss(x.to("meta"), target.to("meta")).device.type == "meta"


@every_loss
def test_compiles_into_a_training_step(name):
    x, target = batch((2, 8, 8), dtype=torch.float32)
    loss = get_loss(CONFIGS[name])
    makes_maps = any(f'"{maker}"' in json.dumps(CONFIGS[name]) for maker in MAKE_MAPS)
    torch._dynamo.reset()  # the tests before count towards the limit of compilations
    step = torch.compile(lambda x: loss(2 * x, target), backend="aot_eager", fullgraph=not makes_maps)
    leaf = x.clone().requires_grad_()
    step(leaf).backward()
    expected, gradient = gradient_of(lambda x, target: loss(2 * x, target), x, target)
    torch.testing.assert_close(step(x), expected)
    torch.testing.assert_close(leaf.grad, gradient)


def test_a_voxel_map_of_dense_labels_compiles_without_a_break():
    loss, logits, labels = FocalLoss(reduction="none"), torch.randn(1, 2, 6, 6), torch.rand(1, 2, 6, 6)
    torch._dynamo.reset()  # the tests before count towards the limit of compilations
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))
    with pytest.raises(ValueError, match="dense labels"):
        loss(logits, 255 * labels.round() + 255)
