# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Put the repository's bundles/ and configs/ into a wheel; all else about the package is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# What trainings and users leave in a bundle, as monai_losses_ext/shipped.py has it.
OF_RUNS = shutil.ignore_patterns("*.pt", "*.ts", "data", "output", "eval", "__pycache__")


class BuildWithBundles(build_py):
    """Copy the folders into the built package. An editable install finds them where they are, in the checkout."""

    def run(self) -> None:
        """Build the package, then add the folders."""
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / "monai_losses_ext" / "_shipped"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in ("bundles", "configs"):
            shutil.copytree(ROOT / name, target / name, ignore=OF_RUNS)


setup(cmdclass={"build_py": BuildWithBundles})
