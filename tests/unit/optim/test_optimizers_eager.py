"""The optimizers that skip torch's compiler give the same bits as torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convlens import optim
from convlens.optim import optimizers
from convlens.recipe import OptimConfig


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_eager_optimizers_give_the_same_bits_as_torch(name: str, fused: bool) -> None:
    options = {"lr": 0.1, "weight_decay": 0.01, "fused": fused}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    mine, theirs = network(), network()
    one = getattr(optimizers, name)(mine.parameters(), **options)
    two = getattr(torch.optim, name)(theirs.parameters(), **options)
    images = torch.randn(6, 1, 4, 4)
    for step in range(6):
        for model, optimizer in ((mine, one), (theirs, two)):
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            model(images).square().mean().backward()
            optimizer.step()
        if step == 2:  # each state dict is loaded by the other optimizer
            saved = one.state_dict()
            assert saved["param_groups"] == two.state_dict()["param_groups"]
            one.load_state_dict(two.state_dict())
            two.load_state_dict(saved)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad


def test_recipes_use_eager_optimizers() -> None:
    for name in optim.OPTIMIZERS:
        assert isinstance(
            optim.build_optimizer(network(), OptimConfig(name=name)), optimizers.Eager
        ), name
