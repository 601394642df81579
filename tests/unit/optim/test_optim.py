"""Optimisers, schedules and averages against torch's own and slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from convlens import optim
from convlens.errors import UsageError
from convlens.optim import OPTIMIZERS, SCHEDULES
from convlens.recipe import LookaheadConfig, OptimConfig
from helpers.support import same


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


# Optimisers


@pytest.mark.parametrize("exempt", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "nesterov"])
def test_the_optimisers_are_torchs_with_the_recipes_numbers(name: str, exempt: bool) -> None:
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


def test_decay_moves_nothing_exempt() -> None:
    """Without a gradient, decoupled decay shrinks weights by 1 - lr * decay and nothing else."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, decay_bias_and_norm=False)
    optimizer = optim.build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 0.95 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, before[name] * shrunk), name


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = optim.build_optimizer(model, OptimConfig(decay_bias_and_norm=False))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == 4


def test_an_unknown_optimiser_or_schedule_names_near_misses() -> None:
    with pytest.raises(UsageError, match="unknown optimiser 'adan'"):
        optim.build_optimizer(network(), OptimConfig(name="adan"))
    with pytest.raises(UsageError, match="did you mean cosine"):
        optim.build_schedule(OptimConfig(schedule="cosin"))


def test_setting_the_rate_keeps_what_it_was_at_first() -> None:
    config = OptimConfig(lr=0.2, weight_decay=0.1, decay_bias_and_norm=False)
    optimizer = optim.build_optimizer(network(), config)
    for factor in (0.5, 0.0, 0.25):
        assert optim.set_lr(optimizer, factor) == pytest.approx(0.2 * factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


# Schedules

STEPS = 90


def of_torch(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def of_ours(config: OptimConfig, steps: int = STEPS) -> list[float]:
    factor = optim.build_schedule(config)
    return [factor(step / steps) for step in range(steps)]


def one() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_cosine_is_torchs() -> None:
    optimizer = one()
    theirs = of_torch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS), optimizer)
    assert of_ours(OptimConfig(schedule="cosine")) == pytest.approx(theirs, abs=1e-9)


def test_linear_is_torchs() -> None:
    optimizer = one()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    theirs = of_torch(scheduler, optimizer)
    assert of_ours(OptimConfig(schedule="linear")) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 6, 9, 10])
def test_step_is_torchs(parts: int) -> None:
    optimizer = one()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, STEPS // parts, gamma=0.3)
    theirs = of_torch(scheduler, optimizer)
    ours = of_ours(OptimConfig(schedule="step", step_size=1 / parts, gamma=0.3))
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("rise", [0.3, 0.1, 0.7])
def test_one_cycle_is_torchs(rise: float) -> None:
    total = 1000
    optimizer = one()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=rise, cycle_momentum=False
    )
    theirs = of_torch(scheduler, optimizer, total - 1)
    config = OptimConfig(schedule="one-cycle", warmup=0.0 if rise == 0.3 else rise)
    factor = optim.build_schedule(config)
    # torch's top is one step before its share of the steps, and its end is the last step.
    top, end = rise * total - 1, total - 1
    warped = [
        rise * step / top if step <= top else rise + (1 - rise) * (step - top) / (end - top)
        for step in range(total - 1)
    ]
    assert [factor(progress) for progress in warped] == pytest.approx(theirs, abs=1e-9)
    assert of_ours(config, total)[:-1] == pytest.approx(theirs, abs=0.02)
    assert factor(0.0) == pytest.approx(1 / 25)
    assert factor(rise) == pytest.approx(1.0)
    assert factor(1.0) == pytest.approx(4e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
def test_warmup_rises_from_zero_and_the_schedule_runs_over_the_rest(name: str) -> None:
    plain = optim.build_schedule(OptimConfig(schedule=name))
    factor = optim.build_schedule(OptimConfig(schedule=name, warmup=0.2))
    assert [factor(p) for p in (0.0, 0.05, 0.1)] == pytest.approx([0, 0.25, 0.5])
    for progress in (0.2, 0.4, 0.7, 1.0):
        assert factor(progress) == pytest.approx(plain((progress - 0.2) / 0.8))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_schedule_can_end_above_zero(name: str) -> None:
    factor = optim.build_schedule(OptimConfig(schedule=name, final=0.07))
    # Half way both shapes are in the middle between 1 and their end.
    assert [factor(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.535, 0.07])


def test_the_triangle_of_the_records_is_a_linear_schedule_with_warmup() -> None:
    """airbench94's rates: from 0.2 at the first step to 1 at 23%, then down to 0.07."""
    steps, peak = 500, 115
    theirs = [
        0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (steps - peak)
        for step in range(steps)
    ]
    config = OptimConfig(schedule="linear", warmup=0.23, warmup_from=0.2, final=0.07)
    assert of_ours(config, steps) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": "step", "final": 0.1}, "optim.final=0.1: schedule step"),
        ({"schedule": "one-cycle", "final": 0.1}, "optim.final=0.1: schedule one-cycle"),
        ({"schedule": "linear", "warmup_from": 0.2}, "optim.warmup_from=0.2"),
        ({"schedule": "one-cycle", "warmup": 0.2, "warmup_from": 0.2}, "optim.warmup_from=0.2"),
    ],
)
def test_a_schedule_refuses_keys_that_would_do_nothing(options: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        optim.build_schedule(OptimConfig(**options))


def test_the_tables_are_what_recipes_name() -> None:
    assert set(OPTIMIZERS) == {"adam", "adamw", "muon", "sgd"}
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "one-cycle", "step"}


