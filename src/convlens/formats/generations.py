"""Checkpoints of a run: the two newest are kept, in case one is corrupted.

    state/0003-000017.safetensors       the newest: epoch 3, 17 steps of it done
    state/0003-000001.safetensors       the one before

File names carry (epoch, step), and every file carries its SHA-256, so no index is needed: the
newest file that is intact wins. A file gets its name last, by a rename, when its contents are on
the disk.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.errors import ModelFileError
from convlens.formats import modelfile

NUM_KEPT = 2
_NAME = re.compile(r"(\d{4,})-(\d{6,})\.safetensors")  # epoch, step


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint: saved in `epoch` (counted from 1) after `step` steps of it."""

    epoch: int
    step: int
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class CheckpointStore:
    """The checkpoints in one directory.

    Attributes:
        corrupt: why `read` skipped newer checkpoints, one sentence each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: Path | None = None  # the checkpoint that was read or saved last
        self.corrupt: list[str] = []

    def save(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete all but the two newest.

        Args:
            counters: with `position`, a mapping with `epoch` and `step`.

        Raises:
            ResourceError: the disk refused it; the checkpoint before is intact.
        """
        position = epoch, step = _epoch_and_step(counters)
        path = self._folder / f"{epoch:04}-{step:06}.safetensors"
        # A checkpoint ahead of this one was corrupt or unusable when the run went back behind it.
        # It is deleted first: if this process is killed after the rename, the next start must not
        # find it.
        _delete(each for each in self._files() if _position(each) > position)
        modelfile.write(path, tensors, counters)
        older = [each for each in self._files() if _position(each) < position]
        if self._current in older:  # others may be corrupt: nobody has read them
            older = [self._current]
        self._delete_all_but({path, *older[: NUM_KEPT - 1]})
        self._current = path

    def read(self, is_usable: Callable[[dict[str, Any]], str] = lambda _: "") -> Checkpoint | None:
        """Read the newest intact checkpoint; None if there is none.

        Args:
            is_usable: returns why a checkpoint with these counters can't be used, or "".

        Raises:
            modelfile.NewerFormatError: a later version wrote it; skipping it would mean that the
                next `save` deletes it.
        """
        self.corrupt, self._current = [], None
        for path in self._files():
            try:
                tensors, counters = modelfile.read(path)
                if not _matches(path, counters):
                    raise ModelFileError("its content is of another epoch or step than its name")
                if reason := is_usable(counters):
                    raise ModelFileError(reason)
            except modelfile.NewerFormatError:
                raise
            except ModelFileError as error:
                self.corrupt.append(f"the checkpoint of {_as_text(path)}: {error.what}")
            else:
                self._current = path
                return Checkpoint(*_position(path), tensors, counters)
        return None

    def keep_newest(self) -> None:
        """Delete all but the newest: a finished run keeps one, so that it can be extended."""
        newest = self._current or next(iter(self._files()), None)
        if newest is not None:
            self._delete_all_but({newest})

    def clear(self) -> None:
        """Delete all checkpoints, and the directory if nothing else is in it."""
        self._current = None
        if self._folder.is_dir():
            self._delete_all_but(set())
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _files(self) -> list[Path]:
        """All files named like a checkpoint, newest first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_position, reverse=True)

    def _delete_all_but(self, kept: Collection[Path]) -> None:
        """Delete older checkpoints, and files that killed processes or earlier versions left."""
        _delete(p for p in self._folder.iterdir() if p not in kept and not p.is_dir())


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        with contextlib.suppress(OSError):
            path.unlink()


def _position(path: Path) -> tuple[int, int]:
    """(epoch, step) by the file's name."""
    epoch, step = path.name.removesuffix(".safetensors").split("-")
    return int(epoch), int(step)


def _as_text(path: Path) -> str:
    return "epoch {}, step {}".format(*_position(path))


def _epoch_and_step(counters: Mapping[str, Any]) -> tuple[int, int]:
    return int(counters["position"]["epoch"]), int(counters["position"]["step"])


def _matches(path: Path, counters: Mapping[str, Any]) -> bool:
    try:
        return _epoch_and_step(counters) == _position(path)
    except (KeyError, TypeError, ValueError):
        return False
