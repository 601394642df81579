"""Rates and windows step by step: at which rate each parameter group trains, and when at all."""

from __future__ import annotations

import math

import torch

from convlens.optim.schedules import Schedule


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group's learning rate to `factor` times its initial one.

    Returns the recipe's rate times `factor`; single groups may have rates of their own.
    """
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimiser.defaults["lr"] * factor)


class Timetable:
    """Sets rates before each step, and freezes each group outside its window.

    A group's window is `[start, end)` in fractions of all steps; a bound between two steps counts
    from the later one. Outside it the parameters need no gradient: they cost no backward pass,
    and optimisers leave alone what has no gradient (no decay, no moments). The schedule of a
    group with a window runs over that window, as in airbench94_muon (Jordan 2024), where the
    whitening bias has reached rate 0 when it is frozen; what opens late has its own warm-up.

    After training, what had its window closed still needs no gradient.

    Args:
        optimiser: as `optim.build` made it.
        steps: all steps of the run.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self._optimiser, self._schedule, self._steps = optimiser, schedule, steps
        self._windows = [
            (group, self._step_of(group["window"][0]), self._step_of(group["window"][1]))
            for group in optimiser.param_groups
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
        lr = set_lr(self._optimiser, self._schedule(step / self._steps))
        for group, first, last in self._windows:
            trains = first <= step < last
            factor = self._schedule((step - first) / (last - first)) if trains else 0.0
            group["lr"] = group["initial_lr"] * factor
        return lr

    def lr_at(self, step: int) -> float:
        """The rate that `set_rates` returns for `step`."""
        return float(self._optimiser.defaults["lr"] * self._schedule(step / self._steps))
