# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What each loss is for: the phantoms hold their difficulty, measures are what they say, trainings can be repeated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_losses_ext.benchmark.purpose import PURPOSES, measure_purpose, phantoms, purpose_tables, save_purposes
from monai_losses_ext.benchmark.purpose.measures import METRICS, Outcome, measure
from monai_losses_ext.benchmark.purpose.table import verdict


def case_of(phantom, seed=0, training=True):
    return phantom(np.random.default_rng(seed), training)


@pytest.mark.parametrize("name", PURPOSES)
def test_phantoms_are_made_by_their_seed_and_hold_every_class(name):
    purpose = PURPOSES[name]
    first, again, other = (case_of(purpose.phantom, seed, training=False) for seed in (3, 3, 4))
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])
    assert first["label"].unique().tolist() == list(range(1 + purpose.foreground))


def test_small_lesions_are_dark_and_large_ones_bright():
    case = case_of(phantoms.lesions)
    components, n = ndimage.label(case["label"][0].numpy(), np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())
    means = ndimage.mean(case["image"][0].numpy(), components, range(1, n + 1))
    small = sizes[1:] < phantoms.SMALL_VOXELS
    assert small.sum() >= 5 and (~small).sum() >= 3
    assert means[small].mean() < 0 < means[~small].mean()


def test_half_of_the_training_cases_lack_the_last_class_and_no_held_out_one():
    cases = [case_of(phantoms.half_annotated, seed) for seed in range(40)]
    lacking = [case for case in cases if not case["annotated"][2]]
    assert 10 <= len(lacking) <= 30
    assert all((case["label"] != 2).all() for case in lacking)
    whole = [case_of(phantoms.two_organs, seed) for seed in range(40)]
    assert all((case["label"] == 2).any() for case in whole)
    assert all(case_of(phantoms.half_annotated, seed, training=False)["annotated"].all() for seed in range(40))
    unsaid = case_of(phantoms.half_annotated_unsaid)
    assert "annotated" not in unsaid and torch.equal(unsaid["label"], cases[0]["label"])


def test_held_out_labels_have_no_errors():
    """The image's balls are the label's, to the voxel, where the case is held out; not so where it is trained on."""
    held_out = case_of(phantoms.wrong_labels, training=False)["label"]
    trained = [case_of(phantoms.wrong_labels, seed)["label"] for seed in range(5)]
    clean = [case_of(phantoms.wrong_labels, seed, training=False)["label"] for seed in range(5)]
    assert torch.equal(held_out, clean[0])
    assert any(not torch.equal(one, other) for one, other in zip(trained, clean, strict=True))


def test_measures_of_a_perfect_and_of_an_empty_answer():
    label = case_of(phantoms.lesions)["label"][0]
    truth = torch.stack([label == 0, label == 1]).float()
    perfect = measure([Outcome(truth, label)], list(METRICS), level=0.9)
    assert perfect == pytest.approx({name: float(METRICS[name].higher_is_better) for name in METRICS}, abs=1e-9)
    nothing = measure([Outcome(torch.stack([torch.ones_like(label), torch.zeros_like(label)]).float(), label)],
                      ("dice", "voxel_recall", "small_recall", "voxel_recall_at_precision"), level=0.9)  # fmt: skip
    assert nothing.pop("voxel_recall_at_precision") is not None
    assert nothing == {"dice": 0, "voxel_recall": 0, "small_recall": 0}


def test_equal_precision_moves_the_threshold():
    """At 0.5 two of three predicted voxels are right; above 0.6 all are, and half of the reference is found."""
    label = torch.tensor([1, 1, 1, 1, 0, 0]).view(1, 1, 6)
    p = torch.tensor([0.9, 0.8, 0.2, 0.1, 0.6, 0.05]).view(1, 1, 6)
    outcome = Outcome(torch.stack([1 - p, p]), label)
    names = ("voxel_recall", "voxel_precision", "voxel_recall_at_precision")
    assert measure([outcome], names, level=0.9) == pytest.approx(dict(zip(names, (0.5, 2 / 3, 0.5), strict=True)))
    assert measure([outcome], names, level=0.8)["voxel_recall_at_precision"] == pytest.approx(1.0)


def parts(values, purpose="probabilities"):
    """Return trainings with these values of the metric that decides, one list per row."""
    of_all = [*PURPOSES[purpose].metrics]
    rows = zip(PURPOSES[purpose].rows, values, strict=False)
    return [
        {"purpose": purpose, "row": row, "seed": seed, "metrics": dict.fromkeys(of_all, value)}
        for row, of_row in rows
        for seed, value in enumerate(of_row)
    ]


def test_a_row_is_better_only_where_every_seed_is():
    rows = list(PURPOSES["probabilities"].rows)
    measured = parts([[0.2, 0.3, 0.4], [0.1, 0.2, 0.3], [0.1, 0.4, 0.3], [0.3, 0.4, 0.5], [0.1, math.nan, 0.1]])
    words = [verdict(measured, "probabilities", row, "ace") for row in rows[1:]]  # of an error: lower is better
    assert words == ["better", "no clear difference", "worse", "not reached"]


@pytest.mark.parametrize("name", ["unequal_costs", "unannotated"])
def test_a_training_is_measured_once_and_can_be_repeated(name, tmp_path):
    row = list(PURPOSES[name].rows)[1]
    first = measure_purpose(name, row, 0, tmp_path / "one", steps=2)
    again = measure_purpose(name, row, 0, tmp_path / "other", steps=2)
    assert first["metrics"] == again["metrics"] or any(map(math.isnan, first["metrics"].values()))
    file = next((tmp_path / "one").iterdir())
    file.write_text(json.dumps({**first, "seconds": -1.0}))
    assert measure_purpose(name, row, 0, tmp_path / "one", steps=2)["seconds"] == -1.0
    assert measure_purpose(name, row, 0, tmp_path / "one", steps=1)["seconds"] >= 0


def test_the_tables_and_the_picture_hold_every_row(tmp_path):
    measured = [part for name in PURPOSES for part in parts([[0.1, 0.2, 0.3]] * len(PURPOSES[name].rows), name)]
    text = purpose_tables(measured)
    assert all(f"| {row} |" in text for purpose in PURPOSES.values() for row in purpose.rows)
    save_purposes(measured, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
