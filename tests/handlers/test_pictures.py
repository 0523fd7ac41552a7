# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""PredictionPicture on real engines: which cases, which planes, which way round, and on time for MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib import image as png
from matplotlib.colors import to_rgb
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    Spacingd,
    SpatialPadd,
)
from torch import nn

from monai_losses_ext.handlers import PredictionPicture, pictures
from monai_losses_ext.handlers._planes import cut_planes
from monai_losses_ext.handlers.curves import draw_curves

LABELS = {"0": "background", "1": "front", "2": "back"}


def volume(length: int = 6, value: int = 1) -> np.ndarray:
    """Return a label map with a bar of one class."""
    label = np.zeros((12, 14, 10))
    label[3:8, 2 : 2 + length, 3:6] = value
    return label


def test_planes_are_the_same_however_the_volume_is_stored() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((12, 14, 10))
    reference = volume(6) + volume(8, 2) * (volume(6) == 0)
    prediction = np.roll(reference, 1, axis=0)
    as_stored = {}
    for axcodes in ("LAS", "RAS", "SPL", "IRP"):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("LAS"), nib.orientations.axcodes2ornt(axcodes)
        )
        las_affine = np.diag([-1.0, 2.0, 4.0, 1.0])  # x to the left, y to the front, z up
        affine = las_affine @ nib.orientations.inv_ornt_aff(turn, reference.shape)
        assert "".join(nib.aff2axcodes(affine)) == axcodes
        stored = [
            MetaTensor(np.ascontiguousarray(nib.orientations.apply_orientation(array, turn))[None], affine=affine)
            for array in (image, prediction, reference)
        ]
        as_stored[axcodes] = cut_planes(dict(zip(("image", "pred", "label"), stored, strict=True)), [1, 2])
    for planes in as_stored.values():
        assert [plane.title for plane in planes] == ["axial", "coronal", "sagittal"]
        assert [plane.spacing for plane in planes] == [(1.0, 2.0), (1.0, 4.0), (2.0, 4.0)]
        for plane, expected in zip(planes, as_stored["LAS"], strict=True):
            np.testing.assert_array_equal(plane.prediction, expected.prediction)
            np.testing.assert_array_equal(plane.reference, expected.reference)
            np.testing.assert_allclose(plane.image, expected.image)
    # Axial, as stored in LAS: x to the right of the picture and y upwards, in full, since the margin is 10 mm.
    axial = as_stored["LAS"][0]
    np.testing.assert_array_equal(axial.reference[0], reference[:, :, 3] == 1)
    np.testing.assert_array_equal(axial.prediction[1], prediction[:, :, 3] == 2)


def test_the_plane_shows_the_small_class_too() -> None:
    reference = np.zeros((20, 20, 20))
    reference[2:18, 2:18, 2:18] = 1
    reference[9:11, 9:11, 4] = 2
    label = MetaTensor(reference[None], affine=np.diag([-1.0, 1.0, 1.0, 1.0]))
    axial = cut_planes({"image": label, "label": label, "pred": label}, [1, 2])[0]
    assert axial.reference[1].sum() == 4


def test_window_and_empty_reference() -> None:
    label = MetaTensor(np.zeros((1, 60, 60, 60)), affine=np.diag([-1.0, 1.0, 1.0, 1.0]))
    prediction = torch.zeros(1, 60, 60, 60)
    prediction[0, 30:34, 30:34, 33] = 1
    axial, *_ = cut_planes({"image": label, "label": label, "pred": prediction}, [1])
    assert axial.image.shape == (24, 24)  # 4 voxels and 10 mm on each side
    assert axial.prediction.sum() == 16
    middle, *_ = cut_planes({"image": label, "label": label, "pred": label}, [1])
    assert middle.image.shape == (60, 60)


def run(cases: list[dict[str, str]], handlers: list[Any], prepare: Any = ()) -> None:
    """Evaluate with a network that gives back the image."""
    load = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"]), *prepare])
    restore = Compose([Invertd("pred", load, orig_keys="image")]) if prepare else None
    evaluator = SupervisedEvaluator(
        torch.device("cpu"),
        DataLoader(Dataset(cases, load), batch_size=2),
        nn.Identity(),
        postprocessing=restore,
        val_handlers=handlers,
    )
    evaluator.run()


def count_pixels(path: Path, color: str) -> int:
    """Return how many pixels of a picture have just this color."""
    pixels = png.imread(path)[..., :3]
    return int((np.abs(pixels - to_rgb(color)).max(axis=-1) < 0.02).sum())


def test_picture_is_logged_by_mlflow(write_case: Callable[..., dict[str, str]], tmp_path: Path, store: Any) -> None:
    cases = [write_case(f"case_{n}", volume(n), volume(8), np.diag([1.0, 1.0, 3.0, 1.0])) for n in (3, 4, 5)]
    path = tmp_path / "new" / "predictions.png"
    mlflow_handler = store.handler(artifacts=str(path), close_on_complete=True)
    picture = PredictionPicture(path, LABELS)
    run(cases, [picture, mlflow_handler])
    assert store.artifacts() == ["predictions.png"]
    assert count_pixels(path, pictures.COLORS[0]) > 500
    assert len(picture.cases) == 3
    run(cases[:1], [picture])
    assert len(picture.cases) == 1


