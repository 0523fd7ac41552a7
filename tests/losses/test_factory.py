# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Configs: what builds, what is refused and how it is said, and the schema that editors use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import monai.losses
import pytest
import torch
from monai.utils import LossReduction

import monai_losses_ext as ours
from monai_losses_ext import errors, get_loss
from monai_losses_ext.losses.factory import BY_NAME, COMPOUND_KEYS, config_keys
from monai_losses_ext.losses.schema import loss_schema

SCHEMA = Path(__file__).parents[2] / "configs" / "loss.schema.json"
VALID = [
    {"type": "tversky", "alpha": 0.3, "beta": [0.5, 0.7, 0.9], "include_background": False},
    {"loss": {"type": "dice", "class_weight": [1, 2, 3], "sigmoid": True}},
    {"$schema": "loss.schema.json", "loss": "dice_ce"},
    {
        "loss": {
            "type": "compound",
            "components": [
                {"type": "dice", "weight": 0.5},
                {"type": "focal", "weight": 0.3, "alpha": 0.25, "gamma": 2.0},
                "cross_entropy",
            ][:2],
        }
    },
    {"type": "compound", "components": ["dice", "focal"]},
    {"type": "compound", "components": ["dice", "focal"], "learnable_weights": True},
    {"type": "compound", "components": ["dice", "focal"], "learnable_weights": True, "weighting": None},
    {"type": "compound", "components": ["dice", "focal"], "learnable_weights": False, "weighting": "dwa"},
    {"type": "compound", "components": ["dice", "focal"], "weighting": {"type": "fixed"}},
    {"type": "compound", "components": ["dice", "focal"], "weighting": {"type": "softmax", "floor": 0, "pull": 0.5}},
    {
        "type": "compound",
        "components": [{"type": "dice", "weight": 0.7}, {"type": "hausdorff_dt", "weight": 0.3}],
        "learnable_weights": True,
        "weighting": {"type": "uncertainty", "max_ratio": 4},
    },
    {"type": "compound", "components": ["dice", "focal"], "weighting": {"type": "dwa", "temperature": 1.5}},
    {"$schema": "loss.schema.json", "type": "compound", "components": ["dice"]},
    {"loss": {"$schema": "loss.schema.json", "type": "tversky"}},
    {"type": "compound", "components": [{"type": "dice", "name": "overlap", "weight": 1, "class_weight": [1, 2, 3]}]},
    {"type": "compound", "components": [{"type": "dice", "name": None, "weight": None}]},
    {"type": "focal", "use_softmax": True},
    {"type": "focal", "use_softmax": False, "sigmoid": True},
    {"type": "dice", "voxel_weight": {"w0": 10, "sigma": 2.5, "class_weight": "inverse"}},
    {"type": "compound", "components": ["dice", "focal"], "voxel_weight": {"class_weight": [1, 2, 3]}},
    {"loss": {"type": "dice_ce", "voxel_weight": None}},
]
TWO = {"type": "compound", "components": ["dice", "focal"]}
INVALID = [
    ({"type": "tverskyy"}, "Did you mean 'tversky'"),
    ({"type": "dice", "smoth_nr": 1}, "Did you mean 'smooth_nr'"),
    ({"type": "focal", "gamma": "2"}, "loss: focal: gamma: must be a number of at least 0; got '2'"),
    ({"type": "dice", "batch": "yes"}, "batch: must be true or false or 'all_ranks'; got 'yes'"),
    ({"type": "compound", "components": []}, "at least one loss"),
    ({"type": "compound", "componets": ["dice"]}, "Did you mean 'components'"),
    ({"type": "compound", "components": [{"type": "compound", "components": ["dice"]}]}, "do not nest"),
    ({"type": "compound", "components": [{"type": "dice", "weight": -1}]}, r"components\[0\]: weight: .*got -1"),
    ({"type": "compound", "components": [{"type": "dice", "weight": [1, 2]}]}, "class_weight"),
    ({"gamma": 2}, "needs a type"),
    ({**TWO, "learnable": True}, r"compound: key: must be one of .*Did you mean 'learnable_weights'"),
    ({**TWO, "learnable_weights": "yes"}, "compound: learnable_weights: must be true or false; got 'yes'"),
    ({**TWO, "weighting": "sofmax"}, "compound: weighting: must be one of .*got 'sofmax'. Did you mean 'softmax'"),
    ({**TWO, "weighting": {"type": "softmax", "flor": 0.1}}, "weighting: softmax: key: .*Did you mean 'floor'"),
    ({**TWO, "weighting": {"type": "softmax", "pull": -1}}, "compound: weighting: softmax: pull: .*got -1"),
    ({**TWO, "weighting": {"type": "uncertainty", "max_ratio": 1}}, "max_ratio: must be a number above 1; got 1"),
    ({**TWO, "weighting": {"type": "dwa", "temperature": "hot"}}, "temperature: must be a number above 0; got 'hot'"),
    ({**TWO, "learnable_weights": True, "weighting": "dwa"}, "must be softmax or uncertainty .*got 'dwa'"),
    (
        {**TWO, "learnable_weights": True, "weighting": {"type": "fixed"}},
        "must be softmax or uncertainty .*got 'fixed'",
    ),
    (
        {**TWO, "learnable_weights": False, "weighting": "softmax"},
        "must be true, or left out, with weighting 'softmax'",
    ),
    ({"type": ["dice"]}, r"loss: type: must be one of dice, .*; got \['dice'\]\.$"),
    ({"type": "compound", "components": [{"type": ["dice"]}]}, r"components\[0\]: type: must be .*got \['dice'\]\.$"),
    ({"type": "compound", "components": [{"type": {"type": "dice"}}]}, r"components\[0\]: type: must be one of"),
    (
        {"type": "compound", "components": [{"type": "dice", "name": 5}]},
        r"components\[0\]: name: must be a text; got 5",
    ),
    ({"type": "dice", "use_softmax": True}, "key: must be one of .*got 'use_softmax'. Did you mean 'softmax'"),
    ({"type": "focal", "use_softmax": True, "softmax": False}, "softmax and use_softmax are the same"),
    ({"type": "focal", "use_softmax": True, "sigmoid": True}, "at most one of sigmoid and softmax"),
    ({"type": "dice", "softmax": True, "sigmoid": True}, "at most one of sigmoid and softmax"),
    ({"type": "dice", "weight": 1, "class_weight": 1}, "weight and class_weight are the same"),
    ({"type": "dice", "reduction": "sum"}, "loss: dice: reduction: is no key .* a training needs a scalar .*got 'sum'"),
    ({"type": "compound", "components": ["dice"], "reduction": "none"}, "compound: reduction: is no key .* a scalar"),
    ({"type": "dice", "other_act": "tanh"}, "dice: other_act: is no key .*softmax or sigmoid; got 'tanh'"),
    ({"loss": {"loss": "dice"}}, "needs a type"),
    ({"loss": "dice.json"}, "type: must be one of .*got 'dice.json'"),
    ({"type": "DiceCELoss"}, "Did you mean 'dice_ce'"),
    ({"type": "dice", "voxel_weight": {"w1": 1}}, "^loss: voxel_weight: key: must be one of class_weight, w0, sigma; "),
    ({"type": "dice", "voxel_weight": {"sigma": 0}}, "^loss: voxel_weight: sigma: must be a number above 0; got 0"),
    ({"type": "dice", "voxel_weight": "inverse"}, "^loss: voxel_weight: must be a dictionary with class_weight, w0"),
    (
        {"type": "hausdorff_dt", "voxel_weight": {"w0": 1}},
        "^loss: voxel_weight: is known to the losses",
    ),
    ({"type": "compound", "components": [{"type": "dice", "voxel_weight": {}}]}, "key: must be one of"),
]
ANYTHING = [None, True, 0, -1, 2, 0.5, 1.5, "mean", "", [1, 2, 3], [], ["dice"], {}, {"type": "softmax"}]


