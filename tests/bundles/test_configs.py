# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The configs through MONAI's own workflow class: properties, references, paths, overrides, errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles.helpers import on_path, user_error
from monai.bundle import ComponentLocator, ConfigComponent, ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.bundle.reference_resolver import ReferenceResolver

import monai_losses_ext
from monai_losses_ext.data.phantoms import make_phantoms
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.engine import check_processes
from monai_losses_ext.errors import UserError

TEMPLATE = Path(monai_losses_ext.__file__).parent / "bundlekit" / "template"
CONFIGS = {"train": ["train"], "evaluate": ["train", "evaluate"], "inference": ["inference"]}


def tiny() -> dict[str, Any]:
    """Return a network that takes no time."""
    shape = {"channels": [2, 4], "strides": [2]}
    return {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, **shape}


def workflow(bundle: Path, name: str = "train", **overrides: Any) -> ConfigWorkflow:
    """Return an initialized workflow, as ``monai.bundle run`` makes one; nothing is built until it is asked for."""
    files = [str(bundle / "configs" / f"{config}.json") for config in CONFIGS[name]]
    kind = "infer" if name == "inference" else "train"
    on_path(bundle)
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


@pytest.mark.parametrize("start", ["elsewhere", "configs", "root"])
def test_outputs_stay_in_the_bundle(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    folder = {"elsewhere": tmp_path, "configs": bundle / "configs", "root": bundle.parent}[start]
    monkeypatch.chdir(folder)
    on_path(bundle)
    relative = {"configs": "train.json", "root": f"{bundle.name}/configs/train.json"}
    file = relative.get(start, str(bundle / "configs" / "train.json"))
    made = ConfigWorkflow(file, workflow_type="train", logging_file=False)
    made.initialize()
    for name in ("bundle_root", "output_dir", "run_dir", "dataset_dir", "config_path"):
        assert Path(made.parser.get_parsed_content(name)).is_relative_to(bundle.resolve())
    assert made.parser.get_parsed_content("tracking_uri") == f"sqlite:///{bundle.resolve()}/output/mlruns.db"


def test_bundle_root_is_never_guessed(bundle: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    with pytest.raises(ModuleNotFoundError, match="scripts.bundle_root"):
        parser.get_parsed_content("bundle_root")


def test_scripts_of_another_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    on_path(other)
    assert ConfigParser({"root": {"_target_": "scripts.bundle_root"}}).get_parsed_content("root") == str(other)
    files = [str(bundle / "configs" / "train.json")]
    made = ConfigWorkflow(files, logging_file=False, run=["@bundle_root"])
    made.initialize()
    assert "Run each bundle in a process of its own" in user_error(made.run)


@pytest.mark.parametrize("file", sorted(path.stem for path in TEMPLATE.glob("configs/*.json*")))
def test_any_file_can_be_read_outside_of_a_workflow(bundle: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that need no folder of the bundle resolve; with the bundle on the path all do that need no data."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it
    parser = ConfigParser()
    before = ["train"] if "evaluate" in file or "multi_gpu" in file else []  # these are read behind it
    names = [*before, file.removesuffix(".json")]
    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in names])
    plain = [name for name in ("epochs", "patch_size", "labels", "amp", "mirrors", "network") if name in parser]
    for name in plain:
        assert parser.get_parsed_content(name) is not None
    if "bundle_root" in parser:
        on_path(bundle)
        assert parser.get_parsed_content("bundle_root") == str(bundle.resolve())
        assert parser.get_parsed_content("inferer") is not None


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


@pytest.mark.parametrize("name", ["train", "inference"])
@pytest.mark.parametrize(("word", "expected"), [("false", False), ("true", True), (False, False)])
def test_a_switch_of_the_command_line_is_read_as_a_switch(
    bundle: Path, dataset: Path, tmp_path: Path, name: str, word: Any, expected: bool
) -> None:
    folder = dataset if name == "train" else dataset / "imagesTr"
    made = workflow(bundle, name, amp=word, dataset_dir=str(folder), bundle_root=str(tmp_path), network_def=tiny())
    engine = "train#trainer" if name == "train" else "evaluator"
    assert made.parser.get_parsed_content(engine).amp is expected


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
    assert list(tmp_path.iterdir()) == []  # the run's own folder will hold the config


def error_of(bundle: Path, name: str, **overrides: Any) -> str:
    """Return what a run prints when it refuses its input."""
    return f"error: {user_error(lambda: workflow(bundle, name, **overrides).run())}"


def test_errors_are_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    absent, data = str(tmp_path / "absent"), str(dataset)
    assert f"{bundle.resolve()}/data/Task04_Hippocampus" in error_of(bundle, "train")
    message = error_of(bundle, "train", dataset_dir=absent)
    assert absent in message
    for way in ("data phantoms", "data download", "imagesTr"):
        assert way in message
    assert "dataset_dir: must be a path without '#'" in error_of(bundle, "train", dataset_dir=f"{data}#2")
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
    for text in ("not weights", "hello", "", "\x80\x02"):  # each makes torch raise another error
        weights.write_bytes(text.encode("latin-1"))
        assert "torch.load" in error_of(bundle, "evaluate", **common)


def test_misspelt_option_is_refused_with_the_nearest_name(bundle: Path) -> None:
    assert "'--epoch'. Did you mean 'epochs'?" in error_of(bundle, "train", epoch=5)
    assert "'--ckpt_pth'. Did you mean 'ckpt_path'?" in error_of(bundle, "evaluate", ckpt_pth="x")


def test_patch_that_the_network_cannot_take_is_refused_with_the_nearest(bundle: Path) -> None:
    message = error_of(bundle, "train", patch_size=[40, 36, 30])
    assert "patch_size: must be multiples of [8, 8, 8]" in message and "Try [40, 32, 32]." in message


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: must be a whole number of at least 1; got 0."),
        ({"epochs": "many"}, "epochs: must be a whole number of at least 1; got 'many'."),
        ({"epochs": True}, "epochs: must be a whole number of at least 1; got True."),
        ({"val_interval": 0}, "val_interval: must be a whole number of at least 1; got 0."),
        ({"batch_size": 0}, "batch_size: must be a whole number of at least 1; got 0."),
        ({"patches_per_case": 1.5}, "patches_per_case: must be a whole number of at least 1; got 1.5."),
        ({"seed": -1}, "seed: must be a whole number between 0 and 4.29497e+09; got -1."),
        ({"split_seed": "one"}, "split_seed: must be a whole number; got 'one'."),
        ({"validation_fraction": 2}, "validation_fraction: must be a number between 0 and 1; got 2."),
        ({"cache_rate": -0.5}, "cache_rate: must be a number between 0 and 1; got -0.5."),
        ({"num_workers": -1}, "num_workers: must be a whole number of at least 0; got -1."),
        ({"optimizer#lr": -1}, "optimizer#lr: must be a number of at least 0 or a tensor; got -1."),
        ({"patch_size": 64}, "patch_size: must be a list of whole numbers of at least 1; got 64."),
        (
            {"patch_size": [32, "a", 32]},
            "patch_size: must be a list of whole numbers of at least 1; got [32, 'a', 32].",
        ),
        ({"patch_size": [0, 0, 0]}, "patch_size: must be a list of whole numbers of at least 1; got [0, 0, 0]."),
        ({"patch_size": [32, 48]}, "patch_size: must have one value for each of the network's 3 axes; got [32, 48]."),
        ({"labels": {"1": "a", "2": "a"}}, "labels: must each have a name of its own in the metrics"),
        ({"labels": {"0": "b", "2": "a"}}, "labels: must name the classes 0 (the background), 1, 2, ... without a gap"),
        ({"device": "gpu"}, "device: must be cpu, cuda, cuda:0 or the like; got 'gpu'."),
        ({"device": "cuda:99"}, "device: must be one that this machine has"),
        ({"run_name": "a'b"}, "run_name: must be the name of a folder"),
        ({"run_name": "a/b"}, "run_name: must be the name of a folder"),
        ({"output_dir": "/nowhere/a::b"}, "output_dir: must be a path without '#'"),
    ],
)
def test_wrong_value_is_one_line_before_anything_is_built(
    bundle: Path, name: str, options: dict[str, Any], message: str
) -> None:
    assert error_of(bundle, name, **options).startswith(f"error: {message}")


