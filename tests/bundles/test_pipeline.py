# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What differs from task to task in a bundle: channels, voxel sizes, cases kept on disk, scores joined on the CPU."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

from monai_losses_ext.data.tasks import TASKS, Task, get_task

SPACING = (1.1, 0.9, 3.0)
# Four channels as stored and on disk; resampled and on disk; two channels, resampled and in memory.
KINDS = ["Task01_BrainTumour", "Task03_Liver", "Task05_Prostate"]


@pytest.fixture(params=KINDS)
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


@pytest.fixture
def data(task: Task, tmp_path: Path) -> Path:
    """Return three cases in the task's layout: a bright ball in a box, its axes flipped, in voxels of another size."""
    folder = tmp_path / task.name
    low, high = task.intensity.get("low", 50), task.intensity.get("high", 400)
    cases = []
    for i, shape in enumerate([(44, 52, 18), (46, 50, 17), (40, 54, 20)]):
        axes = [(np.arange(n) - n / 2 + i) * mm for n, mm in zip(shape, SPACING, strict=True)]
        ball = np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij")), axis=0) < 12
        channels = [np.where(ball, high, low)] + [np.full(shape, low + 1)] * (len(task.channels) - 1)
        image = np.stack(channels, axis=-1).astype(np.float32)
        affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
        affine[:3, 3] = (20, -7, 3 * i)
        case = {"image": f"imagesTr/case_{i}.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"}
        for path, volume in ((case["image"], image.squeeze()), (case["label"], ball.astype(np.uint8))):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, affine), folder / path)
        cases.append(case)
    (folder / "dataset.json").write_text(json.dumps({"training": cases}))
    return folder


def workflow(bundle: Path, task: Task, root: Path, *names: str, **overrides: Any) -> ConfigWorkflow:
    """Return the workflow of the task's bundle with a network of one 1x1x1 convolution."""
    files = [str(bundle.parent / task.bundle / "configs" / f"{name}.json") for name in names]
    shape = {"in_channels": len(task.channels), "out_channels": len(task.labels), "kernel_size": 1}
    small = {"network_def": {"_target_": "torch.nn.Conv3d", **shape}, "patch_size": [16, 16, 16], "device": "cpu"}
    given = {"bundle_root": str(root), **small, **overrides}
    made = ConfigWorkflow(files, workflow_type="train", logging_file=False, **given)
    made.initialize()
    return made


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_references_resolve_and_inference_prepares_as_validation_does(bundle: Path, task: Task, tmp_path: Path) -> None:
    parsers = {}
    for name, files in {"train": ["train"], "evaluate": ["train", "evaluate"], "inference": ["inference"]}.items():
        parsers[name] = workflow(bundle, task, tmp_path, *files).parser
        items = parsers[name].ref_resolver.items
        for id, item in items.items():
            assert not [ref for ref in ReferenceResolver.find_refs_in_config(item.get_config(), id) if ref not in items]
    own = ("CheckCased", "CheckImaged")  # which make no other voxels
    prepared = {
        name: [step for step in parsers[name].get(place) if step["_target_"].split(".")[-1] not in own]
        for name, place in {
            "train": "validate#preprocessing#transforms",
            "inference": "preprocessing#transforms",
        }.items()
    }
    assert [{**step, "keys": "image"} for step in prepared["train"]] == prepared["inference"]
    assert len(prepared["inference"]) >= 5


def threshold(task: Task, path: Path) -> None:
    """Save the weights of a network that finds what is bright in the first channel, halfway after normalization."""
    rule = task.intensity
    value = ((rule["low"] + rule["high"]) / 2 - rule["mean"]) / rule["std"] if rule["rule"] == "window" else 1.5
    weight = torch.zeros(len(task.labels), len(task.channels), 1, 1, 1)
    weight[1, 0] = 1
    bias = torch.tensor([0, -value, *[-99.0] * (len(task.labels) - 2)])
    torch.save({"weight": weight, "bias": bias}, path)


def test_perfect_network_scores_in_native_space(bundle: Path, task: Task, data: Path, tmp_path: Path) -> None:
    """From file to score against the untouched label: orientation, voxel size and normalization, there and back."""
    threshold(task, tmp_path / "model.pt")
    common = {"dataset_dir": str(data), "ckpt_path": str(tmp_path / "model.pt"), "patch_size": [32, 32, 32]}
    workflow(bundle, task, tmp_path, "train", "evaluate", **common).run()
    (report,) = (tmp_path / "output").glob("evaluate_*/evaluation.csv")
    with open(report, newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["dice"]) > (0.97 if task.training.spacing_mm else 0.999)
    workflow(bundle, task, tmp_path, "inference", **{**common, "dataset_dir": str(data / "imagesTr")}).run()
    for path in (data / "labelsTr").iterdir():
        label = nib.load(path)
        prediction = nib.load(tmp_path / "output" / "predictions" / path.name.replace(".nii.gz", "_seg.nii.gz"))
        np.testing.assert_allclose(prediction.affine, label.affine, atol=1e-4)
        predicted, true = np.asarray(prediction.dataobj) == 1, np.asarray(label.dataobj) == 1
        assert 2 * (predicted & true).sum() / (predicted.sum() + true.sum()) > 0.97


def test_patches_hold_image_and_label_together(bundle: Path, task: Task, data: Path, tmp_path: Path) -> None:
    parser = workflow(bundle, task, tmp_path, "train", dataset_dir=str(data)).parser
    dataset = parser.get_parsed_content("train#dataset")
    with_ball = 0
    for epoch in (1, 2, 3):
        dataset.set_epoch(epoch)
        patches = dataset[0]
        assert len(patches) == task.training.patches_per_case
        for patch in patches:
            image, label = patch["image"], patch["label"]
            assert image.shape == (len(task.channels), 16, 16, 16) and label.shape == (1, 16, 16, 16)
            assert set(patch) == {"image", "label"} and image.dtype == label.dtype == torch.float32
            if 100 < (label == 1).sum() < 16**3 - 100:
                with_ball += 1
                assert image[:1][label == 1].mean() > image[:1][label == 0].mean() + 0.3
    assert with_ball > 0
    batches = list(parser.get_parsed_content("train#dataloader"))
    assert len(batches[0]["image"]) == parser.get("batch_size") * task.training.patches_per_case
    cached = tmp_path / "output" / "cache"
    assert cached.is_dir() == task.training.cache_on_disk
    if task.training.cache_on_disk:
        assert len(list(cached.glob("*.pt"))) == len(dataset)
