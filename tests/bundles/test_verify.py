# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Every bundle passes ``bundles verify``, a new row needs nothing but itself, and what is wrong is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from monai_losses_ext.bundlekit import zoo
from monai_losses_ext.bundlekit.render import render_task
from monai_losses_ext.bundlekit.verify import CHECKS, Report, lacking, verify_bundle
from monai_losses_ext.cli import main
from monai_losses_ext.data.tasks import TASKS, TASKS_FILE, Task, read_tasks

REPOSITORY = Path(__file__).parents[2]
HIPPOCAMPUS = TASKS["Task04_Hippocampus"]


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all, so that they share an MLflow store."""
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the volumes are too small to share


def written(task: Task, out: Path) -> Path:
    """Render one task's bundle into a folder."""
    for name, text in render_task(task).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return out / task.bundle


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_bundle_is_verified(task: Task, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://the-users-own.invalid")  # must get none of these runs
    bundle = REPOSITORY / "bundles" / task.bundle
    before = sorted(bundle.rglob("*"))
    report = verify_bundle(task, bundle.parent, scratch)
    assert report.lines == []
    assert set(report.problems) == set(CHECKS)
    assert report.verdict.startswith("not zoo-ready: ")  # until evaluated weights are shipped
    assert sorted(bundle.rglob("*")) == before


def eleventh() -> dict[str, Any]:
    """Return a made-up row: two MRI channels, four labels, slices eight times as thick as their voxels are wide."""
    rows = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    row = next(row for row in rows if row["name"] == HIPPOCAMPUS.name)
    structure = {"shape": "ellipsoid", "radii": [8, 8, 16]}
    row |= {
        "name": "Task11_Knee",
        "bundle": "msd_knee_mri_segmentation",
        "title": "Knee segmentation",
        "source": "Scans of our own hospital",
        "license": "none",
        "authors": "A. Radiologist",
        "references": ["Radiologist, A. Knees of our own hospital (2026)."],
        "channels": ["PD", "T2"],
        "labels": ["background", "femur", "tibia", "meniscus"],
        "typical_shape": [64, 48, 10],
        "typical_spacing_mm": [0.5, 0.5, 4.0],
        "nsd_tolerance_mm": 2.0,
        "published_results": [],
        "phantom": {
            **row["phantom"],
            "background": {"tissues": [[0.1, 0.3], [0.4, 0.2]], "scale_mm": 6},
            "structures": [
                {**structure, "center": [-6, 0, 0], "labels": [1], "intensity": [0.9, 0.5]},
                {**structure, "center": [6, 0, 0], "labels": [2], "intensity": [0.7, 0.9]},
                {**structure, "center": [0, 8, 0], "radii": [4, 4, 8], "labels": [3], "intensity": [0.1, 0.9]},
            ],
        },
    }
    row["training"] |= {"patch_size": [64, 48, 8], "spacing_mm": [0.5, 0.5, 4.0]}
    flat = [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2]]
    network = {"in_channels": 2, "out_channels": 4, "strides": flat, "upsample_kernel_size": flat[1:]}
    row["training"]["network_def"] |= network
    return row


def test_an_eleventh_task_is_one_row(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps([eleventh()]))
    (task,) = read_tasks(file).values()
    bundle = written(task, tmp_path)
    texts = [path.read_text() for path in (bundle / "docs").iterdir()]
    texts.append((bundle / "configs" / "metadata.json").read_text())
    for text in texts:  # a row that began as a copy of the Decathlon's is none of it
        assert "Scans of our own hospital" in text
        assert not any(claim in text for claim in ("Decathlon", "contributors", "Vanderbilt", "safe for these"))
    assert json.loads(texts[-1])["authors"] == "A. Radiologist"
    report = verify_bundle(task, tmp_path, scratch)
    assert report.lines == []
    data = json.loads((scratch / task.name / "dataset.json").read_text())
    assert [data["modality"], data["labels"]["3"]] == [{"0": "PD", "1": "T2"}, "meniscus"]
    weights = torch.load(scratch / task.bundle / "output" / "training" / "model.pt", weights_only=True)
    assert next(iter(weights.values())).shape[1] == 2


