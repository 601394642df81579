"""Parameter groups: which parameters are trained, when, and at which learning rate.

`split_parameters` makes the groups for a recipe's `optim` section; `stage_table` summarizes them
stage by stage, to be shown before training.
"""

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

ParameterGroup = dict[str, Any]  # as torch's optimizers take it: `params` and their options
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
    """Options of one parameter; parameters with equal options form a group.

    Attributes:
        window: start and end of training, as fractions of all steps.
        muon: whether Muon updates it by its own rule or as SGD; None with other optimizers.
    """

    lr: float
    weight_decay: float
    momentum: float
    window: tuple[float, float]
    muon: bool | None


def split_parameters(model: nn.Module, config: OptimConfig) -> list[ParameterGroup]:
    """Group a model's trainable parameters by their options, in order of first appearance.

    A parameter gets the options of the first entry of `optim.groups` that matches it, and the keys
    of `optim` for everything else. Then:

    - `decay_bias_and_norm: false` removes weight decay from one-dimensional parameters, unless
      their entry sets it, as is usual since "Bag of Tricks" (He et al. 2019);
    - `layer_decay` multiplies the learning rate (also one set by an entry) once for each stage
      from the head back to the parameter's stage (discriminative fine-tuning of ULMFiT, Howard &
      Ruder 2018);
    - `head_first` delays the window of everything but the head.

    Raises:
        UsageError: patterns without matches, keys that the optimizer lacks, empty windows, or a
            time in which nothing is trained.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError(
            "no parameter of the network is trainable", fix="set model.trainable to something else"
        )
    problems = [problem for entry in config.groups for problem in _entry_problems(entry, config)]
    entries, unmatched = _match_entries(model, named, config.groups)
    depths = _depths(model) if config.layer_decay != 1 else {}
    head = model_parts(model).head
    members: dict[GroupOptions, NamedParameters] = {}
    for name, parameter in named:
        options = _resolve_options(
            parameter,
            config,
            entries.get(name),
            is_head=is_below(name, head),
            scale=float(config.layer_decay) ** depths.get(name, 0),
        )
        members.setdefault(options, []).append((name, parameter))
    problems += unmatched
    problems = problems or _group_problems(members)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UsageError("; ".join(problems[:3]) + more, fix=_describe_patterns(model))
    return [_make_group(options, named, config) for options, named in members.items()]


def parameter_kinds(model: nn.Module) -> dict[str, Callable[[str, nn.Parameter], bool]]:
    """Return the keywords that select parameters in any network, each with its predicate."""
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


def _match_entries(
    model: nn.Module, named: NamedParameters, entries: list[GroupConfig]
) -> tuple[dict[str, GroupConfig], list[str]]:
    """Return the first entry that matches each parameter, and a message for each unused entry."""
    kinds = parameter_kinds(model)

    def match(pattern: str, parameters: NamedParameters) -> list[str]:
        matches = kinds.get(pattern) or (lambda name, parameter: fnmatchcase(name, pattern))
        return [name for name, parameter in parameters if matches(name, parameter)]

    matched: dict[str, GroupConfig] = {}
    problems = []
    for entry in entries:
        names = match(entry.params, named)
        unmatched = [name for name in names if name not in matched]
        matched |= dict.fromkeys(unmatched, entry)
        if unmatched:
            continue
        label = _entry_label(entry)
        if names:
            problems.append(f"{label} matches only parameters of earlier groups")
        elif match(entry.params, list(model.named_parameters())):
            problems.append(f"{label} matches frozen parameters only")
        else:
            modules = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            choices = [*kinds, *(f"{name}.*" for name in modules), *dict(model.named_parameters())]
            close = close_matches(entry.params, choices)
            problems.append(f"{label} matches no parameter{did_you_mean_suffix(close)}")
    return matched, problems


def _resolve_options(
    parameter: nn.Parameter,
    config: OptimConfig,
    entry: GroupConfig | None,
    *,
    is_head: bool,
    scale: float,
) -> GroupOptions:
    """Return the options of one parameter.

    Args:
        entry: its entry of `optim.groups`, if any.
        scale: factor on the learning rate.
    """
    entry = entry or GroupConfig(params="*")
    muon = None
    if config.name == "muon":
        # Muon's rule is for layers between other layers (Jordan et al. 2024): the outputs of the
        # last layer are logits, not features. Filters of the first layer are included, as in its
        # CIFAR-10 reference.
        muon = parameter.ndim == 4 and not is_head if entry.muon is None else entry.muon
    lr, weight_decay = entry.lr, entry.weight_decay
    if lr is None:
        lr = float(config.lr) if muon in (None, True) or config.aux_lr is None else config.aux_lr
    if weight_decay is None:
        exempt = parameter.ndim <= 1 and not config.decay_bias_and_norm
        weight_decay = 0.0 if exempt else config.weight_decay
    start = entry.start if is_head else max(entry.start, config.head_first)
    return GroupOptions(
        lr=lr * scale,
        weight_decay=weight_decay,
        momentum=config.momentum if entry.momentum is None else entry.momentum,
        window=(start, entry.end),
        muon=muon,
    )


def _make_group(
    options: GroupOptions, members: NamedParameters, config: OptimConfig
) -> ParameterGroup:
    """Return the group as torch's optimizers take it, with the options that this one has."""
    group: ParameterGroup = {
        "params": [parameter for _, parameter in members],
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "window": options.window,
    }
    if config.name in ("sgd", "muon"):
        group["momentum"] = options.momentum
        group["nesterov"] = config.nesterov and options.momentum > 0
    if options.muon is not None:
        group["muon"] = options.muon
    return group


