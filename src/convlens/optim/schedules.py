"""Learning rate schedules, time windows of parameter groups, and averages of the weights.

A schedule is a function of progress (from 0 at the first step to 1) that gives a factor on the
learning rate. `GroupSchedule` applies it to an optimizer, and freezes groups outside their windows.
`EMA` and `Lookahead` average the weights over training.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from convlens.errors import UsageError, lookup
from convlens.recipe import OptimConfig

Schedule = Callable[[float], float]


def _constant(progress: float, config: OptimConfig) -> float:
    return 1.0


def _cosine(progress: float, config: OptimConfig) -> float:
    """Half a cosine from 1 to `final` (SGDR without restarts, Loshchilov & Hutter 2017)."""
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: OptimConfig) -> float:
    """From 1 to `final`; with `warmup`, the triangle of most CIFAR-10 records since Page 2018."""
    return 1 - (1 - config.final) * progress


def _step(progress: float, config: OptimConfig) -> float:
    """Multiplied by `gamma` after each `step_size` (a fraction of all steps)."""
    # The small addend makes up for rounding: 3 * (1/3) must reach the third step.
    return float(config.gamma ** math.floor(progress / config.step_size + 1e-9))


def _one_cycle(progress: float, config: OptimConfig) -> float:
    """Cosine from 1/25 up to 1 over the first 30%, then down to 4e-6 (Smith & Topin 2017).

    The numbers are the defaults of `torch.optim.lr_scheduler.OneCycleLR`. `warmup` replaces the
    30%.
    """
    rise = config.warmup or 0.3
    if progress < rise:
        return _anneal(1 / 25, 1.0, progress / rise)
    return _anneal(1.0, 1 / 25 / 1e4, (progress - rise) / (1 - rise))


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "one-cycle": _one_cycle,
    "step": _step,
}
SCHEDULES_WITH_FINAL = ("cosine", "linear")


def build_schedule(config: OptimConfig) -> Schedule:
    """Return the factor on the learning rate as a function of progress, 0 at the first step.

    During `warmup`, a fraction of all steps, the factor rises linearly from `warmup_from`; then
    the schedule runs over the remaining steps. One-cycle has its own warm-up and takes `warmup` as
    its length.

    Raises:
        UsageError: unknown schedule, or a key that this schedule doesn't have.
    """
    shape = lookup(SCHEDULES, config.schedule, "schedule")
    if config.final and config.schedule not in SCHEDULES_WITH_FINAL:
        raise UsageError(
            f"optim.final={config.final:g}: schedule {config.schedule} does not use it",
            fix=f"leave it out, or use optim.schedule={' or '.join(SCHEDULES_WITH_FINAL)}",
        )
    has_warmup = config.warmup > 0 and config.schedule != "one-cycle"
    if config.warmup_from and not has_warmup:
        raise UsageError(
            f"optim.warmup_from={config.warmup_from:g}: this schedule has no linear warm-up",
            fix="leave it out, or set optim.warmup (one-cycle has a warm-up of its own)",
        )
    if not has_warmup:
        return lambda progress: shape(progress, config)

    def factor(progress: float) -> float:
        if progress < config.warmup:
            return config.warmup_from + (1 - config.warmup_from) * progress / config.warmup
        return shape((progress - config.warmup) / (1 - config.warmup), config)

    return factor


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the learning rate of each group to `factor` times its initial one.

    Returns:
        The recipe's learning rate times `factor`; groups may have other ones.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.defaults["lr"] * factor)


class GroupSchedule:
    """Set learning rates before each step, and freeze each group outside its window.

    The window of a group is `[start, end)` in fractions of all steps; a bound between two steps
    applies from the later one. Outside the window the parameters require no gradient: they cost no
    backward pass, and optimizers skip parameters without gradient (no decay, no moments). The
    schedule of a group with a window runs over that window, as in airbench94_muon (Jordan 2024),
    where the whitening bias has reached learning rate 0 when it is frozen; a group that starts
    later has its own warm-up.

    After training, parameters whose window has ended still require no gradient.

    Args:
        optimizer: made by `build_optimizer`.
        steps: number of steps of the whole training.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self._optimizer, self._schedule, self._steps = optimizer, schedule, steps
        self._windows = [
            (group, self._first_step(group["window"][0]), self._first_step(group["window"][1]))
            for group in optimizer.param_groups
            if group["window"] != (0.0, 1.0)
        ]
        bounds = {step for _, start, end in self._windows for step in (start, end)}
        self._bounds = sorted(bounds | {0, steps})
        self._current = range(0)  # the steps between two bounds for which windows are applied

    def _first_step(self, fraction: float) -> int:
        # Rounding must not move a fraction of a whole number of steps (0.3 of 10) to the next one.
        return math.ceil(fraction * self._steps - 1e-6)

    def apply_windows(self, step: int) -> bool:
        """Freeze and unfreeze groups for `step`, from 0; return whether any may have changed."""
        if step in self._current or not self._windows:
            return False
        for group, start, end in self._windows:
            for parameter in group["params"]:
                parameter.requires_grad_(start <= step < end)
        previous = max(bound for bound in self._bounds if bound <= step)
        following = min((bound for bound in self._bounds if bound > step), default=step + 1)
        self._current = range(previous, following)
        return True

    def set_rates(self, step: int) -> float:
        """Set the learning rates for `step`, from 0; return that of groups without a window."""
        lr = set_lr(self._optimizer, self._schedule(step / self._steps))
        for group, start, end in self._windows:
            is_open = start <= step < end
            factor = self._schedule((step - start) / (end - start)) if is_open else 0.0
            group["lr"] = group["initial_lr"] * factor
        return lr

    def lr_at(self, step: int) -> float:
        """Return the learning rate that `set_rates` returns for `step`."""
        return float(self._optimizer.defaults["lr"] * self._schedule(step / self._steps))


