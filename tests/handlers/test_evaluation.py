# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""SegmentationReport on a real evaluator that reads NIfTI files."""

from __future__ import annotations

import csv
import math
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Orientationd,
    SpatialPadd,
)
from torch import nn

from monai_losses_ext import get_loss
from monai_losses_ext.errors import UserError
from monai_losses_ext.handlers import SegmentationReport, WeightSchedule
from monai_losses_ext.metrics import METRICS, class_metrics

LABELS = {"0": "background", "1": "front part", "2": "back"}
AFFINE = np.array([[0.0, -1.0, 0.0, 30.0], [1.0, 0.0, 0.0, -20.0], [0.0, 0.0, -5.0, 7.0], [0.0, 0.0, 0.0, 1.0]])
SPACING = (1.0, 1.0, 5.0)


def box(low: int, high: int, value: int = 1) -> np.ndarray:
    """Return a label map with the box ``low <= v < high`` of one class."""
    volume = np.zeros((9, 10, 8))
    volume[low:high, low:high, low:high] = value
    return volume


def evaluate(cases: list[dict[str, Any]], report: SegmentationReport, *others: Any, **arguments: Any) -> dict[str, Any]:
    """Run an evaluator whose network gives back the image, so that the image is the prediction."""
    load = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])
    data = Dataset(cases, load if isinstance(cases[0]["image"], str) else None)
    arguments.setdefault("val_data_loader", DataLoader(data, batch_size=2))
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), network=nn.Identity(), val_handlers=[*others, report], **arguments
    )
    evaluator.run(5)
    return evaluator.state.metrics


@pytest.fixture
def cases(write_case: Callable[..., dict[str, str]]) -> list[dict[str, str]]:
    """Return cases, not in the order of their names: a good one, one that misses class 2, one that has no class 2."""
    return [
        write_case("case_c", box(2, 7) + box(7, 9, 2), box(3, 7) + box(7, 8, 2), AFFINE),
        write_case("case_a", box(3, 6), box(2, 6) + box(6, 8, 2), AFFINE),
        write_case("case_b", box(3, 6), box(3, 7), AFFINE),
    ]