def edited(config: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that edits one config file of a bundle."""

    def apply(bundle: Path) -> None:
        path = bundle / "configs" / f"{config}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return apply


def metadata(name: str, value: Any) -> Callable[[Path], None]:
    """Return a function that sets one value of the metadata."""

    def edit(content: dict[str, Any]) -> None:
        parser = ConfigParser(content)
        parser[name] = value

    return edited("metadata", edit)


IMAGE, PRED = "network_data_format#inputs#image", "network_data_format#outputs#pred"
FAULTS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str]] = {
    "file": (lambda bundle: (bundle / "LICENSE").unlink(), zoo.check_files, "LICENSE is absent"),
    "empty": (lambda bundle: (bundle / "docs" / "README.md").write_text(" "), zoo.check_files, "README.md is empty"),
    "key": (edited("metadata", lambda m: m.pop("authors")), zoo.check_metadata, "'authors' is a required property"),
    "tensor key": (
        edited("metadata", lambda m: m["network_data_format"]["inputs"]["image"].pop("dtype")),
        zoo.check_metadata,
        "network_data_format#inputs#image: 'dtype' is a required property",
    ),
    "kind": (metadata("references", "Simpson et al."), zoo.check_metadata, "references: 'Simpson et al.' is not of"),
    "version": (metadata("version", "0.2.0"), zoo.check_metadata, "version '0.2.0' is not in the changelog"),
    "channels": (metadata(f"{PRED}#num_channels", 2), zoo.check_metadata, "must name channels 0 to 1"),
    "reference": (
        edited("train", lambda c: c["train"]["trainer"].update(optimizer="@optimzer")),
        zoo.check_references,
        "train: train#trainer#optimizer refers to @optimzer, which is not there. Did you mean 'optimizer'?",
    ),
    "expression": (
        edited("multi_gpu_evaluate", lambda c: c.update(device="$torch.device(@sede)")),
        zoo.check_references,
        "multi_gpu_evaluate: device refers to @sede, which is not there. Did you mean 'seed'?",
    ),
    "shape": (metadata(f"{PRED}#spatial_shape", [32, 48, 16]), zoo.check_network, "[32, 48, 32], not [32, 48, 16]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault: str, tmp_path: Path) -> None:
    spoil, check, message = FAULTS[fault]
    bundle = written(HIPPOCAMPUS, tmp_path)
    assert list(check(bundle)) == []
    spoil(bundle)
    problems = list(check(bundle))
    assert any(message in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


def test_each_wrong_part_fails_its_own_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = written(HIPPOCAMPUS, tmp_path)
    metadata(f"{PRED}#num_channels", 4)(bundle)
    edited("train", lambda c: c["lr_scheduler"].update(warmup="none"))(bundle)
    edited("evaluate", lambda c: c["validate#report"].pop("csv_path"))(bundle)
    edited("inference", lambda c: c["postprocessing"]["transforms"].pop(-2))(bundle)  # the way back to the image's grid
    assert main(["bundles", "verify", "--task", HIPPOCAMPUS.name, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    failed: dict[str, str] = {}
    for line in printed.err.splitlines():
        name, check, problem = line.split(": ", 2)
        assert name == HIPPOCAMPUS.bundle
        failed[check] = problem
    assert list(failed) == ["metadata", "network", "properties", "train", "evaluate", "infer"]
    assert "channel_def must name channels 0 to 3" in failed["metadata"]
    assert "output channel number `3` doesn't match: `4`" in failed["network"]
    assert "unexpected keyword argument 'warmup'" in failed["train"]
    assert "evaluation.csv" in failed["evaluate"]
    assert "has a segmentation that does not lie on it" in failed["infer"]
    assert f"not zoo-ready: {', '.join(failed)} failed" in printed.out


def test_verdict() -> None:
    problems = {"files": [], "train": []}
    assert Report("b", lacking="", problems=problems).verdict == "zoo-ready"
    assert Report("b", lacking="no weights", problems=problems).verdict == "not zoo-ready: no weights"
    failed = Report("b", lacking="", problems={"files": [], "train": ["ValueError: no"]})
    assert failed.verdict == "not zoo-ready: train failed"
    assert failed.lines == ["b: train: ValueError: no"]


def test_weights_must_be_the_networks_own_evaluated_and_good(scratch: Path, tmp_path: Path) -> None:
    bundle = written(HIPPOCAMPUS, tmp_path)
    weights = bundle / "models" / "model.pt"
    metadata("eval_metrics", {"dice": 0.8})(bundle)
    assert lacking(bundle) == "no trained weights"
    network = ConfigParser({"network": HIPPOCAMPUS.training.network_def}).get_parsed_content("network")
    torch.save(network.state_dict(), weights)
    assert lacking(bundle) == "metadata.json records no evaluation of the weights"
    metadata("weights_sha256", "0" * 64)(bundle)
    assert lacking(bundle) == "the evaluation that metadata.json records is of other weights"
    metadata("weights_sha256", hashlib.sha256(weights.read_bytes()).hexdigest())(bundle)
    metadata("eval_metrics", {"dice": 0.0})(bundle)
    assert lacking(bundle) == "the weights' mean Dice of 0.000 is below 0.5"
    metadata("eval_metrics", {"dice": 0.8})(bundle)
    assert verify_bundle(HIPPOCAMPUS, tmp_path, scratch).verdict == "zoo-ready"
    torch.save({"other.weight": torch.zeros(1)}, weights)
    report = verify_bundle(HIPPOCAMPUS, tmp_path, scratch)
    assert report.verdict == "not zoo-ready: torchscript failed"
    assert "of another network" in report.problems["torchscript"][0]


def test_absent_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundles", "verify", "--task", HIPPOCAMPUS.name, "--out", str(tmp_path)]) == 1
    assert "bundles render" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_small_patch_passes_the_rows_own_network(task: Task) -> None:
    """In numbers, with the recipe's filters: the shapes of the full patch are checked without numbers."""
    patch = zoo.small_patch(task.training.network_def, task.training.patch_size, least=1)
    network = ConfigParser({"network": task.training.network_def}).get_parsed_content("network").eval()
    with torch.no_grad():
        output = network(torch.rand(1, len(task.channels), *patch))
    assert output.shape == (1, len(task.labels), *patch)
    assert output.isfinite().all()