def logits_and_labels(num_channels=3):
    return torch.randn(2, num_channels, 5, 6), torch.randint(0, 3, (2, 1, 5, 6))


@pytest.mark.parametrize("config", VALID)
def test_valid_configs_build_and_satisfy_the_schema(config):
    jsonschema.validate(config, loss_schema())
    assert torch.isfinite(get_loss(config)(*logits_and_labels()))


@pytest.mark.parametrize(("config", "message"), INVALID)
def test_invalid_configs_are_refused_in_one_line_and_by_the_schema(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_loss(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, loss_schema())


@pytest.mark.parametrize("name", BY_NAME)
def test_get_loss_and_the_schema_agree_on_any_value_of_any_key(name):
    base = {"type": name} | ({"components": ["dice"]} if name == "compound" else {})
    common = {"type", "name", "weight", "class_weight", "softmax", "sigmoid", "use_softmax", "reduction", "loss"}
    own = {*COMPOUND_KEYS} if name == "compound" else {*config_keys(BY_NAME[name])}
    configs = [{**base, key: value} for key in common | own for value in ANYTHING]
    components = [{**base, key: value} for key in common for value in ANYTHING]
    configs += [{"type": "compound", "components": [component]} for component in components]
    schema = jsonschema.Draft202012Validator(loss_schema())
    taken = [config for config in configs if is_taken(config)]
    assert 0 < len(taken) < len(configs)
    assert taken == [config for config in configs if schema.is_valid(config)]


def is_taken(config):
    try:
        get_loss(config)
    except ValueError:
        return False
    return True


def test_the_committed_schema_is_the_generated_one():
    assert SCHEMA.read_text() == json.dumps(loss_schema(), indent=2) + "\n"


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_configs_from_files(tmp_path, suffix):
    path = tmp_path / f"loss{suffix}"
    path.write_text('{"loss": {"type": "focal", "gamma": 1.5}}')  # JSON is YAML too
    assert get_loss(path).gamma == get_loss(str(path)).gamma == 1.5
    path.write_text('{"loss": ')
    with pytest.raises(ValueError, match="must hold valid"):
        get_loss(path)
    with pytest.raises(ValueError, match="config file must exist; got 'absent.json'"):
        get_loss("absent.json")


BROKEN = {
    "cut off": (b'{"loss": ', "must hold valid"),
    "no UTF-8": ('{"type": "dice", "name": "größe"}'.encode("latin-1"), "must be text in UTF-8"),
    "nested": (b"[" * 100_000, "must hold valid"),
    "no dictionary": (b'"dice"', "must hold a dictionary; got 'dice'"),
    "empty": (b"", "must hold "),
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_that_names_it_and_its_format(tmp_path, kind, suffix):
    content, message = BROKEN[kind]
    path = tmp_path / f"loss{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^loss: {re.escape(str(path))} {message}") as caught:
        get_loss(path)
    assert "\n" not in str(caught.value)
    assert {".json": "YAML", ".yaml": "JSON"}[suffix] not in str(caught.value)


@pytest.mark.parametrize("text", ["type: !!bool dice", "type: 2001-99-99", "type: !!timestamp dice", "a: &a {b: *c}"])
def test_a_value_that_yaml_cannot_read_is_one_line(tmp_path, text):
    path = tmp_path / "loss.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="^loss: .* must hold valid YAML; got ") as caught:
        get_loss(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, suffix):
    path = tmp_path / f"loss{suffix}"
    path.mkdir()
    with pytest.raises(ValueError, match=r"must be a file that can be read; got 'Is a directory'\.$"):
        get_loss(path)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_byte_order_mark_is_passed_over(tmp_path, suffix):
    path = tmp_path / f"loss{suffix}"
    path.write_text('{"type": "focal", "gamma": 1.5}', encoding="utf-8-sig")
    assert get_loss(path).gamma == 1.5


def test_a_loss_that_names_or_holds_itself_is_one_line(tmp_path):
    path = tmp_path / "loss.json"
    path.write_text(json.dumps({"loss": str(path)}))
    with pytest.raises(ValueError, match="^loss: type: must be one of "):
        get_loss(path)
    path = tmp_path / "loss.yaml"
    path.write_text("&loss {loss: *loss}")
    with pytest.raises(ValueError, match="^loss: needs a type"):
        get_loss(path)
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match=r"got a deeply nested list\.$"):
        get_loss({"type": "dice", "batch": nested})