def test_one_case_alone_cannot_be_split(bundle: Path, tmp_path: Path) -> None:
    data = make_phantoms("Task04_Hippocampus", tmp_path / "data", n_cases=2, scale=0.1)
    content = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**content, "training": content["training"][:1]}))
    assert "cases: must be at least two" in error_of(bundle, "train", dataset_dir=str(data))


def check_with(bundle: Path, dataset: Path, folder: Path, **overlay: Any) -> None:
    """Run the checks alone, of the training config with an overlay."""
    (folder / "mine.json").write_text(json.dumps(overlay))
    files = [str(bundle / "configs" / "train.json"), str(folder / "mine.json")]
    run = ["$@running_config.check()", "$@running_config.check_loss(@loss)"]
    on_path(bundle)
    made = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset), run=run)
    made.initialize()
    made.run()


@pytest.mark.parametrize(
    "overlay",
    [
        {"_mine": {"_target_": "StatsHandler"}, "+train#handlers": ["@_mine"]},
        {"train#handlers": "$[monai.handlers.StatsHandler()]"},
        {"+train#handlers": [{"_note_": "no component"}]},
    ],
)
def test_handlers_of_any_form_are_left_to_monai(
    bundle: Path, dataset: Path, tmp_path: Path, overlay: dict[str, Any]
) -> None:
    check_with(bundle, dataset, tmp_path, **overlay)


