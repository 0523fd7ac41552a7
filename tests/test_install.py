# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""What is installed: a core of four packages, extras for the rest, and a wheel that works outside a checkout."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools.config.setupcfg import read_configuration

from monai_losses_ext.bundlekit import overlays
from monai_losses_ext.bundlekit.render import render_task
from monai_losses_ext.data.tasks import TASKS
from monai_losses_ext.extras import EXTRAS
from monai_losses_ext.shipped import OF_RUNS

ROOT = Path(__file__).parents[1]
CORE = ("torch", "monai", "numpy", "scipy")
# Hides every package that is installed here but the core and what these four need themselves.
BLOCK = """
import importlib.metadata as metadata, re, sys

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

def tree(name):
    for line in metadata.requires(name) or ():
        required = plain(re.split("[^A-Za-z0-9_.-]", line)[0])
        if "extra ==" not in line and required not in allowed:
            allowed.add(required)
            try:
                tree(required)
            except metadata.PackageNotFoundError:
                pass

allowed = {"torch", "numpy", "scipy", "monai"}
for name in sorted(allowed):
    tree(name)
owners = metadata.packages_distributions()

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top != "monai_losses_ext" and top in owners and not allowed & {plain(owner) for owner in owners[top]}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
STEP = """
import torch
import monai_losses_ext.sums, monai_losses_ext.losses, monai_losses_ext.distance, monai_losses_ext.transforms
from monai_losses_ext import get_loss

network = torch.nn.Conv3d(1, 3, 3, padding=1)
components = [{"type": "dice"}, {"type": "focal"}, {"type": "boundary"}]
loss = get_loss({"type": "compound", "components": components, "learnable_weights": True})
optimizer = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=0.1)
before = [parameter.detach().clone() for parameter in (*network.parameters(), *loss.parameters())]
loss(network(torch.randn(1, 1, 8, 8, 8)), torch.randint(0, 3, (1, 1, 8, 8, 8))).backward()
optimizer.step()
after = [*network.parameters(), *loss.parameters()]
assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
"""
ONE_LINE = """
import contextlib, io
from pathlib import Path
from monai_losses_ext.cli import main
from monai_losses_ext.errors import UserError

for command in ("quickstart", "data check --dataset_dir x", "data phantoms --task x --out x", "bundles verify",
                "data download --task x --out x", "bundles render", "bundles check", "benchmark report"):
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        assert main(command.split()) == 1
    line = text.getvalue()
    assert line.count("\\n") == 1 and line.endswith('install with: pip install "monai_losses_ext[bundles]"\\n'), line
assert main(["overlays"]) == 0 and main(["bundles", "copy"]) == 0
Path("loss.yaml").write_text("type: dice")
for attempt in ("import monai_losses_ext.handlers", "from monai_losses_ext.data.phantoms import make_phantoms",
                "from monai_losses_ext.data.check import check_dataset", "get_loss('loss.yaml')"):
    try:
        exec(attempt)
    except UserError as error:
        assert "\\n" not in str(error) and str(error).endswith('pip install "monai_losses_ext[bundles]"'), error
    else:
        raise AssertionError(attempt)
"""


def test_the_core_trains_a_step_without_any_other_package_and_says_what_brings_them(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", BLOCK + STEP + ONE_LINE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_extras_are_those_that_the_errors_name() -> None:
    options = read_configuration(ROOT / "setup.cfg")["options"]
    assert {name(line) for line in options["install_requires"]} == set(CORE)
    for extra, packages in EXTRAS.items():
        listed = {name(line) for line in options["extras_require"][extra]}
        assert set(packages.values()) == listed or (extra == "test" and set(packages.values()) <= listed)


def name(requirement: str) -> str:
    """Return the package that a requirement names."""
    return requirement.split(">")[0].split("=")[0].strip()


def test_constraints_pin_every_package_of_the_extras() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {package.lower() for packages in EXTRAS.values() for package in packages.values()} <= pinned
    assert set(CORE) <= pinned


def test_setup_leaves_out_what_runs_leave_behind() -> None:
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (patterns,) = [call.args for call in calls if getattr(call.func, "attr", "") == "ignore_patterns"]
    assert tuple(ast.literal_eval(pattern) for pattern in patterns) == OF_RUNS


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack a wheel, built from a copy in which a bundle was trained, to a folder of its own: where pip puts it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a checkout")
    for path in listed.stdout.splitlines():
        if (ROOT / path).is_file() and not path.startswith(("docs/", "tests/")):
            (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / path).write_bytes((ROOT / path).read_bytes())
    bundle = folder / "source" / "bundles" / "msd_spleen_ct_segmentation"
    (bundle / "models" / "model.pt").write_text("weights")
    (bundle / "output").mkdir()
    (bundle / "output" / "curves.csv").write_text("loss")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(folder / "source")], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_every_bundle_and_overlay_and_nothing_of_a_run(installed: Path) -> None:
    shipped = installed / "monai_losses_ext" / "_shipped"
    found = {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()}
    bundles = {f"bundles/{path}" for task in TASKS.values() for path in render_task(task)}
    configs = {f"configs/{path}" for path in overlays.generated_configs()}
    others = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.json")}
    assert found == bundles | configs | others
    template = Path(overlays.__file__).parent
    for path in template.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / "monai_losses_ext" / "bundlekit" / path.relative_to(template)).is_file()


def test_an_installed_package_works_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    """In a process that sees the unpacked wheel alone: commands, bundles, overlays, and an overlay on a bundle."""
    code = """
import contextlib, io, json, sys
from pathlib import Path
import monai_losses_ext
from monai_losses_ext.cli import main
from monai.bundle import ConfigParser

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return status, out.getvalue(), err.getvalue()

print(monai_losses_ext.__file__)
status, printed, _ = run("bundles", "copy", "msd_hippocampus_mri_segmentation", "--out", "mine")
bundle = Path(printed.strip())
status, printed, _ = run("overlays")
overlays = Path(printed.splitlines()[0])
sys.path.insert(0, str(bundle))  # as MONAI does when a bundle runs
parser = ConfigParser()
parser.read_config([str(bundle / "configs" / "train.json"), str(overlays / "losses" / "tversky.json")])
loss = parser.get_parsed_content("loss")
assert (type(loss).__name__, loss.beta) == ("TverskyLoss", 0.7)
assert "anyOf" in json.loads((overlays / "loss.schema.json").read_text())
for action in ("render", "check"):
    status, printed, error = run("bundles", action)
    assert status == 1 and error.count("\\n") == 1 and printed == "", error
    assert error.startswith("error: bundles: must be rendered and checked in a checkout of the project")
status, _, error = run("benchmark", "report")
assert status == 1 and error.count("\\n") == 1 and "in the folder of a checkout" in error
assert not Path("bundles").exists() and not Path("docs").exists()
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "monai_losses_ext" / "__init__.py")
    assert json.loads((tmp_path / "mine" / "msd_hippocampus_mri_segmentation" / "configs" / "train.json").read_text())
