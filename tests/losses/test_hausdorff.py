# Copyright (c) monai_losses_ext contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's Hausdorff losses by name, with the targets and precisions of the losses here."""

from __future__ import annotations

import monai.losses
import pytest
import torch

from monai_losses_ext import get_loss


@pytest.mark.parametrize("name", ["hausdorff_dt", "log_hausdorff_dt"])
def test_monais_hausdorff_losses_by_name(name):
    logits, labels = torch.randn(2, 3, 6, 5), torch.randint(0, 3, (2, 6, 5))
    theirs = {"hausdorff_dt": monai.losses.HausdorffDTLoss, "log_hausdorff_dt": monai.losses.LogHausdorffDTLoss}[name]
    expected = theirs(softmax=True, to_onehot_y=True, alpha=1.5)(logits, labels[:, None])
    ours = get_loss({"type": name, "alpha": 1.5})
    dense = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    for target in (labels, labels[:, None], dense, {"label": labels}):
        assert ours(logits, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours(logits.half(), labels).item() == pytest.approx(expected.item(), rel=1e-2)
    compound = get_loss({"type": "compound", "components": ["dice", {"type": name, "alpha": 1.5}]})
    compound(logits, labels)
    assert compound.last_terms[compound.names[1]].item() == pytest.approx(expected.item(), rel=1e-5)
    foreground = (labels > 0)[:, None].float()
    with pytest.warns(UserWarning, match="softmax=True"):  # and takes the logits for probabilities
        constant = theirs(softmax=True, include_background=True)(logits[:, :1], foreground)
    assert constant.item() == theirs(include_background=True)(logits[:, :1], foreground).item()
    with pytest.raises(ValueError, match=r"^softmax: is constant over one channel; use sigmoid"):
        ours(logits[:, :1], labels > 0)
    with pytest.raises(ValueError, match=r"^loss: .*: key: must be one of .* got 'weight'"):
        get_loss({"type": name, "weight": [1, 2, 3]})
