"""Schedules: the factor on the learning rate as a function of progress, 0 at the first step."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from convlens.errors import UsageError, lookup
from convlens.recipe import OptimConfig

Schedule = Callable[[float], float]


def _constant(progress: float, config: OptimConfig) -> float:
    return 1.0


def _cosine(progress: float, config: OptimConfig) -> float:
    """Half a cosine from 1 to `final` (SGDR, Loshchilov & Hutter 2017, without restarts)."""
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: OptimConfig) -> float:
    """From 1 to `final`; with `warmup` the triangle of most CIFAR-10 records since Page 2018."""
    return 1 - (1 - config.final) * progress


def _step(progress: float, config: OptimConfig) -> float:
    """Times `gamma` after each `step_size` of the run (a fraction of all steps)."""
    # The small addend keeps 3 * (1/3) from falling just short of the third step.
    return float(config.gamma ** math.floor(progress / config.step_size + 1e-9))


def _one_cycle(progress: float, config: OptimConfig) -> float:
    """Cosine from 1/25 up to 1 over the first 30%, then down to 4e-6 (Smith & Topin 2017).

    The numbers are `torch.optim.lr_scheduler.OneCycleLR`'s defaults. `warmup` sets another
    share for the way up.
    """
    rise = config.warmup or 0.3
    if progress < rise:
        return _anneal(1 / 25, 1.0, progress / rise)
    return _anneal(1.0, 1 / 25 / 1e4, (progress - rise) / (1 - rise))


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, Callable[[float, OptimConfig], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "one-cycle": _one_cycle,
    "step": _step,
}
WITH_FINAL = ("cosine", "linear")


def build_schedule(config: OptimConfig) -> Schedule:
    """The factor on the learning rate as a function of progress, 0 at the first step.

    `warmup` is the share of all steps in which the factor rises linearly from `warmup_from`; the
    schedule proper runs over the rest. One-cycle has its own way up and takes `warmup` as its
    length.

    Raises:
        UsageError: unknown schedule, or a key that this schedule doesn't have.
    """
    shape = lookup(SCHEDULES, config.schedule, "schedule")
    if config.final and config.schedule not in WITH_FINAL:
        raise UsageError(
            f"optim.final={config.final:g}: schedule {config.schedule} has an end of its own",
            fix=f"leave it out, or use optim.schedule={' or '.join(WITH_FINAL)}",
        )
    rises = config.warmup > 0 and config.schedule != "one-cycle"
    if config.warmup_from and not rises:
        raise UsageError(
            f"optim.warmup_from={config.warmup_from:g}: there is no linear warm-up to start",
            fix="leave it out, or set optim.warmup (one-cycle has a way up of its own)",
        )
    if not rises:
        return lambda progress: shape(progress, config)

    def factor(progress: float) -> float:
        if progress < config.warmup:
            return config.warmup_from + (1 - config.warmup_from) * progress / config.warmup
        return shape((progress - config.warmup) / (1 - config.warmup), config)

    return factor


# ---- timetable ----------------------------------------
# Rates and windows step by step: at which rate each parameter group trains, and when at all.


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's learning rate to `factor` times its initial one.

    Returns the recipe's rate times `factor`; single groups may have rates of their own.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.defaults["lr"] * factor)


class GroupSchedule:
    """Sets rates before each step, and freezes each group outside its window.

    A group's window is `[start, end)` in fractions of all steps; a bound between two steps counts
    from the later one. Outside it the parameters need no gradient: they cost no backward pass,
    and optimisers leave alone what has no gradient (no decay, no moments). The schedule of a
    group with a window runs over that window, as in airbench94_muon (Jordan 2024), where the
    whitening bias has reached rate 0 when it is frozen; what opens late has its own warm-up.

    After training, what had its window closed still needs no gradient.

    Args:
        optimizer: as `optim.build` made it.
        steps: all steps of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self._optimizer, self._schedule, self._steps = optimizer, schedule, steps
        self._windows = [
            (group, self._step_of(group["window"][0]), self._step_of(group["window"][1]))
            for group in optimizer.param_groups
            if group["window"] != (0.0, 1.0)
        ]
        turns = {step for _, first, last in self._windows for step in (first, last)}
        self._turns = sorted(turns | {0, steps})
        self._same = range(0)  # the steps up to the next turn, once `turn` was asked

    def _step_of(self, fraction: float) -> int:
        # A fraction that stands for a whole step (0.3 of 10) must not be one later by rounding.
        return math.ceil(fraction * self._steps - 1e-6)

    def turn(self, step: int) -> bool:
        """Opens and closes windows for `step`, from 0; whether anything may have changed."""
        if step in self._same or not self._windows:
            return False
        for group, first, last in self._windows:
            for parameter in group["params"]:
                parameter.requires_grad_(first <= step < last)
        before = max(turn for turn in self._turns if turn <= step)
        self._same = range(before, min((t for t in self._turns if t > step), default=step + 1))
        return True

    def set_rates(self, step: int) -> float:
        """Sets the groups' rates for `step`, from 0; returns the rate of what has no window."""
        lr = set_lr(self._optimizer, self._schedule(step / self._steps))
        for group, first, last in self._windows:
            trains = first <= step < last
            factor = self._schedule((step - first) / (last - first)) if trains else 0.0
            group["lr"] = group["initial_lr"] * factor
        return lr

    def lr_at(self, step: int) -> float:
        """The rate that `set_rates` returns for `step`."""
        return float(self._optimizer.defaults["lr"] * self._schedule(step / self._steps))


