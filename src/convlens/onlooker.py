"""The run folder as the processes see it that don't lead: they read, the first one writes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.distributed.processes import World
from convlens.errors import DataError, ResourceError
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


def same_images(world: World, name: str, fingerprint: str) -> None:
    """Checks that all processes have the images of the first one.

    Raises:
        DataError: not so; they would learn from other images, or take one's label for another's.
    """
    other = world.other(fingerprint)
    if other is not None:
        raise DataError(
            f"process {other} of {world.size} has other images of {name!r} than the first one",
            where=f"{fingerprint[:12]} is what process {world.rank} has on {socket.gethostname()}",
            fix="give each machine a copy of the same images, or one shared folder",
        )


def agreed(world: World, mine: Sequence[int], place: RunFolder) -> None:
    """Checks that all processes found the same state of a run on their disks.

    Raises:
        ResourceError: not so.
    """
    other = world.other(str(list(mine)))
    if other is not None:
        raise ResourceError(
            f"process {other} doesn't see the same state of this run as the first one",
            where=str(place.path),
            fix="all machines must work in one shared folder; see docs/distributed.md",
        )
