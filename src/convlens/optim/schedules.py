"""Schedules: the factor on the learning rate as a function of progress, 0 at the first step."""

from __future__ import annotations

import math
from collections.abc import Callable

from convlens.errors import UsageError
from convlens.names import pick
from convlens.schema import OptimConfig

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


def schedule(config: OptimConfig) -> Schedule:
    """The factor on the learning rate as a function of progress, 0 at the first step.

    `warmup` is the share of all steps in which the factor rises linearly from `warmup_from`; the
    schedule proper runs over the rest. One-cycle has its own way up and takes `warmup` as its
    length.

    Raises:
        UsageError: unknown schedule, or a key that this schedule doesn't have.
    """
    shape = pick(SCHEDULES, config.schedule, "schedule")
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
