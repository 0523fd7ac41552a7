# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The configs through MONAI's own workflow class: properties, references, paths, overrides, errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ComponentLocator, ConfigComponent, ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.bundle.reference_resolver import ReferenceResolver

from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.distributed import check_share

CONFIGS = {"train": ["train"], "evaluate": ["train", "evaluate"], "inference": ["inference"]}


def tiny() -> dict[str, Any]:
    """Return a network that takes no time."""
    shape = {"channels": [2, 4], "strides": [2]}
    return {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, **shape}


def workflow(bundle: Path, name: str = "train", **overrides: Any) -> ConfigWorkflow:
    """Return an initialized workflow, as ``monai.bundle run`` makes one; nothing is built until it is asked for."""
    files = [str(bundle / "configs" / f"{config}.json") for config in CONFIGS[name]]
    kind = "infer" if name == "inference" else "train"
    made = ConfigWorkflow(files, workflow_type=kind, logging_file=False, **overrides)
    made.initialize()
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_has_monais_properties(bundle: Path, dataset: Path, tmp_path: Path, name: str) -> None:
    overrides = {"dataset_dir": str(dataset), "bundle_root": str(tmp_path), "network_def": tiny(), "is_not_rank0": True}
    assert workflow(bundle, name, **overrides).check_properties() == []


@pytest.mark.parametrize("name", CONFIGS)
def test_references_resolve(bundle: Path, name: str) -> None:
    items = workflow(bundle, name).parser.ref_resolver.items
    references = {
        (id, ref) for id, item in items.items() for ref in ReferenceResolver.find_refs_in_config(item.get_config(), id)
    }
    assert len(references) > 50
    assert [(id, ref) for id, ref in references if ref not in items] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_bare_names_are_monais_alone(bundle: Path, name: str) -> None:
    """MONAI looks for a bare name in every module called monai*, so in this package too; a second find is a warning."""
    items = workflow(bundle, name).parser.ref_resolver.items.values()
    components = [item for item in items if isinstance(item, ConfigComponent)]
    bare = {item.config["_target_"] for item in components if "." not in item.config["_target_"]}
    assert len(bare) > 5
    for target in bare:
        module = ComponentLocator().get_component_module_name(target)
        assert isinstance(module, str), f"{target} is in {module}"
        assert module.startswith("monai.")


@pytest.mark.parametrize("name", ["train", "inference"])
def test_network_fits_the_metadata(bundle: Path, name: str) -> None:
    configs = bundle / "configs"
    verify_net_in_out("network_def", str(configs / "metadata.json"), str(configs / f"{name}.json"), device="cpu")


def test_network_keeps_the_patch_shape(bundle: Path) -> None:
    parser = workflow(bundle).parser
    network, patch = parser.get_parsed_content("network_def"), parser.get_parsed_content("patch_size")
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)


def test_inference_prepares_images_as_validation_does(bundle: Path) -> None:
    validation = workflow(bundle).parser.get("validate#preprocessing#transforms")
    parser = workflow(bundle, "inference").parser
    first, *others = parser.get("preprocessing#transforms")
    assert "(@load, case)" in first
    inference = [parser.get("load"), *others]
    assert [{**step, "keys": "image"} for step in validation if "keys" in step] == inference  # checks have none


@pytest.mark.parametrize("start", ["elsewhere", "configs", "root"])
def test_outputs_stay_in_the_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    folder = {"elsewhere": tmp_path, "configs": bundle / "configs", "root": bundle.parent}[start]
    monkeypatch.chdir(folder)
    relative = {"configs": "train.json", "root": f"{bundle.name}/configs/train.json"}
    file = relative.get(start, str(bundle / "configs" / "train.json"))
    made = ConfigWorkflow(file, workflow_type="train", logging_file=False)
    made.initialize()
    for name in ("bundle_root", "output_dir", "ckpt_dir", "dataset_dir", "config_path"):
        assert Path(made.parser.get_parsed_content(name)).is_relative_to(bundle.resolve())
    assert made.parser.get_parsed_content("tracking_uri") == f"sqlite:///{bundle.resolve()}/output/mlruns.db"


