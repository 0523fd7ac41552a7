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
    Activationsd,
    AsDiscreted,
    Compose,
    CopyItemsd,
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


def lesions(*boxes: tuple[int, int]) -> np.ndarray:
    """Return a label map ``[9, 10, 8]`` of class 1: a box along the first axis for each pair of bounds."""
    volume = np.zeros((9, 10, 8))
    for low, high in boxes:
        volume[low:high, 2:6, 2:4] = 1
    return volume


@pytest.fixture
def lesion_cases(write_case: Callable[..., dict[str, str]]) -> list[dict[str, str]]:
    """Return cases with one small lesion that is found, one that is missed beside a large one, and none at all."""
    return [
        write_case("case_a", lesions((1, 2)), lesions((1, 2)), AFFINE),
        write_case("case_b", lesions((4, 8)), lesions((0, 1), (4, 8)), AFFINE),
        write_case("case_c", lesions(), lesions(), AFFINE),
        write_case("case_d", lesions((3, 4)), lesions(), AFFINE),
    ]


def test_components_of_all_cases_count_alike(lesion_cases: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    wanted = ["recall", "precision", "f1", "small_recall"]
    metrics = evaluate(lesion_cases, SegmentationReport({"1": "lesion", "2": "other"}, path, metrics=wanted))
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if row["class"] != "other"]
    counts = ["n_reference", "n_predicted", "n_found"]
    assert reader.fieldnames == ["case", "class", *wanted, *counts, "empty"]
    table = {row["case"]: [int(row[name]) for name in counts] for row in rows if row["class"] == "lesion"}
    assert table == {
        "case_a": [1, 1, 1],
        "case_b": [2, 1, 1],
        "case_c": [0, 0, 0],
        "case_d": [0, 1, 0],
        "mean": [3, 3, 2],
    }
    assert [row["recall"] for row in rows[:4]] == ["1", "0.5", "nan", "nan"]
    assert [row["precision"] for row in rows[:4]] == ["1", "1", "nan", "0"]
    assert metrics["recall_lesion"] == pytest.approx(2 / 3)  # 0.75 is the mean of the cases' own
    assert metrics["precision_lesion"] == pytest.approx(2 / 3)
    assert metrics["f1_lesion"] == pytest.approx(2 / 3)
    assert math.isnan(metrics["recall_other"])
    assert metrics["mean_recall"] == metrics["recall_lesion"]  # no case has the other class
    assert math.isnan(metrics["small_recall_lesion"])  # of 8, 8 and 32 voxels none is below the median


def test_small_is_below_the_median_of_the_whole_evaluation(
    write_case: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    cases = [
        write_case("case_a", lesions((1, 2)), lesions((1, 2)), AFFINE),
        write_case("case_b", lesions((2, 6)), lesions((0, 1), (2, 6)), AFFINE),
        write_case("case_c", lesions((2, 8)), lesions((2, 8)), AFFINE),
    ]
    path = tmp_path / "metrics.csv"
    metrics = evaluate(cases, SegmentationReport({"1": "lesion"}, path, metrics=["recall", "small_recall"]))
    assert metrics["recall_lesion"] == 0.75
    assert metrics["small_recall_lesion"] == 0.5  # of the two of 8 voxels one; the median is of 8 and 32
    rows = list(csv.DictReader(path.open()))
    assert [row["small_recall"] for row in rows] == ["1", "0", "nan", "0.5", "0.5"]
    strict = evaluate(cases, SegmentationReport({"1": "lesion"}, metrics=["recall"], iou_threshold=1.0))
    assert strict["recall_lesion"] == 0.0


def test_instances_of_ignored_voxels_and_of_classes_not_annotated(lesion_cases: list[dict[str, Any]]) -> None:
    load = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])
    data = [load(case) for case in lesion_cases[:2]]
    data[1]["label"][:, 0:1] = 255  # the missed lesion is not known
    report = SegmentationReport({"1": "lesion"}, metrics=["recall", "precision"], ignore_label=255)
    assert evaluate(data, report) == dict.fromkeys(
        ("mean_recall", "mean_precision", "recall_lesion", "precision_lesion"), 1.0
    )
    data = [load(case) | {"annotated": np.array([1, i == 0], bool)} for i, case in enumerate(lesion_cases[:2])]
    report = SegmentationReport({"1": "lesion"}, metrics=["recall", "dice"])
    assert evaluate(data, report)["recall_lesion"] == 1.0
    assert math.isnan(report.rows[1]["recall"])


