"""The run folder as the processes see it that don't lead: they read, the first one writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.errors import ResourceError
from convlens.processes import World
from convlens.recipe import Recipe
from convlens.run import RunFolder


class Onlooker(RunFolder):
    """A run folder that is read only: all that would write does nothing."""

    def create(self, recipe: Recipe, facts: Mapping[str, Any]) -> None: ...

    def note(self, facts: Mapping[str, Any]) -> None: ...

    def finish(self, **facts: Any) -> None: ...

    def lock(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def save_model(self, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
        return ""

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None: ...

    def write_split(self, held_out: Mapping[str, Sequence[str]]) -> None: ...

    def save_state(self, tensors: Mapping[str, Any], counters: Mapping[str, Any]) -> None: ...


def placed(world: World, find: Callable[[], RunFolder]) -> RunFolder:
    """The folder that the first process finds, for all; the others only look on."""
    if world.size == 1:
        return find()
    found = find() if world.leads else None
    paths = world.told(
        lambda: [str(found.path), str(found.plots), str(found.model_path)] if found else []
    )
    if found:
        return found
    other = Onlooker(*map(Path, paths[:2]))
    other.model_path = Path(paths[2])  # of a model file on its own it has another name
    return other


def agreed(world: World, mine: Sequence[int], place: RunFolder) -> None:
    """Checks that all processes found the same state of a run on their disks.

    Raises:
        ResourceError: not so.
    """
    found = list(mine)
    if world.told(lambda: found) != found:
        raise ResourceError(
            "the processes don't see the same state of this run",
            where=f"{place.path}, process {world.rank}",
            fix="all machines must work in one shared folder; see docs/distributed.md",
        )
