"""Faster gradients of depthwise convolutions: equal to torch's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from convlens.device import Plan
from convlens.engine.depthwise import _part_starts, depthwise_gradients

PLAN = Plan("cpu", "bf16", "channels_last")


def network(kernel: int, stride: int, *, bias: bool, height: int | None = None) -> nn.Sequential:
    size = (height or kernel, kernel)
    padding = (size[0] // 2, size[1] // 2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, size, stride, padding, groups=8, bias=bias),
        nn.Conv2d(8, 4, 1),
    )


def gradients(
    model: nn.Module, images: Tensor, context: contextlib.AbstractContextManager[object]
) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    with context:
        output = model(images)
    output.float().square().sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "height"),
    [(3, 1, None), (3, 2, None), (5, 1, None), (5, 2, None), (7, 1, None), (4, 2, None), (5, 1, 3)],
)
def test_the_gradients_are_those_of_torch(
    kernel: int, stride: int, height: int | None, layout: torch.memory_format
) -> None:
    """In float32, so that only the order of additions differs."""
    torch.manual_seed(0)
    model = network(kernel, stride, bias=kernel % 2 == 0, height=height).to(memory_format=layout)
    images = torch.randn(2, 3, 11, 9).to(memory_format=layout)
    expected_output, expected = gradients(model, images, contextlib.nullcontext())
    output, actual = gradients(model, images, depthwise_gradients(network(5, 1, bias=False), PLAN))
    assert torch.equal(output, expected_output)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-4)


def test_gradients_in_bfloat16_are_as_precise_as_those_of_torch() -> None:
    """Against float64, the error is hardly larger than that of torch's bfloat16 gradients."""
    torch.manual_seed(0)
    model, images = network(5, 2, bias=True), torch.randn(4, 3, 12, 12)
    _, exact = gradients(model.double(), images.double(), contextlib.nullcontext())
    model = model.float()
    with PLAN.autocast():
        _, torchs = gradients(model, images, contextlib.nullcontext())
        _, ours = gradients(model, images, depthwise_gradients(model, PLAN))
    for name, gradient in exact.items():
        scale = gradient.abs().max()
        error = (ours[name].double() - gradient).abs().max() / scale
        assert error <= 1.5 * (torchs[name].double() - gradient).abs().max() / scale + 0.005
        assert ours[name].dtype == torch.float32


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    model = network(5, 1, bias=False)
    model[1].weight.requires_grad_(False)
    images = torch.randn(2, 3, 8, 8)
    _, expected = gradients(model, images, contextlib.nullcontext())
    _, actual = gradients(model, images, depthwise_gradients(model, PLAN))
    assert actual.keys() == expected.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(actual["0.weight"], expected["0.weight"], rtol=1e-4, atol=1e-4)


def test_other_networks_and_plans_are_left_to_torch() -> None:
    depthwise, plain = network(5, 1, bias=False), nn.Sequential(nn.Conv2d(3, 4, 5))
    small = network(3, 1, bias=False)
    nothing = contextlib.nullcontext
    assert not isinstance(depthwise_gradients(depthwise, PLAN), nothing)
    for model, plan in (
        (plain, PLAN),
        (small, PLAN),
        (depthwise, Plan("cpu", "fp32", "channels_last")),
        (depthwise, Plan("cpu", "bf16", "channels_last", step_mode="compiled")),
        (depthwise, Plan("cuda", "bf16", "channels_last")),
    ):
        assert isinstance(depthwise_gradients(model, plan), nothing)


@pytest.mark.parametrize(
    ("size", "starts"), [(5, [0, 2]), (7, [0, 3, 4]), (9, [0, 3, 6]), (4, [0, 1])]
)
def test_parts_cover_the_kernel(size: int, starts: list[int]) -> None:
    assert _part_starts(size) == starts
    assert {start + tap for start in starts for tap in range(3)} == set(range(size))
