"""Wide ResNets: the number of weights in the paper, and a slow reference of the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlens import models
from convlens.errors import UsageError
from convlens.models.resnet import WRN


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    # Zagoruyko & Komodakis 2016, table 4 (CIFAR-10).
    [
        (40, 1, 0.6),
        (40, 2, 2.2),
        (40, 4, 8.9),
        (40, 8, 35.7),
        (28, 10, 36.5),
        (28, 12, 52.5),
        (22, 8, 17.2),
        (22, 10, 26.8),
        (16, 8, 11.0),
        (16, 10, 17.1),
    ],
)
def test_the_number_of_weights_is_that_of_the_paper(
    depth: int, width: int, millions: float
) -> None:
    with torch.device("meta"):
        model = WRN(10, 3, 32, depth=depth, width=width)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def reference_forward(weights: dict[str, Tensor], images: Tensor, blocks: int) -> Tensor:
    """The network in training mode, one operation per line, with weights by name."""

    def norm_relu(x: Tensor, name: str) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        x = (x - mean) / (variance + 1e-5).sqrt()
        return (x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).clamp(min=0)

    x = F.conv2d(images, weights["conv.weight"], padding=1)
    for group in (1, 2, 3):
        for block in range(blocks):
            name = f"group{group}.{block}"
            stride = 2 if block == 0 and group > 1 else 1
            active = norm_relu(x, f"{name}.norm1")
            if block == 0:
                x = F.conv2d(active, weights[f"{name}.shortcut.weight"], stride=stride)
            inner = F.conv2d(active, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = norm_relu(inner, f"{name}.norm2")
            x = x + F.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1)
    x = norm_relu(x, "norm").mean((2, 3))
    return x @ weights["classifier.weight"].T + weights["classifier.bias"]


@pytest.mark.parametrize(("depth", "channels", "size"), [(10, 1, 8), (16, 3, 17), (22, 3, 32)])
def test_the_output_equals_a_slow_reference(depth: int, channels: int, size: int) -> None:
    torch.manual_seed(0)
    model = WRN(5, channels, size, depth=depth, width=2).train()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.8, 0.3)
    images = torch.randn(4, channels, size, size)
    expected = reference_forward(model.state_dict(), images, (depth - 4) // 6)
    assert torch.allclose(model(images), expected, atol=1e-3)
    assert expected.std() > 0.05


def test_a_block_without_change_of_shape_has_no_shortcut_weights() -> None:
    # With width 1 the first group keeps 16 channels, so its shortcut is the identity.
    names = {name for name, _ in WRN(2, 3, 8, width=1).named_modules() if "shortcut" in name}
    assert names == {"group2.0.shortcut", "group3.0.shortcut"}


def test_dropout_is_between_the_convolutions_of_each_block() -> None:
    model = WRN(2, 1, 8, depth=16, width=1, dropout=0.4)
    drops = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout)]
    assert drops == [f"group{g}.{b}.dropout" for g in (1, 2, 3) for b in (0, 1)]
    assert model.group1[0].dropout.p == 0.4
    order: list[str] = []
    for name, module in model.group2[1].named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, o, name=name: order.append(name))
    model(torch.randn(2, 1, 8, 8))
    assert order == ["norm1", "conv1", "norm2", "dropout", "conv2"]
    assert not any(isinstance(m, nn.Dropout) for m in WRN(2, 1, 8, width=1).modules())


def test_weights_are_initialized_as_in_the_papers_code() -> None:
    torch.manual_seed(0)
    model = WRN(10, 3, 32, width=4)
    weight = model.group3[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, "model.depth=18: must be 6 n + 4"),
        ({"depth": 4}, "model.depth=4"),
        ({"width": 0}, "model.width=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"dropout": "some"}, "model wrn"),
        ({"widths": [1]}, "did you mean model.width?"),
    ],
)
def test_unsuitable_options_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        models.build_model("wrn", 2, 1, 8, options)
    assert message in str(caught.value)
