"""Schedules and averages of the weights, against torch and slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from convlens import optim
from convlens.errors import UsageError
from convlens.recipe import LookaheadConfig, OptimConfig
from helpers.support import same

STEPS = 90


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


# Schedules


def torch_rates(
    scheduler: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS
) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(config: OptimConfig, steps: int = STEPS) -> list[float]:
    factor = optim.build_schedule(config)
    return [factor(step / steps) for step in range(steps)]


def one_parameter() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_cosine_equals_torchs() -> None:
    optimizer = one_parameter()
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS), optimizer)
    assert our_rates(OptimConfig(schedule="cosine")) == pytest.approx(expected, abs=1e-9)


def test_linear_equals_torchs() -> None:
    optimizer = one_parameter()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    expected = torch_rates(scheduler, optimizer)
    assert our_rates(OptimConfig(schedule="linear")) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 6, 9, 10])
def test_step_equals_torchs(parts: int) -> None:
    optimizer = one_parameter()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, STEPS // parts, gamma=0.3)
    expected = torch_rates(scheduler, optimizer)
    ours = our_rates(OptimConfig(schedule="step", step_size=1 / parts, gamma=0.3))
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warmup", [0.3, 0.1, 0.7])
def test_one_cycle_equals_torchs(warmup: float) -> None:
    total = 1000
    optimizer = one_parameter()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    expected = torch_rates(scheduler, optimizer, total - 1)
    config = OptimConfig(schedule="one-cycle", warmup=0.0 if warmup == 0.3 else warmup)
    factor = optim.build_schedule(config)
    # torch reaches the maximum one step earlier, and the minimum in the last step.
    top, end = warmup * total - 1, total - 1
    mapped = [
        warmup * step / top if step <= top else warmup + (1 - warmup) * (step - top) / (end - top)
        for step in range(total - 1)
    ]
    assert [factor(progress) for progress in mapped] == pytest.approx(expected, abs=1e-9)
    assert our_rates(config, total)[:-1] == pytest.approx(expected, abs=0.02)
    assert factor(0.0) == pytest.approx(1 / 25)
    assert factor(warmup) == pytest.approx(1.0)
    assert factor(1.0) == pytest.approx(4e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
def test_warmup_rises_from_zero_and_the_schedule_runs_over_the_remaining_steps(name: str) -> None:
    without_warmup = optim.build_schedule(OptimConfig(schedule=name))
    factor = optim.build_schedule(OptimConfig(schedule=name, warmup=0.2))
    assert [factor(p) for p in (0.0, 0.05, 0.1)] == pytest.approx([0, 0.25, 0.5])
    for progress in (0.2, 0.4, 0.7, 1.0):
        assert factor(progress) == pytest.approx(without_warmup((progress - 0.2) / 0.8))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_schedule_can_end_above_zero(name: str) -> None:
    factor = optim.build_schedule(OptimConfig(schedule=name, final=0.07))
    # At half of the steps, both are at the mean of 1 and `final`.
    assert [factor(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.535, 0.07])


def test_the_triangular_schedule_of_airbench94_is_linear_with_warmup() -> None:
    """From 0.2 at the first step to 1 at 23% of the steps, then down to 0.07."""
    steps, peak = 500, 115
    expected = [
        0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (steps - peak)
        for step in range(steps)
    ]
    config = OptimConfig(schedule="linear", warmup=0.23, warmup_from=0.2, final=0.07)
    assert our_rates(config, steps) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step", "final": 0.1}, "optim.final=0.1: schedule step"),
        ({"schedule": "one-cycle", "final": 0.1}, "optim.final=0.1: schedule one-cycle"),
        ({"schedule": "linear", "warmup_from": 0.2}, "optim.warmup_from=0.2"),
        ({"schedule": "one-cycle", "warmup": 0.2, "warmup_from": 0.2}, "optim.warmup_from=0.2"),
    ],
)
def test_a_schedule_refuses_keys_without_effect(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        optim.build_schedule(OptimConfig(**options))


def test_set_lr_scales_the_initial_learning_rates() -> None:
    config = OptimConfig(lr=0.2, weight_decay=0.1, decay_bias_and_norm=False)
    optimizer = optim.build_optimizer(network(), config)
    for factor in (0.5, 0.0, 0.25):
        assert optim.set_lr(optimizer, factor) == pytest.approx(0.2 * factor)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


# Windows of parameter groups


def group_schedule(
    *windows: tuple[float, float], steps: int, schedule: str = "linear"
) -> tuple[optim.GroupSchedule, torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in windows]
    groups = [
        {"params": [p], "window": w, "initial_lr": 1.0}
        for p, w in zip(parameters, windows, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    factor = optim.build_schedule(OptimConfig(schedule=schedule))
    return optim.GroupSchedule(optimizer, factor, steps), optimizer


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 30, 1000])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 1 / 3, 0.375, 0.7, 0.999])
def test_adjacent_windows_cover_each_step_once(steps: int, fraction: float) -> None:
    windows, optimizer = group_schedule((0.0, fraction), (fraction, 1.0), steps=steps)
    early, late = (group["params"][0] for group in optimizer.param_groups)
    count = 0
    for step in range(steps):
        windows.apply_windows(step)
        assert early.requires_grad != late.requires_grad
        assert early.requires_grad == (step < round(fraction * steps, 9))
        count += early.requires_grad
    assert count == math.ceil(round(fraction * steps, 9))


def test_apply_windows_reports_changes_once_for_steps_in_any_order() -> None:
    windows, _ = group_schedule((0.0, 0.4), (0.2, 1.0), (0.0, 1.0), steps=10)
    assert [step for step in range(10) if windows.apply_windows(step)] == [0, 2, 4]
    assert windows.apply_windows(1)  # an earlier step
    assert not windows.apply_windows(0)
    assert windows.apply_windows(9)
    without_windows, _ = group_schedule((0.0, 1.0), steps=10)
    assert not any(without_windows.apply_windows(step) for step in range(10))


def test_the_schedule_of_a_group_runs_over_its_window() -> None:
    windows, optimizer = group_schedule((0.2, 0.6), (0.0, 1.0), steps=10)
    rates = []
    for step in range(10):
        assert windows.set_rates(step) == pytest.approx(1 - step / 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [r[0] for r in rates] == pytest.approx([0, 0, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0])
    assert [r[1] for r in rates] == pytest.approx([1 - i / 10 for i in range(10)])


# Averages


def test_the_average_equals_a_slow_reference() -> None:
    model = network()
    averager = optim.EMA(model, 0.4)
    reference = {k: v.clone().double() for k, v in model.state_dict().items()}
    optimizer = optim.build_optimizer(model, OptimConfig(lr=0.05))
    for t in range(1, 9):
        train(model, optimizer, steps=1)
        averager.update()
        decay = min(0.4, (1 + t) / (10 + t))  # 0.4 from the fifth step on
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                reference[key] = decay * reference[key] + (1 - decay) * value.double()
            else:
                reference[key] = value.double()
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with optim.averaged_weights(averager):
        for key, value in model.state_dict().items():
            assert torch.allclose(value.double(), reference[key], rtol=1e-5, atol=1e-7), key
        assert not torch.equal(model.state_dict()["1.running_mean"], live["1.running_mean"])
    same(live, dict(model.state_dict()))


def test_the_average_of_a_part_is_that_of_the_whole_if_the_rest_does_not_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    whole, part = optim.EMA(model, 0.5), optim.EMA(model, 0.5, trained=model[2])
    for _ in range(3):
        with torch.no_grad():
            model[2].weight.mul_(1.3)
            model[2].bias.add_(0.1)
        whole.update()
        part.update()
    assert part.state()["steps"] == 3
    for one, other in zip(whole.state()["average"], part.state()["average"], strict=True):
        assert torch.equal(one, other)
    with optim.averaged_weights(part):
        averaged = model[2].weight.clone()
    assert not torch.equal(averaged, model[2].weight)
    # What does not belong to the part is not averaged.
    with torch.no_grad():
        model[0].weight.add_(1.0)
    part.update()
    assert not torch.equal(part.state()["average"][0], model[0].weight)


def test_a_small_decay_is_used_unchanged() -> None:
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


def test_the_weights_are_restored_after_an_error() -> None:
    model = network()
    averager = optim.EMA(model, 0.5)
    train(model, optim.build_optimizer(model, OptimConfig()), steps=1)
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), optim.averaged_weights(averager):
        raise ZeroDivisionError
    same(live, dict(model.state_dict()))
    with optim.averaged_weights(None):
        same(live, dict(model.state_dict()))


def test_a_restored_average_continues_with_the_same_bits() -> None:
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


def test_lookahead_equals_a_slow_reference() -> None:
    """Every third step the weights are reset to the average; the last two of 11 are discarded."""
    total, every, decay, power = 11, 3, 0.9, 2.0
    config = OptimConfig(lr=0.05, lookahead=LookaheadConfig(every=every, decay=decay, power=power))
    mine, reference = network(), network()
    lookahead = optim.build_averager(mine, config, total)
    assert isinstance(lookahead, optim.Lookahead)
    average = {k: v.clone() for k, v in reference.state_dict().items()}
    ours, theirs = optim.build_optimizer(mine, config), optim.build_optimizer(reference, config)
    for step in range(1, total + 1):
        train(mine, ours, steps=1)
        lookahead.update()
        train(reference, theirs, steps=1)
        factor = decay**every * (step / total) ** power if step % every == 0 else None
        for key, value in reference.state_dict().items():
            if not value.is_floating_point():
                continue
            if factor is not None:
                average[key] = factor * average[key] + (1 - factor) * value
            if factor is not None or step == total:
                value.copy_(average[key])
        for key, value in mine.state_dict().items():
            assert torch.allclose(value, reference.state_dict()[key], rtol=1e-4, atol=1e-6), key
        live = mine.state_dict()["0.weight"].clone()
        with optim.averaged_weights(lookahead):  # as in validation and in the model file
            averaged = mine.state_dict()["0.weight"]
            assert torch.allclose(averaged, average["0.weight"], rtol=1e-4, atol=1e-6)
        assert torch.equal(live, mine.state_dict()["0.weight"])


def test_the_final_weights_are_the_average() -> None:
    model = network()
    lookahead = optim.Lookahead(model, every=4, decay=0.95, power=3, steps=6)
    optimizer = optim.build_optimizer(model, OptimConfig(lr=0.05))
    for step in range(1, 7):
        train(model, optimizer, steps=1)
        lookahead.update()
        is_average = all(
            torch.equal(mine, average)
            for mine, average in zip(
                (t for t in model.state_dict().values() if t.is_floating_point()),
                _ordered(model, lookahead),
                strict=True,
            )
        )
        assert is_average == (step in (4, 6))


def _ordered(model: nn.Module, average: optim.WeightAverage) -> list[torch.Tensor]:
    """The average in the order of the network's `state_dict`."""
    with optim.averaged_weights(average):
        return [t.clone() for t in model.state_dict().values() if t.is_floating_point()]


def test_a_recipe_has_at_most_one_average() -> None:
    assert optim.build_averager(network(), OptimConfig(), 10) is None
    assert isinstance(optim.build_averager(network(), OptimConfig(ema=0.9), 10), optim.EMA)
    with pytest.raises(UsageError, match=r"optim\.ema and optim\.lookahead"):
        optim.build_averager(network(), OptimConfig(ema=0.9, lookahead=LookaheadConfig()), 10)
