# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_losses_ext import get_loss
from monai_losses_ext.data.dataset import dataset_fingerprint
from monai_losses_ext.handlers.run_facts import commit_of, loss_label, run_params

COMPOUND = {"type": "compound", "components": [{"type": "dice", "weight": 0.25}, {"type": "focal", "weight": 0.75}]}


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ("tversky", "tversky"),
        ({"type": "dice_ce"}, "dice_ce"),
        ({"loss": COMPOUND}, "dice_focal"),
        ({"type": "compound", "components": ["dice", {"type": "boundary", "name": "rand/ a:b"}]}, "dice_rand-a-b"),
        ({"components": [f"monai.Loss{i}OfALongName" for i in range(5)]}, "monai-Loss0OfALongName_4_more"),
        ({"type": "x" * 300}, "x" * 40),
        ({"type": "../.."}, "loss"),
        ({"components": 3}, "None"),
        ("absent.json", "loss"),
        (None, "loss"),
        ([1], "loss"),
    ],
)
def test_labels_are_short_and_fit_file_names(config: Any, label: str) -> None:
    assert loss_label(config) == label
    assert re.fullmatch(r"[\w-]{1,40}", loss_label(config), re.ASCII)


def test_params_of_a_compound(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.02, weight_decay=0.003)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)  # a warm-up
    params = run_params(COMPOUND, get_loss(COMPOUND), optimizer, seed=3, patch_size=[16, 16, 8], fold=None)
    assert params["loss"] == "dice_focal"
    assert json.loads(params["loss_config"]) == COMPOUND
    assert params["loss_components"] == "dice, focal"
    assert json.loads(params["loss_weights"]) == {"dice": 0.25, "focal": 0.75}
    assert (params["optimizer"], params["learning_rate"], params["weight_decay"]) == ("AdamW", "0.02", "0.003")
    assert (params["seed"], params["patch_size"]) == ("3", "[16, 16, 8]")
    assert params["version_torch"] == torch.__version__
    assert "fold" not in params
    long = run_params({"type": "dice", "class_weight": [0.1] * 500})
    assert max(map(len, long.values())) == 500


def test_fingerprint_changes_with_list_names_and_sizes(tmp_path: Path) -> None:
    def write(names: list[str], content: bytes = b"12") -> dict[str, str]:
        cases = []
        for name in names:
            for kind in ("image", "label"):
                (tmp_path / f"{kind}_{name}").write_bytes(content)
            cases.append({kind: f"{kind}_{name}" for kind in ("image", "label")})
        (tmp_path / "dataset.json").write_text(json.dumps({"training": cases}))
        return dataset_fingerprint(tmp_path)

    first = write(["a", "b"])
    assert first["dataset"] == tmp_path.name
    assert first["dataset_cases"] == "2"
    assert write(["a", "b"]) == first
    digests = {facts["dataset_fingerprint"] for facts in (first, write(["a", "c"]), write(["a", "b"], b"123"))}
    assert len(digests) == 3
    assert dataset_fingerprint(tmp_path / "absent") == {}


def test_commit_is_of_the_repository_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    tracked, other = tmp_path / "tracked.py", tmp_path / "other.py"
    tracked.write_text("1")
    other.write_text("1")
    assert commit_of(tracked) == ""
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "first")
    assert commit_of(tracked) == git("rev-parse", "HEAD")
    assert commit_of(other) == ""
    tracked.write_text("2")
    assert commit_of(tracked) == f"{git('rev-parse', 'HEAD')}-dirty"