def test_cases_that_share_a_file_name_are_told_apart(write_case: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    cases = []
    for name in ("p2", "p1"):
        case = write_case("volume", box(2, 6), box(3, 6), AFFINE)
        (tmp_path / name).mkdir()
        cases.append({key: str(Path(path).rename(tmp_path / name / f"{key}.nii.gz")) for key, path in case.items()})
    report = SegmentationReport(LABELS, metrics=["dice"])
    evaluate(cases, report)
    assert [row["case"] for row in report.rows[::2]] == ["p1/label.nii.gz", "p2/label.nii.gz"]


def test_csv_and_means(cases: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.csv"
    metrics = evaluate(cases, SegmentationReport(LABELS, csv_path=path))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [
        *((case, name) for case in ("case_a", "case_b", "case_c") for name in ("front part", "back")),
        ("mean", "front part"),
        ("mean", "back"),
        ("mean", "all"),
    ]
    assert [row["empty"] for row in rows] == ["", "prediction", "", "both", "", "", "", "", ""]

    pairs = [(box(3, 6), box(2, 6)), (box(3, 6), box(3, 7)), (box(2, 7), box(3, 7))]
    front = [class_metrics(*(torch.tensor(v) == 1 for v in pair), SPACING) for pair in pairs]
    back = [
        {"dice": 0.0, "nsd": 0.0, "hd95": math.hypot(9, 10, 8 * 5)},
        dict.fromkeys(METRICS, math.nan),
        class_metrics(torch.tensor(box(7, 9, 2)) == 2, torch.tensor(box(7, 8, 2)) == 2, SPACING),
    ]
    for row, expected in zip(rows[:6:2] + rows[1:6:2], front + back, strict=True):
        assert {m: float(row[m]) for m in METRICS} == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for metric in METRICS:
        mean_front = sum(values[metric] for values in front) / 3
        mean_back = (back[0][metric] + back[2][metric]) / 2
        assert metrics[f"{metric}_front_part"] == pytest.approx(mean_front)
        assert metrics[f"{metric}_back"] == pytest.approx(mean_back)
        assert metrics[f"mean_{metric}"] == pytest.approx((mean_front + mean_back) / 2)
        assert [float(row[metric]) for row in rows[6:]] == pytest.approx(
            [mean_front, mean_back, (mean_front + mean_back) / 2], rel=1e-5
        )


def test_order_of_cases_does_not_matter(cases: list[dict[str, str]], tmp_path: Path) -> None:
    texts = set()
    for seed in range(3):
        random.Random(seed).shuffle(cases)
        evaluate(cases, SegmentationReport(LABELS, csv_path=tmp_path / "metrics.csv", metrics=["dice"]))
        texts.add((tmp_path / "metrics.csv").read_text())
    assert len(texts) == 1


def test_mlflow_has_the_means_at_the_step_of_the_training(cases: list[dict[str, str]], store: Any) -> None:
    # MLFlowHandler stands first and has read before SegmentationReport's end of the epoch.
    mlflow_handler = store.handler(close_on_complete=True)
    metrics = evaluate(cases[2:], SegmentationReport(LABELS), mlflow_handler)
    assert store.history("mean_dice") == {5: pytest.approx(metrics["mean_dice"])}
    assert store.history("dice_front_part") == {5: pytest.approx(metrics["dice_front_part"])}
    # No case has this class: the mean is NaN, which MLflow stores.
    assert math.isnan(store.history("hd95_back")[5])


def test_native_space_after_turning_and_padding(write_case: Callable[..., dict[str, str]]) -> None:
    label = box(2, 5) + box(5, 9, 2)
    prepare = Compose(
        [
            LoadImaged(["image", "label"]),
            EnsureChannelFirstd(["image", "label"]),
            Orientationd("image", axcodes="RAS", labels=None),
            SpatialPadd("image", (16, 16, 16)),
        ]
    )
    restore = Compose(
        [
            Invertd("pred", prepare, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True, to_onehot=3),
        ]
    )
    data = Dataset([write_case("case", label, label, AFFINE)], prepare)

    class Logits(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([-((image - value) ** 2) for value in range(3)], dim=1)

    report = SegmentationReport(LABELS)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), DataLoader(data), Logits(), postprocessing=restore, val_handlers=[report]
    )
    evaluator.run()
    assert evaluator.state.metrics == {
        f"{metric}_{name}" if name != "mean" else f"mean_{metric}": 0.0 if metric == "hd95" else 1.0
        for metric in METRICS
        for name in ("mean", "front_part", "back")
    }


def test_dice_alone_and_a_tolerance_per_class(cases: list[dict[str, str]]) -> None:
    assert set(evaluate(cases, SegmentationReport(LABELS, metrics=["dice"]))) == {
        "mean_dice",
        "dice_front_part",
        "dice_back",
    }
    loose = evaluate(cases[:1], SegmentationReport(LABELS, tolerance_mm=[100, 0.1]))
    assert loose["nsd_front_part"] == 1.0
    assert loose["nsd_back"] < 1.0


def test_a_second_run_starts_anew(cases: list[dict[str, str]]) -> None:
    report = SegmentationReport(LABELS, metrics=["dice"])
    data = Dataset(cases, Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])]))
    evaluator = SupervisedEvaluator(torch.device("cpu"), DataLoader(data), nn.Identity(), val_handlers=[report])
    evaluator.run(1)
    first = dict(evaluator.state.metrics)
    evaluator.run(2)
    assert evaluator.state.metrics == first
    assert len(report.rows) == len(cases) * 2


def test_plain_tensors_need_the_spacing() -> None:
    case = {"image": torch.tensor(box(2, 6))[None], "label": torch.tensor(box(3, 6))[None]}
    loader = [{key: value[None] for key, value in case.items()}]
    metrics = evaluate([case], SegmentationReport({"1": "a"}, spacing=SPACING), val_data_loader=loader)
    expected = class_metrics(case["image"][0] == 1, case["label"][0] == 1, SPACING)
    assert metrics == pytest.approx(
        {f"{m}_a": expected[m] for m in METRICS} | {f"mean_{m}": expected[m] for m in METRICS}
    )
    with pytest.raises(ValueError, match=r"^spacing: must be given for labels without an affine.*; got None\.$"):
        evaluate([case], SegmentationReport({"1": "a"}), val_data_loader=loader)


