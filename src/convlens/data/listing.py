"""Which image files a set has, kept with a run: so that what changed since can be named.

`images.csv.gz` has a line an image: id, class, split (empty: not used, or unreadable) and the first
16 digits of its file's SHA-256. It explains, warns and decides nothing: whether a set is the same
goes by its fingerprint.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convlens.data import similar
from convlens.data.opening import Index, Opened
from convlens.data.similar import Repeats
from convlens.system.files import write_atomic

FILE = "images.csv.gz"
COLUMNS = ("id", "class", "split", "sha256")
_SHOWN = 3

Line = tuple[str, str, str, str]


@dataclass(frozen=True)
class Listing:
    """All image files of a set, and which split each is in."""

    classes: Sequence[str]
    parts: Sequence[Opened]
    views: Mapping[str, tuple[Opened, Index]]

    @classmethod
    def of(cls, classes: Sequence[str], views: Mapping[str, tuple[Opened, Index]]) -> Listing:
        parts = {id(opened): opened for opened, _ in views.values()}
        return cls(classes, list(parts.values()), views)

    @property
    def of_files(self) -> bool:
        """Whether these are files; images of built-in sets have no names to tell."""
        return all(part.digests is not None for part in self.parts)

    def lines(self) -> Iterator[Line]:
        for opened in self.parts:
            assert opened.digests is not None
            splits = np.full(len(opened.part.labels), "", "U5")
            for name, (mine, index) in self.views.items():
                if mine is opened:
                    splits[opened.good[index]] = name
            labels = opened.part.labels.tolist()
            for number, (image, label) in enumerate(zip(opened.part.ids, labels, strict=True)):
                digest = opened.digests[number, :8].tobytes().hex()
                yield image, self.classes[label], str(splits[number]), digest

    def copies(self) -> Repeats:
        """The used files that are equal byte for byte, as groups."""
        every = [(name, o, o.good[index]) for name, (o, index) in self.views.items()]
        heads = np.concatenate([_heads(o, numbers) for _, o, numbers in every])
        ordered = np.sort(heads)  # np.unique takes ten times as long
        again = np.isin(heads, ordered[1:][ordered[1:] == ordered[:-1]])
        ids, splits, labels, digests, start = list[str](), list[str](), list[str](), [], 0
        for name, opened, numbers in every:
            twins = numbers[again[start : start + len(numbers)]]
            start += len(numbers)
            assert opened.digests is not None
            digests.append(opened.digests[twins])
            for number in twins.tolist():
                ids.append(opened.part.ids[number])
                splits.append(name)
                labels.append(self.classes[opened.part.labels[number]])
        return Repeats.of(similar.repeated(np.concatenate(digests)), ids, splits, labels)

    def write(self, folder: Path) -> None:
        """Into the folder of a run."""
        packed = io.BytesIO()
        with (
            gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as raw,
            io.TextIOWrapper(raw, "utf-8", newline="") as text,
        ):
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(self.lines())
        write_atomic(folder / FILE, packed.getvalue())

    def changed(self, folder: Path) -> str:
        """How these files differ from those that the run in `folder` began with, in words.

        Empty where that can't be told: an old run, a damaged list, or nothing but their order.
        """
        before = _read(folder / FILE)
        if before is None or not self.of_files:
            return ""
        now = {image: (label, digest) for image, label, _, digest in self.lines()}
        kept = before.keys() & now.keys()
        return "; ".join(
            [
                *_told("added", [i for i in now if i not in before]),
                *_told("removed", [i for i in before if i not in now]),
                *_told("with other content", [i for i in now if i in kept
                                              and before[i][1] != now[i][1]]),
                *_told("in another class", [i for i in now if i in kept
                                            and before[i][0] != now[i][0]]),
            ]
        )  # fmt: skip


def _heads(opened: Opened, numbers: Index) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of the digests of some files."""
    assert opened.digests is not None
    return np.ascontiguousarray(opened.digests[numbers, :8]).view(np.uint64)[:, 0]


def learned_from(folder: Path, opened: Opened) -> int:
    """How many of these files are, byte for byte, among those that the run in `folder` trained on.

    0 where that can't be told: an old run, a damaged list, or images that are no files.
    """
    rows = _rows(folder / FILE) if opened.digests is not None else None
    if rows is None:
        return 0
    known = [digest for _, _, split, digest in rows if split == "train"]
    try:
        heads = np.array([int(digest, 16) for digest in known], np.uint64)
    except (ValueError, OverflowError):
        return 0
    mine = _heads(opened, opened.good).view(">u8")  # as the digits are read
    return int(np.isin(mine, heads).sum())


def _told(what: str, images: Sequence[str]) -> list[str]:
    if not images:
        return []
    rest = " ..." if len(images) > _SHOWN else ""
    return [f"{len(images):,} {what}: {', '.join(images[:_SHOWN])}{rest}"]


def _read(path: Path) -> dict[str, tuple[str, str]] | None:
    """Class and digest by id; None where there is no whole list."""
    rows = _rows(path)
    if rows is None:
        return None
    return {image: (label, digest) for image, label, _, digest in rows}


def _rows(path: Path) -> list[Line] | None:
    try:
        # gzip has a sum of its own.
        text = gzip.decompress(path.read_bytes()).decode()
        rows = list(csv.reader(io.StringIO(text), strict=True))
        return [(image, label, split, digest) for image, label, split, digest in rows[1:]]
    except (OSError, EOFError, ValueError, zlib.error, csv.Error):
        return None