PROBABILITY = Compose(
    [
        CopyItemsd("pred", names="probability"),
        AsDiscreted("pred", argmax=True),
        Activationsd("probability", softmax=True),
    ]
)


def scored_cases(number: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return cases of three classes with random scores, the last of them with class 2 nowhere."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for i in range(number):
        label = torch.randint(0, 2 if i == number - 1 else 3, (1, 6, 5 + i % 2, 4), generator=generator)
        scores = 2 * torch.randn(3, *label.shape[1:], generator=generator)
        cases.append({"image": scores, "label": label})
    return cases


def calibrated(cases: list[dict[str, torch.Tensor]], report: SegmentationReport, **arguments: Any) -> dict[str, float]:
    loader = DataLoader(Dataset(cases), batch_size=1)
    return evaluate(
        cases, report, val_data_loader=loader, postprocessing=arguments.pop("postprocessing", PROBABILITY), **arguments
    )


def error_of(cases: list[dict[str, torch.Tensor]], value: int, bins: int = 20) -> dict[str, float]:
    """Return both errors of a class over the voxels of cases, from their definitions."""
    p = torch.cat([case["image"].softmax(0)[value].flatten() for case in cases]).double()
    g = torch.cat([(case["label"][0] == value).flatten() for case in cases]).double()
    inside = [(p > i / bins) & (p <= (i + 1) / bins) for i in range(bins)]
    gaps = [(abs(p[b].mean() - g[b].mean()).item(), int(b.sum())) for b in inside if b.any()]
    return {"ece": sum(gap * n for gap, n in gaps) / len(p), "ace": sum(gap for gap, _ in gaps) / len(gaps)}


def test_calibration_is_of_the_voxels_of_all_cases(tmp_path: Path) -> None:
    cases, path = scored_cases(), tmp_path / "metrics.csv"
    report = SegmentationReport(LABELS, path, metrics=["dice", "ece", "ace"], spacing=SPACING)
    metrics = calibrated(cases, report)
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == ["case", "class", "dice", "ece", "ace", "empty"]
    for value, name in ((1, "front_part"), (2, "back")):
        expected = error_of(cases, value)
        assert metrics[f"ece_{name}"] == pytest.approx(expected["ece"], abs=1e-6)
        assert metrics[f"ace_{name}"] == pytest.approx(expected["ace"], abs=1e-6)
        for case, row in zip(cases, rows[value - 1 : 10 : 2], strict=True):
            assert float(row["ace"]) == pytest.approx(error_of([case], value)["ace"], abs=1e-5)
    assert metrics["mean_ace"] == pytest.approx((metrics["ace_front_part"] + metrics["ace_back"]) / 2)
    coarse = calibrated(cases, SegmentationReport(LABELS, metrics=["ece"], spacing=SPACING, bins=3))
    assert coarse["ece_back"] == pytest.approx(error_of(cases, 2, 3)["ece"], abs=1e-6)


def test_calibration_leaves_out_what_is_not_known() -> None:
    cases = scored_cases()
    known = [{**case, "label": case["label"].clone()} for case in cases]
    for case in known:
        case["label"][:, :2] = 255
    report = SegmentationReport(LABELS, metrics=["ece", "ace"], spacing=SPACING, ignore_label=255)
    metrics = calibrated(known, report)
    kept = [{"image": case["image"][:, 2:], "label": case["label"][:, 2:]} for case in cases]
    assert metrics["ace_back"] == pytest.approx(error_of(kept, 2)["ace"], abs=1e-6)
    partly = [{**case, "annotated": torch.tensor([True, True, i != 1])} for i, case in enumerate(cases)]
    metrics = calibrated(partly, report)
    assert metrics["ace_back"] == pytest.approx(error_of(cases[:1] + cases[2:], 2)["ace"], abs=1e-6)
    assert metrics["ace_front_part"] == pytest.approx(error_of(cases, 1)["ace"], abs=1e-6)
    assert math.isnan(report.rows[3]["ace"])


def test_calibration_of_sigmoids_and_of_a_single_channel() -> None:
    steps = [CopyItemsd("pred", names="probability"), Activationsd("probability", sigmoid=True)]
    case = scored_cases(1)[0]
    one = {"image": case["image"][1:2], "label": (case["label"] == 1).long()}
    shown = Compose([*steps, AsDiscreted("pred", threshold=0.0)])
    report = SegmentationReport({"1": "a"}, metrics=["ece", "dice"], spacing=SPACING)
    metrics = calibrated([one], report, postprocessing=shown)
    p, g = one["image"][0].sigmoid().double(), one["label"][0].double()
    place = (p * 20).ceil() - 1
    gaps = [abs((p - g)[place == i].sum().item()) for i in range(20)]
    assert metrics["ece_a"] == pytest.approx(sum(gaps) / g.numel(), abs=1e-6)
    both = SegmentationReport({"1": "a", "2": "b"}, metrics=["ece"], spacing=SPACING)
    with pytest.raises(ValueError, match=r"^probability: must have a channel per label, up to 2; got 1\.$"):
        calibrated([one], both, postprocessing=shown)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], r"probability: must be in the evaluator's output for ece and ace: .*; got \['image', 'label', 'pred'\]"),
        ([CopyItemsd("pred", names="probability")], r"probability: must be between 0 and 1; got \["),
        (
            [CopyItemsd("pred", names="probability"), SpatialPadd("probability", (9, 9, 9))],
            "probability: must have the",
        ),
    ],
    ids=["none", "scores", "shape"],
)
def test_what_is_no_probability_ends_in_a_line(steps: list[Any], message: str) -> None:
    report = SegmentationReport(LABELS, metrics=["ece"], spacing=SPACING)
    with pytest.raises(ValueError, match=f"^{message}"):
        calibrated(scored_cases(1), report, postprocessing=Compose([*steps, AsDiscreted("pred", argmax=True)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iou_threshold": -0.1}, r"iou_threshold: must be a number between 0 and 1; got -0\.1\."),
        ({"bins": 0}, r"bins: must be a whole number of at least 1; got 0\."),
        ({"metrics": ["recal"]}, r"metrics: must be one of .*; got 'recal'. Did you mean 'recall'"),
    ],
)
def test_wrong_arguments_of_components_and_bins(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SegmentationReport(**{"labels": LABELS, **arguments})


EVERYTHING = ["dice", "recall", "precision", "f1", "small_recall", "ece", "ace"]


def _share(rank: int, folder: str, cases: list[dict[str, torch.Tensor]]) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that torch thinks it has
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    path = f"{folder}/{rank}.csv"
    report = SegmentationReport(LABELS, path, metrics=EVERYTHING, spacing=SPACING, across_ranks=True)
    metrics = calibrated(cases[rank::2], report)
    torch.save(metrics, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_report_what_one_does(tmp_path: Path) -> None:
    cases = scored_cases()
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_share, args=(rank, str(tmp_path), cases)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    report = SegmentationReport(LABELS, tmp_path / "one.csv", metrics=EVERYTHING, spacing=SPACING)
    metrics = calibrated(cases, report)
    assert {f"{name}_back" for name in EVERYTHING} <= set(metrics)
    for rank in (0, 1):
        tables = [list(csv.reader((tmp_path / name).open())) for name in ("one.csv", f"{rank}.csv")]
        assert [row[:2] + row[9:] for row in tables[0]] == [row[:2] + row[9:] for row in tables[1]]
        for one, other in zip(tables[0][1:], tables[1][1:], strict=True):
            assert list(map(float, one[2:9])) == pytest.approx(list(map(float, other[2:9])), abs=1e-5, nan_ok=True)
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(metrics, abs=1e-6, nan_ok=True)
