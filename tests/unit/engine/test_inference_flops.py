"""Floating-point operations of networks."""

from __future__ import annotations

import pytest
from torch import nn

from convlens import models
from convlens.engine.inference import flops


def test_flops_computed_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    model.train()
    # 4 channels of 8 x 8 positions, 27 products each; 256 x 5 products
    assert flops(model, (3, 8, 8), "cpu") == 2 * (4 * 64 * 27 + 256 * 5)
    assert model.training


def test_flops_of_a_resnet_agree_with_the_published_number() -> None:
    model = models.build_model("resnet18", 1000, 3, 224, {"stem": "imagenet"})
    assert flops(model, (3, 224, 224), "cpu") == pytest.approx(2 * 1.814e9, rel=0.001)
