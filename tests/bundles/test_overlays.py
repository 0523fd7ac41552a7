# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlays of ``configs/``: every one on every bundle merges and resolves, and what each does in a training."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles.helpers import REPOSITORY, bundle_run, on_path, only_run, only_run_folder, user_error
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_losses_ext.bundlekit.zoo import small_patch, unresolved
from monai_losses_ext.data.phantoms import LEAST_VOXELS, make_phantoms
from monai_losses_ext.data.tasks import TASKS, Task
from monai_losses_ext.losses import boundary, regions, skeleton, voxel_weight
from monai_losses_ext.losses.factory import BY_NAME

OVERLAYS = REPOSITORY / "configs"
FILES = [file.relative_to(OVERLAYS).as_posix() for file in sorted(OVERLAYS.rglob("*.json"))]
NAMES = [name for name in FILES if not name.endswith(".schema.json")]
LOSSES = [name for name in NAMES if name.startswith("losses/")]
# As few trainings as touch every bundle and every overlay.
PAIRS = [(list(TASKS.values())[i % len(TASKS)], NAMES[i % len(NAMES)]) for i in range(max(len(TASKS), len(NAMES)))]
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [2, 4],
    "strides": [2],
}


def content(name: str) -> dict[str, Any]:
    """Return an overlay."""
    return json.loads((OVERLAYS / name).read_text(encoding="utf-8"))


def train_config(task: Task) -> str:
    """Return the path of a committed bundle's training config."""
    return str(REPOSITORY / "bundles" / task.bundle / "configs" / "train.json")


