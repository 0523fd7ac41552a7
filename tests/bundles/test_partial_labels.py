# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Cases that are labeled in part, and weights of voxels, from dataset.json to the loss of a bundle."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundles.helpers import bundle_run, only_run_folder, user_error
from bundles.test_configs import tiny, workflow

from monai_losses_ext.cli import main
from monai_losses_ext.data.dataset import weight_keys
from monai_losses_ext.losses.base import VoxelLoss

DOCS = Path(__file__).parents[2] / "docs" / "training" / "partial_labels.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_commands_of_the_docs_train_one_model_on_two_data_sets(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "bundles" / bundle.name)
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCKS:
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
            continue
        for line in block.splitlines():
            python, dash_m, module, *words = shlex.split(line)
            assert (python, dash_m) == ("python", "-m")
            if module == "monai_losses_ext":
                assert main(words) == 0
            else:
                bundle_run(tmp_path, words[2], *words[3:])
    said = capfd.readouterr().out
    assert "label 1 (anterior): 5 of 10 cases are annotated for it" in said
    assert "warning" not in said
    (plain,) = (tmp_path / "bundles" / bundle.name / "output").glob("train_dice_*")
    assert (plain / "finished.json").is_file()
    weighted = only_run_folder(tmp_path / "bundles" / bundle.name / "output", "train_cross_entropy")
    stored = json.loads((tmp_path / "data/merged/statistics.json").read_text())
    state = torch.load(weighted / "training_state.pt", weights_only=False)
    told = [row["balanced_weight"] for row in stored["classes"]]
    assert any(np.allclose(value, told) for value in of_length(state, 3)), "the weights are in the loss's state"


def of_length(state: object, n: int) -> list[list[float]]:
    """Return the tensors of one axis and a length in nested dictionaries."""
    if isinstance(state, dict):
        return [found for value in state.values() for found in of_length(value, n)]
    is_vector = isinstance(state, torch.Tensor) and state.shape == (n,)
    return [state.tolist()] if is_vector else []  # type: ignore[attr-defined]


@pytest.fixture
def mixed(dataset: Path, tmp_path: Path) -> Path:
    """Return a dataset in which two cases are annotated in part and two have weights, twice the place from the left."""
    folder = Path(shutil.copytree(dataset, tmp_path / "mixed"))
    index = json.loads((folder / "dataset.json").read_text())
    for i, case in enumerate(index["training"]):
        if i < 2:
            case["annotated"] = [1]
        if i % 2:
            label = nib.load(folder / case["label"])
            weight = np.broadcast_to(2.0 * np.arange(label.shape[0])[:, None, None], label.shape)
            case["weight"] = f"weight_{i}.nii.gz"
            nib.save(nib.Nifti1Image(weight.astype(np.float32), label.affine), folder / case["weight"])
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def test_batches_hold_both_and_the_loss_gets_them(bundle: Path, mixed: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(mixed), "bundle_root": str(tmp_path), "network_def": tiny(), "is_not_rank0": True}
    made = workflow(bundle, **options, patch_size=[16, 16, 16], cache_rate=0.0, batch_size=5)
    (batch,) = made.parser.get_parsed_content("train#dataloader")
    files = [Path(name).name for name in batch["label"].meta["filename_or_obj"]]
    in_part = [name in ("case_0.nii.gz", "case_1.nii.gz") for name in files]
    assert batch["annotated"].tolist() == [[True, True, not part] for part in in_part]
    assert batch["annotated"].dtype == torch.bool
    assert batch["weight"].shape == batch["label"].shape
    for name, weight in zip(files, batch["weight"].as_tensor(), strict=True):
        has_file = int(re.findall(r"\d", name)[0]) % 2
        assert weight.max() > 5 if has_file else 0.99 < weight.max() < 1.01
    image, target = made.parser.get_parsed_content("prepare_batch")(batch, torch.device("cpu"))
    assert set(target) == {"label", "weight", "annotated"}
    loss = made.parser.get_parsed_content("loss")
    logits = torch.randn(*image.shape[:1], 3, *image.shape[2:], requires_grad=True)
    loss(logits, target).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert not torch.equal(loss(logits, target), loss(logits, target["label"]))


def test_weights_move_with_their_label(bundle: Path, mixed: Path, tmp_path: Path) -> None:
    """A weight that is the label itself stays the label but where interpolation blurs its border."""
    index = json.loads((mixed / "dataset.json").read_text())
    for case in index["training"]:
        case["weight"] = case["label"]
    (mixed / "dataset.json").write_text(json.dumps(index))
    options = {"dataset_dir": str(mixed), "bundle_root": str(tmp_path), "network_def": tiny(), "is_not_rank0": True}
    made = workflow(bundle, **options, patch_size=[16, 16, 16], cache_rate=0.0)
    for batch in made.parser.get_parsed_content("train#dataloader"):
        label, weight = (batch[key].as_tensor() for key in ("label", "weight"))
        assert ((label - weight).abs() < 0.6).float().mean() > 0.95
        assert (label - weight).abs().max() <= 2
        assert label.max() == 2


