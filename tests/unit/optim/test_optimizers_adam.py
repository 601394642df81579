"""LeanAdam: the same bits as torch's Adam, with any gradients, also after loading a state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from convlens import optim
from convlens.optim.optimizers import LeanAdam
from convlens.recipe import GroupConfig, OptimConfig

STEPS = 7


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).to(memory_format=torch.channels_last)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    vectors = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": others, "weight_decay": 0.3}, {"params": vectors, "lr": 0.02}]


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    nn.functional.cross_entropy(model(images), labels).backward()


def have_equal_bits(mine: Any, theirs: Any) -> bool:
    """Whether weights and optimizer states are equal bit for bit."""
    (model, optimizer), (twin, reference) = mine, theirs
    weights = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    state, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    return all(torch.equal(a, b) for a, b in weights) and all(
        state.keys() == expected.keys() and torch.equal(state[i][key], value)
        for i, tensors in expected.items()
        for key, value in tensors.items()
    )


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("frozen", [(), (2, 3), (0, 1)])
@pytest.mark.parametrize("reloaded", [None, 4])
def test_each_step_has_the_bits_of_torch(
    decoupled: bool, frozen: tuple[int, ...], reloaded: int | None
) -> None:
    mine, theirs = network(), network()
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95)}
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = optimizer_class(groups(theirs), weight_decay=0.1, fused=True, **options)
    lean = LeanAdam(groups(mine), weight_decay=0.1, decoupled_weight_decay=decoupled, **options)
    for step in range(STEPS):
        for model, optimizer in ((mine, lean), (theirs, reference)):
            model[0].requires_grad_(step not in frozen)  # has no gradient in these steps
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        if step == reloaded:
            lean.load_state_dict(copy.deepcopy(lean.state_dict()))
        assert have_equal_bits((mine, lean), (theirs, reference)), step


def test_parameters_without_gradient_do_not_change() -> None:
    model = network()
    optimizer = LeanAdam(groups(model), lr=0.1)
    for step in range(3):
        backward(model, step)
        before = model[4].weight.detach().clone()
        model[4].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model[4].weight, before)


def test_recipes_use_it_on_a_cpu() -> None:
    for name in ("adam", "adamw"):
        config = OptimConfig(name=name, groups=[GroupConfig(params="biases", lr=0.1)])
        built = optim.build_optimizer(network(), config)
        assert isinstance(built, LeanAdam)
        assert built.param_groups[0]["decoupled_weight_decay"] == (name == "adamw")
