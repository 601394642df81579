"""Optimisers, parameter groups, schedules as functions of progress, and weight averaging."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from convlens.names import pick
from convlens.schema import OptimConfig

Schedule = Callable[[float], float]


def _adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    # Adam's weight decay is L2 in the gradient (Kingma & Ba 2015); adamw decouples it.
    return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, fused=True)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _sgd(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True
    )


OPTIMISERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "sgd": _sgd,
}


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over `model`'s trainable parameters.

    With `decay_bias_and_norm: false`, biases and norm scales (every parameter of one dimension)
    go into a group without weight decay, as is usual since "Bag of Tricks" (He et al. 2019).
    """
    make = pick(OPTIMISERS, config.name, "optimiser")
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 and not config.decay_bias_and_norm
            (free if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if free:
        groups.append({"params": free, "weight_decay": 0.0})
    optimiser = make(groups, config)
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group's learning rate to `factor` times its initial one; returns the first."""
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimiser.param_groups[0]["lr"])


def _constant(progress: float, config: OptimConfig) -> float:
    return 1.0


def _cosine(progress: float, config: OptimConfig) -> float:
    """Half a cosine from 1 to 0 (SGDR, Loshchilov & Hutter 2017, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: OptimConfig) -> float:
    return 1 - progress


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


def schedule(config: OptimConfig) -> Schedule:
    """The factor on the learning rate as a function of progress, 0 at the first step.

    `warmup` is the share of all steps in which the factor rises linearly from 0; the schedule
    proper runs over the rest. One-cycle has its own way up and takes `warmup` as its length.
    """
    shape = pick(SCHEDULES, config.schedule, "schedule")
    if config.schedule == "one-cycle":
        return lambda progress: shape(progress, config)

    def factor(progress: float) -> float:
        if progress < config.warmup:
            return progress / config.warmup
        return shape((progress - config.warmup) / (1 - config.warmup), config)

    return factor


class Averager:
    """An exponential moving average of a network's weights and norm statistics.

    `average <- d * average + (1 - d) * weights` after each step, with
    `d = min(decay, (1 + t) / (10 + t))`, so that a short run isn't held back by its random
    start (as in TensorFlow's `ExponentialMovingAverage`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._live = [t for t in _tensors(model) if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Takes one step of the average; call after the optimiser's step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)

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


@contextlib.contextmanager
def averaged(averager: Averager | None) -> Iterator[None]:
    """The network has its averaged weights inside; nothing changes where there is no average."""
    if averager is None:
        yield
        return
    averager.swap()
    try:
        yield
    finally:
        averager.swap()


def _tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    yield from (parameter.data for parameter in model.parameters())
    yield from model.buffers()
