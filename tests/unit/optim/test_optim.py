"""Optimizers built from a recipe, against those of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from convlens import optim, user_code
from convlens.errors import UsageError
from convlens.optim import OPTIMIZERS, SCHEDULES, build_optimizer, check_optimizer
from convlens.recipe import GroupConfig, OptimConfig
from convlens.user_code import UntrustedCode


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(8, 1, 8, 8, generator=generator)
        labels = torch.randint(0, 3, (8,), generator=generator)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("exempt", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "nesterov"])
def test_optimizers_equal_those_of_torch_with_the_numbers_of_the_recipe(
    name: str, exempt: bool
) -> None:
    config = OptimConfig(
        name="sgd" if name == "nesterov" else name,
        lr=0.05,
        weight_decay=0.3,
        momentum=0.8,
        betas=(0.8, 0.95),
        nesterov=name == "nesterov",
        decay_bias_and_norm=not exempt,
    )
    mine, theirs = network(), network()
    weights = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    assert [tuple(p.shape) for p in others] == [(4,), (4,), (3,)]
    groups = [
        {"params": weights, "weight_decay": 0.3},
        {"params": others, "weight_decay": 0.0 if exempt else 0.3},
    ]
    reference: torch.optim.Optimizer
    if name == "adam":
        reference = torch.optim.Adam(groups, lr=0.05, betas=(0.8, 0.95))
    elif name == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95))
    else:
        reference = torch.optim.SGD(groups, lr=0.05, momentum=0.8, nesterov=name == "nesterov")
    train(mine, optim.build_optimizer(mine, config))
    train(theirs, reference)
    for (key, value), expected in zip(
        mine.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.allclose(value, expected, rtol=1e-4, atol=1e-6), key


def test_weight_decay_does_not_change_exempt_parameters() -> None:
    """With zero gradients, decoupled weight decay only multiplies weights by 1 - lr * decay."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, decay_bias_and_norm=False)
    optimizer = optim.build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = optim.build_optimizer(model, OptimConfig(decay_bias_and_norm=False))
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(optimized) == 4


def test_an_unknown_optimizer_or_schedule_names_near_misses() -> None:
    with pytest.raises(UsageError, match="unknown optimizer 'adan'"):
        optim.build_optimizer(network(), OptimConfig(name="adan"))
    with pytest.raises(UsageError, match="did you mean cosine"):
        optim.build_schedule(OptimConfig(schedule="cosin"))


def test_the_registries_contain_the_documented_names() -> None:
    assert set(OPTIMIZERS) == {"adam", "adamw", "muon", "sgd"}
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "one-cycle", "step"}


def test_an_optimizer_of_a_user_gets_the_groups_and_the_keywords_that_it_names() -> None:
    text = "import torch\n\nclass Own(torch.optim.SGD):\n"
    text += "    def __init__(self, params, lr, momentum, dampening=0.0):\n"
    text += "        super().__init__(params, lr, momentum, dampening)\n"
    Path("own.py").write_text(text)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    group = GroupConfig(params="norms", lr=0.5, weight_decay=0.0)
    values = {"name": "./own.py:Own", "lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}
    config = OptimConfig(**values, options={"dampening": 0.25}, groups=[group])
    with pytest.raises(UntrustedCode):
        build_optimizer(model, config)
    with user_code.trust(True):
        check_optimizer(model, config)
        optimizer = build_optimizer(model, config)
        wrong = config.model_copy(update={"options": {"damping": 1}})
        with pytest.raises(UsageError, match=r"has no option 'damping' \(did you mean dampening"):
            build_optimizer(model, wrong)
    found = [(g["lr"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(0.1, 0.1, 0.01), (0.5, 0.5, 0.0)]
    assert optimizer.defaults["momentum"] == 0.8
    assert optimizer.defaults["dampening"] == 0.25