def slots(overlay: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the name of each place that an overlay sets, without the notes; ``+name`` of a dictionary sets its keys."""
    for key, value in overlay.items():
        name = prefix + key.lstrip("+")
        if key.startswith("+") and isinstance(value, dict):
            yield from slots(value, f"{name}#")
        elif key != "_note_":
            yield name


@pytest.mark.parametrize("name", NAMES)
def test_overlay_says_what_it_is_and_sets_known_slots_alone(name: str) -> None:
    """MONAI takes a misspelt name silently."""
    overlay = content(name)
    assert len(overlay["_note_"]) > 20
    assert all(len(text) <= 100 for text in overlay.values() if str(text).startswith("$"))
    for task in TASKS.values():
        config = ConfigParser(ConfigParser.load_config_file(train_config(task)))
        assert [slot for slot in slots(overlay) if slot not in config] == []


def test_slots_are_seen_at_any_depth() -> None:
    overlay = {"_note_": "", "+loss": {"confg": 1, "device": 2}, "+train#handlers": [], "loss#_target_": "", "epoch": 1}
    assert [*slots(overlay)] == ["loss#confg", "loss#device", "train#handlers", "loss#_target_", "epoch"]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_overlay_resolves_on_every_bundle(task: Task) -> None:
    for name in NAMES:
        parser = ConfigParser()
        parser.read_config([train_config(task), str(OVERLAYS / name)])
        assert [*unresolved(parser)] == [], name


def test_every_loss_has_an_overlay_that_swaps_the_class_of_any_bundles_loss() -> None:
    compounds = {"dice_focal_boundary", "compound_learnable", "boundary_weights", "class_balance"}
    assert {Path(name).stem for name in LOSSES} == set(BY_NAME) - {"compound"} | compounds
    for name in LOSSES:
        assert content(name)["loss#_target_"] == "monai_losses_ext.get_loss"
        assert content(name)["+loss"] == {"config": "@loss_config", "device": "@device"}


# A loss of the zoo's kind, its number of channels, and the channels that hold foreground.
HEADS = {
    "softmax": ({"_target_": "DiceLoss", "to_onehot_y": True, "softmax": True}, 3, [1, 2]),
    "regions": ({"_target_": "DiceLoss", "sigmoid": True}, 3, [0, 1, 2]),
    "binary sigmoid": ({"_target_": "DiceLoss", "sigmoid": True}, 1, [0]),
    "binary softmax": ({"_target_": "DiceLoss", "to_onehot_y": True, "softmax": True}, 2, [1]),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_foreground_channel_is_trained(name: str, head: str) -> None:
    """None is left out as background that is none, nor gets a hundredth of what another one gets."""
    flags, channels, foreground = HEADS[head]
    parser = ConfigParser({"loss": flags, "device": "cpu", "network": "$torch.nn.Identity()"})
    overlay = {key: value for key, value in content(name).items() if key.removeprefix("+").startswith("loss")}
    parser.update({key: value for key, value in overlay.items() if not key.startswith("+")})
    parser["loss"] = {**parser["loss"], **overlay["+loss"]}
    labels = torch.zeros(2, 1, 12, 12, 12)
    labels[:, :, 2:7, 2:7, 2:7] = 1
    labels[:, :, 7:10, 3:8, 4:9] = min(2, max(channels - 1, 1))
    if "sigmoid" in flags:  # overlapping regions of like size
        labels = torch.cat([labels > 0, labels > 0, labels == 1][:channels], dim=1).float()
    logits = torch.randn(2, channels, 12, 12, 12, generator=torch.manual_seed(0)).requires_grad_()
    loss = parser.get_parsed_content("loss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # voxels without an affine count as 1 mm
        loss(logits, labels).backward()
    assert logits.grad is not None
    gradients = logits.grad.abs().sum(dim=(0, 2, 3, 4))[foreground]
    assert (gradients > 0.1 * gradients.max()).all(), gradients


@pytest.mark.parametrize("name", LOSSES)
def test_no_overlay_says_whether_the_background_counts(name: str) -> None:
    """That is the bundle's to say, where it has a background."""
    assert "include_background" not in json.dumps(content(name))


def test_bundles_own_weights_are_kept() -> None:
    parser = ConfigParser({"device": "cpu"})
    parser["loss"] = {"_target_": "DiceCELoss", "softmax": True, "lambda_dice": 0.3, "lambda_ce": 0.6}
    overlay = content("losses/dice_ce.json")
    parser["loss_config"] = overlay["loss_config"]
    parser["loss"] = {**parser["loss"], **overlay["+loss"], "_target_": overlay["loss#_target_"]}
    assert parser.get_parsed_content("loss").get_weights() == {"dice": 0.3, "cross_entropy": 0.6}


def miniature(task: Task, out: Path, *overlays: str, **overrides: Any) -> ConfigWorkflow:
    """Return one epoch of a task's committed bundle with overlays, on small phantoms; all it writes is in ``out``."""
    network = {**task.training.network_def, "filters": [8] * len(task.training.network_def["filters"])}
    files = [train_config(task), *(str(OVERLAYS / name) for name in overlays)]
    small = {
        "network_def": network,
        "patch_size": small_patch(network, task.training.patch_size, LEAST_VOXELS),
        "dataset_dir": str(make_phantoms(task, out / "data", 3, scale=1e-3)),
        "output_dir": str(out / "output"),
        "epochs": 1,
        "is_not_rank0": True,  # which writes nothing
        **overrides,
    }
    on_path(REPOSITORY / "bundles" / task.bundle)
    workflow = ConfigWorkflow(files, logging_file=False, **small)
    workflow.initialize()
    return workflow


@pytest.mark.parametrize(("task", "name"), PAIRS, ids=lambda value: getattr(value, "bundle", value))
def test_overlay_trains(task: Task, name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # the volumes are too small to share
    workflow = miniature(task, tmp_path, name)
    weights = [w.detach().clone() for w in workflow.parser.get_parsed_content("network").parameters()]
    workflow.run()
    trained = workflow.parser.get_parsed_content("network").parameters()
    assert any(not torch.equal(before, after) for before, after in zip(weights, trained, strict=True))
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    assert torch.tensor([*metrics.values()]).isfinite().all()
    config = content(name).get("loss_config")
    if config is not None:
        loss = workflow.parser.get_parsed_content("loss")
        assert isinstance(loss, BY_NAME[config["type"]])


def test_tracking_goes_where_the_overlay_says_for_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{tmp_path}/runs.db"
    task = TASKS["Task04_Hippocampus"]
    workflow = miniature(task, tmp_path, "tracking.json", is_not_rank0=False, tracking_uri=store, batch_size=1)
    assert content("tracking.json")["tracking_uri"].startswith("http://")
    workflow.run()
    run = only_run(store, content("tracking.json")["experiment_name"])
    assert set(run.history("loss")) == {1}  # of the epoch
    assert set(run.history("iteration_loss")) == {1, 2}  # of each step


def test_smoke_run_is_short_and_leaves_trained_weights_alone(tmp_path: Path) -> None:
    task = TASKS["Task04_Hippocampus"]
    bundle = tmp_path / task.bundle
    shutil.copytree(REPOSITORY / "bundles" / task.bundle, bundle, ignore=shutil.ignore_patterns("*.pt", "output"))
    (bundle / "models" / "model.pt").write_text("trained")
    data = make_phantoms(task, tmp_path / "data", 12, scale=1e-3)
    files = [str(bundle / "configs" / "train.json"), str(OVERLAYS / "smoke.json")]
    small = {"network_def": NETWORK, "patch_size": [16, 16, 16], "dataset_dir": str(data)}
    on_path(bundle)
    workflow = ConfigWorkflow(files, logging_file=False, **small)
    workflow.initialize()
    get = workflow.parser.get_parsed_content
    assert [len(get(f"{part}#dataset")) for part in ("train", "validate")] == [4, 2]
    workflow.run()
    assert get("train#trainer").state.epoch == 2
    assert [path.name for path in (bundle / "models").glob("*.pt")] == ["model.pt"]
    assert (bundle / "models" / "model.pt").read_text() == "trained"
    assert (only_run_folder(bundle / "output" / "smoke") / "model.pt").is_file()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_patch_of_the_smoke_run_is_legal(task: Task) -> None:
    patch = content("smoke.json")["patch_size"]
    with torch.device("meta"):
        network = ConfigParser({"network": task.training.network_def}).get_parsed_content("network").train()
        assert network(torch.empty(2, len(task.channels), *patch)).shape == (2, len(task.labels), *patch)


def test_mixed_precision_is_the_trainers(tmp_path: Path) -> None:
    """Without a GPU the trainer only says so; the switch itself reaches it."""
    workflow = miniature(TASKS["Task04_Hippocampus"], tmp_path, "mixed_precision.json")
    assert workflow.parser.get_parsed_content("train#trainer").amp is True
    assert workflow.parser.get_parsed_content("amp") is False


def test_loss_is_one_flag_of_the_command_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """The text goes through the shell's and MONAI's own parsing, and over an overlay's loss."""
    files = f"['{bundle / 'configs' / 'train.json'}','{OVERLAYS / 'losses' / 'dice.json'}']"
    small = ["--network_def", str(NETWORK), "--patch_size", "[16,16,16]", "--epochs", "1"]
    places = ["--dataset_dir", str(dataset), "--output_dir", str(tmp_path)]
    text = "{'type': 'compound', 'components': [{'type': 'tversky', 'beta': 0.7}, {'type': 'focal'}]}"
    printed = bundle_run(tmp_path, files, *small, *places, "--loss_config", text)
    assert "loss_tversky " in printed
    assert "loss_focal " in printed
    ran = json.loads((only_run_folder(tmp_path) / "train_config.json").read_text())["loss_config"]
    assert ran == {"type": "compound", "components": [{"type": "tversky", "beta": 0.7}, {"type": "focal"}]}
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bundle_run(tmp_path, files, *small, *places, "--loss_config", text.replace("focal", "focl"))
    (line,) = [line for line in caught.value.stderr.splitlines() if line.startswith("error: ")]
    assert "Did you mean 'focal'?" in line


def overlaid(bundle: Path, dataset: Path, out: Path, *overlays: str | Path, **overrides: Any) -> ConfigWorkflow:
    """Return the training of a bundle with overlays, small and in a folder of its own."""
    root = out / "bundle"
    shutil.copytree(bundle, root)
    files = [str(root / "configs" / "train.json"), *(str(OVERLAYS / overlay) for overlay in overlays)]
    small = {"network_def": NETWORK, "patch_size": [16, 16, 16], "epochs": 2, "device": "cpu", **overrides}
    on_path(root)
    workflow = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset), **small)
    workflow.initialize()
    return workflow