def _depths(model: nn.Module) -> dict[str, int]:
    """Return the number of stages from each parameter to the head, 0 for the head's own."""
    stages = model_parts(model).stages
    depth = {stage: len(stages) - index for index, stage in enumerate(stages)}
    return {name: depth.get(stage, 0) for name, stage in stage_of(model).items()}


def _entry_label(entry: GroupConfig) -> str:
    return f"optim.groups: params {entry.params!r}"


def _entry_problems(entry: GroupConfig, config: OptimConfig) -> list[str]:
    """Problems of an entry that do not depend on the network."""
    label = _entry_label(entry)
    problems = []
    if entry.start >= entry.end:
        problems.append(f"{label}: start={entry.start:g} is not before end={entry.end:g}")
    if entry.momentum is not None and config.name not in ("sgd", "muon"):
        problems.append(f"{label}: momentum is a key of sgd and muon, not of {config.name}")
    if entry.muon is not None and config.name != "muon":
        problems.append(f"{label}: muon={str(entry.muon).lower()} needs optim.name=muon")
    return problems


def _group_problems(groups: dict[GroupOptions, NamedParameters]) -> list[str]:
    """Problems of the finished groups: Muon with vectors, empty windows, gaps between windows."""
    problems = []
    for options, members in groups.items():
        start, end = options.window
        if start >= end:
            name = members[0][0]
            problems.append(f"{name!r} is trained until {end:.0%}, but optim.head_first={start:g}")
        vectors = [name for name, parameter in members if parameter.ndim < 2]
        if options.muon and vectors:
            problems.append(f"muon=true for {vectors[0]!r}: Muon is for filters and matrices")
    windows = [options.window for options in groups]
    bounds = sorted({0.0, 1.0, *itertools.chain.from_iterable(windows)})
    for low, high in itertools.pairwise(bounds):
        if not any(start <= low and high <= end for start, end in windows):
            problems.append(f"nothing is trained from {low:.0%} to {high:.0%} of the steps")
    return problems


def _describe_patterns(model: nn.Module) -> str:
    kinds = ", ".join(parameter_kinds(model))
    examples = ", ".join(name for name, _ in itertools.islice(model.named_parameters(), 3))
    return f"params is one of {kinds}, or a pattern of names such as {examples}"


@dataclass(frozen=True)
class StageRow:
    """One stage: number of parameters, trainable ones, and their learning rates and times.

    Attributes:
        rates: lowest and highest initial learning rate; empty if nothing is trained.
        window: earliest start and latest end, as fractions of all steps.
    """

    stage: str
    parameters: int
    trainable: int
    rates: tuple[float, ...]
    window: tuple[float, float]

    def cells(self) -> tuple[str, ...]:
        """Return the row as text: stage, parameters, trainable, learning rate, time."""
        trainable = f"{self.trainable:,}" if self.trainable else "frozen"
        rates = dict.fromkeys(f"{rate:.3g}" for rate in self.rates)
        start, end = self.window
        time = "all of it" if (start, end) == (0, 1) else f"{start:.0%} to {end:.0%}"
        time = time if self.trainable else ""
        return self.stage, f"{self.parameters:,}", trainable, " to ".join(rates), time


def stage_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[StageRow]:
    """Return a row for each stage of `model` that has parameters, in order, the head last."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    members: dict[str, list[nn.Parameter]] = {}
    named_parameters = dict(model.named_parameters())
    for name, stage in stage_of(model).items():
        members.setdefault(stage, []).append(named_parameters[name])
    rows = []
    for stage, parameters in members.items():
        groups = [group_of[id(p)] for p in parameters if id(p) in group_of]
        rates = sorted({float(group["initial_lr"]) for group in groups})
        windows = [group["window"] for group in groups]
        rows.append(
            StageRow(
                stage=stage,
                parameters=sum(p.numel() for p in parameters),
                trainable=sum(p.numel() for p in parameters if id(p) in group_of),
                rates=tuple(dict.fromkeys([*rates[:1], *rates[-1:]])),
                window=(
                    min((start for start, _ in windows), default=0.0),
                    max((end for _, end in windows), default=1.0),
                ),
            )
        )
    return rows
