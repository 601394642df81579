"""Images in shards by number, and the index that finds them: made once, kept in the cache.

The index is a safetensors file with its hash behind it: where each image begins and ends, its label
and its key. Its name is a hash over the paths, sizes and times of all shards.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from convlens.data.cache import Reader, cache_folder
from convlens.data.decode import EXTENSIONS, MAX_BYTES, UnreadableImage
from convlens.data.image_folder import normalize_name, printable
from convlens.data.types import EncodedFiles, IndexArray, PackedStrings, modification_times
from convlens.device import available_memory, max_open_files
from convlens.errors import DataError, ResourceError
from convlens.utils.console import print_status, progress_bar
from convlens.utils.files import (
    CorruptError,
    add_checksum,
    cannot_read,
    interprocess_lock,
    remove_stale_temp_files,
    verify_checksum,
    write_atomic,
)

INDEX_VERSION = 2  # of the index: raise it when the same tar would give another one
MAX_OPEN_FILES = 64  # shards that are kept open, of each part, where the system lets us


@dataclass(frozen=True)
class TarIndex:
    """All samples of some shards, in order.

    `shard`, `offset` and `size` int64 `[N]` say where each image lies, `label` int64 `[N]` which
    of `labels` it has: numbers of classes, or their names. `problems` is what is wrong with the
    shards, by kind; an index with problems is not kept.
    """

    shard: IndexArray
    offset: IndexArray
    size: IndexArray
    label: IndexArray
    labels: tuple[int | str, ...]
    keys: PackedStrings
    ignored: int = 0
    problems: tuple[tuple[str, tuple[str, ...]], ...] = ()


class TarMembers(EncodedFiles):
    """Images in shards, read where they lie; `number` is one's place in the rows of this part."""

    streams = True

    def __init__(
        self,
        paths: Sequence[str],
        times: IndexArray,
        shard: IndexArray,
        offset: IndexArray,
        size: IndexArray,
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
        self._most = min(MAX_OPEN_FILES, max(1, max_open_files() // 8))

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

    def plus(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, TarMembers)
        return TarMembers(
            [*self._paths, *other._paths],
            np.concatenate([self._times, other._times]),
            np.concatenate([self._shard, other._shard + len(self._paths)]),
            np.concatenate([self._offset, other._offset]),
            np.concatenate([self._size, other._size]),
            mixed=self.mixed and other.mixed,
        )

    def blocks(self) -> IndexArray | None:
        return self._shard if self.mixed else None

    def expect(self, blocks: Sequence[int]) -> None:
        """Reads these shards from front to back, in a thread, into the system's file cache.

        That memory isn't ours and goes to whoever needs it; where little is free, nothing is done.
        """
        new = [shard for shard in blocks if shard not in self._expected]
        size = int(self._times[new, 0].sum())
        if not new or 4 * size > available_memory():
            return
        self._expected.update(dict.fromkeys(new))
        while len(self._expected) > MAX_OPEN_FILES:
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


def tar_index(paths: Sequence[str]) -> tuple[TarIndex, IndexArray]:
    """The index of these shards, from the cache or made now, and their times.

    Raises:
        DataError: a shard that is no tar, compressed, cut short, damaged.
    """
    times = modification_times(paths)
    digest = hashlib.sha256(repr(INDEX_VERSION).encode())
    digest.update("\0".join(paths).encode("utf-8", "surrogateescape") + times.tobytes())
    path = cache_folder() / f"{digest.hexdigest()[:40]}.index"
    if found := _load_index(path):
        return found, times
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(path.with_suffix(".lock"), "reading these shards"):
            if found := _load_index(path):
                return found, times
            index = _build_index(paths)
            if not index.problems:
                _save_index(index, path)
            return index, times
    except OSError as error:
        print_status(f"no cache for the index of shards ({path.parent}: {error.strerror or error})")
        return _build_index(paths), times


def _build_index(paths: Sequence[str]) -> TarIndex:
    keys = list[str]()
    columns: dict[str, list[int]] = {"shard": [], "offset": [], "size": [], "label": []}
    number_of: dict[int | str, int] = {}
    problems: dict[str, list[str]] = {}
    ignored = 0
    with progress_bar("reading shards", len(paths)) as bar:
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
    return TarIndex(
        **arrays,
        labels=tuple(number_of),
        keys=PackedStrings.of(keys),
        ignored=ignored,
        problems=told,
    )


def _save_index(index: TarIndex, path: Path) -> None:
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
    remove_stale_temp_files(path.parent, [path.name], alone=True)  # the lock is held
    try:
        write_atomic(path, add_checksum(save(arrays, {"facts": facts})))
    except ResourceError as error:
        print_status(f"the index of these shards could not be kept ({error.what})")


def _load_index(path: Path) -> TarIndex | None:
    """A whole index, or None: absent, damaged, of another version."""
    from safetensors.numpy import load

    try:
        content = verify_checksum(path.read_bytes())
    except (OSError, CorruptError):
        return None
    # Its hash is right, so it is what `_keep` wrote.
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    arrays: dict[str, Any] = load(content)
    keys = PackedStrings(arrays.pop("text"), arrays.pop("starts"))
    return TarIndex(**arrays, labels=tuple(facts["labels"]), keys=keys, ignored=facts["ignored"])


# ---- tars ----------------------------------------
# The samples of one shard: a tar as WebDataset writes it, read strictly and never unpacked.
#
# A sample is what shares a name up to the first dot of its last part (github.com/webdataset):
# `0001.jpg` is an image and `0001.cls` its class.

LABEL_SUFFIXES = ("cls", "json", "txt")  # where there are several, the first counts
MAX_LABEL_BYTES = 1 << 20  # bytes of a label
_MOST_HEADER = 1 << 20  # bytes of one header with its extensions; a name has 4 KiB at most
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZ": "bzip2",
    b"\xfd7": "xz",
    b"\x28\xb5": "zstd",
    b"PK": "zip",
}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass
class TarSamples:
    """The images of one tar in their order, and what is wrong with it."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    ignored: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)

    def wrong(self, what: str, thing: str) -> None:
        self.problems.setdefault(what, []).append(thing)


@dataclass
class _Sample:
    """What was found of one sample: the place of its image, its labels by kind."""

    image: tuple[int, int] | None = None
    labels: dict[str, int | str] = field(default_factory=dict)
    mistaken: bool = False  # it has a label that can't be read


def read_samples(path: Path) -> TarSamples:
    """The samples of a tar. Members are looked at one by one; images are not read.

    Raises:
        DataError: it is no tar, compressed, cut short or damaged.
        ResourceError: the disk or the network fails.
    """
    try:
        return _read_tar(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def _read_tar(path: Path) -> TarSamples:
    found, samples = TarSamples(), dict[str, _Sample]()
    with _opened(path) as file:
        for member in _members(file, path):
            name = member.name
            if member.isdir():
                continue
            if not member.isreg() or member.sparse is not None:
                found.wrong("members that are links, devices or the like", printable(name))
            elif name.startswith("/") or ".." in name.split("/"):
                found.wrong("members whose names lead out of the tar", printable(name))
            else:
                _take_member(member, file, samples, found)
    for key, sample in samples.items():
        _keep_member(key, sample, found)
    return found


def _take_member(
    member: tarfile.TarInfo, file: IO[bytes], samples: dict[str, _Sample], found: TarSamples
) -> None:
    """Notes one plain member: an image, a label, or something else that is left alone."""
    parts = _NAME.fullmatch(member.name)
    key, kind = (parts[1].removeprefix("./"), parts[2].lower()) if parts else ("", "")
    is_image = f".{kind}" in EXTENSIONS
    if not is_image and kind not in LABEL_SUFFIXES:
        found.ignored += 1
        return
    sample = samples.setdefault(key, _Sample())
    if is_image:
        if sample.image is not None:
            found.wrong("keys with two images", printable(key))
        sample.image = member.offset_data, member.size
        return
    if kind in sample.labels:
        found.wrong("keys with the same kind of label twice", printable(key))
    try:
        if member.size > MAX_LABEL_BYTES:
            raise ValueError("too long")
        file.seek(member.offset_data)
        label = _label(kind, file.read(member.size))
        if label is not None:
            sample.labels[kind] = label
    except (ValueError, RecursionError) as error:  # the latter: JSON a thousand lists deep
        sample.mistaken = True
        found.wrong("labels that can't be read", f"{printable(member.name)} ({error})")


def _label(kind: str, content: bytes) -> int | str | None:
    """A class as a number or as a name; None where a JSON has no field `label`."""
    text = content.decode("utf-8-sig").strip()  # its errors are ValueErrors
    if kind == "json":
        fields = json.loads(text)
        value = fields.get("label") if isinstance(fields, dict) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("its label is neither a whole number nor a name")
        if isinstance(value, int):
            return _number(str(value))
        text = value.strip()
    elif kind == "cls":
        return _number(text)
    if not text:
        raise ValueError("it is empty")
    if "\n" in text or len(text) > 200:
        raise ValueError("more than one line or 200 letters: no class name")
    return normalize_name(text)


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text[:20]!r} is no number of a class, 0 or more")
    return int(text)


def _keep_member(key: str, sample: _Sample, found: TarSamples) -> None:
    if sample.image is None:
        found.ignored += len(sample.labels)
        return
    kind = next((kind for kind in LABEL_SUFFIXES if kind in sample.labels), None)
    if kind is None:
        if not sample.mistaken:
            what = "images without a label (.cls, .txt, or .json with `label`)"
            found.wrong(what, printable(key))
        return
    found.keys.append(printable(key))
    found.offsets.append(sample.image[0])
    found.sizes.append(sample.image[1])
    found.labels.append(sample.labels[kind])


# The tar itself


def _opened(path: Path) -> IO[bytes]:
    try:
        if not path.is_file():  # a pipe would block
            raise DataError("it is not a regular file", where=str(path))
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"can't read this shard: {error.strerror}", where=str(path)) from error
    head = file.read(512)
    file.seek(0)
    problem, fix = "", "write this shard again"
    if not head:
        problem = "this shard is empty (0 bytes)"
    elif head[257:262] != b"ustar" and (packed := _PACKED.get(head[:2])):
        problem = f"this shard is compressed ({packed}), so that its images can't be found in it"
        fix = "unpack it to a plain .tar: its images are compressed already"
    if problem:
        file.close()
        raise DataError(problem, where=str(path), fix=fix)
    return file


class _Bounded:
    """A tar's file as `tarfile` sees it: a header may not ask for gigabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a whole, undamaged tar.

    `tarfile` takes a damaged header in the middle for the end: so the end is looked at, too.
    """
    at = -1
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                if member.offset <= at or member.size < 0:
                    raise tarfile.ReadError("headers that lead backwards")
                at = member.offset
                tar.members.clear()  # or it would keep them all
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        # A header that leads nowhere is an invalid argument; all else is the disk's fault.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _damaged(path, str(error)) from error
    file.seek(end)
    rest = file.read(1 << 20)
    if len(rest) < 1024 or any(rest[:1024]):
        size = os.fstat(file.fileno()).st_size
        raise _damaged(path, f"no header and no end at byte {end:,} of {size:,}")
    while rest:
        if rest.count(0) != len(rest):
            raise _damaged(path, "there is more behind its end, as if two were put together")
        rest = file.read(1 << 20)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"a shard that is cut short, damaged or no tar: {why}",
        where=str(path),
        fix="copy or write this shard again",
    )