def test_validation_knows_what_was_annotated_and_no_weights(bundle: Path, mixed: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(mixed), "bundle_root": str(tmp_path), "validation_fraction": 0.9}
    made = workflow(bundle, **options)
    batches = list(made.parser.get_parsed_content("validate#dataloader"))
    assert len(batches) == 5
    assert all("weight" not in batch and batch["annotated"].shape == (1, 3) for batch in batches)


def test_other_data_sets_are_as_they_were(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(dataset), "bundle_root": str(tmp_path), "network_def": tiny(), "is_not_rank0": True}
    made = workflow(bundle, **options, patch_size=[16, 16, 16], cache_rate=0.0)
    batch = next(iter(made.parser.get_parsed_content("train#dataloader")))
    assert {"annotated", "weight"}.isdisjoint(batch)
    assert weight_keys(dataset) == []
    _, label = made.parser.get_parsed_content("prepare_batch")(batch, torch.device("cpu"))
    assert isinstance(label, torch.Tensor)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w - 1, "weight_1.nii.gz has .* voxels below 0, down to -1"),
        (lambda w: np.where(w == 2, np.nan, w), "weight_1.nii.gz has .* voxels that are NaN or infinite"),
        (lambda w: w[1:], "weight_1.nii.gz has the shape .*; the image has"),
    ],
    ids=["negative", "NaN", "shape"],
)
def test_a_wrong_weight_stops_a_training(
    bundle: Path, mixed: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    path = mixed / "weight_1.nii.gz"
    volume = nib.load(path)
    changed = spoil(volume.get_fdata()).astype(np.float32)  # type: ignore[operator]
    nib.save(nib.Nifti1Image(changed, volume.affine), path)
    options = {"dataset_dir": str(mixed), "bundle_root": str(tmp_path), "network_def": tiny(), "is_not_rank0": True}
    made = workflow(bundle, **options, patch_size=[16, 16, 16], validation_fraction=0.0, cache_rate=0.0)
    said = user_error(lambda: list(made.parser.get_parsed_content("train#dataset")))
    assert re.match(f"case case_1: .*{message}.*data check", said)


def test_balanced_is_resolved_from_the_statistics_or_says_the_command(
    bundle: Path, mixed: Path, tmp_path: Path
) -> None:
    index = json.loads((mixed / "dataset.json").read_text())
    names = {"0": "background", "1": "anterior", "2": "posterior"}
    (mixed / "dataset.json").write_text(json.dumps({**index, "labels": names, "modality": {"0": "MRI"}}))
    config = {"type": "compound", "components": ["dice", {"type": "cross_entropy", "class_weight": "balanced"}]}
    options = {"dataset_dir": str(mixed), "bundle_root": str(tmp_path), "loss_config": config}

    def built(**others: object) -> VoxelLoss:
        loss = workflow(bundle, **options, **others).parser.get_parsed_content("loss")
        return loss.losses[1]

    said = user_error(built)
    command = f"python -m monai_losses_ext data statistics --dataset_dir {mixed}"
    assert said.startswith("loss: components[1]: class_weight: statistics: must be made first")
    assert command in said
    assert main(shlex.split(command)[3:]) == 0
    stored = json.loads((mixed / "statistics.json").read_text())
    told = [row["balanced_weight"] for row in stored["classes"]]
    assert built().class_weight.tolist() == pytest.approx(told)
    assert "those of another ignore_label" in user_error(lambda: built(ignore_label=255))
    assert "--ignore_label 255" in user_error(lambda: built(ignore_label=255))
    elsewhere = tmp_path / "elsewhere.json"
    assert f"--out {elsewhere}" in user_error(lambda: built(statistics=str(elsewhere)))
    assert main([*shlex.split(command)[3:], "--ignore_label", "255", "--out", str(elsewhere)]) == 0
    assert built(statistics=str(elsewhere), ignore_label=255).class_weight.tolist() == pytest.approx(told)
    (mixed / "dataset.json").write_text((mixed / "dataset.json").read_text() + " ")
    assert "those of other cases or files" in user_error(built)


def test_a_loss_of_monai_alone_is_refused_where_cases_say_more(
    bundle: Path, mixed: Path, dataset: Path, tmp_path: Path
) -> None:
    config = {"type": "monai.DiceCELoss", "to_onehot_y": True, "softmax": True}

    def check(folder: Path) -> None:
        made = workflow(bundle, dataset_dir=str(folder), bundle_root=str(tmp_path), loss_config=config)
        made.parser.get_parsed_content("running_config").check_loss(made.parser.get_parsed_content("loss"))

    check(dataset)
    assert user_error(lambda: check(mixed)) == (
        "loss_config: must be a loss of this package, since cases of dataset.json have annotated and weight; got "
        "'DiceCELoss'."
    )
