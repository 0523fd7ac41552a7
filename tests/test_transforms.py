# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""Distance maps on their way from the volume to the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.transforms import (
    AsDiscreted,
    Compose,
    RandAffined,
    RandFlipd,
    RandRotate90d,
    RandSpatialCropd,
    RandZoomd,
)

from monai_losses_ext import get_loss
from monai_losses_ext.distance import signed_distance
from monai_losses_ext.errors import UserError
from monai_losses_ext.transforms import SignedDistanceMapd, UnpackLabeld, prepare_batch_with_distance

KEYS = ["label", "distance"]


def blob_case(shape=(24, 20, 22), spacing=(1.0, 1.0, 1.0)):
    """A label of two smooth structures, with an image."""
    grid = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    label = torch.zeros(1, *shape)
    label[0][grid[0] ** 2 + 1.5 * grid[1] ** 2 + 2 * grid[2] ** 2 < 0.35] = 1
    label[0][(grid[0] - 0.3) ** 2 + grid[1] ** 2 + grid[2] ** 2 < 0.06] = 2
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return {"image": MetaTensor(torch.randn(1, *shape), affine=affine), "label": MetaTensor(label, affine=affine)}


def recomputed(case, spacing=None):
    sizes = case["label"].pixdim.tolist() if spacing is None else spacing
    return signed_distance(case["label"].as_tensor()[None], 3, sizes)[0]


def test_map_of_every_class_in_mm_with_the_labels_affine():
    case = blob_case(spacing=(0.5, 2.0, 3.0))
    out = SignedDistanceMapd("label", num_classes=3)(case)
    assert "distance" not in case
    assert torch.equal(out["distance"].as_tensor(), recomputed(case, (0.5, 2.0, 3.0)))
    assert isinstance(out["distance"], MetaTensor) and torch.equal(out["distance"].affine, case["label"].affine)
    half = SignedDistanceMapd("label", num_classes=3, dtype="float16")(case)["distance"]
    assert half.dtype == torch.float16
    assert torch.allclose(half.as_tensor().float(), out["distance"].as_tensor(), rtol=1e-3)


def test_overlapping_masks_several_labels_plain_arrays():
    masks = torch.zeros(2, 9, 9)
    masks[0, 2:8, 2:8], masks[1, 4:6, 4:6] = 1, 1
    out = SignedDistanceMapd(["a", "b"], spacing=2.0)({"a": masks.numpy(), "b": masks})
    expected = signed_distance(masks[None], spacing=2.0)[0]
    assert torch.equal(out["a_distance"], expected) and torch.equal(out["b_distance"], expected)
    assert np.allclose(SignedDistanceMapd("a", names="phi", spacing=2.0)({"a": masks})["phi"], expected)
    assert SignedDistanceMapd(["a", "b"], spacing=1.0, allow_missing_keys=True)({"a": masks}).keys() == {
        "a",
        "a_distance",
    }
    with pytest.warns(UserWarning, match="SignedDistanceMapd: 'a' has no affine"):
        in_voxels = SignedDistanceMapd("a")({"a": masks})["distance"]
    assert torch.allclose(2 * in_voxels, expected)
    with pytest.raises(
        ValueError, match=r"^SignedDistanceMapd: 'a': must be a tensor .*LoadImaged.*; got 'a.nii.gz'\.$"
    ):
        SignedDistanceMapd("a")({"a": "a.nii.gz"})
    with pytest.raises(ValueError, match=r"^names: must hold one name per key \(2\)"):
        SignedDistanceMapd(["a", "b"], names=["phi"])
    with pytest.raises(ValueError, match=r"^dtype: must be one of float32, float16; got 'float61'"):
        SignedDistanceMapd("a", dtype="float61")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "random",
    [
        RandFlipd(KEYS, prob=1.0, spatial_axis=(0, 2)),
        RandRotate90d(KEYS, prob=1.0, max_k=1, spatial_axes=(0, 1)),
        RandFlipd(KEYS, prob=1.0),
    ],
    ids=["flip", "quarter turn", "flip all"],
)
def test_moves_with_the_label(random, dtype):
    case = random(SignedDistanceMapd("label", num_classes=3, dtype=dtype)(blob_case(spacing=(0.5, 2.0, 3.0))))
    assert torch.allclose(case["distance"].as_tensor().float(), recomputed(case), rtol=1e-3)
    batch = list_data_collate([case])
    logits = torch.randn(1, *case["distance"].shape)
    loss = get_loss("boundary")
    given = loss(logits, {"label": batch["label"], "distance": batch["distance"]})
    assert loss(logits, batch["label"]).item() == pytest.approx(given.item(), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_crop_keeps_the_distances_of_the_whole_volume(dtype):
    whole = SignedDistanceMapd("label", num_classes=3, dtype=dtype)(blob_case())
    whole["place"] = MetaTensor(torch.arange(24 * 20 * 22.0).view(1, 24, 20, 22))
    patch = RandSpatialCropd([*KEYS, "place"], (7, 6, 5), random_size=False)(whole)
    place = patch["place"].long().flatten()
    expected = whole["distance"].as_tensor().flatten(1)[:, place].view(3, 7, 6, 5)
    assert torch.equal(patch["distance"].as_tensor(), expected)


@pytest.mark.parametrize("zoom", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["affine", "zoom"])
def test_rotated_and_zoomed_maps_are_the_patients_millimeters(kind, zoom):
    """The recomputed map, with the voxel size that the patch's affine says, is the one that was carried along."""
    case = SignedDistanceMapd("label", num_classes=3)(blob_case((40, 40, 40)))
    options = {"mode": ["nearest", "bilinear"], "padding_mode": ["zeros", "border"]}
    if kind == "affine":
        random = RandAffined(
            KEYS, prob=1.0, rotate_range=[(0.3, 0.3)] * 3, scale_range=[(zoom - 1, zoom - 1)] * 3, **options
        )
    else:
        random = RandZoomd(
            KEYS, prob=1.0, min_zoom=zoom, max_zoom=zoom, mode=["nearest", "trilinear"], padding_mode="edge"
        )
    out = random(case)
    mm = out["label"].pixdim.tolist()
    assert mm == pytest.approx([zoom if kind == "affine" else 1 / zoom] * 3, rel=0.05)
    inner = (slice(None), *[slice(8, 32)] * 3)
    error = (out["distance"].as_tensor() - recomputed(out))[inner].abs()
    assert error.mean() < 0.3 * (1 + mm[0])  # both are from voxel center to voxel center
    if zoom != 1.0:
        wrong = (out["distance"].as_tensor() - recomputed(out, (1.0, 1.0, 1.0)))[inner].abs()
        assert wrong.mean() > 2 * error.mean()


class HalfPrecision(torch.nn.Conv3d):
    """A network under autocast; the trainer's own ``amp`` is for CUDA alone."""

    def forward(self, input):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input)