def test_softmax_and_index_labels_unless_told_otherwise():
    x, labels = logits_and_labels()
    assert get_loss("dice")(x, labels).item() == ours.DiceLoss(softmax=True)(x, labels).item()
    assert get_loss("focal", sigmoid=True)(x, labels).item() == ours.FocalLoss()(x, labels).item()
    assert get_loss("dice", softmax=False)(x.sigmoid(), labels).item() == ours.DiceLoss()(x.sigmoid(), labels).item()
    assert get_loss({"type": "dice", "softmax": True}, sigmoid=True).activation == "softmax"


def test_defaults_of_another_bundle_reach_the_losses_that_take_them():
    flags = {"sigmoid": True, "include_background": False, "batch": True, "squared_pred": True, "lambda_ce": 2.0}
    compound = get_loss({"type": "compound", "components": ["dice", "cross_entropy"]}, **flags)
    dice, cross_entropy = compound.losses
    assert dice.batch and dice.squared_pred and not dice.include_background
    assert dice.activation == cross_entropy.activation == "sigmoid"
    for unknown in ("sigmoyd", "learnable", "weighting"):
        with pytest.raises(ValueError, match=f"got '{unknown}'"):
            get_loss("dice", **{unknown: True})


def test_what_only_another_of_monais_losses_takes_is_dropped_and_another_activation_refused():
    monai.losses.GeneralizedDiceLoss(w_type="simple", softmax=True)  # it is an argument there
    assert get_loss("dice", w_type="simple", batch=True).batch
    with pytest.raises(ValueError, match="^get_loss: other_act: defaults must not have it"):
        get_loss("dice", other_act=torch.tanh)
    assert get_loss("dice", other_act=None).activation == "softmax"


