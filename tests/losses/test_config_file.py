# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Configs that are wrong end in one line, in bounded time; losses of MONAI by name."""

from __future__ import annotations

import os
import time

import monai.losses
import pytest
import torch

from monai_losses_ext import get_loss
from monai_losses_ext.errors import UserError

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def compound(*components, **options):
    return {"type": "compound", "components": list(components), **options}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "focal", "gamma": 10**400}, "^loss: focal: gamma: must be .* bits. It is too large to compute with"),
        ({"type": "focal", "gamma": 1e300}, r"^loss: focal: gamma: must be .*1e\+300\. It is too large"),
        ({"type": "dice", "smooth_nr": 1e300}, "^loss: dice: smooth_nr: must be .* too large"),
        ({"type": "dice", "ignore_index": 10**30}, "^loss: dice: ignore_index: must be .* too large"),
        ({"type": "tversky", "alpha": [10**400, 1]}, "^loss: tversky: alpha: must be "),
        (compound({"type": "dice", "weight": 1e308}), r"^loss: components\[0\]: weight: must be .* too large"),
        (compound({"type": "dice", "name": "x" * 300}), r"^loss: components\[0\]: name: must have at most 64 letters"),
        (compound({"type": "dice", "weight": 0}), "^loss: compound: weights: must hold one above 0"),
        (
            compound("dice", {"type": "focal", "sigmoid": True}),
            "^loss: compound: losses: must all read",
        ),
        (compound("dice", mixed_activations="yes"), "^loss: compound: mixed_activations: must be true or false"),
        ({"type": ["dice"]}, "^loss: type: must be one of dice"),
        ({"type": "dice", "smooth_nr": "1e-5"}, r"must be a number.*in YAML with a point \(1.0e-05\)"),
        ("{'type': 'dice'", "^loss: must be a name, .* is a brace or a quote missing"),
        ("cldice", "Did you mean 'monai.SoftclDiceLoss'"),
        ("generalized_wasserstein_dice", "Did you mean 'monai.GeneralizedWassersteinDiceLoss'"),
        ({"type": "monai.DiceLos"}, "^loss: type: must be a loss class of monai.losses.*Did you mean 'monai.DiceLoss'"),
        ({"type": "monai.os"}, "^loss: type: must be a loss class of monai.losses"),
        ({"type": "monai.SoftclDiceLoss", "itr": 3}, "^loss: monai.SoftclDiceLoss: key: .*Did you mean 'iter_'"),
        ({"type": "monai.NACLLoss"}, "^loss: monai.NACLLoss: .*missing 2 required"),
    ],
)
def test_a_wrong_config_is_one_line(config, message):
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        get_loss(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bomb.yaml", BOMB + "type: dice\n", "must hold at most 10000 entries"),
        (
            "twice.json",
            '{"type": "dice", "type": "focal"}',
            "must say each key .* once; got .*type.* twice",
        ),
        ("twice.yaml", "type: dice\ntype: focal\n", "must say each key of a dictionary once"),
        ("deep.json", '{"type": "compound", "components": [{"type": "dice", "a": 1, "a": 2}]}', "each key"),
        ("exponent.yaml", "type: dice\nsmooth_nr: 1e-5\n", r"in YAML with a point \(1.0e-05\)"),
        ("merges.yaml", "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\ntype: dice\n", "must not merge dictionaries"),
        ("large.json", '{"type": "' + "x" * 2**20 + '"}', "must have at most 1048576 bytes"),
    ],
)
def test_a_wrong_file_is_one_line_in_bounded_time(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as error:
        get_loss(tmp_path / name)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 10


def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "loss.json")
    with pytest.raises(UserError, match="^loss: the config must be a regular file"):
        get_loss(tmp_path / "loss.json")


def test_losses_of_monai_by_name_take_logits_and_index_labels():
    loss = get_loss({"type": "monai.SoftclDiceLoss", "iter_": 2})
    assert type(loss) is monai.losses.SoftclDiceLoss and loss.iter == 2
    x, labels = torch.randn(1, 3, 8, 8, 8), torch.randint(0, 3, (1, 1, 8, 8, 8))
    expected = monai.losses.SoftclDiceLoss(iter_=2, softmax=True, to_onehot_y=True)
    assert torch.equal(loss(x, labels), expected(x, labels))
    both = get_loss(compound({"type": "monai.DiceLoss", "weight": 2.0}, {"type": "cross_entropy", "weight": 1.0}))
    dice = monai.losses.DiceLoss(softmax=True, to_onehot_y=True)
    expected = 2 * dice(x, labels) + torch.nn.functional.cross_entropy(x, labels[:, 0])
    torch.testing.assert_close(both(x, labels), expected)
    regions = get_loss({"type": "monai.DiceLoss"}, sigmoid=True)
    assert regions.sigmoid and not regions.softmax and not regions.to_onehot_y
    assert get_loss("monai.FocalLoss", softmax=True).use_softmax
    assert get_loss("monai.TverskyLoss", use_softmax=True).softmax
    assert get_loss("monai.DiceLoss", sigmoid=False, other_act=None).softmax
    assert not get_loss({"type": "monai.DiceLoss", "softmax": False}).softmax
