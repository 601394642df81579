"""What every source of images hands over: parts (train, val, test) of images with labels."""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from convlens.data.decode import EXTENSIONS, Pixels, UnreadableImage, read_bytes
from convlens.utils.files import cannot_read

# ---- encoded ----------------------------------------
# Image files as they were encoded: where they lie, and their bytes by number.

# What the system says of a file that will be no better the next time: gone, forbidden, no regular
# file, a name that can't be.
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


class EncodedFiles(ABC):
    """Encoded images by number: files of a folder, or members of archives. Any thread may read."""

    # Whether images beyond the memory budget are decoded whenever they are needed, and not kept
    # decoded on the disk, where they take a multiple of the space.
    streams = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, number: int) -> str:
        """Where an image lies, for people."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The bytes of one image.

        Raises:
            UnreadableImage: it is not there, empty, too large, no regular file; or the system
                failed (`refuse_passing`).
        """

    @abstractmethod
    def stamp(self) -> str:
        """A digest of names, sizes and times: it is another one after every change."""

    @abstractmethod
    def plus(self, other: EncodedFiles) -> EncodedFiles:
        """These and then `other`, which is of the same kind."""

    def blocks(self) -> npt.NDArray[np.int64] | None:
        """Numbers `[N]` of what is best read in one go; None where each image is on its own."""
        return None

    def expect(self, blocks: Sequence[int]) -> None:
        """Tells that images of these blocks will be asked for soon. Returns at once."""
        return


def raise_if_transient(error: UnreadableImage) -> None:
    """Raises where the system failed: that may pass, and must not be remembered of the image.

    Raises:
        ResourceError: out of files or memory, a disk or a network that doesn't answer.
    """
    cause = error.__cause__  # Pillow's own errors about contents have no number
    if (
        isinstance(cause, OSError)
        and cause.errno is not None
        and cause.errno not in PERMANENT_ERRNOS
    ):
        raise cannot_read(error.path, cause) from error


class FilePaths(EncodedFiles, Sequence[str]):
    """One file an image."""

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

    def stamp(self) -> str:
        digest = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape"))
        digest.update(modification_times(self._paths).tobytes())
        return digest.hexdigest()

    def plus(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, FilePaths)
        return FilePaths([*self._paths, *other._paths])


def modification_times(paths: Sequence[str]) -> npt.NDArray[np.int64]:
    """Size, time of modification and of change of each file, `[N, 3]`; 0 0 0 where it is gone."""
    times = np.zeros((len(paths), 3), np.int64)
    for i, path in enumerate(paths):
        try:
            s = os.stat(path)
        except OSError:
            continue  # reading it will say why
        # The change time too: it can't be set back, as a copy tool does with the other.
        times[i] = s.st_size, s.st_mtime_ns, s.st_ctime_ns
    return times


class ImageSource(Protocol):
    """uint8 images `[N, C, H, W]` that are read piece by piece: an array, a memory map, drawn."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels: ...


@dataclass(frozen=True)
class Part:
    """One split as its source gives it: `images` are pixels, or files that hold them."""

    images: ImageSource | EncodedFiles
    labels: npt.NDArray[np.int64]
    ids: Sequence[str]
    groups: list[str] | None = None


@dataclass(frozen=True)
class DataSource:
    """A named set: `parts` always has `train`, and `val` and `test` where the source has them."""

    name: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    notes: tuple[str, ...] = field(default=())


def is_image_name(name: str) -> bool:
    """Whether a file counts as an image: a known extension, not hidden."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


# ---- ids ----------------------------------------
# Names of many images in little memory: made when asked for, equal to a list of the same.

IndexArray = npt.NDArray[np.int64]


class StringSequence(Sequence[str]):
    """What `Numbered`, `Joined` and `Taken` share; they only know how to make one name."""

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

    __hash__ = None  # type: ignore[assignment]  # as a list has none


class NumberedStrings(StringSequence):
    """`prefix/0` and so on."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix, self._count = prefix, count

    def __len__(self) -> int:
        return self._count

    def _name(self, number: int) -> str:
        return f"{self._prefix}/{number}"


class PackedStrings(StringSequence):
    """One text of all of them, UTF-8, and where each begins, with the end of the last."""

    def __init__(self, text: npt.NDArray[np.uint8], starts: IndexArray) -> None:
        self.text, self.starts = text, starts

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedStrings:
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
    """Some of others, by number."""

    def __init__(self, names: Sequence[str], index: IndexArray) -> None:
        self._names, self._index = names, index

    def __len__(self) -> int:
        return len(self._index)

    def _name(self, number: int) -> str:
        name: str = self._names[self._index[number]]
        return name
