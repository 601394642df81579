"""The samples of one shard: a tar as WebDataset writes it, read strictly and never unpacked.

A sample is what shares a name up to the first dot of its last part (github.com/webdataset):
`0001.jpg` is an image and `0001.cls` its class.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from convlens.data.decode import EXTENSIONS
from convlens.data.folders import normal
from convlens.data.scanning import printable
from convlens.errors import DataError
from convlens.system.files import cannot_read

LABELS = ("cls", "json", "txt")  # where there are several, the first counts
MOST_LABEL = 1 << 20  # bytes of a label
_MOST_HEADER = 1 << 20  # bytes of one header with its extensions; a name has 4 KiB at most
_PACKED = {
    b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip",
}  # fmt: skip
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass
class Samples:
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


def read_samples(path: Path) -> Samples:
    """The samples of a tar. Members are looked at one by one; images are not read.

    Raises:
        DataError: it is no tar, compressed, cut short or damaged.
        ResourceError: the disk or the network fails.
    """
    try:
        return _read(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def _read(path: Path) -> Samples:
    found, samples = Samples(), dict[str, _Sample]()
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
                _take(member, file, samples, found)
    for key, sample in samples.items():
        _keep(key, sample, found)
    return found


def _take(
    member: tarfile.TarInfo, file: IO[bytes], samples: dict[str, _Sample], found: Samples
) -> None:
    """Notes one plain member: an image, a label, or something else that is left alone."""
    parts = _NAME.fullmatch(member.name)
    key, kind = (parts[1].removeprefix("./"), parts[2].lower()) if parts else ("", "")
    is_image = f".{kind}" in EXTENSIONS
    if not is_image and kind not in LABELS:
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
        if member.size > MOST_LABEL:
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
    return normal(text)


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text[:20]!r} is no number of a class, 0 or more")
    return int(text)


def _keep(key: str, sample: _Sample, found: Samples) -> None:
    if sample.image is None:
        found.ignored += len(sample.labels)
        return
    kind = next((kind for kind in LABELS if kind in sample.labels), None)
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
