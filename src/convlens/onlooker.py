"""Read-only view of the run directory for ranks other than 0, which alone writes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.distributed.processes import ProcessGroup
from convlens.errors import DataError, ResourceError
from convlens.recipe import Recipe
from convlens.run import RunFolder


class ReadOnlyRunDir(RunFolder):
    """Run directory whose writing methods do nothing."""

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


def shared_run_dir(group: ProcessGroup, find: Callable[[], RunFolder]) -> RunFolder:
    """Return the run directory that `find` returns on rank 0; read-only on the other ranks."""
    if group.size == 1:
        return find()
    found = find() if group.is_main_process else None
    paths = group.broadcast(
        lambda: [str(found.path), str(found.plots), str(found.model_path)] if found else []
    )
    if found:
        return found
    run_dir = ReadOnlyRunDir(*map(Path, paths[:2]))
    run_dir.model_path = Path(paths[2])  # a bare model file may have any name
    return run_dir


def check_same_images(group: ProcessGroup, name: str, fingerprint: str) -> None:
    """Check that every rank has the images of rank 0, by their fingerprint.

    Raises:
        DataError: a rank has others. It would train on them, or read one image's label for another.
    """
    other = group.first_rank_that_differs(fingerprint)
    if other is not None:
        raise DataError(
            f"process {other} of {group.size} has other images of {name!r} than process 0",
            where=f"process {group.rank} on {socket.gethostname()} has {fingerprint[:12]}",
            fix="give each machine a copy of the same images, or use one shared folder",
        )


def check_same_checkpoint(group: ProcessGroup, progress: Sequence[int], run_dir: RunFolder) -> None:
    """Check that every rank loaded the checkpoint that rank 0 did, by its epoch and step.

    Raises:
        ResourceError: a rank sees another checkpoint on its disk.
    """
    other = group.first_rank_that_differs(str(list(progress)))
    if other is not None:
        raise ResourceError(
            f"process {other} does not see the same checkpoint of this run as process 0",
            where=str(run_dir.path),
            fix="all machines must work in one shared folder; see docs/distributed.md",
        )
