"""Small networks with given weights, as `InspectedModel`, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convlens.interpret.inputs import InspectedModel
from convlens.run import LoadedModel, Preprocessing
from helpers.support import PLAN


def subject(
    model: nn.Module, size: int = 4, channels: int = 3, classes: str = "ab"
) -> InspectedModel:
    """Return a network that takes pixels in 0..1."""
    pre = Preprocessing(size, channels, "stretch", [0.0] * channels, [1.0] * channels)
    return InspectedModel("net", LoadedModel(model.eval(), tuple(classes), pre, {}), PLAN)


def conv(weights: Any, bias: Any = None) -> nn.Conv2d:
    """Return a convolution with these weights `[out, in, k, k]`."""
    weight = torch.as_tensor(weights, dtype=torch.float32)
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32))
    return layer


def network(first: nn.Conv2d) -> nn.Module:
    """Return the convolution, an in-place ReLU, and a head: the sum over channels, and 0."""
    model = nn.Sequential()
    model.add_module("first", first)
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    head = nn.Linear(first.out_channels, 2)
    nn.init.constant_(head.weight[0], 1.0)
    nn.init.constant_(head.weight[1], 0.0)
    nn.init.zeros_(head.bias)
    model.add_module("head", head)
    return model


def images(count: int) -> torch.Tensor:
    """Return random images, uint8 `[count, 3, 4, 4]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
