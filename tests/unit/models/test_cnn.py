"""The cnn family: shapes, numbers of parameters, and an output computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convlens import models, recipe
from convlens.errors import UsageError
from convlens.models.cnn import CNN, Flatten


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_networks_of_recipes_have_the_expected_number_of_parameters() -> None:
    mnist = models.build_model("cnn", 10, 1, 28, recipe.load_recipe("mnist").model.options)
    convolutions = (1 * 9 * 32 + 32) + (32 * 9 * 64 + 64)
    assert parameters(mnist) == convolutions + (64 * 7 * 7 * 128 + 128) + (128 * 10 + 10)
    assert parameters(mnist) == 421_642
    digits = models.build_model("cnn", 10, 1, 8, recipe.load_recipe("digits").model.options)
    first = (1 * 9 * 16 + 2 * 16) + (16 * 9 * 16 + 2 * 16)  # batch norm instead of a bias
    second = (16 * 9 * 48 + 2 * 48) + (48 * 9 * 48 + 2 * 48)
    assert parameters(digits) == first + second + (48 * 2 * 2 * 10 + 10)


def test_the_output_equals_one_computed_with_functions() -> None:
    torch.manual_seed(0)
    model = CNN(3, 1, 9, widths=[2, 4], batch_norm=False, hidden=5, activation="relu").eval()
    weights = model.state_dict()
    images = torch.randn(6, 1, 9, 9)
    x = F.relu(F.conv2d(images, weights["stage1.0.weight"], weights["stage1.0.bias"], padding=1))
    x = F.max_pool2d(x, 2)
    assert x.shape == (6, 2, 4, 4)
    x = F.relu(F.conv2d(x, weights["stage2.0.weight"], weights["stage2.0.bias"], padding=1))
    x = F.max_pool2d(x, 2).mean((2, 3))
    x = F.relu(F.linear(x, weights["dense.hidden.weight"], weights["dense.hidden.bias"]))
    x = F.linear(x, weights["classifier.weight"], weights["classifier.bias"])
    assert torch.allclose(model(images), x, atol=1e-6)
    assert x.std() > 0


@pytest.mark.parametrize("pool", ["max", "avg", "stride", "none"])
@pytest.mark.parametrize("size", [8, 9, 15, 28])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_flatten_head_fits_every_image_size(pool: str, size: int, kernel: int) -> None:
    model = CNN(4, 3, size, widths=[2, 3, 2], pool=pool, kernel=kernel, head="flatten")
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)
    side = {"none": size, "stride": -(-size // 8)}.get(pool, size // 8)
    assert model.classifier.in_features == 2 * side * side


@pytest.mark.parametrize(("pool", "sides"), [("max", (5, 2)), ("avg", (5, 2)), ("stride", (6, 3))])
def test_each_stage_halves_the_image(pool: str, sides: tuple[int, int]) -> None:
    model = CNN(2, 1, 11, widths=[3, 4], pool=pool)
    first = model.get_submodule("stage1")(torch.zeros(1, 1, 11, 11))
    second = model.get_submodule("stage2")(first)
    assert (first.shape[2:], second.shape[2:]) == ((sides[0],) * 2, (sides[1],) * 2)


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("head", ["flatten", "avg"])
def test_a_single_pixel_is_not_halved_further(pool: str, head: str) -> None:
    model = CNN(2, 1, 8, widths=[2] * 6, pool=pool, head=head)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 2)


@pytest.mark.parametrize("head", ["avg", "max"])
def test_pooling_heads_pool_over_all_pixels(head: str) -> None:
    maps = torch.randn(2, 3, 4, 4)
    pooled = CNN(2, 1, 8, widths=[3], head=head).pool(maps)
    expected = maps.mean((2, 3)) if head == "avg" else maps.amax((2, 3))
    assert torch.allclose(pooled, expected)


def test_depth_and_kernel_can_be_set_by_stage() -> None:
    model = CNN(2, 1, 16, widths=[3, 4], depth=[1, 2], kernel=[5, 3])
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(3, 1, 5, 5), (4, 3, 3, 3), (4, 4, 3, 3)]


@pytest.mark.parametrize(
    ("size", "pool", "sides"),
    [
        # 13 px: a 5x5 kernel has 9 positions, with stride 2 it has 5; a 3x3 kernel then has 3,
        # pooled to 1.
        (13, ["stride", "max"], (5, 1)),
        (14, ["stride", "none"], (5, 3)),
        (14, ["none", "avg"], (10, 4)),
        (14, "max", (5, 1)),
    ],
)
@pytest.mark.parametrize("head", ["flatten", "avg"])
def test_sizes_with_valid_padding_and_pooling_by_stage(
    size: int, pool: str | list[str], sides: tuple[int, int], head: str
) -> None:
    model = CNN(2, 1, size, widths=[3, 4], kernel=[5, 3], padding="valid", pool=pool, head=head)
    images = torch.randn(3, 1, size, size)
    first = model.get_submodule("stage1")(images)
    second = model.get_submodule("stage2")(first)
    assert (first.shape[2:], second.shape[2:]) == ((sides[0],) * 2, (sides[1],) * 2)
    assert model(images).shape == (3, 2)


def test_valid_padding_gives_the_inner_part_of_same_padding() -> None:
    same = CNN(2, 1, 12, widths=[3, 4], kernel=[5, 3], pool="none").eval()
    valid = CNN(2, 1, 12, widths=[3, 4], kernel=[5, 3], pool="none", padding="valid").eval()
    valid.load_state_dict(same.state_dict())
    images = torch.randn(2, 1, 12, 12)
    inner, full = (m.get_submodule("stage1")(images) for m in (valid, same))
    assert torch.allclose(inner, full[:, :, 2:-2, 2:-2], atol=1e-6)


def test_dropout_drops_channels_and_units() -> None:
    model = CNN(2, 1, 16, widths=[3, 4], hidden=8, dropout=0.3, stage_dropout=0.2)
    kinds = [m for m in model.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
    assert [type(m) for m in kinds] == [nn.Dropout2d, nn.Dropout2d, nn.Dropout]
    assert [m.p for m in kinds] == [0.2, 0.2, 0.3]
    assert not any("Dropout" in type(m).__name__ for m in CNN(2, 1, 16).modules())


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.build_model("cnn", 2, 1, 8, {"widths": [4]}).get_parameter("stage1.0.weight")

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": [4]}, "unknown key 'model.width' (did you mean model.widths?)"),
        ({"dropuot": 0.1, "x": 1}, "unknown key 'model.x'"),
        ({"nam": "cnn"}, "unknown key 'model.nam' (did you mean model.name?)"),
        ({"pool": "maxx"}, "unknown model.pool 'maxx'"),
        ({"head": "mean"}, "unknown model.head 'mean'"),
        ({"activation": "rilu"}, "unknown model.activation 'rilu'"),
        ({"widths": []}, "model.widths=[]"),
        ({"widths": [4, 0]}, "model.widths=[4, 0]"),
        ({"kernel": 4}, "kernel sizes are odd"),
        ({"kernel": [3, 3]}, "model.kernel has 2 values for 3"),
        ({"depth": 0}, "at least one convolution"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"dropout": float("nan")}, "model.dropout=nan"),
        ({"hidden": -1}, "model.hidden=-1"),
        ({"widths": "abc"}, "model cnn"),
        ({"widths": 4}, "model cnn"),
        ({"widths": [2.5]}, "model cnn"),
        ({"dropout": "much"}, "model cnn"),
        ({"pool": ["max"]}, "model.pool has 1 values for 3"),
        ({"pool": ["max", "max", "mx"]}, "unknown model.pool 'mx'"),
        ({"pool": [1, 2, 3]}, "model.pool: an object of type 'int'"),
        ({"padding": "full"}, "unknown model.padding 'full'"),
        ({"padding": "valid", "kernel": 5}, "a 5x5 kernel doesn't fit maps of 2 px"),
        ({"widths": [10**30]}, "model cnn"),
    ],
)
def test_unsuitable_options_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        models.build_model("cnn", 2, 1, 8, options)
    assert message in str(caught.value)


def test_several_unsuitable_options_are_reported_at_once() -> None:
    options = {"kernel": 2, "dropout": 2, "hidden": -1}
    with pytest.raises(UsageError, match=r"kernel.*dropout.*hidden"):
        models.build_model("cnn", 2, 1, 8, options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_flatten_has_the_memory_format_of_its_input(memory_format: Any) -> None:
    maps = torch.randn(3, 4, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    gradients = list[torch.Tensor]()
    inputs = maps * 1.0
    rows = Flatten()(inputs)
    inputs.register_hook(gradients.append)  # called after the hook of the layer
    assert torch.equal(rows, maps.reshape(3, 100))
    weights = torch.randn(3, 100)
    (rows * weights).sum().backward()
    assert gradients[0].is_contiguous(memory_format=memory_format)
    assert torch.equal(gradients[0], weights.view(3, 4, 5, 5))
