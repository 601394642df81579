"""What learns, stage by stage, as a person asks before a fine-tuning begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from convlens.models.parts import stage_of


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


def stage_rows(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[StageRow]:
    """A row for each stage of `model` that has weights, in order, the head last."""
    group_of = {id(p): group for group in optimiser.param_groups for p in group["params"]}
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