def test_bundle_root_is_never_guessed(bundle: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    with pytest.raises(RuntimeError, match="Failed to evaluate"):
        parser.get_parsed_content("bundle_root")


def test_seed_never_moves_the_split(bundle: Path, dataset: Path) -> None:
    def held_out(**overrides: Any) -> list[str]:
        parser = workflow(bundle, dataset_dir=str(dataset), validation_fraction=0.5, **overrides).parser
        training, validation = (parser.get_parsed_content(f"{part}#dataset#data") for part in ("train", "validate"))
        assert len(training) == len(validation) == 3
        assert not {case["image"] for case in training} & {case["image"] for case in validation}
        return [case["image"] for case in validation]

    assert held_out(seed=0) == held_out(seed=1)
    assert any(held_out() != held_out(split_seed=seed) for seed in range(1, 5))


def test_run_names_are_unique(bundle: Path) -> None:
    names = {workflow(bundle, name).parser.get_parsed_content("run_name") for name in ("train", "train", "evaluate")}
    assert len(names) == 3


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_no_amp_on_the_cpu(bundle: Path, device: Any) -> None:
    assert workflow(bundle, device=device).parser.get_parsed_content("amp") is False


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"loss_config": "tversky"}, ["TverskyLoss", 0.5]),
        ({"loss_config": {"type": "tversky", "beta": 0.7}}, ["TverskyLoss", 0.7]),
        ({"loss_config": {"type": "tversky", "beta": 0.7}, "loss_config#beta": 0.8}, ["TverskyLoss", 0.8]),
        ({"loss": {"_target_": "monai.losses.TverskyLoss", "beta": 0.9}}, ["TverskyLoss", 0.9]),
    ],
)
def test_loss_is_one_override_away(bundle: Path, overrides: dict[str, Any], names: list[Any]) -> None:
    loss = workflow(bundle, **overrides).parser.get_parsed_content("loss")
    assert [type(loss).__name__, loss.beta] == names
    assert type(loss).__module__.startswith("monai." if "loss" in overrides else "monai_losses_ext.")


def test_component_weight_is_one_override_away(bundle: Path) -> None:
    made = workflow(bundle, **{"loss_config#components#0#weight": 0.7})
    assert made.parser.get_parsed_content("loss").get_weights() == {"dice": 0.7, "cross_entropy": 1.0}


@pytest.mark.parametrize("name", ["train", "inference"])
def test_prediction_of_the_mirror_image_is_the_mirror_image_of_the_prediction(bundle: Path, name: str) -> None:
    parser = workflow(bundle, name, device="cpu").parser
    mirrors, infer = (parser.get_parsed_content(key) for key in ("mirrors", "inferer"))
    network = torch.nn.Conv3d(1, 3, 3, padding=1, bias=False)
    image = torch.randn(1, 1, 36, 50, 33)
    with torch.no_grad():
        prediction = infer(image, network)
        assert prediction.shape == (1, 3, 36, 50, 33)
        for axes in mirrors:
            assert torch.allclose(infer(image.flip(axes), network).flip(axes), prediction, atol=1e-5)
        assert not torch.allclose(infer(image.flip(3), network).flip(3), prediction, atol=1e-2)


@pytest.mark.parametrize(("epochs", "handlers"), [(10, 1), (11, 2)])
def test_last_epoch_is_validated(bundle: Path, dataset: Path, epochs: int, handlers: int) -> None:
    overrides = {"dataset_dir": str(dataset), "network_def": tiny(), "is_not_rank0": True}
    parser = workflow(bundle, epochs=epochs, val_interval=5, **overrides).parser
    ids = [i for i, h in enumerate(parser.get("train#handlers")) if h["_target_"] == "ValidationHandler"]
    made = [parser.get_parsed_content(f"train#handlers#{i}") for i in ids]
    assert [handler.interval for handler in made if handler is not None] == [5, epochs][:handlers]


def test_monais_tracking_flag_adds_to_the_same_run(bundle: Path, tmp_path: Path) -> None:
    made = workflow(bundle, tracking="mlflow", output_dir=str(tmp_path))
    for part in ("train", "validate"):
        handlers = [h for h in made.parser.get(f"{part}#handlers") if h["_target_"].endswith("MLFlowHandler")]
        assert len(handlers) == 2
        for key in ("tracking_uri", "experiment_name", "run_name"):
            assert handlers[0][key] == handlers[1][key] == f"@{key}"
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # MONAI's copy of the config, and nothing else


def error_of(bundle: Path, name: str, **overrides: Any) -> str:
    """Return what a run prints when it refuses its input."""
    with pytest.raises(SystemExit) as caught:
        workflow(bundle, name, **overrides).run()
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    assert caught.value.code.startswith("error: ")
    return caught.value.code