# Averages


def test_the_average_is_that_of_a_slow_reference() -> None:
    model = network()
    averager = optim.EMA(model, 0.4)
    slow = {k: v.clone().double() for k, v in model.state_dict().items()}
    optimizer = optim.build_optimizer(model, OptimConfig(lr=0.05))
    for t in range(1, 9):
        train(model, optimizer, steps=1)
        averager.update()
        decay = min(0.4, (1 + t) / (10 + t))  # 0.4 from the fifth step on
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                slow[key] = decay * slow[key] + (1 - decay) * value.double()
            else:
                slow[key] = value.double()
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with optim.averaged_weights(averager):
        for key, value in model.state_dict().items():
            assert torch.allclose(value.double(), slow[key], rtol=1e-5, atol=1e-7), key
        assert not torch.equal(model.state_dict()["1.running_mean"], live["1.running_mean"])
    same(live, dict(model.state_dict()))


def test_a_small_decay_is_used_as_it_is() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        averager = optim.EMA(model, 0.1)
        model.weight.fill_(1.0)
        for _ in range(2):
            averager.update()
    with optim.averaged_weights(averager):
        # min(0.1, 2/11) = 0.1, so 1 - 0.1^2.
        assert model.weight.item() == pytest.approx(0.99)


def test_the_weights_are_back_after_an_error() -> None:
    model = network()
    averager = optim.EMA(model, 0.5)
    train(model, optim.build_optimizer(model, OptimConfig()), steps=1)
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), optim.averaged_weights(averager):
        raise ZeroDivisionError
    same(live, dict(model.state_dict()))
    with optim.averaged_weights(None):
        same(live, dict(model.state_dict()))


def test_a_restored_average_goes_on_as_the_first_would() -> None:
    model = network()
    first, second = optim.EMA(model, 0.9), optim.EMA(model, 0.9)
    optimizer = optim.build_optimizer(model, OptimConfig())
    train(model, optimizer, steps=1)
    first.update()
    state = first.state()
    second.load({"steps": state["steps"], "average": [t.clone() for t in state["average"]]})
    train(model, optimizer, steps=1)
    first.update()
    second.update()
    for mine, theirs in zip(first.state()["average"], second.state()["average"], strict=True):
        assert torch.equal(mine, theirs)
    assert math.isfinite(float(first.state()["average"][0].sum()))


# Lookahead


def test_lookahead_is_the_loop_of_its_reference() -> None:
    """Every third step the weights go back to an average; the last two of 11 are thrown away."""
    total, every, decay, power = 11, 3, 0.9, 2.0
    config = OptimConfig(lr=0.05, lookahead=LookaheadConfig(every=every, decay=decay, power=power))
    mine, slow = network(), network()
    lookahead = optim.build_averager(mine, config, total)
    assert isinstance(lookahead, optim.Lookahead)
    average = {k: v.clone() for k, v in slow.state_dict().items()}
    ours, theirs = optim.build_optimizer(mine, config), optim.build_optimizer(slow, config)
    for step in range(1, total + 1):
        train(mine, ours, steps=1)
        lookahead.update()
        train(slow, theirs, steps=1)
        kept = decay**every * (step / total) ** power if step % every == 0 else None
        for key, value in slow.state_dict().items():
            if not value.is_floating_point():
                continue
            if kept is not None:
                average[key] = kept * average[key] + (1 - kept) * value
            if kept is not None or step == total:
                value.copy_(average[key])
        for key, value in mine.state_dict().items():
            assert torch.allclose(value, slow.state_dict()[key], rtol=1e-4, atol=1e-6), key
        live = mine.state_dict()["0.weight"].clone()
        with optim.averaged_weights(lookahead):  # validation and the model file see the average
            seen = mine.state_dict()["0.weight"]
            assert torch.allclose(seen, average["0.weight"], rtol=1e-4, atol=1e-6)
        assert torch.equal(live, mine.state_dict()["0.weight"])


def test_the_network_ends_with_its_average() -> None:
    model = network()
    lookahead = optim.Lookahead(model, every=4, decay=0.95, power=3, steps=6)
    optimizer = optim.build_optimizer(model, OptimConfig(lr=0.05))
    for step in range(1, 7):
        train(model, optimizer, steps=1)
        lookahead.update()
        same_now = all(
            torch.equal(mine, average)
            for mine, average in zip(
                (t for t in model.state_dict().values() if t.is_floating_point()),
                _ordered(model, lookahead),
                strict=True,
            )
        )
        assert same_now == (step in (4, 6))


def _ordered(model: nn.Module, average: optim.WeightAverage) -> list[torch.Tensor]:
    """The average in the order of the network's `state_dict`."""
    with optim.averaged_weights(average):
        return [t.clone() for t in model.state_dict().values() if t.is_floating_point()]


def test_a_recipe_has_one_average_or_none() -> None:
    assert optim.build_averager(network(), OptimConfig(), 10) is None
    assert isinstance(optim.build_averager(network(), OptimConfig(ema=0.9), 10), optim.EMA)
    with pytest.raises(UsageError, match=r"optim\.ema and optim\.lookahead"):
        optim.build_averager(network(), OptimConfig(ema=0.9, lookahead=LookaheadConfig()), 10)
