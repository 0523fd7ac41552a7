# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""The purposes: a phantom, the losses that are compared on it, and the metric that decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai.transforms import Transform

from monai_losses_ext.benchmark.purpose import phantoms
from monai_losses_ext.transforms import RegionMapd, SignedDistanceMapd, SkeletonMapd

BASELINE = "Dice + CE"
DICE = {"type": "dice", "include_background": False, "batch": True}
DICE_CE = (DICE, {"type": "cross_entropy"})


@dataclass(frozen=True)
class Row:
    """One of the trainings that are compared.

    Attributes:
        loss: its loss_config.
        phantom: what it trains on, where that is not the purpose's.
    """

    loss: Mapping[str, Any]
    phantom: phantoms.Phantom | None = None


@dataclass(frozen=True)
class Purpose:
    """What a family of losses is for.

    Attributes:
        title: in words, for a table's head.
        phantom: makes a case.
        rows: the trainings by name, the baseline first.
        metrics: what is measured, that which decides first; see :mod:`monai_losses_ext.benchmark.purpose.measures`.
        maps: make the map that the losses read beside the label.
        foreground: how many classes beside the background.
        level: the precision at which recalls are compared.
        steps: length of each training.
    """

    title: str
    phantom: phantoms.Phantom
    rows: Mapping[str, Row]
    metrics: Sequence[str]
    maps: Callable[[], Transform] | None = None
    foreground: int = 1
    level: float = 0.7
    steps: int = 300


def _beside(*parts: Mapping[str, Any]) -> Row:
    """Return a row of Dice + CE with further losses, each of weight 1."""
    return Row({"type": "compound", "components": [*DICE_CE, *parts]})


TVERSKY = {"type": "tversky", "alpha": 0.1, "beta": 0.9, "include_background": False, "batch": True}
ANNOTATED, UNSAID = "Dice + CE, annotated", "Dice + CE, without a word of it"

PURPOSES = {
    "small_lesions": Purpose(
        "Small lesions among large ones",
        phantoms.lesions,
        {
            BASELINE: _beside(),
            "+ cc_dice": _beside({"type": "cc_dice"}),
            "+ blob": _beside({"type": "blob"}),
            "+ tversky, beta 0.9": _beside(TVERSKY),
        },
        ("small_recall", "instance_precision", "small_recall_at_precision", "dice"),
        lambda: RegionMapd("label", num_classes=2),
        level=0.9,
        steps=400,
    ),
    "thin_tubes": Purpose(
        "Thin tubes that stay connected",
        phantoms.tubes,
        {
            BASELINE: _beside(),
            "+ skeleton_recall": _beside({"type": "skeleton_recall"}),
            "+ tversky, beta 0.9": _beside(TVERSKY),
        },
        ("cldice", "components_off", "voxel_recall", "voxel_precision", "cldice_at_precision", "dice"),
        lambda: SkeletonMapd("label", num_classes=2),
    ),
    "unequal_costs": Purpose(
        "A miss that costs more than a false alarm",
        phantoms.faint,
        {
            BASELINE: _beside(),
            "tversky, beta 0.9": Row(TVERSKY),
            "focal_tversky, beta 0.7": Row({**TVERSKY, "type": "focal_tversky", "alpha": 0.3, "beta": 0.7}),
            "+ tversky, beta 0.9": _beside(TVERSKY),
        },
        ("voxel_recall", "voxel_precision", "voxel_recall_at_precision", "dice"),
    ),
    "far_outliers": Purpose(
        "False positives far away",
        phantoms.outliers,
        {
            BASELINE: _beside(),
            "+ boundary": _beside({"type": "boundary", "include_background": False}),
            "+ MONAI's Hausdorff DT": _beside({"type": "monai.LogHausdorffDTLoss", "include_background": False}),
            "+ focal": _beside({"type": "focal"}),
        },
        ("hd95", "voxel_recall", "voxel_precision", "dice"),
        lambda: SignedDistanceMapd("label", num_classes=2),
    ),
    "unannotated": Purpose(
        "A class that half of the cases lack",
        phantoms.half_annotated,
        {
            f"{BASELINE}, every label": Row(_beside().loss, phantoms.two_organs),
            ANNOTATED: _beside(),
            UNSAID: Row(_beside().loss, phantoms.half_annotated_unsaid),
        },
        ("dice_of_last", "voxel_recall", "voxel_precision", "dice"),
        foreground=2,
    ),
    "probabilities": Purpose(
        "Probabilities that mean something",
        phantoms.vague,
        {
            BASELINE: _beside(),
            "dice": Row(DICE),
            "cross_entropy": Row({"type": "cross_entropy"}),
            "+ l1_ace": _beside({"type": "l1_ace"}),
            "focal": Row({"type": "focal"}),
        },
        ("ace", "ece", "dice"),
    ),
    "wrong_labels": Purpose(
        "Training labels with errors",
        phantoms.wrong_labels,
        {
            BASELINE: _beside(),
            "dice": Row(DICE),
            "cross_entropy": Row({"type": "cross_entropy"}),
            "mcc": Row({"type": "mcc"}),
            "focal": Row({"type": "focal"}),
            "unified_focal": Row({"type": "unified_focal"}),
        },
        ("dice", "voxel_recall", "voxel_precision"),
    ),
}
