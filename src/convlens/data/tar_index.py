"""Tars of WebDataset samples: parsing them, an index of their images, and random access to these.

Tars are parsed strictly and never unpacked. The members of a sample share their name up to the
first dot of its last component (github.com/webdataset): `0001.jpg` is an image and `0001.cls` its
class. The index of a set of shards is cached as a safetensors file with a checksum, under a hash of
the paths, sizes and times of all shards.
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
from convlens.data.layout import normalize_name, printable
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

INDEX_VERSION = 2  # raise it when the same tar would give another index
MAX_OPEN_FILES = 64  # shards of one part that are kept open, if the system permits
LABEL_SUFFIXES = ("cls", "json", "txt")  # in order of priority
MAX_LABEL_BYTES = 1 << 20
MAX_CLASS_NAME_LENGTH = 200
MAX_HEADER_BYTES = 1 << 20  # of one header with its extensions; a path has at most 4 KiB
READ_BYTES = 1 << 20  # per read of a whole shard
_COMPRESSED_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZ": "bzip2",
    b"\xfd7": "xz",
    b"\x28\xb5": "zstd",
    b"PK": "zip",
}
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True)
class TarIndex:
    """All samples of some shards, in order.

    Attributes:
        shard: number of the shard of each image, int64 `[N]`.
        offset: where the image begins in its shard, int64 `[N]`.
        size: bytes of the image, int64 `[N]`.
        label: position of its label in `labels`, int64 `[N]`.
        labels: the distinct labels: class numbers or class names.
        keys: key of each sample.
        ignored: number of members that are neither images nor labels.
        problems: what is wrong with the shards: messages with examples. An index with problems is
            not cached.
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
    """Images in shards, read at their offsets.

    Args:
        paths: the shards.
        times: their `modification_times`; a shard that changed since then is an error.
        shard: number of the shard of each image, `[N]`.
        offset: where each image begins, `[N]`.
        size: bytes of each image, `[N]`.
        mixed: each shard holds all classes, so images may be drawn from a few shards at a time.
    """

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
        self._open = collections.OrderedDict[int, Reader]()  # least recently used first
        self._prefetched = collections.OrderedDict[int, None]()
        self._lock = threading.Lock()
        # A source has up to three parts, and the rest of the program opens files as well.
        self._max_open = min(MAX_OPEN_FILES, max(1, max_open_files() // 8))

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
        """Return the open shard. An evicted one is closed when its last user releases it."""
        with self._lock:
            reader = self._open.pop(shard, None)
            if reader is None:
                reader = self._open_shard(shard)
            self._open[shard] = reader
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
            return reader

    def _open_shard(self, shard: int) -> Reader:
        path = self._paths[shard]
        fix = "do not change the shards during a run; run the same command again"
        try:
            reader = Reader(path)
        except OSError as error:
            raise DataError(
                f"a shard can no longer be opened: {error.strerror}", where=path, fix=fix
            ) from error
        stat = reader.facts()
        if [stat.st_size, stat.st_mtime_ns] != self._times[shard, :2].tolist():
            raise DataError("a shard has changed since the start", where=path, fix=fix)
        return reader

    def stat_digest(self) -> str:
        digest = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape"))
        for array in (self._times, self._shard, self._offset, self._size):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def subset(self, index: IndexArray) -> EncodedFiles:
        return TarMembers(
            self._paths,
            self._times,
            self._shard[index],
            self._offset[index],
            self._size[index],
            mixed=self.mixed,
        )

    def concat(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, TarMembers)
        return TarMembers(
            [*self._paths, *other._paths],
            np.concatenate([self._times, other._times]),
            np.concatenate([self._shard, other._shard + len(self._paths)]),
            np.concatenate([self._offset, other._offset]),
            np.concatenate([self._size, other._size]),
            mixed=self.mixed and other.mixed,
        )

    def shard_ids(self) -> IndexArray | None:
        return self._shard if self.mixed else None

    def prefetch(self, shard_ids: Sequence[int]) -> None:
        """Read these shards into the system's file cache, in a background thread.

        The system can reclaim that memory at any time; nothing is read if little memory is free.
        """
        new = [shard for shard in shard_ids if shard not in self._prefetched]
        size = int(self._times[new, 0].sum())
        if not new or 4 * size > available_memory():
            return
        self._prefetched.update(dict.fromkeys(new))
        while len(self._prefetched) > MAX_OPEN_FILES:
            self._prefetched.popitem(last=False)
        # A daemon, so that the program does not wait for it at exit.
        threading.Thread(target=self._read_through, args=(new,), daemon=True).start()

    def _read_through(self, shards: Sequence[int]) -> None:
        buffer = memoryview(bytearray(READ_BYTES))
        for shard in shards:
            try:
                reader, size = Reader(self._paths[shard]), int(self._times[shard, 0])
                for start in range(0, size, len(buffer)):
                    reader.fill(buffer[: size - start], start)
            except (OSError, DataError, ResourceError):
                return  # reading an image of this shard will report the error


def tar_index(paths: Sequence[str]) -> tuple[TarIndex, IndexArray]:
    """Return the index of these shards, cached or built now, and their `modification_times`.

    Raises:
        DataError: a shard is not a tar, compressed, cut short or damaged.
    """
    times = modification_times(paths)
    digest = hashlib.sha256(repr(INDEX_VERSION).encode())
    digest.update("\0".join(paths).encode("utf-8", "surrogateescape") + times.tobytes())
    path = cache_folder() / f"{digest.hexdigest()[:40]}.index"
    if index := _load_index(path):
        return index, times
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(path.with_suffix(".lock"), "reading these shards"):
            index = _load_index(path)
            if index is None:
                index = _build_index(paths)
                if not index.problems:
                    _save_index(index, path)
            return index, times
    except OSError as error:
        reason = error.strerror or error
        print_status(f"the index of the shards is not cached ({path.parent}: {reason})")
        return _build_index(paths), times


def _build_index(paths: Sequence[str]) -> TarIndex:
    keys = list[str]()
    columns: dict[str, list[int]] = {"shard": [], "offset": [], "size": [], "label": []}
    number_of: dict[int | str, int] = {}
    problems: dict[str, list[str]] = {}
    ignored = 0
    with progress_bar("reading shards", len(paths)) as bar:
        for shard, path in enumerate(paths):
            samples = read_samples(Path(path))
            file = os.path.basename(path)
            keys += samples.keys
            columns["shard"] += [shard] * len(samples.keys)
            columns["offset"] += samples.offsets
            columns["size"] += samples.sizes
            columns["label"] += [number_of.setdefault(x, len(number_of)) for x in samples.labels]
            ignored += samples.ignored
            for message, items in samples.problems.items():
                problems.setdefault(message, []).extend(f"{file}: {item}" for item in items)
            bar.advance(1)
    return TarIndex(
        **{name: np.array(values, np.int64) for name, values in columns.items()},
        labels=tuple(number_of),
        keys=PackedStrings.of(keys),
        ignored=ignored,
        problems=tuple((message, tuple(items)) for message, items in problems.items()),
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
        print_status(f"the index of the shards could not be cached ({error.what})")


def _load_index(path: Path) -> TarIndex | None:
    """Return a cached index; None if it is missing or damaged."""
    from safetensors.numpy import load

    try:
        content = verify_checksum(path.read_bytes())
    except (OSError, CorruptError):
        return None
    # The checksum is right, so this is exactly what `_save_index` wrote.
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    arrays: dict[str, Any] = load(content)
    keys = PackedStrings(arrays.pop("text"), arrays.pop("starts"))
    return TarIndex(**arrays, labels=tuple(facts["labels"]), keys=keys, ignored=facts["ignored"])


@dataclass
class TarSamples:
    """The labeled images of one tar, in order, and the problems of the tar by message."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    ignored: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)

    def add_problem(self, message: str, item: str) -> None:
        self.problems.setdefault(message, []).append(item)


@dataclass
class _Sample:
    """The members of one sample: offset and size of its image, and its labels by suffix."""

    image: tuple[int, int] | None = None
    labels: dict[str, int | str] = field(default_factory=dict)
    has_bad_label: bool = False


def read_samples(path: Path) -> TarSamples:
    """Return the samples of a tar. Images are located but not read.

    Raises:
        DataError: it is not a tar, compressed, cut short or damaged.
        ResourceError: the disk or the network fails.
    """
    try:
        return _read_tar(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def _read_tar(path: Path) -> TarSamples:
    result, samples = TarSamples(), dict[str, _Sample]()
    with _open_tar(path) as file:
        for member in _members(file, path):
            name = member.name
            if member.isdir():
                continue
            if not member.isreg() or member.sparse is not None:
                result.add_problem("members that are not regular files", printable(name))
            elif name.startswith("/") or ".." in name.split("/"):
                result.add_problem("members whose names point outside the tar", printable(name))
            else:
                _add_member(member, file, samples, result)
    for key, sample in samples.items():
        _add_sample(key, sample, result)
    return result


def _add_member(
    member: tarfile.TarInfo, file: IO[bytes], samples: dict[str, _Sample], result: TarSamples
) -> None:
    """Add a regular file to its sample if it is an image or a label; ignore it otherwise."""
    match = _MEMBER_NAME.fullmatch(member.name)
    key, suffix = (match[1].removeprefix("./"), match[2].lower()) if match else ("", "")
    is_image = f".{suffix}" in EXTENSIONS
    if not is_image and suffix not in LABEL_SUFFIXES:
        result.ignored += 1
        return
    sample = samples.setdefault(key, _Sample())
    if is_image:
        if sample.image is not None:
            result.add_problem("keys with two images", printable(key))
        sample.image = member.offset_data, member.size
        return
    if suffix in sample.labels:
        result.add_problem("keys with two labels of the same kind", printable(key))
    try:
        if member.size > MAX_LABEL_BYTES:
            raise ValueError("too long")
        file.seek(member.offset_data)
        label = _parse_label(suffix, file.read(member.size))
        if label is not None:
            sample.labels[suffix] = label
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested JSON
        sample.has_bad_label = True
        result.add_problem("labels that can't be read", f"{printable(member.name)} ({error})")


def _parse_label(suffix: str, content: bytes) -> int | str | None:
    """Return a class number or a class name; None for JSON without a field `label`."""
    text = content.decode("utf-8-sig").strip()  # a UnicodeDecodeError is a ValueError
    if suffix == "json":
        fields = json.loads(text)
        value = fields.get("label") if isinstance(fields, dict) else None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("its `label` is neither an integer nor a string")
        if isinstance(value, int):
            return _parse_number(str(value))
        text = value.strip()
    elif suffix == "cls":
        return _parse_number(text)
    if not text:
        raise ValueError("it is empty")
    if "\n" in text or len(text) > MAX_CLASS_NAME_LENGTH:
        raise ValueError(
            f"not a class name: more than one line or {MAX_CLASS_NAME_LENGTH} characters"
        )
    return normalize_name(text)


def _parse_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text[:20]!r} is not a class number, which is 0 or more")
    return int(text)


def _add_sample(key: str, sample: _Sample, result: TarSamples) -> None:
    if sample.image is None:
        result.ignored += len(sample.labels)
        return
    suffix = next((suffix for suffix in LABEL_SUFFIXES if suffix in sample.labels), None)
    if suffix is None:
        if not sample.has_bad_label:
            message = "images without a label (.cls, .txt, or .json with `label`)"
            result.add_problem(message, printable(key))
        return
    result.keys.append(printable(key))
    result.offsets.append(sample.image[0])
    result.sizes.append(sample.image[1])
    result.labels.append(sample.labels[suffix])


def _open_tar(path: Path) -> IO[bytes]:
    """Open a tar; files that are empty or compressed are errors."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise DataError("it is not a regular file", where=str(path))
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"can't read this shard: {error.strerror}", where=str(path)) from error
    head = file.read(512)
    file.seek(0)
    problem, fix = "", "write this shard again"
    if not head:
        problem = "this shard is empty (0 bytes)"
    elif head[257:262] != b"ustar" and (compression := _COMPRESSED_MAGIC.get(head[:2])):
        problem = f"this shard is compressed ({compression}), which prevents random access"
        fix = "unpack it to a plain .tar: its images are compressed already"
    if problem:
        file.close()
        raise DataError(problem, where=str(path), fix=fix)
    return file


class _BoundedFile:
    """A file for `tarfile` that refuses to read huge headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        return self._file.read(count)


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar; raise `DataError` at the end unless it is complete.

    `tarfile` takes a damaged header for the end of the tar. Therefore the end marker is checked.
    """
    offset = -1
    try:
        with tarfile.open(fileobj=_BoundedFile(file), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                if member.offset <= offset or member.size < 0:
                    raise tarfile.ReadError("headers that point backwards")
                offset = member.offset
                tar.members.clear()  # otherwise it would keep them all
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        # A seek to an invalid offset gives EINVAL; other system errors are the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _damaged_tar(path, str(error)) from error
    file.seek(end)
    tail = file.read(READ_BYTES)
    if len(tail) < 1024 or any(tail[:1024]):
        size = os.fstat(file.fileno()).st_size
        raise _damaged_tar(path, f"no header and no end marker at byte {end:,} of {size:,}")
    while tail:
        if tail.count(0) != len(tail):
            raise _damaged_tar(path, "data after the end marker, as if tars were concatenated")
        tail = file.read(READ_BYTES)


def _damaged_tar(path: Path, reason: str) -> DataError:
    return DataError(
        f"this shard is cut short, damaged or not a tar: {reason}",
        where=str(path),
        fix="copy or write this shard again",
    )