def test_errors_are_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    absent, data = str(tmp_path / "absent"), str(dataset)
    assert f"{bundle.resolve()}/data/Task04_Hippocampus" in error_of(bundle, "train")
    message = error_of(bundle, "train", dataset_dir=absent)
    assert absent in message
    for way in ("data phantoms", "data download", "imagesTr"):
        assert way in message
    assert "'dice_ce'" in error_of(bundle, "train", dataset_dir=data, loss_config="dise_ce")
    assert absent in error_of(bundle, "evaluate", dataset_dir=data, ckpt_path=absent)
    assert "Train first" in error_of(bundle, "inference", dataset_dir=data)
    weights = tmp_path / "model.pt"
    weights.touch()
    assert absent in error_of(bundle, "inference", dataset_dir=absent, ckpt_path=str(weights))


def test_weights_of_another_network_are_refused_in_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    common = {"dataset_dir": str(dataset), "network_def": tiny(), "ckpt_path": str(weights), "run_name": "none"}

    torch.save({"model": {"a": torch.zeros(2)}}, weights)
    assert "of another network: model.0" in error_of(bundle, "evaluate", **common)
    own = workflow(bundle, **common).parser.get_parsed_content("network").state_dict()
    torch.save({**own, "more.weight": torch.zeros(2)}, weights)
    assert "more.weight is (2,) there and absent in network_def" in error_of(bundle, "evaluate", **common)
    torch.save([1.0], weights)
    assert "it holds a list" in error_of(bundle, "evaluate", **common)
    weights.write_text("not weights")
    assert "torch.load" in error_of(bundle, "evaluate", **common)


def test_misspelt_option_is_refused_with_the_nearest_name(bundle: Path) -> None:
    assert "'--epoch'. Did you mean 'epochs'?" in error_of(bundle, "train", epoch=5)
    assert "'--ckpt_pth'. Did you mean 'ckpt_path'?" in error_of(bundle, "evaluate", ckpt_pth="x")


def test_patch_that_the_network_cannot_take_is_refused_with_the_nearest(bundle: Path) -> None:
    message = error_of(bundle, "train", patch_size=[40, 36, 30])
    assert "patch_size: must be multiples of [8, 8, 8]" in message and "Try [40, 32, 32]." in message


def test_image_of_other_channels_is_refused_by_inference_with_its_name(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    for name, shape in (("a", (9, 8, 7)), ("b", (9, 8, 7, 2))):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    message = error_of(bundle, "inference", dataset_dir=str(tmp_path), ckpt_path=str(tmp_path / "model.pt"))
    assert f"must be 3-D with 1 channel: {tmp_path / 'b.nii.gz'} is not." in message


def test_own_names_are_not_refused(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    overlay = copy / "configs" / "mine.json"
    overlay.write_text('{"my_rate": 0.1, "optimizer#lr": "@my_rate", "_note": "mine"}')
    files = [str(copy / "configs" / "train.json"), str(overlay)]
    run = ["$engine.check_inputs(@dataset_dir, @loss_config)"]
    made = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset), run=run, **{"network_def#dropout": 0.1})
    made.initialize()
    assert made.run() == [None]


def test_handlers_that_others_refer_to_stand_where_they_are_looked_for(bundle: Path) -> None:
    parser = workflow(bundle).parser
    kinds = {"train#handlers#1": "LossTracker", "train#handlers#2": "CurvePicture", "validate#handlers#1": "BestModel"}
    assert {place: parser.get(place)["_target_"].split(".")[-1] for place in kinds} == kinds


def test_several_processes_need_a_case_each() -> None:
    check_share(2, 2)
    with pytest.raises(SystemExit, match="^error: validation_fraction: must hold out a case for each of 3 processes"):
        check_share(2, 3)


def test_config_of_several_processes_alone_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    files = [str(bundle / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    with pytest.raises(SystemExit, match="^error: .* torchrun --nproc_per_node=N"):
        ConfigWorkflow(files, workflow_type="train", logging_file=False).initialize()


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_output_that_cannot_be_written_is_one_line(bundle: Path, tmp_path: Path, name: str) -> None:
    data = make_phantoms("Task04_Hippocampus", tmp_path / "data", n_cases=2, scale=0.1)
    (tmp_path / "file").touch()
    outputs = [{"output_dir": str(tmp_path / "file" / "out")}]
    if name == "train":  # found before the first epoch, not when the first weights are saved
        outputs.append({"ckpt_dir": str(tmp_path / "file"), "output_dir": str(tmp_path / "out")})
    given: dict[str, Any] = {"dataset_dir": str(data / "imagesTr" if name == "inference" else data)}
    if name != "train":
        given["ckpt_path"] = str(tmp_path / "model.pt")
        torch.save(workflow(bundle).parser.get_parsed_content("network").state_dict(), given["ckpt_path"])
    for places in outputs:
        message = error_of(bundle, name, **given, **places)
        assert "cannot be written to" in message
        assert str(tmp_path / "file") in message
