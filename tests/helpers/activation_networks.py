"""Shared by the tests of activations and others."""

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
    pre = Preprocessing(size, channels, "stretch", [0.0] * channels, [1.0] * channels)
    return InspectedModel("net", LoadedModel(model.eval(), tuple(classes), pre, {}), PLAN)


def conv(weights: Any, bias: Any = None) -> nn.Conv2d:
    weight = torch.as_tensor(weights, dtype=torch.float32)
    made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=bias is not None)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(torch.as_tensor(bias, dtype=torch.float32))
    return made


def network(first: nn.Conv2d) -> nn.Module:
    """The convolution, an in-place ReLU, and the sum over channels as the logits of two classes."""
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
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