def test_defaults_reduce_to_the_mean_or_are_refused():
    x, labels = logits_and_labels()
    for mean in ("mean", LossReduction.MEAN):
        assert get_loss("dice", reduction=mean)(x, labels).item() == get_loss("dice")(x, labels).item()
    for other in ("sum", "none", LossReduction.SUM, None):
        for config in ("dice", {"type": "compound", "components": ["dice", "focal"]}):
            with pytest.raises(
                ValueError, match="^get_loss: reduction: .*a training needs a scalar .*; got "
            ) as caught:
                get_loss(config, reduction=other)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ce", "cross_entropy"),
        ("DiceCE", "dice_ce"),
        ("dicece", "dice_ce"),
        ("DiceLoss", "dice"),
        ("FocalLoss", "focal"),
        ("DiceCELoss", "dice_ce"),
        ("DiceFocalLoss", "dice_focal"),
        ("HausdorffDTLoss", "hausdorff_dt"),
        ("LogHausdorffDTLoss", "log_hausdorff_dt"),
        ("cross-entropy", "cross_entropy"),
        ("crossentropy", "cross_entropy"),
        ("hausdorff", "hausdorff_dt"),
        ("UnifiedFocalLoss", "unified_focal"),
    ],
)
def test_names_that_users_of_monai_type_are_met_by_ours(typed, meant):
    with pytest.raises(ValueError, match=rf"got '{typed}'\. Did you mean '{meant}'\?$"):
        get_loss(typed)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_class_is_met_by_its_own_name(name):
    assert errors.nearest(BY_NAME[name].__name__, BY_NAME) == f" Did you mean {name!r}?"


@pytest.mark.parametrize("typed", [None, 5, ["dice"], True, "", "x", "_"])
def test_what_resembles_no_name_gets_no_hint(typed):
    with pytest.raises(ValueError, match=r"^loss: type: must be one of [^.]*; got [^.]*\.$"):
        get_loss({"type": typed})


@pytest.mark.parametrize("name", ["dice", "focal", "dice_ce", "dice_focal", "cross_entropy", "tversky"])
def test_softmax_over_one_channel_is_an_error(name):
    with pytest.raises(ValueError, match="softmax over one channel is constant"):
        get_loss(name)(*[t[:, :1] for t in logits_and_labels()])
    x, labels = logits_and_labels(1)
    value = get_loss(name, sigmoid=True)(x.requires_grad_(), labels.clamp_max(1))
    assert torch.autograd.grad(value, x)[0].any()


def test_the_device_is_honoured():
    loss = get_loss({"type": "dice", "class_weight": [1, 2]}, device="meta")
    assert loss.class_weight.device.type == "meta"
    loss = get_loss({"type": "compound", "components": ["dice"], "learnable_weights": True}, device="meta")
    assert {t.device.type for t in loss.state_dict().values()} == {"meta"}