def test_schedule_of_a_component_that_is_not_there_is_one_line(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    schedule = {"type": "linear", "component": "boundry", "start": 0.1, "end": 1.0, "epochs": 5}
    handler = {"_target_": "monai_losses_ext.handlers.WeightSchedule", "loss": "@loss", "schedules": schedule}
    for overlay in (
        {"+train#handlers": ["@train#handlers#0", handler]},
        {"+train#every_process": [handler]},
        {"train#trainer#schedules": schedule},
    ):
        assert "boundry" in user_error(lambda overlay=overlay: check_with(bundle, dataset, tmp_path, **overlay))


def test_own_names_are_not_refused(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    overlay = copy / "configs" / "mine.json"
    overlay.write_text('{"my_rate": 0.1, "optimizer#lr": "@my_rate", "_note": "mine"}')
    files = [str(copy / "configs" / "train.json"), str(overlay)]
    run = ["$@running_config.check()"]
    on_path(copy)
    made = ConfigWorkflow(files, logging_file=False, dataset_dir=str(dataset), run=run, **{"network_def#dropout": 0.1})
    made.initialize()
    assert made.run() == [None]


def expressions(config: Any) -> Iterator[str]:
    """Yield the texts in a config."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, (dict, list)):
        for value in config.values() if isinstance(config, dict) else config:
            yield from expressions(value)


@pytest.mark.parametrize("bundle_name", sorted(task.bundle for task in TASKS.values()))
def test_configs_hold_no_programs(bundle: Path, bundle_name: str) -> None:
    for file in (bundle.parent / bundle_name / "configs").glob("*.json"):
        texts = [*expressions(json.loads(file.read_text()))]
        assert [text for text in texts if text.startswith("$") and len(text) > 100] == [], file
        assert [text for text in texts if re.search(r"inspect|handlers#\d|sys\.exit", text)] == [], file


def test_what_every_process_needs_comes_first(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    """The zoo's configs for several GPUs cut handlers off the end; others refer to handlers by name."""
    overrides = {"dataset_dir": str(dataset), "output_dir": str(tmp_path), "network_def": tiny()}
    get = workflow(bundle, is_not_rank0=True, **overrides).parser.get_parsed_content
    others, every = get("train#handlers"), get("train#every_process")
    assert others[0].handlers == every
    assert {type(handler).__name__ for handler in every} >= {"EpochSeed", "CurvePicture", "TrainingState"}
    assert get("train#state").objects["curves"] is get("train#curves")
    assert get("train#state").objects["best_model"] is get("validate#best_model")
    assert get("validate#handlers")[0].handlers == [get("validate#best_model")]
    kinds = [type(handler).__name__ for handler in others]
    assert kinds[:3] == ["HandlerGroup", "LrScheduleHandler", "ValidationHandler"]


def test_keys_that_the_zoo_names_are_used(bundle: Path, dataset: Path, tmp_path: Path) -> None:
    overrides = {"dataset_dir": str(dataset), "output_dir": str(tmp_path), "network_def": tiny()}
    made = workflow(bundle, is_not_rank0=True, **overrides)
    assert [made.trainer.state.key_metric_name, made.evaluator.state.key_metric_name] == ["loss", "mean_dice"]
    assert made.train_key_metric == {"loss": made.parser.get_parsed_content("train#loss_tracker")}
    assert made.val_key_metric == {"mean_dice": made.parser.get_parsed_content("validate#report")}
    assert made.train_postprocessing.transforms == ()


def test_several_processes_need_a_case_each() -> None:
    check_processes(2, 2)
    with pytest.raises(UserError, match="^validation_fraction: must hold out a case for each of 3 processes"):
        check_processes(2, 3)


def test_config_of_several_processes_alone_is_one_line(
    bundle: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    files = [str(bundle / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    made = ConfigWorkflow(files, workflow_type="train", logging_file=False, dataset_dir=str(dataset))
    made.initialize()
    assert "torchrun --nproc_per_node=N" in user_error(made.run)


@pytest.mark.parametrize("name", ["train", "evaluate", "inference"])
def test_output_that_cannot_be_written_is_one_line(bundle: Path, tmp_path: Path, name: str) -> None:
    data = make_phantoms("Task04_Hippocampus", tmp_path / "data", n_cases=2, scale=0.1)
    (tmp_path / "file").touch()
    outputs = [{"output_dir": str(tmp_path / "file" / "out")}]
    if name == "train":  # found before the first epoch, not when the first weights are saved
        outputs.append({"output_dir": str(tmp_path), "run_name": "file"})
    given: dict[str, Any] = {"dataset_dir": str(data / "imagesTr" if name == "inference" else data)}
    if name != "train":
        given["ckpt_path"] = str(tmp_path / "model.pt")
        torch.save(workflow(bundle).parser.get_parsed_content("network").state_dict(), given["ckpt_path"])
    for places in outputs:
        message = error_of(bundle, name, **given, **places)
        assert "cannot be written to" in message
        assert str(tmp_path / "file") in message
