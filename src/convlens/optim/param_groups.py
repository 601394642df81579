"""Parameter groups: from a recipe's words to which parameter trains when, and at which rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from convlens.errors import UsageError, close_matches, did_you_mean_suffix
from convlens.models.stages import is_below, model_parts, stage_of
from convlens.recipe import GroupConfig, OptimConfig

ParameterGroup = dict[str, Any]  # what torch's optimisers take: `params` and their options
NamedParameters = list[tuple[str, nn.Parameter]]

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class GroupOptions:
    """How one parameter is trained; parameters with equal settings form one group.

    `window` is when it trains, as fractions of all steps; `muon` is by which of Muon's two rules
    and None with any other optimiser.
    """

    lr: float
    weight_decay: float
    momentum: float
    window: tuple[float, float]
    muon: bool | None


def split_parameters(model: nn.Module, config: OptimConfig) -> list[ParameterGroup]:
    """The groups of `model`'s trainable parameters, in order of first appearance.

    A parameter goes by the first of `optim.groups` that matches it; what that leaves open, and
    what nothing matches, goes by the keys of `optim`. Then:

    - `decay_bias_and_norm: false` takes the weight decay from every parameter of one dimension
      for which no group states it, as is usual since "Bag of Tricks" (He et al. 2019);
    - `layer_decay` multiplies rates, stated ones too, by itself once for each step from the head
      back to the parameter's stage (ULMFiT's discriminative rates, Howard & Ruder 2018);
    - `head_first` is when everything but the head may open at the earliest.

    Raises:
        UsageError: all that can't be: patterns that match nothing, keys that the optimiser lacks,
            windows that never open, times at which nothing trains.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError(
            "no parameter of the network is trainable", fix="set model.trainable to something else"
        )
    problems = [problem for group in config.groups for problem in _problems(group, config)]
    chosen, unmatched = _assign(model, named, config.groups)
    depth = _depths(model) if config.layer_decay != 1 else {}
    head = model_parts(model).head
    groups: dict[GroupOptions, NamedParameters] = {}
    for name, parameter in named:
        settings = _settings(
            parameter,
            config,
            chosen.get(name),
            is_head=is_below(name, head),
            scale=config.layer_decay ** depth.get(name, 0),
        )
        groups.setdefault(settings, []).append((name, parameter))
    problems += unmatched
    problems = problems or _impossible(groups)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError("; ".join(problems[:3]) + more, fix=_near_miss(model))
    return [_group(settings, members, config) for settings, members in groups.items()]


