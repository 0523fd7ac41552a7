# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""NaN in, NaN out; nothing in, nothing out; and an input that is read in one way by all components."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import monai.losses
import numpy as np
import pytest
import torch
from torch import nn

from monai_losses_ext import BoundaryLoss, CompoundLoss, CrossEntropyLoss, DiceCELoss, DiceLoss, FocalLoss, get_loss
from monai_losses_ext.errors import ShapeError, UserError
from monai_losses_ext.losses import LOSSES
from monai_losses_ext.sums import Target, voxel_sums

SINGLE = sorted(set(LOSSES) - {"compound"})
COMPOUND = {"type": "compound", "components": ["dice", "focal", "boundary"], "learnable_weights": True}
every_loss = pytest.mark.parametrize("config", [*SINGLE, COMPOUND], ids=[*SINGLE, "compound"])
LABELS = torch.arange(2 * 6 * 5 * 4).reshape(2, 1, 6, 5, 4) % 3


@every_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("where", ["everywhere", "one voxel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:BoundaryLoss")
def test_a_nan_comes_out_as_it_went_in(config, activation, where, dtype):
    if (config, activation) == ("dice_ce", "sigmoid"):
        pytest.skip("its cross-entropy has a softmax")
    loss = get_loss(config, **{activation: True})
    x = torch.randn(2, 3, 6, 5, 4, dtype=dtype)
    if where == "everywhere":
        x[:] = torch.nan
    else:
        x[1, 1, 2, 3, 1] = torch.nan
    assert loss(x, LABELS).isnan()


@every_loss
@pytest.mark.filterwarnings("ignore:BoundaryLoss")
def test_a_nan_that_does_not_count_stays_out(config):
    loss = get_loss(config, ignore_index=9)
    x, labels = torch.randn(2, 3, 6, 5, 4, requires_grad=True), LABELS.clone()
    labels[1, 0, 2, 3, 1] = 9
    x.data[1, 1, 2, 3, 1] = torch.nan
    value = loss(x, labels)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.isfinite() and gradient.isfinite().all()
    assert (gradient[1, :, 2, 3, 1] == 0).all()


@every_loss
@pytest.mark.parametrize("shape", [(0, 3, 4, 4, 4), (2, 3, 0, 4, 4)])
@pytest.mark.filterwarnings("ignore:BoundaryLoss")
def test_a_batch_without_voxels_costs_nothing(config, shape):
    x = torch.randn(shape, requires_grad=True)
    value = get_loss(config)(x, torch.zeros(shape[0], 1, *shape[2:], dtype=torch.long))
    value.backward()
    assert value.item() == 0 and x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("losses", "activations"),
    [
        ([DiceLoss(softmax=True), FocalLoss()], "softmax for 'dice' and sigmoid for 'focal'"),
        ([DiceLoss(), CrossEntropyLoss()], "none for 'dice' and softmax for"),
        ([DiceLoss(sigmoid=True), BoundaryLoss(softmax=True)], "sigmoid for 'dice' and softmax for 'boundary'"),
        ([DiceLoss(softmax=True), monai.losses.FocalLoss()], "softmax for 'dice' and sigmoid for 'focal'"),
        ([monai.losses.DiceLoss(sigmoid=True), nn.CrossEntropyLoss()], "sigmoid for 'dice' and softmax for"),
        (
            [DiceLoss(other_act=torch.sigmoid), DiceLoss(softmax=True)],
            "other_act sigmoid for 'dice' and softmax for",
        ),
    ],
)
def test_components_that_read_the_input_in_two_ways_are_refused_by_name(losses, activations):
    with pytest.raises(UserError, match=rf"^losses: must .*{activations}") as error:
        CompoundLoss(losses)
    assert "\n" not in str(error.value)
    CompoundLoss(losses, mixed_activations=True)


def test_a_backend_of_a_compound_is_that_of_its_components():
    loss = DiceCELoss(softmax=True)
    loss.backend = "reference"
    assert [part.backend for part in loss.losses] == ["reference"] * 2 and loss.backend == "reference"
    loss.backend = "nonsense"
    with pytest.raises(UserError, match="^backend: must be one of"):
        loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("loss", [DiceLoss(), DiceLoss(squared_pred=True), BoundaryLoss(spacing=1.0)], ids=str)
def test_logits_without_an_activation_are_warned_about_once(loss):
    labels = LABELS[:, :, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(torch.rand(2, 3, 5, 4), labels)
    loss = copy.deepcopy(loss)
    logits = 8 * torch.randn(2, 3, 1, 1).expand(2, 3, 5, 4)
    with pytest.warns(UserWarning, match="should be probabilities between 0 and 1.*set softmax=True or sigmoid=True"):
        pickle.loads(pickle.dumps(loss))(logits, labels)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_logits_whose_mean_could_be_a_probability_are_warned_about(spread):
    with pytest.warns(UserWarning, match="should be probabilities"):
        DiceLoss()(spread * torch.randn(2, 3, 8, 8, 8) + 0.5, torch.zeros(2, 1, 8, 8, 8))


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode(backend, dtype):
    x, labels = torch.randn(2, 3, 6, 5, 4, dtype=dtype), LABELS
    loss = DiceLoss(softmax=True)
    expected = loss(x, labels)
    loss.backend = backend
    with torch.inference_mode():
        torch.testing.assert_close(loss(x + 0, labels + 0), expected)


def test_labels_to_ignore_come_in_any_list():
    x, labels = torch.randn(2, 3, 6, 5, 4), LABELS.clone()
    labels[:, :, 0], labels[:, :, 1] = 255, 254
    expected = DiceLoss(softmax=True, ignore_index=[255, 254])(x, labels)
    for given in (np.array([255, 254]), torch.tensor([255, 254]), (254, 255)):
        torch.testing.assert_close(DiceLoss(softmax=True, ignore_index=given)(x, labels), expected)
    later = DiceLoss(softmax=True)
    later.ignore_index = [255, 254]  # an attribute like the others
    torch.testing.assert_close(later(x, labels), expected)
    with pytest.raises(UserError, match="^ignore_index: must be a whole number"):
        voxel_sums(x, labels.float(), ["tp"], ignore_index=10**30)


def test_a_parsed_target_of_another_batch_is_refused():
    target = Target.parse(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ShapeError, match="^target: must fit the input's shape"):
        DiceLoss(softmax=True)(torch.zeros(1, 2, 16, 16), target)


def test_kernels_that_cannot_be_imported_are_replaced():
    code = (
        "import sys, warnings, torch, monai_losses_ext as m; sys.modules['numba'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    print(m.DiceLoss(softmax=True)(torch.zeros(1, 2, 4), torch.zeros(1, 4)).item())\n"
        "print([str(w.message) for w in seen if 'voxel_sums: numba does not work here' in str(w.message)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "chunked" in done.stdout
