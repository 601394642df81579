"""Registry of optimizers, and `build_optimizer`, which builds one from a recipe's `optim` section.

`param_groups` decides which parameter is trained when and at which rate, `optimizers` has the
update rules, and `schedules` has learning rate schedules and averages of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from convlens.errors import lookup
from convlens.optim import optimizers
from convlens.optim.optimizers import LeanAdam, Muon
from convlens.optim.param_groups import ParameterGroup, StageRow, split_parameters, stage_table
from convlens.optim.schedules import (
    EMA,
    SCHEDULES,
    GroupSchedule,
    Lookahead,
    Schedule,
    WeightAverage,
    averaged_weights,
    build_averager,
    build_schedule,
    set_lr,
)
from convlens.recipe import OptimConfig

__all__ = [
    "EMA",
    "OPTIMIZERS",
    "SCHEDULES",
    "GroupSchedule",
    "Lookahead",
    "Muon",
    "Schedule",
    "StageRow",
    "WeightAverage",
    "averaged_weights",
    "build_averager",
    "build_optimizer",
    "build_schedule",
    "check_optimizer",
    "set_lr",
    "stage_table",
]


def _adam(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    # Adam's weight decay is L2 regularization (Kingma & Ba 2015); AdamW decouples it.
    if _is_on_cpu(groups):
        return LeanAdam(groups, lr=float(config.lr), betas=config.betas)
    return optimizers.Adam(groups, lr=float(config.lr), betas=config.betas, fused=True)


def _adamw(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    if _is_on_cpu(groups):
        return LeanAdam(
            groups, lr=float(config.lr), betas=config.betas, decoupled_weight_decay=True
        )
    return optimizers.AdamW(groups, lr=float(config.lr), betas=config.betas, fused=True)


def _is_on_cpu(groups: list[ParameterGroup]) -> bool:
    return all(p.device.type == "cpu" for group in groups for p in group["params"])


def _sgd(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    # Weight decay is L2 regularization, so each step shrinks weights by lr * weight_decay. For a
    # decay that doesn't depend on the learning rate, as in Page's and Jordan's CIFAR-10 records,
    # give the group weight_decay = decay / lr.
    return optimizers.SGD(groups, lr=float(config.lr), momentum=config.momentum, fused=True)


def _muon(groups: list[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    return Muon(
        groups,
        lr=float(config.lr),
        momentum=config.momentum,
        iterations=config.muon_iterations,
        normalize=config.muon_normalise,
    )


OPTIMIZERS: dict[str, Callable[[list[ParameterGroup], OptimConfig], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "muon": _muon,
    "sgd": _sgd,
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer for a model's trainable parameters, in groups (`split_parameters`).

    Each group has the keys `initial_lr` and `window`, besides those of torch.

    Raises:
        UsageError: unknown optimizer, or invalid groups, learning rates or windows.
    """
    make = lookup(OPTIMIZERS, config.name, "optimizer")
    optimizer = make(split_parameters(model, config), config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def check_optimizer(model: nn.Module, config: OptimConfig) -> None:
    """Check what `build_optimizer` would do without creating tensors; `model` may be on `meta`.

    Raises:
        UsageError: as `build_optimizer`.
    """
    lookup(OPTIMIZERS, config.name, "optimizer")
    split_parameters(model, config)