def test_boundary_with_precomputed_maps_and_a_schedule(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recompute(*_: Any) -> None:
        raise AssertionError("the map was computed in the loss")

    monkeypatch.setattr(boundary, "signed_distance", recompute)
    overlays = ("precomputed_maps.json", "losses/dice_focal_boundary.json")
    workflow = overlaid(bundle, dataset, tmp_path, *overlays)
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["weight_boundary"] == pytest.approx(0.02)
    assert metrics["weight_dice"] + metrics["weight_focal"] == pytest.approx(0.98)
    assert metrics["loss_boundary"] > 0
    case = workflow.parser.get_parsed_content("train#dataset")[0][0]
    assert case["distance"].shape == (3, 16, 16, 16) and isinstance(case["image"], torch.Tensor)
    assert not [*(tmp_path / "bundle" / "models").glob("*.pt")]
    written = sorted(path.name for path in only_run_folder(tmp_path / "bundle" / "output").glob("*.pt"))
    assert written == ["model.pt", "model_final.pt", "training_state.pt"]


@pytest.mark.parametrize(
    ("overlay", "loss", "key"),
    [("regions", "cc_dice", "regions"), ("regions", "blob", "regions"), ("skeletons", "skeleton_recall", "skeleton")],
)
def test_regions_and_skeletons_once_per_case(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: str, loss: str, key: str
) -> None:
    def remake(*_: Any) -> None:
        raise AssertionError("the map was made in the loss")

    monkeypatch.setattr(regions, "regions_of", remake)
    monkeypatch.setattr(skeleton, "skeleton_of", remake)
    files = (f"precomputed_{overlay}.json", f"losses/{loss}.json")
    workflow = overlaid(bundle, dataset, tmp_path, *files, epochs=1)
    workflow.run()
    name = [*workflow.parser.get_parsed_content("loss").get_weights()][-1]
    assert workflow.parser.get_parsed_content("train#trainer").state.metrics[f"loss_{name}"] > 0
    places, inside = 0, 0
    for patches in workflow.parser.get_parsed_content("train#dataset"):
        for case in patches:
            label, made = case["label"].as_tensor(), case[key].as_tensor()
            assert torch.equal(made, made.round())
            if key == "skeleton":
                assert made.shape == (1, 16, 16, 16)
                places, inside = places + (made > 0).sum(), inside + (label[made > 0] == made[made > 0]).sum()
            else:
                assert made.shape == (2, 16, 16, 16)
                whole = made.flatten(1) > 0  # each voxel of the case is nearest to some component; padding to none
                places, inside = places + label.numel(), inside + whole.all(0).sum()
    assert inside > 0.5 * places > 0


@pytest.mark.parametrize("loss", ["cc_dice", "skeleton_recall"])
def test_without_the_overlay_maps_are_made_in_the_loss(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    made = []
    for module, name in ((regions, "regions_of"), (skeleton, "skeleton_of")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function: made.append(1) or f(*a))
    overlaid(bundle, dataset, tmp_path, f"losses/{loss}.json", epochs=1).run()
    assert made


def test_weights_once_per_case_reach_any_loss(
    bundle: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remake(*_: Any) -> None:
        raise AssertionError("the weights were made in the loss")

    monkeypatch.setattr(voxel_weight, "voxel_weights", remake)
    files = ("precomputed_class_balance.json", "precomputed_boundary_weights.json", "losses/boundary_weights.json")
    workflow = overlaid(bundle, dataset, tmp_path, *files, epochs=1)
    workflow.run()
    assert workflow.parser.get_parsed_content("train#trainer").state.metrics["loss_dice"] > 0
    case = workflow.parser.get_parsed_content("train#dataset")[0][0]
    label, weight = case["label"].as_tensor(), case["weight"].as_tensor()
    assert weight.shape == label.shape and weight.min() >= 0
    assert weight[label > 0].mean() > 2 * weight[label == 0].mean()  # the background has most voxels


def test_class_balance_by_the_stored_statistics_is_one_flag(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    flag = {"extra_transforms#0#class_weight": "@balanced_weights", "statistics": str(tmp_path / "none.json")}
    workflow = overlaid(bundle, dataset, tmp_path, "precomputed_class_balance.json", epochs=1, **flag)
    assert "statistics: must be made first" in user_error(workflow.run)


def test_boundary_computed_in_the_loss(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "losses/dice_focal_boundary.json", epochs=1)
    workflow.run()
    assert workflow.parser.get_parsed_content("train#trainer").state.metrics["loss_boundary"] > 0


def test_maps_are_of_no_use_to_other_losses_and_do_no_harm(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "precomputed_maps.json", epochs=1)
    workflow.run()
    assert "loss_boundary" not in workflow.parser.get_parsed_content("train#trainer").state.metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss_config": "dice"}, "schedules: must be of a compound loss; got 'DiceLoss'."),
        ({"loss_config": "dice_ce"}, "weights: must be one of dice, ce; got "),
        ({"train#trainer#schedules#step": 2}, "schedule: rebalance: step: must be a number"),
        ({"train#trainer#schedules#type": "rebalanc"}, "schedule: type: must be one of constant, linear"),
    ],
)
def test_a_wrong_schedule_is_one_line(
    bundle: Path, dataset: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, "losses/dice_focal_boundary.json")
    for name, value in overrides.items():
        workflow.parser[name] = value
    assert user_error(workflow.run).startswith(message)


def test_missing_maps_are_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    prepare = {"_target_": "monai_losses_ext.transforms.prepare_batch_with_distance", "_mode_": "callable"}
    workflow = overlaid(bundle, dataset, tmp_path, prepare_batch=prepare)
    assert "Add monai_losses_ext.transforms.SignedDistanceMapd" in user_error(workflow.run)


def test_learned_weights_with_precomputed_maps(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    overlays = ("precomputed_maps.json", "losses/compound_learnable.json")
    workflow = overlaid(bundle, dataset, tmp_path, *overlays)
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    weights = [metrics[f"weight_{name}"] for name in ("dice", "focal", "boundary")]
    assert sum(weights) == pytest.approx(1)
    assert weights != pytest.approx([0.5, 0.3, 0.2], abs=1e-4)


def test_learned_weights_are_one_flag_away(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    workflow = overlaid(bundle, dataset, tmp_path, epochs=1, **{"loss_config#learnable_weights": True})
    workflow.run()
    metrics = workflow.parser.get_parsed_content("train#trainer").state.metrics
    assert metrics["weight_dice"] + metrics["weight_cross_entropy"] == pytest.approx(1)
    assert metrics["weight_dice"] != 0.5
