# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Two processes through ``torchrun -m monai.bundle run`` with gloo: equal weights, one run, a one-process curve."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bundles.helpers import bundle_run, only_run, only_run_folder

EPOCHS = 2
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "monai.bundle")
# Terms that are means over samples, so that the mean over two processes is what one process has of the same batch.
LOSS = {
    "type": "compound",
    "components": [{"type": "dice", "smooth_nr": 1.0, "smooth_dr": 1.0}, "focal"],
    "learnable_weights": True,
}
NETWORK = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "norm": "instance",
}
WITNESS = """
import torch
import torch.distributed as dist
from ignite.engine import Events

class Witness:
    def __init__(self, network, loss, folder):
        self.network, self.loss, self.folder = network, loss, folder

    def attach(self, engine):
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine):
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.save([self.network.state_dict(), self.loss.state_dict()], f"{self.folder}/rank{rank}.pt")
"""


def train(folder: Path, bundle: Path, dataset: Path, name: str, batch_size: int, *configs: str) -> Path:
    """Train in one process, or with ``multi_gpu_train`` in two; each rank leaves its weights in the folder returned."""
    root = folder / name
    root.mkdir()
    witness = {"_target_": "witness.Witness", "network": "@network", "loss": "@loss", "folder": str(root)}
    (folder / "witness.py").write_text(WITNESS)
    (folder / f"{name}.json").write_text(json.dumps({"+train#handlers": [witness]}))
    files = [str(bundle / "configs" / f"{config}.json") for config in ("train", *configs)] + [f"{folder / name}.json"]
    options = {"bundle_root": root, "dataset_dir": dataset, "epochs": EPOCHS, "val_interval": 1}
    options |= {"batch_size": batch_size, "patch_size": [16, 16, 16], "validation_fraction": 0.34}
    options |= {"network_def": NETWORK, "loss_config": LOSS}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    bundle_run(folder, str(files), *arguments, python=TORCHRUN if configs else ("-m", "monai.bundle"))
    return root


@pytest.fixture(scope="module")
def roots(bundle: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("processes")
    one = train(folder, bundle, dataset, "one", 2)
    return SimpleNamespace(one=one, two=train(folder, bundle, dataset, "two", 1, "multi_gpu_train"))


def test_ranks_end_with_equal_weights(roots: SimpleNamespace) -> None:
    ranks = [torch.load(roots.two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_curve_is_that_of_one_process_with_the_same_global_batch(roots: SimpleNamespace) -> None:
    one, two = (only_run(f"sqlite:///{root}/output/mlruns.db") for root in (roots.one, roots.two))
    assert {"loss", "loss_dice", "weight_focal", "mean_dice"} <= set(one.run.data.metrics)
    for name in one.run.data.metrics:
        assert one.history(name) == {step: pytest.approx(value, rel=1e-4) for step, value in two.history(name).items()}
    assert one.history("weight_dice")[1] != one.history("weight_dice")[2]


def test_two_processes_leave_what_one_leaves(roots: SimpleNamespace) -> None:
    files = []
    for root in (roots.one, roots.two):
        run = only_run_folder(root / "output").name
        found = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != "rank1.pt"]
        files.append({name.replace(run, "run") for name in found})
    without_ids = [{name for name in some if "mlruns/" not in name} for some in files]
    assert without_ids[0] == without_ids[1]


def test_evaluation_in_two_processes_reports_every_case_of_uneven_shares(
    roots: SimpleNamespace, bundle: Path, dataset: Path, tmp_path: Path
) -> None:
    tables = {}
    for name, configs in (("one", []), ("two", ["multi_gpu_evaluate"])):
        files = [str(bundle / "configs" / f"{config}.json") for config in ("train", "evaluate", *configs)]
        options = {"bundle_root": roots.two, "output_dir": tmp_path / name, "dataset_dir": dataset}
        options |= {"network_def": NETWORK, "patch_size": [16, 16, 16], "validation_fraction": 0.5}
        options |= {"ckpt_path": only_run_folder(roots.two / "output") / "model.pt"}
        arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        bundle_run(tmp_path, str(files), *arguments, python=TORCHRUN if configs else ("-m", "monai.bundle"))
        tables[name] = (only_run_folder(tmp_path / name, "evaluate") / "evaluation.csv").read_text()
    assert tables["one"] == tables["two"]
    assert len(tables["one"].splitlines()) == 1 + 3 * 2 + 3  # header, cases of two classes, means
