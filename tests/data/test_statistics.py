# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The statistics of a dataset against a loop over its voxels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_losses_ext import get_loss
from monai_losses_ext.cli import main
from monai_losses_ext.data.statistics import balanced_weights, dataset_statistics
from monai_losses_ext.errors import UserError

SPACINGS = [(1.0, 1.0, 1.0), (0.5, 0.5, 4.0), (2.0, 1.0, 1.0), (1.0, 1.0, 3.0)]
LABELS = {"0": "background", "1": "a", "2": "b", "3": "c"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return four cases of random labels 0 to 3, and 255, of other shapes and spacings, three of them in part."""
    rng = np.random.default_rng(1)
    cases: list[dict[str, Any]] = []
    for i, spacing in enumerate(SPACINGS):
        shape = tuple(int(n) for n in rng.integers(4, 8, 3))
        label = rng.choice([0, 1, 2, 3, 255], shape, p=[0.6, 0.2, 0.1, 0.05, 0.05]).astype(np.uint8)
        case: dict[str, Any] = {"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"}
        for key, voxels in (("image", rng.random(shape).astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1.0])), tmp_path / case[key])
        cases.append(case)
    cases[1]["annotated"], cases[2]["annotated"], cases[3]["annotated"] = [1], [2, 3], [1, 2]
    index = {"name": "mine", "modality": {"0": "MRI"}, "labels": LABELS, "training": cases}
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    return tmp_path


def looped(folder: Path, num_classes: int, sources: list[list[int]]) -> list[dict[str, float]]:
    """Count voxel by voxel; ``sources`` are the labels of each class."""
    cases = json.loads((folder / "dataset.json").read_text())["training"]
    rows = []
    for value in range(num_classes):
        n = total = present = annotated = 0
        ml = total_ml = 0.0
        for case, spacing in zip(cases, SPACINGS, strict=True):
            known = [set(case.get("annotated", [1, 2, 3])) >= set(of_class) for of_class in sources]
            known[0] = True
            if not known[value]:
                continue
            annotated += 1
            here = 0
            for voxel in np.asarray(nib.load(folder / case["label"]).dataobj).flatten().tolist():
                if voxel == 255:
                    continue
                (of_voxel,) = [i for i, of_class in enumerate(sources) if voxel in of_class]
                is_class = (of_voxel if known[of_voxel] else 0) == value
                here += is_class
                total += 1
                ml += is_class * np.prod(spacing) / 1000
                total_ml += np.prod(spacing) / 1000
            n += here
            present += here > 0
        rows.append(
            {
                "cases_annotated": annotated,
                "cases_present": present,
                "voxels": n,
                "voxel_share": n / total,
                "mean_volume_ml": ml / annotated,
                "volume_share": ml / total_ml,
            }
        )
    inverse = [1 / row["voxel_share"] for row in rows]
    for row, value in zip(rows, inverse, strict=True):
        row["balanced_weight"] = value / (sum(inverse) / len(inverse))
    return rows


@pytest.mark.parametrize(
    ("label_map", "sources"),
    [(None, [[0], [1], [2], [3]]), ({"3": 1}, [[0], [1, 3], [2]]), ({"1": 0, "2": 1, "3": 2}, [[0, 1], [2], [3]])],
)
def test_numbers_are_those_of_a_loop(folder: Path, label_map: Any, sources: list[list[int]]) -> None:
    found = dataset_statistics(folder, ignore_label=255, label_map=label_map)["classes"]
    for row, expected in zip(found, looped(folder, len(sources), sources), strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert np.mean([row["balanced_weight"] for row in found]) == pytest.approx(1)


def test_a_class_without_voxels_weighs_nothing_and_is_not_in_the_mean(folder: Path) -> None:
    index = json.loads((folder / "dataset.json").read_text())
    for case in index["training"]:
        case["annotated"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(index))
    found = dataset_statistics(folder, ignore_label=255)["classes"]
    assert found[3]["cases_annotated"] == found[3]["voxel_share"] == found[3]["balanced_weight"] == 0
    assert sum(row["balanced_weight"] for row in found) == pytest.approx(3)


def test_command_prints_a_table_and_keeps_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "statistics", "--dataset_dir", str(folder), "--ignore_label", "255"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert printed[-1] == str(folder / "statistics.json")
    assert [line.split()[1:4] for line in printed[2:5]] == [["a", "3", "3"], ["b", "3", "3"], ["c", "2", "2"]]
    stored = json.loads((folder / "statistics.json").read_text())
    assert stored == dataset_statistics(folder, ignore_label=255)
    told = [row["balanced_weight"] for row in stored["classes"]]
    assert balanced_weights(folder, LABELS, ignore_label=255) == told
    loss = get_loss({"type": "dice", "class_weight": "balanced"}, balanced=told)
    assert loss.class_weight.tolist() == pytest.approx(told)


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "statistics", "--dataset_dir", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: case image_0: {folder}/label_0.nii.gz has values outside 0..3")
    assert said.count("\n") == 1
    nowhere = str(folder / "absent" / "out.json")
    command = ["data", "statistics", "--dataset_dir", str(folder), "--ignore_label", "255", "--out", nowhere]
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("error: out: must be a file that can be written (No such file")
    (folder / "statistics.json").write_text("{}")
    with pytest.raises(UserError, match="^statistics: must be a file of this command: python -m .* data statistics"):
        balanced_weights(folder, LABELS, ignore_label=255)
    with pytest.raises(UserError, match="^loss: class_weight: 'balanced' is known where a dataset is"):
        get_loss({"type": "dice", "class_weight": "balanced"})
