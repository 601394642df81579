"""Registry of optimizers, and `build_optimizer`, which builds one from a recipe's `optim` section.

`param_groups` decides which parameter is trained when and at which rate, `optimizers` has the
update rules, and `schedules` has learning rate schedules and averages of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from convlens import user_code
from convlens.errors import UsageError, lookup
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
    "is_user_optimizer",
    "set_lr",
    "stage_table",
    "unstorable_state",
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
    groups = split_parameters(model, config)
    if is_user_optimizer(config.name):
        optimizer = _build_user_optimizer(groups, config)
    else:
        _refuse_options(config)
        optimizer = lookup(OPTIMIZERS, config.name, "optimizer")(groups, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def check_optimizer(model: nn.Module, config: OptimConfig) -> None:
    """Check what `build_optimizer` would do without creating tensors; `model` may be on `meta`.

    Raises:
        UsageError: as `build_optimizer`.
    """
    if is_user_optimizer(config.name):
        _check_user_optimizer(config)
    else:
        lookup(OPTIMIZERS, config.name, "optimizer")
        _refuse_options(config)
    split_parameters(model, config)


def is_user_optimizer(name: str) -> bool:
    """Return whether a name means an optimizer that a user wrote."""
    return name not in OPTIMIZERS and user_code.is_user_code("optimizers", name)


def _refuse_options(config: OptimConfig) -> None:
    if config.options:
        raise UsageError(
            f"optim.options applies only to optimizers of your own, and optim.name={config.name}",
            fix="use the keys of optim, e.g. optim.momentum",
        )


def _build_user_optimizer(
    groups: list[ParameterGroup], config: OptimConfig
) -> torch.optim.Optimizer:
    """Build the optimizer of a user, a subclass of `torch.optim.Optimizer`.

    It is called with the parameter groups, with those of `lr`, `momentum`, `betas`, `nesterov` and
    `weight_decay` that its signature names, and with `optim.options`.
    """
    name = config.name
    make = user_code.load_object("optimizers", name)
    keywords, takes_any = user_code.accepted_keywords(make)
    first = next(iter(keywords), None)
    own = {key: value for key, value in keywords.items() if key != first}
    standard = {
        "lr": float(config.lr),
        "momentum": config.momentum,
        "betas": config.betas,
        "nesterov": config.nesterov,
        "weight_decay": config.weight_decay,
    }
    given = user_code.select_keywords(make, standard) | config.options
    if not takes_any:
        user_code.check_options(f"optimizer {name}", own, given)
    try:
        optimizer = make(groups, **given)
    except Exception as error:
        raise user_code.part_error("optimizers", name, error) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer {name}: an object of type {type(optimizer).__name__!r} is not an optimizer",
            fix="name a subclass of torch.optim.Optimizer",
        )
    return optimizer


def _check_user_optimizer(config: OptimConfig) -> None:
    """Take two steps with the optimizer of a user.

    Raises:
        UsageError: an exception in its code, weights that do not change or are not finite, or a
            state that a checkpoint cannot hold.
    """
    name = config.name
    parameter = nn.Parameter(torch.ones(3, 2))
    group = {"params": [parameter], "lr": float(config.lr), "weight_decay": config.weight_decay}
    optimizer = _build_user_optimizer([group], config)
    try:
        for _ in range(2):
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
    except Exception as error:
        raise user_code.part_error("optimizers", name, error) from error
    values = parameter.detach()
    if not bool(torch.isfinite(values).all()) or torch.equal(values, torch.ones(3, 2)):
        raise UsageError(
            f"optimizer {name}: two steps with a constant gradient leave the weights as they are, "
            "or make them NaN",
            fix="update each parameter that has a gradient, in place",
        )
    unstorable = unstorable_state(optimizer)
    if unstorable:
        key, kind = next(iter(unstorable.items()))
        raise UsageError(
            f"optimizer {name}: its state {key!r} is of the type {kind!r}, which a checkpoint "
            "cannot hold",
            fix="keep tensors only, e.g. torch.tensor(0.0) for a count of steps",
        )


def unstorable_state(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the types of an optimizer's values for parameters that a checkpoint cannot hold."""
    return {
        key: type(value).__name__
        for values in optimizer.state_dict()["state"].values()
        for key, value in values.items()
        if value is not None and not torch.is_tensor(value)
    }
