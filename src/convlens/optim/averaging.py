"""Averages of a network's weights over training: EMA beside it, lookahead pulling it along."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from convlens.errors import UsageError
from convlens.schema import OptimConfig


class Average(ABC):
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


class Averager(Average):
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


class Lookahead(Average):
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


def averager(model: nn.Module, config: OptimConfig, steps: int) -> Average | None:
    """The average that a recipe asks for, if any, over a run of `steps` steps."""
    if config.ema and config.lookahead:
        raise UsageError(
            "optim.ema and optim.lookahead are both set: only one average can be the result",
            fix="set one of them to null",
        )
    if config.ema:
        return Averager(model, config.ema)
    if config.lookahead:
        asked = config.lookahead
        return Lookahead(model, asked.every, asked.decay, asked.power, steps)
    return None


@contextlib.contextmanager
def averaged(average: Average | None) -> Iterator[None]:
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
