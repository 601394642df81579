"""Muon, against the singular value decomposition, a slow reference and torch's SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convlens import optim
from convlens.models.cnn import CNN
from convlens.optim.optimizers import QUINTIC, Muon, orthogonalize
from convlens.recipe import OptimConfig

SHAPES = [(6, 40), (40, 6), (12, 12), (1, 9), (5, 1)]


def matrices(rows: int, columns: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    return torch.randn(count, rows, columns, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_orthogonalize_applies_the_quintic_to_singular_values(
    shape: tuple[int, int], iterations: int, scale: float
) -> None:
    x = matrices(*shape)
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    a, b, c = QUINTIC
    for _ in range(iterations):
        values = a * values + b * values**3 + c * values**5
    expected = left @ torch.diag_embed(values) @ right
    found = orthogonalize(x * scale, iterations)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (64, 288)])
def test_singular_values_of_an_update_are_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(matrices(*shape), 5))
    assert float(values.min()) > 0.65
    assert float(values.max()) < 1.25
    three_iterations = torch.linalg.svdvals(orthogonalize(matrices(*shape), 3))
    assert float(three_iterations.max()) < 1.25
    assert 0.9 < float(three_iterations.mean() / values.mean()) < 1.1


def test_a_gradient_of_zeros_gives_an_update_of_zeros() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4), 3), torch.zeros(2, 3, 4))


def slow_step(
    weight: Tensor, gradient: Tensor, buffer: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One step of one layer's filters, in double precision, by the formulas of the docstring."""
    buffer = options["momentum"] * buffer + gradient
    direction = gradient + options["momentum"] * buffer if options["nesterov"] else buffer
    x = direction.reshape(len(direction), -1)
    x = x / x.norm()
    a, b, c = QUINTIC
    for _ in range(options["muon_iterations"]):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    weight = weight * (1 - options["lr"] * options["weight_decay"])
    if options["muon_normalise"]:
        weight = weight * len(weight) ** 0.5 / weight.norm()
    return weight - options["lr"] * x.reshape(weight.shape), buffer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.6, "nesterov": True},
        {"momentum": 0.6, "muon_iterations": 5, "muon_normalise": False, "weight_decay": 0.5},
        {"momentum": 0.0, "nesterov": True},
    ],
)
def test_training_equals_a_slow_loop_layer_by_layer(
    options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    """Layers of equal shape are computed in one batch of products, but independently."""
    torch.manual_seed(0)
    model = CNN(3, 3, 8, widths=[6, 6, 6], depth=2, pool="none").to(memory_format=memory_format)
    config = OptimConfig(**{"name": "muon", "lr": 0.1, "aux_lr": 0.02, **options})
    resolved = config.model_dump()
    expected_filters = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    buffers = {n: torch.zeros_like(p) for n, p in expected_filters.items()}
    others = {n: p for n, p in model.named_parameters() if p.ndim != 4}
    twins = {n: nn.Parameter(p.detach().clone()) for n, p in others.items()}
    sgd = torch.optim.SGD(
        twins.values(),
        lr=0.02,
        momentum=resolved["momentum"],
        weight_decay=resolved["weight_decay"],
        nesterov=resolved["nesterov"] and resolved["momentum"] > 0,
    )
    optimizer = optim.build_optimizer(model, config)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 4]
    assert shapes.count((6, 6, 3, 3)) == 5
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        images = torch.randn(8, 3, 8, 8, generator=generator)
        model(images.contiguous(memory_format=memory_format)).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if parameter.ndim == 4:
                gradient = parameter.grad.double()
                expected_filters[name], buffers[name] = slow_step(
                    expected_filters[name], gradient, buffers[name], resolved
                )
            else:
                twins[name].grad = parameter.grad.clone()
        sgd.step()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            expected = expected_filters[name] if parameter.ndim == 4 else twins[name].double()
            assert torch.allclose(parameter.double(), expected, rtol=1e-4, atol=1e-5), name


def test_normalized_weights_have_the_norm_sqrt_of_outputs() -> None:
    """Before the update (learning rate 0 here); weights of zeros stay zero and not NaN."""
    weight, zeros = nn.Parameter(torch.randn(9, 2, 3, 3) * 7), nn.Parameter(torch.zeros(4, 2, 1, 1))
    optimizer = Muon([{"params": [weight, zeros], "muon": True}], lr=0.0, momentum=0.5)
    weight.grad, zeros.grad = torch.randn_like(weight), torch.randn_like(zeros)
    optimizer.step()
    assert float(weight.detach().norm()) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_the_scale_of_the_loss_does_not_change_the_update() -> None:
    results = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 2, 3, 3))
        optimizer = Muon([{"params": [weight], "muon": True}], lr=0.1, momentum=0.5)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            weight.grad = scale * torch.randn(weight.shape, generator=generator)
            optimizer.step()
        results.append(weight.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_matrices_can_be_trained_with_muon() -> None:
    model = CNN(3, 1, 8, widths=[4], hidden=6)
    groups = [{"params": "dense.hidden.weight", "muon": True}]
    config = OptimConfig(name="muon", lr=0.1, muon_normalise=False, momentum=0.0, groups=groups)
    optimizer = optim.build_optimizer(model, config)
    before = model.dense.hidden.weight.detach().clone()
    model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    gradient = model.dense.hidden.weight.grad.clone()
    optimizer.step()
    expected = before - 0.1 * orthogonalize(gradient[None], 3)[0]
    assert torch.allclose(model.dense.hidden.weight, expected, atol=1e-6)


@pytest.mark.gpu
def test_on_cuda_the_products_are_in_half_precision() -> None:
    x = matrices(64, 288).cuda()
    found = orthogonalize(x, 5)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert torch.allclose(found.cpu(), orthogonalize(x.cpu(), 5), atol=0.05)
