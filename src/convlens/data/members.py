"""Images in shards by number, and the index that finds them: made once, kept in the cache.

The index is a safetensors file with its hash behind it: where each image begins and ends, its label
and its key. Its name is a hash over the paths, sizes and times of all shards.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convlens import device
from convlens.data.cache import folder
from convlens.data.decode import MAX_BYTES, UnreadableImage
from convlens.data.encoded import Files, times_of
from convlens.data.ids import Joined, Numbers
from convlens.data.locks import interprocess_lock
from convlens.data.reading import Reader
from convlens.data.tars import read_samples
from convlens.errors import DataError, ResourceError
from convlens.system.console import print_status, progress
from convlens.system.files import (
    CorruptError,
    add_checksum,
    remove_stale_temp_files,
    verify_checksum,
    write_atomic,
)

VERSION = 2  # of the index: raise it when the same tar would give another one
OPEN = 64  # shards that are kept open, of each part, where the system lets us


@dataclass(frozen=True)
class Index:
    """All samples of some shards, in order.

    `shard`, `offset` and `size` int64 `[N]` say where each image lies, `label` int64 `[N]` which
    of `labels` it has: numbers of classes, or their names. `problems` is what is wrong with the
    shards, by kind; an index with problems is not kept.
    """

    shard: Numbers
    offset: Numbers
    size: Numbers
    label: Numbers
    labels: tuple[int | str, ...]
    keys: Joined
    ignored: int = 0
    problems: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Members(Files):
    """Images in shards, read where they lie; `number` is one's place in the rows of this part."""

    streams = True

    def __init__(
        self,
        paths: Sequence[str],
        times: Numbers,
        shard: Numbers,
        offset: Numbers,
        size: Numbers,
        *,
        mixed: bool,
    ) -> None:
        self._paths, self._times = list(paths), times
        self._shard, self._offset, self._size = shard, offset, size
        self.mixed = mixed
        self._open = collections.OrderedDict[int, Reader]()
        self._expected = collections.OrderedDict[int, None]()
        self._lock = threading.Lock()
        # There are three parts, and others need files, too.
        self._most = min(OPEN, max(1, device.open_files() // 8))

    def __len__(self) -> int:
        return len(self._shard)

    def name(self, number: int) -> str:
        return f"{self._paths[self._shard[number]]} at byte {self._offset[number]:,}"

    def read(self, number: int) -> bytes:
        size = int(self._size[number])
        if size == 0:
            raise UnreadableImage(self.name(number), "it is empty (0 bytes)")
        if size > MAX_BYTES:
            raise UnreadableImage(self.name(number), f"it is larger than {MAX_BYTES >> 20} MiB")
        content = bytearray(size)
        reader = self._reader(int(self._shard[number]))
        reader.fill(memoryview(content), int(self._offset[number]))
        return bytes(content)

    def _reader(self, shard: int) -> Reader:
        """The open shard. One that is pushed out is closed when its last reader is done with it."""
        with self._lock:
            reader = self._open.pop(shard, None)
            if reader is None:
                reader = self._opened(shard)
            self._open[shard] = reader
            while len(self._open) > self._most:
                self._open.popitem(last=False)
            return reader

    def _opened(self, shard: int) -> Reader:
        path, fix = self._paths[shard], "leave the shards alone during a run; run it again"
        try:
            reader = Reader(path)
        except OSError as error:
            raise DataError(
                f"a shard can't be opened any more: {error.strerror}", where=path, fix=fix
            ) from error
        facts = reader.facts()
        if [facts.st_size, facts.st_mtime_ns] != self._times[shard, :2].tolist():
            raise DataError("a shard has changed since the start", where=path, fix=fix)
        return reader

    def stamp(self) -> str:
        digest = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape"))
        for array in (self._times, self._shard, self._offset, self._size):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def plus(self, other: Files) -> Files:
        assert isinstance(other, Members)
        return Members(
            [*self._paths, *other._paths],
            np.concatenate([self._times, other._times]),
            np.concatenate([self._shard, other._shard + len(self._paths)]),
            np.concatenate([self._offset, other._offset]),
            np.concatenate([self._size, other._size]),
            mixed=self.mixed and other.mixed,
        )

    def blocks(self) -> Numbers | None:
        return self._shard if self.mixed else None

    def expect(self, blocks: Sequence[int]) -> None:
        """Reads these shards from front to back, in a thread, into the system's file cache.

        That memory isn't ours and goes to whoever needs it; where little is free, nothing is done.
        """
        new = [shard for shard in blocks if shard not in self._expected]
        size = int(self._times[new, 0].sum())
        if not new or 4 * size > device.available_memory():
            return
        self._expected.update(dict.fromkeys(new))
        while len(self._expected) > OPEN:
            self._expected.popitem(last=False)
        # A daemon: the end of a training must not wait for what nobody will read.
        threading.Thread(target=self._read_through, args=(new,), daemon=True).start()

    def _read_through(self, shards: Sequence[int]) -> None:
        piece = memoryview(bytearray(1 << 20))
        for shard in shards:
            try:
                reader, size = Reader(self._paths[shard]), int(self._times[shard, 0])
                for start in range(0, size, len(piece)):
                    reader.fill(piece[: size - start], start)
            except (OSError, DataError, ResourceError):
                return  # whoever needs an image of it will say so


def index_of(paths: Sequence[str]) -> tuple[Index, Numbers]:
    """The index of these shards, from the cache or made now, and their times.

    Raises:
        DataError: a shard that is no tar, compressed, cut short, damaged.
    """
    times = times_of(paths)
    digest = hashlib.sha256(repr(VERSION).encode())
    digest.update("\0".join(paths).encode("utf-8", "surrogateescape") + times.tobytes())
    place = folder() / f"{digest.hexdigest()[:40]}.index"
    if found := _kept(place):
        return found, times
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(place.with_suffix(".lock"), "reading these shards"):
            if found := _kept(place):
                return found, times
            index = _made(paths)
            if not index.problems:
                _keep(index, place)
            return index, times
    except OSError as error:
        print_status(
            f"no cache for the index of shards ({place.parent}: {error.strerror or error})"
        )
        return _made(paths), times


def _made(paths: Sequence[str]) -> Index:
    keys = list[str]()
    columns: dict[str, list[int]] = {"shard": [], "offset": [], "size": [], "label": []}
    number_of: dict[int | str, int] = {}
    problems: dict[str, list[str]] = {}
    ignored = 0
    with progress("reading shards", len(paths)) as bar:
        for shard, path in enumerate(paths):
            found = read_samples(Path(path))
            stem = os.path.basename(path)
            keys += found.keys
            columns["shard"] += [shard] * len(found.keys)
            columns["offset"] += found.offsets
            columns["size"] += found.sizes
            columns["label"] += [number_of.setdefault(la, len(number_of)) for la in found.labels]
            ignored += found.ignored
            for what, things in found.problems.items():
                problems.setdefault(what, []).extend(f"{stem}: {thing}" for thing in things)
            bar.advance(1)
    arrays = {name: np.array(values, np.int64) for name, values in columns.items()}
    told = tuple((what, tuple(things)) for what, things in problems.items())
    return Index(
        **arrays, labels=tuple(number_of), keys=Joined.of(keys), ignored=ignored, problems=told
    )


def _keep(index: Index, place: Path) -> None:
    from safetensors.numpy import save

    arrays: dict[str, npt.NDArray[Any]] = {
        "shard": index.shard,
        "offset": index.offset,
        "size": index.size,
        "label": index.label,
        "text": index.keys.text,
        "starts": index.keys.starts,
    }
    facts = json.dumps({"labels": index.labels, "ignored": index.ignored})
    remove_stale_temp_files(place.parent, [place.name], alone=True)  # the lock is held
    try:
        write_atomic(place, add_checksum(save(arrays, {"facts": facts})))
    except ResourceError as error:
        print_status(f"the index of these shards could not be kept ({error.what})")


def _kept(place: Path) -> Index | None:
    """A whole index, or None: absent, damaged, of another version."""
    from safetensors.numpy import load

    try:
        content = verify_checksum(place.read_bytes())
    except (OSError, CorruptError):
        return None
    # Its hash is right, so it is what `_keep` wrote.
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    arrays: dict[str, Any] = load(content)
    keys = Joined(arrays.pop("text"), arrays.pop("starts"))
    return Index(**arrays, labels=tuple(facts["labels"]), keys=keys, ignored=facts["ignored"])
