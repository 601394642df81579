"""The states of a run: the newest and the one before, each with its hash, so that one can go bad.

    state/manifest.json                 which states there are, newest first
    state/0003-000017.safetensors       the newest: epoch 3, 17 steps of it done
    state/0003-000001.safetensors       the one before

A state counts once the manifest names it; that is renamed into place last, when the state is on
the disk. What the manifest doesn't name is deleted by the next save.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from convlens.errors import ModelFileError
from convlens.formats import modelfile
from convlens.system import files

KEPT = 2
MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"[\w-]+\.safetensors")


@dataclass(frozen=True)
class Generation:
    """One state as the manifest names it: `epoch` is the one in training, from 1."""

    file: str
    sha256: str
    epoch: int
    step: int

    @property
    def place(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"


@dataclass(frozen=True)
class Found:
    """A state that is whole."""

    generation: Generation
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


class Generations:
    """The states in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._good: list[Generation] | None = None  # from the last one that was read on
        self.lost: list[str] = []

    def save(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Adds a state and commits it; older ones but one are deleted then.

        Args:
            counters: with `position`, a mapping with `epoch` and `step`.

        Raises:
            ResourceError: the disk; what was there before is intact and still named.
        """
        epoch, step = (int(counters["position"][key]) for key in ("epoch", "step"))
        name = f"{epoch:04}-{step:06}.safetensors"
        digest = modelfile.write(self._folder / name, tensors, counters)
        before = self._named() if self._good is None else self._good
        older = [each for each in before if each.file != name]
        self._commit([Generation(name, digest, epoch, step), *older][:KEPT])

    def read(self, serves: Callable[[dict[str, Any]], str] = lambda counters: "") -> Found | None:
        """The newest state that is whole; `lost` says what is wrong with newer ones.

        Args:
            serves: says of a state's counters why it is of no use, or nothing.

        Raises:
            modelfile.NewerFormatError: a later version wrote it.
        """
        self.lost = []
        for candidates in (self._named, self._unnamed):
            named = candidates()
            for number, generation in enumerate(named):
                found = self._whole(generation, serves)
                if found is not None:
                    self._good = named[number:]
                    return found
        self._good = []
        return None

    def keep_newest(self) -> None:
        """Deletes all but the newest: for a run that is finished, and may be extended."""
        with contextlib.suppress(ModelFileError):
            self._commit(self._named()[:1])

    def clear(self) -> None:
        """Deletes all files: the folder is of no run. (A folder in it is none of ours.)"""
        self._good = None
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if not path.is_dir():
                    path.unlink()
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def _commit(self, generations: list[Generation]) -> None:
        if not generations:
            return
        content = {"format": FORMAT, "generations": [asdict(each) for each in generations]}
        files.write_atomic(self._folder / MANIFEST, json.dumps(content, indent=1) + "\n")
        self._good = generations
        kept = {MANIFEST, *(each.file for each in generations)}
        for path in self._folder.iterdir():
            if path.name not in kept:  # older states, and halves that a killed process left
                with contextlib.suppress(OSError):
                    path.unlink()

    def _named(self) -> list[Generation]:
        """Those of the manifest; none if there is no manifest, or it is damaged."""
        try:
            content = json.loads((self._folder / MANIFEST).read_text("utf-8"))
            found = [Generation(**each) for each in content["generations"]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return []
        # Names that lead out of the folder are none of ours.
        return [each for each in found if _NAME.fullmatch(str(each.file))]

    def _unnamed(self) -> list[Generation]:
        """All whole states, newest first: the manifest was lost, or not yet written.

        Raises:
            modelfile.NewerFormatError: a later version wrote one; what is passed over is deleted.
        """
        found = []
        for path in self._folder.glob("*.safetensors"):
            try:
                counters = modelfile.read(path)[1]
                epoch, step = (int(counters["position"][key]) for key in ("epoch", "step"))
                found.append(Generation(path.name, counters["sha256"], epoch, step))
            except modelfile.NewerFormatError:
                raise
            except (ModelFileError, KeyError, TypeError, ValueError):
                continue
        return sorted(found, key=lambda each: (each.epoch, each.step), reverse=True)

    def _whole(
        self, generation: Generation, serves: Callable[[dict[str, Any]], str]
    ) -> Found | None:
        try:
            tensors, counters = modelfile.read(self._folder / generation.file)
            if counters["sha256"] != generation.sha256:
                raise ModelFileError("it is not the one that was saved")
            if reason := serves(counters):
                raise ModelFileError(reason)
        except modelfile.NewerFormatError:
            raise
        except ModelFileError as error:
            told = f"the state of {generation.place}: {error.what}"
            if told not in self.lost:
                self.lost.append(told)
            return None
        return Found(generation, tensors, counters)
