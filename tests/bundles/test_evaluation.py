# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation of the hepatic vessels through ``python -m monai.bundle run``, computed again from what it saw."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles.helpers import bundle_run, only_run, only_run_folder
from monai.networks.nets import UNet

from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import TASKS

skimage = pytest.importorskip("skimage.morphology")
TASK = TASKS["Task08_HepaticVessel"]
SHAPE = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2]}
WITNESS = """
import torch
from ignite.engine import Events

class Witness:
    def __init__(self, folder):
        self.folder = folder

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine):
        for case in engine.state.output:
            name = case["label"].meta["filename_or_obj"].split("/")[-1].removesuffix(".nii.gz")
            values = {key: case[key].as_tensor().cpu() for key in ("pred", "label", "probability")}
            torch.save(values, f"{self.folder}/{name}.pt")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> SimpleNamespace:
    """Evaluate a network of random weights on phantoms, and keep what the report was given."""
    folder = tmp_path_factory.mktemp("vessels")
    configs = bundle.parent / TASK.bundle / "configs"
    data = make_phantoms(TASK, folder / TASK.name, 4, scale=0.05)
    torch.manual_seed(0)
    torch.save(UNet(**SHAPE).state_dict(), folder / "model.pt")
    (folder / "witness.py").write_text(WITNESS)
    (folder / "witness.json").write_text(
        json.dumps({"+validate#handlers": [{"_target_": "witness.Witness", "folder": str(folder)}]})
    )
    files = [*(str(configs / f"{name}.json") for name in ("train", "evaluate")), str(folder / "witness.json")]
    options = {"bundle_root": folder, "dataset_dir": data, "network_def": {"_target_": "UNet", **SHAPE}}
    options |= {"patch_size": [16, 16, 16], "ckpt_path": folder / "model.pt", "validation_fraction": 0.5}
    options["validate#report#iou_threshold"] = 0  # or such a network finds nothing
    bundle_run(folder, str(files), *(part for key, value in options.items() for part in (f"--{key}", str(value))))
    table = only_run_folder(folder / "output", "evaluate") / "evaluation.csv"
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    tracked = only_run(f"sqlite:///{folder}/output/mlruns.db", TASK.bundle)
    seen = {path.stem: torch.load(path) for path in sorted(folder.glob("phantom*.pt"))}
    shutil.rmtree(folder / "output" / "cache", ignore_errors=True)
    return SimpleNamespace(rows=rows, metrics=tracked.run.data.metrics, seen=seen, data=data)


def test_columns_and_keys_are_those_of_the_row(run: SimpleNamespace) -> None:
    assert "cldice" in TASK.metrics
    counts = ["n_reference", "n_predicted", "n_found"]
    assert list(run.rows[0]) == ["case", "class", *TASK.metrics, *counts, "empty"]
    assert len(run.rows) == 2 * 2 + 3
    expected = {f"{metric}_{name}" for metric in TASK.metrics for name in TASK.labels[1:]}
    assert expected | {f"mean_{metric}" for metric in TASK.metrics} <= set(run.metrics)


def test_probabilities_are_of_the_segmentation_in_native_space(run: SimpleNamespace) -> None:
    assert len(run.seen) == 2
    for name, case in run.seen.items():
        label = nib.load(run.data / "labelsTr" / f"{name}.nii.gz")
        assert case["probability"].shape == (3, *label.shape)
        np.testing.assert_array_equal(case["label"][0], np.asarray(label.dataobj))
        torch.testing.assert_close(case["probability"].sum(0), torch.ones(label.shape), rtol=0, atol=1e-5)
        best = case["probability"].gather(0, case["pred"].long())[0]
        assert torch.equal(best, case["probability"].amax(0))


def test_calibration_is_that_of_all_voxels_of_all_cases(run: SimpleNamespace) -> None:
    for value, name in enumerate(TASK.labels[1:], start=1):
        p = np.concatenate([case["probability"][value].numpy().ravel() for case in run.seen.values()])
        g = np.concatenate([(case["label"][0] == value).numpy().ravel() for case in run.seen.values()])
        place = np.maximum(np.ceil(p * np.float32(20)) - 1, 0)
        gaps = [abs(p[place == i].mean(dtype=float) - g[place == i].mean()) for i in np.unique(place)]
        shares = [(place == i).mean() for i in np.unique(place)]
        assert run.metrics[f"ace_{name}"] == pytest.approx(np.mean(gaps), abs=1e-6)
        assert run.metrics[f"ece_{name}"] == pytest.approx(np.dot(gaps, shares), abs=1e-6)


def test_components_and_skeletons_are_those_of_the_files(run: SimpleNamespace) -> None:
    for value, name in enumerate(TASK.labels[1:], start=1):
        rows = {row["case"]: row for row in run.rows if row["class"] == name}
        counts = dict.fromkeys(("n_reference", "n_predicted", "n_found"), 0)
        for case, volumes in run.seen.items():
            prediction, reference = ((volumes[key][0] == value).numpy() for key in ("pred", "label"))
            for key, mask in (("n_reference", reference), ("n_predicted", prediction)):
                assert int(rows[case][key]) == number_of_components(mask)
            for key in counts:
                counts[key] += int(rows[case][key])
            if not prediction.any() or not reference.any():
                expected = math.nan if not prediction.any() and not reference.any() else 0.0
            else:
                shares = [line_share(prediction, reference), line_share(reference, prediction)]
                expected = 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
            assert float(rows[case]["cldice"]) == pytest.approx(expected, abs=0.02, nan_ok=True)
        assert {key: int(rows["mean"][key]) for key in counts} == counts
        assert counts["n_found"] or name != "Vessel"
        assert run.metrics[f"recall_{name}"] == pytest.approx(counts["n_found"] / counts["n_reference"])
        assert run.metrics[f"precision_{name}"] == pytest.approx(
            counts["n_found"] / counts["n_predicted"] if counts["n_predicted"] else math.nan, nan_ok=True
        )


def number_of_components(mask: np.ndarray) -> int:
    """Return the number of components with 26 neighbors, by scikit-image."""
    from skimage.measure import label

    return int(label(mask, connectivity=3).max())


def line_share(one: np.ndarray, other: np.ndarray) -> float:
    """Return how much of a mask's skeleton lies in another; components that thinning deletes are a few voxels."""
    line = skimage.skeletonize(one).astype(bool)
    return (line & other).sum() / max(1, line.sum())
