"""Which stage of a network each parameter belongs to, for any family with `stages` and `head`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn


def stage_of(model: nn.Module) -> dict[str, str]:
    """The stage of each parameter, by the names that `named_parameters` gives.

    `model.stages` names the sub-modules whose outputs end the stages; a stage is all that lies
    behind the one before it up to and including that sub-module, in the order in which modules
    were registered (for a ResNet with `stages = ("maxpool", "layer1", ...)`, `conv1` and `bn1`
    are in `maxpool`). Names may be dotted (`features.4`). What lies behind the last stage
    belongs to the head: its value is `model.head`.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends: list[tuple[int, str]] = []
    for stage in cast(Sequence[str], model.stages):
        below = (place for name, place in order.items() if is_below(name, stage))
        ends.append((max(below), stage))
    found = {}
    for name, _ in model.named_parameters():
        place = order[name.rpartition(".")[0]]
        found[name] = next((stage for end, stage in ends if place <= end), str(model.head))
    return found


def is_below(name: str, module: str) -> bool:
    """Whether `name` (of a module or parameter) is `module` itself or inside it."""
    return name == module or name.startswith(f"{module}.")