def test_cases_from_worst_to_best(write_case: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: Any) -> None:
    lengths = [5, 2, 8, 3, 6, 4, 7]
    cases = [write_case(f"length_{n}", volume(n), volume(8), np.eye(4)) for n in lengths]
    drawn = []
    figure_class = pictures.Figure

    class SpiedFigure(figure_class):  # type: ignore[misc, valid-type]
        def savefig(self, *arguments: Any, **keywords: Any) -> None:
            drawn.append([axes.get_ylabel() for axes in self.axes if axes.get_ylabel()])
            super().savefig(*arguments, **keywords)

    monkeypatch.setattr(pictures, "Figure", SpiedFigure)
    run(cases, [PredictionPicture(tmp_path / "predictions.png", LABELS, n_cases=3)])
    assert [label.split("\n") for label in drawn[0]] == [
        ["length_2", "Dice 0.400", "(lowest of 7)"],
        ["length_5", f"Dice {2 * 5 / 13:.3f}", "(median of 7)"],
        ["length_8", "Dice 1.000", "(highest of 7)"],
    ]


@pytest.mark.parametrize(
    "prepare",
    [
        Orientationd("image", axcodes="RPI", labels=None),  # mirrored, on a grid of the same shape
        Compose([Orientationd("image", axcodes="SPR", labels=None), SpatialPadd("image", [20] * 3)]),
        Spacingd("image", pixdim=[0.5, 0.5, 1.0], mode="nearest"),
    ],
)
def test_image_on_another_grid(write_case: Callable[..., dict[str, str]], tmp_path: Path, prepare: Any) -> None:
    case = write_case("case", volume(5), volume(8), np.diag([-1.0, 1.0, 1.0, 1.0]))
    picture = PredictionPicture(tmp_path / "predictions.png", LABELS)
    run([case], [picture], prepare=[prepare])
    axial = picture.cases[0].planes[0]
    np.testing.assert_array_equal(axial.image, volume(5)[:, :, 3])
    np.testing.assert_array_equal(axial.prediction[0], volume(5)[:, :, 3] == 1)


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    """Two of them would be a formula to Matplotlib, and this one no valid one."""
    label = torch.zeros(1, 16, 20)
    label[0, 4:9, 5:12] = 1
    (plane,) = cut_planes({"image": label, "label": label, "pred": label}, [1])
    pictures.draw_cases([pictures.ShownCase(r"$\x$", [1.0], [plane])], [r"a $\y$"], 4, tmp_path / "names.png")
    draw_curves({1: {r"loss_$\z$": 1.0}}, tmp_path / "curves.png")
    assert {path.name for path in tmp_path.iterdir()} == {"names.png", "curves.png"}


@pytest.mark.parametrize("affine", [None, np.eye(3)])
def test_flat_images(affine: np.ndarray | None, tmp_path: Path) -> None:
    label = torch.zeros(1, 16, 20)
    label[0, 4:9, 5:12] = 1
    if affine is not None:
        label = MetaTensor(label, affine=affine)
    (plane,) = cut_planes({"image": label, "label": label, "pred": label}, [1])
    assert plane.image.shape == (16, 20)
    pictures.draw_cases([pictures.ShownCase("flat", [1.0], [plane])], ["a"], 4, tmp_path / "flat.png")
    assert count_pixels(tmp_path / "flat.png", pictures.COLORS[0]) > 100


@pytest.mark.parametrize("count", [1, 7, 8, 41, 118])
def test_no_two_classes_have_one_color(count: int) -> None:
    colors = np.array([to_rgb(color) for color in pictures.class_colors(count)])
    apart = np.abs(colors[:, None] - colors[None]).max(axis=-1) + np.eye(count)
    assert apart.min() > 0.04


def test_picture_of_an_evaluation_is_another_than_that_of_a_training(
    write_case: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    cases = [write_case(f"case_{n}", volume(n), volume(8), np.eye(4)) for n in (3, 4, 5)]
    trained = PredictionPicture(tmp_path / "predictions.png", LABELS)
    evaluated = PredictionPicture(tmp_path / "evaluation.png", LABELS, n_cases=3, with_scores=True)
    run(cases, [trained, evaluated])
    first, second = (png.imread(tmp_path / name) for name in ("predictions.png", "evaluation.png"))
    assert second.shape[0] > first.shape[0] + 200  # the scores of all cases
    assert [case.scores[0] for case in evaluated.cases] == pytest.approx([2 * n / (n + 8) for n in (3, 4, 5)])


def test_nothing_is_drawn_where_the_class_is_not_known(
    write_case: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    label = volume(8)
    label[6:] = 255
    picture = PredictionPicture(tmp_path / "predictions.png", LABELS, ignore_label=255)
    run([write_case("case", volume(8), label, np.eye(4))], [picture])
    (case,) = picture.cases
    assert case.dice == 1.0
    for plane in case.planes:
        np.testing.assert_array_equal(plane.prediction, plane.reference)
