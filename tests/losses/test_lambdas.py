# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The weights of a bundle's own loss are kept by the loss that replaces it, unless that has weights of its own."""

from __future__ import annotations

import monai.losses
import pytest
import torch

from monai_losses_ext import get_loss
from monai_losses_ext.errors import UserError


def compound(*parts, **keys):
    return {"type": "compound", "components": [{"type": kind, "weight": weight} for kind, weight in parts], **keys}


DICE_CE = compound(("dice", 1.0), ("cross_entropy", 1.0))


@pytest.mark.parametrize(
    ("config", "lambdas", "weights"),
    [
        (DICE_CE, {"lambda_dice": 0.4, "lambda_ce": 0.2}, [0.4, 0.2]),
        (DICE_CE, {"lambda_ce": 0.2}, [1.0, 0.2]),
        (DICE_CE, {}, [1.0, 1.0]),
        ({"type": "compound", "components": ["cross_entropy", "dice"]}, {"lambda_dice": 0.4}, [1.0, 0.4]),
        ({"type": "compound", "components": ["cross_entropy", "dice"]}, {}, [0.5, 0.5]),
        ("dice_ce", {"lambda_dice": 0.4, "lambda_ce": 0.2}, [0.4, 0.2]),
        ("dice_focal", {"lambda_dice": 0.4, "lambda_focal": 0.0}, [0.4, 0.0]),
        ("dice_focal", {"lambda_gdl": 0.3, "lambda_focal": 2.0}, [0.3, 2.0]),
        # another loss than the bundle's: its sum alone
        ("dice_focal", {"lambda_dice": 0.6, "lambda_ce": 0.2}, [0.4, 0.4]),
        ("dice_focal", {"lambda_ce": 0.2}, [0.6, 0.6]),
        # weights of its own
        (compound(("dice", 0.7), ("cross_entropy", 0.3)), {"lambda_dice": 0.4, "lambda_ce": 0.2}, [0.7, 0.3]),
        ({"type": "dice_ce", "lambda_ce": 0.9}, {"lambda_dice": 0.4, "lambda_ce": 0.2}, [1.0, 0.9]),
        (compound(("dice", 0.5), ("tversky", 0.5)), {"lambda_dice": 0.4, "lambda_ce": 0.2}, [0.5, 0.5]),
        (
            compound(("dice", 1), ("focal", 1), ("boundary", 1)),
            {"lambda_dice": 0.4, "lambda_focal": 0.2},
            [1.0, 1.0, 1.0],
        ),
    ],
)
def test_weights(config, lambdas, weights):
    assert list(get_loss(config, softmax=True, **lambdas).get_weights().values()) == pytest.approx(weights)


@pytest.mark.parametrize("config", [DICE_CE, "dice_ce"], ids=str)
def test_the_value_is_that_of_the_bundles_own_loss(config):
    logits, labels = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randint(0, 3, (2, 1, 6, 5))
    flags = {"softmax": True, "to_onehot_y": True, "lambda_dice": 0.4, "lambda_ce": 0.2}
    theirs = monai.losses.DiceCELoss(**flags)(logits, labels)
    assert get_loss(config, **flags)(logits, labels).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("value", [-1.0, "half", None])
def test_a_wrong_weight_is_one_line(value):
    with pytest.raises(UserError, match="^get_loss: lambda_ce: must be a number of at least 0; got "):
        get_loss(DICE_CE, lambda_ce=value)


def test_nothing_else_is_hidden():
    """A config that is wrong is still the error that it was."""
    for components in ([1, 2], [{"type": "dice"}, {"type": ["focal"]}], "dice", [], ["dice", None]):
        with pytest.raises(UserError, match="^loss: "):
            get_loss({"type": "compound", "components": components}, lambda_ce=0.5)


@pytest.mark.parametrize("kind", ["hausdorff_dt", "log_hausdorff_dt"])
def test_no_region_of_a_sigmoid_is_left_out_by_default(kind):
    """MONAI's Hausdorff losses leave channel 0 out, sigmoid or not; a flag of the config or the bundle still counts."""
    assert get_loss(kind).include_background is False
    assert get_loss(kind, sigmoid=True).include_background is True
    assert get_loss({"type": kind, "sigmoid": True}).include_background is True
    assert get_loss(kind, sigmoid=True, include_background=False).include_background is False
    assert get_loss({"type": kind, "include_background": False}, sigmoid=True).include_background is False


def test_monais_classes_by_name_keep_both():
    loss = get_loss("monai.DiceCELoss", softmax=True, lambda_dice=0.4, lambda_ce=0.2, lambda_focal=3.0)
    assert (loss.lambda_dice, loss.lambda_ce) == (0.4, 0.2)
    assert get_loss({"type": "monai.DiceCELoss", "lambda_ce": 0.9}, lambda_ce=0.2).lambda_ce == 0.9
    assert get_loss("monai.HausdorffDTLoss", sigmoid=True).include_background is True
    assert get_loss("monai.HausdorffDTLoss", softmax=True).include_background is False