# ---- averaging ----------------------------------------
# Averages of a network's weights over training: EMA beside it, lookahead pulling it along.


class WeightAverage(ABC):
    """A network's weights and norm statistics, and a second set of them that follows.

    `update` is called after each optimiser step; validation and the model file get the second
    set (see `averaged`). `state` and `load` keep it with an unfinished run.

    Not `torch.optim.swa_utils.AveragedModel`, because `Lookahead` shares this class and writes
    the average back into the network, which that class cannot do. It also holds a copy of the
    whole module, where validation needs the average inside the network (a cached trunk and its
    trained part share their weights), and would change the bits and keys of saved runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps = 0
        self._live = [t for t in _tensors(model) if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]

    @abstractmethod
    def update(self) -> None:
        """Takes one step of the average; call after the optimiser's step."""

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the network's weights with the average; call twice to be back."""
        for live, average in zip(self._live, self._average, strict=True):
            held = live.clone()
            live.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": self._average}

    def load(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for mine, stored in zip(self._average, state["average"], strict=True):
            mine.copy_(stored)


class EMA(WeightAverage):
    """An exponential moving average (EMA), which training itself doesn't see.

    `average <- d * average + (1 - d) * weights` after each step, with
    `d = min(decay, (1 + t) / (10 + t))`, so that a short run isn't held back by its random
    start (as in TensorFlow's `ExponentialMovingAverage`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)


class Lookahead(WeightAverage):
    """Slow weights that the network is set back to every few steps, and that it ends with.

    After step t of T, where `every` divides t:
    `average <- d * average + (1 - d) * weights; weights <- average` with
    `d = decay^every * (t / T)^power`: free at first, then held ever more. After the last step
    the network takes the average as it is. Source: Lookahead (Zhang et al. 2019), as an average
    with growing decay in airbench94 (Jordan 2024); norm statistics are pulled, too, so it goes
    with norms that follow fast.

    Args:
        steps: T, all steps of the run.
    """

    def __init__(
        self, model: nn.Module, every: int, decay: float, power: float, steps: int
    ) -> None:
        super().__init__(model)
        self.every, self.decay, self.power, self.total = every, decay, power, steps

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        last = self.steps >= self.total
        if self.steps % self.every == 0:
            decay = self.decay**self.every * (self.steps / self.total) ** self.power
            torch._foreach_lerp_(self._average, self._live, 1 - decay)
        elif not last:
            return
        torch._foreach_copy_(self._live, self._average)


def build_averager(model: nn.Module, config: OptimConfig, steps: int) -> WeightAverage | None:
    """The average that a recipe asks for, if any, over a run of `steps` steps."""
    if config.ema and config.lookahead:
        raise UsageError(
            "optim.ema and optim.lookahead are both set: only one average can be the result",
            fix="set one of them to null",
        )
    if config.ema:
        return EMA(model, config.ema)
    if config.lookahead:
        asked = config.lookahead
        return Lookahead(model, asked.every, asked.decay, asked.power, steps)
    return None


@contextlib.contextmanager
def averaged_weights(average: WeightAverage | None) -> Iterator[None]:
    """The network has its averaged weights inside; nothing changes where there is no average."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from (parameter.data for parameter in model.parameters())
    yield from model.buffers()