class WeightAverage(ABC):
    """An average of a network's weights and norm statistics over training.

    `update` is called after each optimizer step. Validation and the model file use the average
    (see `averaged_weights`). `state` and `load` are for checkpoints.

    Not `torch.optim.swa_utils.AveragedModel`, because `Lookahead` shares this class and writes
    the average back into the network, which that class cannot do. It also holds a copy of the
    whole module, where validation needs the average inside the network (a frozen backbone and the
    trainable head share their weights), and would change the bits and keys of saved runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps = 0
        self._live = [t for t in _tensors(model) if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]

    @abstractmethod
    def update(self) -> None:
        """Update the average; call after the optimizer step."""

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights with the average; a second call restores them."""
        for live, average in zip(self._live, self._average, strict=True):
            saved = live.clone()
            live.copy_(average)
            average.copy_(saved)

    def state(self) -> dict[str, Any]:
        """Return number of steps and average."""
        return {"steps": self.steps, "average": self._average}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        self.steps = int(state["steps"])
        for average, stored in zip(self._average, state["average"], strict=True):
            average.copy_(stored)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from (parameter.data for parameter in model.parameters())
    yield from model.buffers()


class EMA(WeightAverage):
    """Exponential moving average of the weights; training itself does not use it.

    `average <- d * average + (1 - d) * weights` after each step, with
    `d = min(decay, (1 + t) / (10 + t))`, so that the random initial weights do not dominate a
    short run (as in TensorFlow's `ExponentialMovingAverage`).

    Args:
        trained: the part of the network that changes; by default all of it. The average of the
            rest equals it.
    """

    def __init__(self, model: nn.Module, decay: float, trained: nn.Module | None = None) -> None:
        super().__init__(model)
        self.decay = decay
        trained = model if trained is None else trained
        changing = {id(tensor) for tensor in (*trained.parameters(), *trained.buffers())}
        own = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        numbers = [number for number, tensor in enumerate(own) if id(tensor) in changing]
        self._changing = [self._live[number] for number in numbers]
        self._updated = [self._average[number] for number in numbers]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._updated, self._changing, 1 - decay)


class Lookahead(WeightAverage):
    """Slow weights: every few steps, and at the end, the network is reset to the average.

    After step t of T, where `every` divides t:
    `average <- d * average + (1 - d) * weights; weights <- average` with
    `d = decay^every * (t / T)^power`, which grows from 0. After the last step the network takes
    the average unchanged. Source: Lookahead (Zhang et al. 2019), as an average with growing decay
    in airbench94 (Jordan 2024). Norm statistics are averaged too, so use it with norms of high
    momentum.

    Args:
        steps: T, the number of steps of the whole training.
    """

    def __init__(
        self, model: nn.Module, every: int, decay: float, power: float, steps: int
    ) -> None:
        super().__init__(model)
        self.every, self.decay, self.power, self.total_steps = every, decay, power, steps

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        is_last = self.steps >= self.total_steps
        if self.steps % self.every == 0:
            decay = self.decay**self.every * (self.steps / self.total_steps) ** self.power
            torch._foreach_lerp_(self._average, self._live, 1 - decay)
        elif not is_last:
            return
        torch._foreach_copy_(self._live, self._average)


def build_averager(
    model: nn.Module, config: OptimConfig, steps: int, trained: nn.Module | None = None
) -> WeightAverage | None:
    """Return the average that a recipe sets, if any, for a training of `steps` steps.

    Args:
        trained: the part of the network that changes; by default all of it.

    Raises:
        UsageError: both `optim.ema` and `optim.lookahead` are set.
    """
    if config.ema and config.lookahead:
        raise UsageError(
            "optim.ema and optim.lookahead are both set: only one average can be the result",
            fix="set one of them to null",
        )
    if config.ema:
        return EMA(model, config.ema, trained)
    if config.lookahead:
        options = config.lookahead
        return Lookahead(model, options.every, options.decay, options.power, steps)
    return None


@contextlib.contextmanager
def averaged_weights(average: WeightAverage | None) -> Iterator[None]:
    """Context in which the network has its averaged weights; without an average, unchanged."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()