def test_a_label_without_a_file_is_numbered(tmp_path: Path) -> None:
    pair = {"image": box(2, 6)[None], "label": box(3, 6)[None]}
    data = Dataset([pair, pair, pair], EnsureTyped(["image", "label"]))
    report = SegmentationReport({"1": "a", "2": "b"}, metrics=["dice"])
    evaluate([pair], report, val_data_loader=DataLoader(data, batch_size=2))
    assert [row["case"] for row in report.rows[::2]] == ["case_0000", "case_0001", "case_0002"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": {"liver": 1}}, r"labels: must map label values to names, as in .*; got \{'liver': 1\}\."),
        ({"labels": ["background", "liver"]}, "labels: must map label values to names"),
        ({"labels": {"0": "background"}}, "labels: must name at least one class beside the background"),
        ({"labels": LABELS, "tolerance_mm": [1.0]}, r"tolerance_mm: must be one number, or one for each of 2 classes"),
        ({"labels": LABELS, "tolerance_mm": -1}, "tolerance_mm: must be a number of at least 0; got -1"),
        ({"labels": LABELS, "metrics": ["dcie"]}, "metrics: must be one of .*; got 'dcie'. Did you mean 'dice'"),
        ({"labels": LABELS, "spacing": [1, 0, 1]}, "spacing: must be a number above 0; got 0"),
        ({"labels": LABELS, "spacing": 1.0}, r"spacing: must be a list of numbers above 0; got 1\.0\."),
        ({"labels": LABELS, "tolerance_mm": None}, r"tolerance_mm: must be a number of at least 0; got None\."),
        ({"labels": {"1": "all", "2": "b"}}, "labels: .*where 'all' is the mean of all classes; got 'all'"),
        ({"labels": {"1": "a", "2": "a"}}, "labels: must each have a name of its own in the metrics, where 'a' is 'a'"),
        ({"labels": {"1": "left lung", "2": "left-lung"}}, "labels: .*'left_lung' is 'left lung'; got 'left-lung'"),
        ({"labels": {"1": "a", "01": "b"}}, "labels: must have every label value once"),
        ({"labels": {"-1": "a"}}, "labels: must have every label value once, from 0 on"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SegmentationReport(**arguments)


@pytest.mark.parametrize("empty", [False, True])
def test_a_spacing_of_other_axes(empty: bool) -> None:
    """An empty mask needs the spacing only for the volume's diagonal."""
    case = {"image": torch.tensor(box(2, 6))[None] * (not empty), "label": torch.tensor(box(3, 6))[None]}
    loader = [{key: value[None] for key, value in case.items()}]
    for metrics in (METRICS, ["dice"]):
        with pytest.raises(
            ValueError, match=r"^spacing: must have one value for each of 3 axes; got \[1\.0, 1\.0\]\.$"
        ):
            evaluate([case], SegmentationReport({"1": "a"}, spacing=[1, 1], metrics=metrics), val_data_loader=loader)


def test_a_label_that_is_no_channel_of_the_prediction() -> None:
    case = {"image": torch.zeros(2, 4, 4, 4), "label": torch.ones(1, 4, 4, 4)}
    loader = [{key: value[None] for key, value in case.items()}]
    report = SegmentationReport({"1": "a", "2": "b"}, spacing=[1, 1, 1])
    with pytest.raises(ValueError, match=r"^labels: must be channels of the one-hot volume, which has 2; got 2\.$"):
        evaluate([case], report, val_data_loader=loader)


def test_prediction_on_another_grid(write_case: Callable[..., dict[str, str]]) -> None:
    case = write_case("case_x", box(2, 5)[:, :, 1:], box(2, 5), AFFINE)
    with pytest.raises(ValueError, match=r"^pred: must have the label's spatial shape \(9, 10, 8\); got \(9, 10, 7\) "):
        evaluate([case], SegmentationReport(LABELS))


def test_output_that_is_not_decollated(cases: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match=r"decollate=True\); got 'dict'"):
        evaluate(cases, SegmentationReport(LABELS), decollate=False)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("ignored", [255, [255, 254]])
def test_unknown_voxels_count_in_no_metric(ignored: Any, one_hot: bool) -> None:
    """Oracle: a prediction that is right where the class is known, whatever it says elsewhere."""
    truth = torch.tensor(box(2, 7))
    label = truth.clone()
    label[4:, :, :] = 255
    if isinstance(ignored, list):
        label[:, 8:, :] = 254
    prediction = truth.clone()
    prediction[5:8, 1:9, 1:7] = 1  # wrong, but nobody knows
    prediction = torch.stack([1 - prediction, prediction]) if one_hot else prediction[None]
    loader = [{"image": prediction[None], "label": label[None, None]}]
    report = SegmentationReport({"1": "a", "255": "unknown"}, spacing=SPACING, ignore_label=ignored)
    metrics = evaluate([{"image": prediction}], report, val_data_loader=loader)
    assert metrics == {"dice_a": 1.0, "nsd_a": 1.0, "hd95_a": 0.0} | {
        "mean_dice": 1.0,
        "mean_nsd": 1.0,
        "mean_hd95": 0.0,
    }
    known = label < 254
    wrong = truth.clone()
    wrong[2] = 0  # a known layer is missed
    loader = [{"image": wrong[None, None], "label": label[None, None]}]
    metrics = evaluate([{"image": wrong}], report, val_data_loader=loader)
    both = [float(((volume == 1) & known).sum()) for volume in (wrong, truth)]
    assert metrics["dice_a"] == pytest.approx(2 * both[0] / sum(both))
    assert metrics["hd95_a"] >= 1.0


def test_wrong_ignore_label() -> None:
    with pytest.raises(ValueError, match=r"^ignore_label: must be a label value, a list of them, or none; got 'x'\.$"):
        SegmentationReport(LABELS, ignore_label="x")


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    pairs = [{"image": torch.ones(1, 3, 3), "label": torch.ones(1, 3, 3)} for _ in range(5)]
    report = SegmentationReport({"1": "a"}, f"{folder}/{rank}.csv", spacing=[1, 1], metrics=["dice"], across_ranks=True)
    evaluate([pairs[0]], report, val_data_loader=DataLoader(Dataset(pairs[rank::2])))
    loss = get_loss({"type": "compound", "components": ["dice", "boundary"]})
    WeightSchedule(loss, {"type": "linear", "component": "boundary", "start": 0, "end": 1, "epochs": 3})
    try:
        loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
    except UserError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_two_ranks_number_cases_without_files_and_miss_no_schedule(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in (0, 1):
        with open(tmp_path / f"{rank}.csv", newline="") as file:
            assert [row["case"] for row in csv.DictReader(file)][:5] == [f"case_{i:04d}" for i in range(5)]
        assert f"but is not on rank {rank}." in (tmp_path / f"{rank}.txt").read_text()


def test_a_class_that_a_case_was_not_annotated_for_is_left_out(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = evaluate(cases, SegmentationReport(LABELS, tmp_path / "whole.csv"))
    for case, annotated in zip(cases, ([1, 1, 1], [1, 1, 0], [1, 0, 1]), strict=True):
        case["annotated"] = np.array(annotated, bool)
    metrics = evaluate(cases, SegmentationReport(LABELS, tmp_path / "partial.csv"))
    rows = {(row["case"], row["class"]): row for row in csv.DictReader((tmp_path / "partial.csv").open())}
    before = {(row["case"], row["class"]): row for row in csv.DictReader((tmp_path / "whole.csv").open())}
    left_out = {(case.split(".")[0], name) for (case, name), row in rows.items() if row["empty"] == "not annotated"}
    assert left_out == {("case_a", "back"), ("case_b", "front part")}
    for key, row in rows.items():
        if row["empty"] == "not annotated":
            assert {row[metric] for metric in METRICS} == {"nan"}
        elif not key[0].startswith("mean"):
            assert row == before[key]
    kept = [float(row["dice"]) for key, row in rows.items() if key[1] == "front part" and key[0].startswith("case")]
    known = [value for value in kept if not math.isnan(value)]
    assert len(known) == 2
    assert metrics["dice_front_part"] == pytest.approx(sum(known) / 2, abs=1e-6)
    assert metrics["dice_front_part"] != pytest.approx(whole["dice_front_part"], abs=1e-6)
