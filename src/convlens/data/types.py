"""Types that every source of images provides.

A `DataSource` has one `Part` per split. Images of a part are either pixels (`ImageSource`) or
encoded files (`EncodedFiles`). The `StringSequence` classes hold the ids of many images in little
memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from convlens.data.decode import EXTENSIONS, Pixels, UnreadableImage, read_bytes
from convlens.utils.files import cannot_read

IndexArray = npt.NDArray[np.int64]

# System errors that a second attempt does not fix: the file is missing, forbidden, not a regular
# file, or its name is invalid.
PERMANENT_ERRNOS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENXIO,
    errno.ENODEV,
)


class ImageSource(Protocol):
    """uint8 images `[N, C, H, W]` that are read in pieces: an array, a memory map, a generator."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels: ...


class EncodedFiles(ABC):
    """Encoded images by number: files of a folder, or members of archives. Thread-safe."""

    # Whether images beyond the memory budget are decoded on demand instead of being stored decoded
    # on the disk, where they take a multiple of the space.
    streams = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, number: int) -> str:
        """Return the location of an image, for messages."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the bytes of one image.

        Raises:
            UnreadableImage: it is missing, empty, too large or not a regular file; or the system
                failed (see `raise_if_transient`).
        """

    @abstractmethod
    def stat_digest(self) -> str:
        """Return a digest of names, sizes and times; it differs after every change of a file."""

    @abstractmethod
    def subset(self, index: IndexArray) -> EncodedFiles:
        """Return the images at the positions `index`."""

    @abstractmethod
    def concat(self, other: EncodedFiles) -> EncodedFiles:
        """Return these files followed by those of `other`, which must be of the same class."""

    def shard_ids(self) -> IndexArray | None:
        """Return the shard of each image, `[N]`; None if images can be read in any order."""
        return None

    def prefetch(self, shard_ids: Sequence[int]) -> None:
        """Announce that images of these shards will be needed soon. Returns immediately."""
        return


class SelectedImages:
    """The images of an `ImageSource` at the positions `index`; nothing is copied."""

    def __init__(self, images: ImageSource, index: IndexArray) -> None:
        self._images, self._index = images, index
        self.shape: tuple[int, ...] = (len(index), *images.shape[1:])

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        return self._images[self._index[index]]


class FilePaths(EncodedFiles, Sequence[str]):
    """Images in files of their own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        return self._paths[number]

    def name(self, number: int) -> str:
        return self._paths[number]

    def read(self, number: int) -> bytes:
        return read_bytes(self._paths[number])

    def stat_digest(self) -> str:
        digest = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape"))
        digest.update(modification_times(self._paths).tobytes())
        return digest.hexdigest()

    def subset(self, index: IndexArray) -> EncodedFiles:
        return FilePaths([self._paths[i] for i in index.tolist()])

    def concat(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, FilePaths)
        return FilePaths([*self._paths, *other._paths])


def raise_if_transient(error: UnreadableImage) -> None:
    """Raise if `error` was caused by the system, so that it is not stored as the image's fault.

    Raises:
        ResourceError: out of file handles or memory, or a disk or network that does not respond.
    """
    cause = error.__cause__  # Pillow's own errors about contents have no errno
    if (
        isinstance(cause, OSError)
        and cause.errno is not None
        and cause.errno not in PERMANENT_ERRNOS
    ):
        raise cannot_read(error.path, cause) from error


def modification_times(paths: Sequence[str]) -> IndexArray:
    """Return size, mtime and ctime (ns) of each file, `[N, 3]`; zeros for a missing file."""
    times = np.zeros((len(paths), 3), np.int64)
    for i, path in enumerate(paths):
        try:
            stat = os.stat(path)
        except OSError:
            continue  # reading the file will report why
        # ctime as well: unlike mtime, which copy tools restore, it can't be set back.
        times[i] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return times


def is_image_name(name: str) -> bool:
    """Return whether a file counts as an image: it has a known extension and is not hidden."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


@dataclass(frozen=True)
class Part:
    """One split as its source provides it.

    Attributes:
        images: pixels, or encoded files.
        labels: class numbers, int64 `[N]`.
        ids: name of each image, unique within the source.
        groups: group of each image; images of a group stay in one split. None without groups.
    """

    images: ImageSource | EncodedFiles
    labels: npt.NDArray[np.int64]
    ids: Sequence[str]
    groups: list[str] | None = None

    def subset(self, index: IndexArray) -> Part:
        """Return the images at the positions `index`; no image is read."""
        images: ImageSource | EncodedFiles
        if isinstance(self.images, EncodedFiles):
            images = self.images.subset(index)
        else:
            images = SelectedImages(self.images, index)
        groups = self.groups and [self.groups[i] for i in index.tolist()]
        return Part(images, self.labels[index], IndexedStrings(self.ids, index), groups)


@dataclass(frozen=True)
class DataSource:
    """A named data set. `parts` has `train`, and `val` and `test` if the source has them."""

    name: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    notes: tuple[str, ...] = field(default=())

    def with_classes(self, names: Collection[str]) -> DataSource:
        """Return the data set with these of its classes only, in its own order.

        Labels are numbered again. A part without images of these classes is dropped, with a note.
        """
        classes = tuple(name for name in self.classes if name in names)
        if classes == self.classes:
            return self
        number_of = {name: number for number, name in enumerate(classes)}
        new_label = np.array([number_of.get(name, -1) for name in self.classes], np.int64)
        parts, notes = {}, list(self.notes)
        for split, part in self.parts.items():
            labels = new_label[part.labels]
            if (labels >= 0).any():
                chosen = part.subset(np.flatnonzero(labels >= 0))
                parts[split] = replace(chosen, labels=labels[labels >= 0])
            else:
                notes.append(f"{split}: no images of the chosen classes, so it is not used")
        return DataSource(self.name, classes, parts, tuple(notes))


class StringSequence(Sequence[str]):
    """A read-only sequence of strings that are made on access; equal to a list of the same."""

    @abstractmethod
    def _name(self, number: int) -> str: ...

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._name(i) for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._name(number % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # unhashable, like a list


class NumberedStrings(StringSequence):
    """`prefix/0`, `prefix/1` and so on."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix, self._count = prefix, count

    def __len__(self) -> int:
        return self._count

    def _name(self, number: int) -> str:
        return f"{self._prefix}/{number}"


class PackedStrings(StringSequence):
    """Strings in one UTF-8 buffer.

    Args:
        text: all strings, concatenated.
        starts: where each string begins, followed by the end of the last one, `[N + 1]`.
    """

    def __init__(self, text: npt.NDArray[np.uint8], starts: IndexArray) -> None:
        self.text, self.starts = text, starts

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedStrings:
        """Pack `names`."""
        text, ends = bytearray(), [0]
        for name in names:
            text += name.encode()
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _name(self, number: int) -> str:
        return self.text[self.starts[number] : self.starts[number + 1]].tobytes().decode()


class IndexedStrings(StringSequence):
    """The strings of `names` at the positions `index`."""

    def __init__(self, names: Sequence[str], index: IndexArray) -> None:
        self._names, self._index = names, index

    def __len__(self) -> int:
        return len(self._index)

    def _name(self, number: int) -> str:
        name: str = self._names[self._index[number]]
        return name
