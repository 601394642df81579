"""Optimisers over parameter groups, schedules as functions of progress, and weight averaging.

A recipe's `optim` section becomes: `groups.py` (which parameter trains when, at which rate),
one of `OPTIMISERS` (`eager.py`: torch's; `muon.py`), `schedules.py`, `timetable.py` (rates and
windows, step by step) and `averaging.py` (EMA, lookahead).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from convlens.names import pick
from convlens.optim import eager
from convlens.optim.adam import LeanAdam
from convlens.optim.averaging import Average, Averager, Lookahead, averaged, averager
from convlens.optim.groups import Group, split
from convlens.optim.muon import Muon
from convlens.optim.schedules import SCHEDULES, Schedule, schedule
from convlens.optim.stagetable import StageRow, stage_rows
from convlens.optim.timetable import Timetable, set_lr
from convlens.schema import OptimConfig

__all__ = [
    "OPTIMISERS",
    "SCHEDULES",
    "Average",
    "Averager",
    "Lookahead",
    "Muon",
    "Schedule",
    "StageRow",
    "Timetable",
    "averaged",
    "averager",
    "build",
    "check",
    "schedule",
    "set_lr",
    "stage_rows",
]


def _adam(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    # Adam's weight decay is L2 in the gradient (Kingma & Ba 2015); adamw decouples it.
    if _on_cpu(groups):
        return LeanAdam(groups, lr=config.lr, betas=config.betas)
    return eager.Adam(groups, lr=config.lr, betas=config.betas, fused=True)


def _adamw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    if _on_cpu(groups):
        return LeanAdam(groups, lr=config.lr, betas=config.betas, decoupled_weight_decay=True)
    return eager.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _on_cpu(groups: list[Group]) -> bool:
    return all(p.device.type == "cpu" for group in groups for p in group["params"])


def _sgd(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    # Weight decay is L2 in the gradient, so each step shrinks weights by lr * weight_decay; for
    # a decay that doesn't depend on the rate, as in Page's and Jordan's CIFAR-10 records, give
    # the group weight_decay = decay / lr.
    return eager.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _muon(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    return Muon(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        iterations=config.muon_iterations,
        normalise=config.muon_normalise,
    )


OPTIMISERS: dict[str, Callable[[list[Group], OptimConfig], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "muon": _muon,
    "sgd": _sgd,
}


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over `model`'s trainable parameters, grouped as `groups.split` says.

    Raises:
        UsageError: no such optimiser, or groups, rates and windows that can't be.
    """
    make = pick(OPTIMISERS, config.name, "optimiser")
    optimiser = make(split(model, config), config)
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def check(model: nn.Module, config: OptimConfig) -> None:
    """Tries what `build` would do, without a tensor being made; `model` may be on `meta`.

    Raises:
        UsageError: as `build`.
    """
    pick(OPTIMISERS, config.name, "optimiser")
    split(model, config)