def parameter_kinds(model: nn.Module) -> dict[str, Callable[[str, nn.Parameter], bool]]:
    """The words that stand for parameters in any family, each with its test."""
    head = model_parts(model).head
    norms = {name for name, module in model.named_modules() if isinstance(module, NORMS)}

    def of_norm(name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[0] in norms

    def is_bias(name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2] == "bias"

    return {
        "head": lambda name, parameter: is_below(name, head),
        "norms": of_norm,
        "norms.bias": lambda name, parameter: of_norm(name, parameter) and is_bias(name, parameter),
        "biases": is_bias,
        "filters": lambda name, parameter: parameter.ndim == 4,
    }


def _assign(
    model: nn.Module, named: NamedParameters, groups: list[GroupConfig]
) -> tuple[dict[str, GroupConfig], list[str]]:
    """The first group that matches each parameter, and what is wrong with those left empty."""
    words = parameter_kinds(model)

    def matched(pattern: str, among: NamedParameters) -> list[str]:
        test = words.get(pattern) or (lambda name, parameter: fnmatchcase(name, pattern))
        return [name for name, parameter in among if test(name, parameter)]

    chosen: dict[str, GroupConfig] = {}
    problems = []
    for group in groups:
        names = matched(group.params, named)
        fresh = [name for name in names if name not in chosen]
        chosen |= dict.fromkeys(fresh, group)
        if fresh:
            continue
        called = f"optim.groups: params {group.params!r}"
        if names:
            problems.append(f"{called} matches only what groups before it take")
        elif matched(group.params, list(model.named_parameters())):
            problems.append(f"{called} matches frozen parameters only")
        else:
            parts = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            choices = [*words, *(f"{part}.*" for part in parts), *dict(model.named_parameters())]
            close = close_matches(group.params, choices)
            problems.append(f"{called} matches no parameter{did_you_mean_suffix(close)}")
    return chosen, problems


def _settings(
    parameter: nn.Parameter,
    config: OptimConfig,
    group: GroupConfig | None,
    *,
    is_head: bool,
    scale: float,
) -> GroupOptions:
    stated = group or GroupConfig(params="*")
    by_muon = None
    if config.name == "muon":
        # Muon's rule is for what lies between other layers (Jordan et al. 2024): the last layer's
        # outputs are logits, not features. Filters of a first layer are left to it, as in its
        # CIFAR-10 reference.
        by_muon = parameter.ndim == 4 and not is_head if stated.muon is None else stated.muon
    lr, decay = stated.lr, stated.weight_decay
    if lr is None:
        lr = config.lr if by_muon in (None, True) or config.aux_lr is None else config.aux_lr
    if decay is None:
        exempt = parameter.ndim <= 1 and not config.decay_bias_and_norm
        decay = 0.0 if exempt else config.weight_decay
    start = stated.start if is_head else max(stated.start, config.head_first)
    return GroupOptions(
        lr=lr * scale,
        weight_decay=decay,
        momentum=config.momentum if stated.momentum is None else stated.momentum,
        window=(start, stated.end),
        muon=by_muon,
    )


def _group(settings: GroupOptions, members: NamedParameters, config: OptimConfig) -> ParameterGroup:
    """The settings as torch's optimisers take them, but only those that this one has."""
    group: ParameterGroup = {
        "params": [parameter for _, parameter in members],
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "window": settings.window,
    }
    if config.name in ("sgd", "muon"):
        group["momentum"] = settings.momentum
        group["nesterov"] = config.nesterov and settings.momentum > 0
    if settings.muon is not None:
        group["muon"] = settings.muon
    return group


def _depths(model: nn.Module) -> dict[str, int]:
    """How many stages each parameter is away from the head, whose own parameters are at 0."""
    of = stage_of(model)
    stages = model_parts(model).stages
    back = {stage: len(stages) - index for index, stage in enumerate(stages)}
    return {name: back.get(stage, 0) for name, stage in of.items()}


def _problems(group: GroupConfig, config: OptimConfig) -> list[str]:
    """What is wrong with a group whatever the network."""
    called = f"optim.groups: params {group.params!r}"
    found = []
    if group.start >= group.end:
        found.append(f"{called}: start={group.start:g} is not before end={group.end:g}")
    if group.momentum is not None and config.name not in ("sgd", "muon"):
        found.append(f"{called}: momentum is a key of sgd and muon, not of {config.name}")
    if group.muon is not None and config.name != "muon":
        found.append(f"{called}: muon={str(group.muon).lower()} goes with optim.name=muon only")
    return found


def _impossible(groups: dict[GroupOptions, NamedParameters]) -> list[str]:
    """What is wrong with the finished groups: Muon's vectors, and windows seen together."""
    found = []
    for settings, members in groups.items():
        start, end = settings.window
        if start >= end:
            name = members[0][0]
            found.append(f"{name!r} trains up to {end:.0%}, but optim.head_first={start:g}")
        vectors = [name for name, parameter in members if parameter.ndim < 2]
        if settings.muon and vectors:
            found.append(f"muon=true for {vectors[0]!r}: Muon is for filters and matrices")
    windows = [settings.window for settings in groups]
    bounds = sorted({0.0, 1.0, *itertools.chain.from_iterable(windows)})
    for low, high in itertools.pairwise(bounds):
        if not any(start <= low and high <= end for start, end in windows):
            found.append(f"nothing trains from {low:.0%} to {high:.0%} of the steps")
    return found


def _near_miss(model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    some = ", ".join(names[:3])
    return f"params is one of {', '.join(parameter_kinds(model))}, or a pattern of names such as {some}"


# ---- stagetable ----------------------------------------
# What learns, stage by stage, as a person asks before a fine-tuning begins.


@dataclass(frozen=True)
class StageRow:
    """One stage: its weights, how many of them learn, the peak rates and when they learn.

    Attributes:
        rates: lowest and highest initial learning rate; empty where nothing learns.
        window: earliest start and latest end, fractions of all steps.
    """

    stage: str
    parameters: int
    trainable: int
    rates: tuple[float, ...]
    window: tuple[float, float]

    def cells(self) -> tuple[str, ...]:
        """The row as text: stage, parameters, trainable, learning rate, time."""
        share = "frozen" if not self.trainable else f"{self.trainable:,}"
        low_high = dict.fromkeys(f"{rate:.3g}" for rate in self.rates)
        start, end = self.window
        when = "all of it" if (start, end) == (0, 1) else f"{start:.0%} to {end:.0%}"
        when = when if self.trainable else ""
        return self.stage, f"{self.parameters:,}", share, " to ".join(low_high), when


def stage_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[StageRow]:
    """A row for each stage of `model` that has weights, in order, the head last."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    members: dict[str, list[nn.Parameter]] = {}
    parameters = dict(model.named_parameters())
    for name, stage in stage_of(model).items():
        members.setdefault(stage, []).append(parameters[name])
    rows = []
    for stage, its in members.items():
        groups = [group_of[id(p)] for p in its if id(p) in group_of]
        rates = sorted({float(group["initial_lr"]) for group in groups})
        windows = [group["window"] for group in groups]
        rows.append(
            StageRow(
                stage=stage,
                parameters=sum(p.numel() for p in its),
                trainable=sum(p.numel() for p in its if id(p) in group_of),
                rates=tuple(dict.fromkeys([*rates[:1], *rates[-1:]])),
                window=(
                    min((start for start, _ in windows), default=0.0),
                    max((end for _, end in windows), default=1.0),
                ),
            )
        )
    return rows