def train(network, compile):
    """Run the stock trainer on maps that were computed once, with metrics and post-processing."""
    cases = [blob_case((16, 16, 16)) for _ in range(4)]
    transform = Compose(
        [SignedDistanceMapd("label", num_classes=3), RandSpatialCropd(["image", *KEYS], (8, 8, 8), random_size=False)]
    )
    loader = DataLoader(CacheDataset(cases, transform, progress=False), batch_size=2)
    loss = get_loss({"type": "compound", "components": ["dice", "boundary"]})
    seen = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=lambda prediction, target: seen.append((prediction, target)) or loss(prediction, target),
        prepare_batch=prepare_batch_with_distance,
        postprocessing=Compose([UnpackLabeld(), AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3)]),
        key_train_metric={"dice": MeanDice(output_transform=from_engine(["pred", "label"]))},
        compile=compile,
        compile_kwargs={"backend": "eager"},
    )
    trainer.run()
    return trainer, seen


@pytest.mark.parametrize("compile", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("kind", [torch.nn.Conv3d, HalfPrecision], ids=["", "autocast"])
def test_stock_trainer_with_metrics_and_postprocessing(compile, kind):
    network = kind(1, 3, 3, padding=1)
    before = network.weight.detach().clone()
    trainer, seen = train(network, compile)
    assert all(target["distance"].shape == (2, 3, 8, 8, 8) for _, target in seen) and len(seen) == 2
    assert all((prediction.dtype == torch.bfloat16) == (kind is HalfPrecision) for prediction, _ in seen)
    assert network.weight.isfinite().all() and not torch.equal(network.weight, before)
    assert 0 < trainer.state.metrics["dice"] <= 1
    assert trainer.state.output[0]["label"].shape == (3, 8, 8, 8)


def test_missing_map_names_the_transform_to_add():
    with pytest.raises(UserError, match="^prepare_batch: the batch has no distance map. Add .*SignedDistanceMapd"):
        prepare_batch_with_distance({"image": torch.zeros(1), "label": torch.zeros(1)})


def test_unpack_leaves_plain_labels():
    assert UnpackLabeld()({"label": 3}) == {"label": 3}
