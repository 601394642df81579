"""Image files as they were encoded: where they lie, and their bytes by number."""

from __future__ import annotations

import errno
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from convlens.data.decode import UnreadableImage, read_bytes
from convlens.system.files import cannot_read

# What the system says of a file that will be no better the next time: gone, forbidden, no regular
# file, a name that can't be.
ITS_OWN = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.ENODEV,
)  # fmt: skip


class Files(ABC):
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
    def plus(self, other: Files) -> Files:
        """These and then `other`, which is of the same kind."""

    def blocks(self) -> npt.NDArray[np.int64] | None:
        """Numbers `[N]` of what is best read in one go; None where each image is on its own."""
        return None

    def expect(self, blocks: Sequence[int]) -> None:
        """Tells that images of these blocks will be asked for soon. Returns at once."""
        return


def refuse_passing(error: UnreadableImage) -> None:
    """Raises where the system failed: that may pass, and must not be remembered of the image.

    Raises:
        ResourceError: out of files or memory, a disk or a network that doesn't answer.
    """
    cause = error.__cause__  # Pillow's own errors about contents have no number
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in ITS_OWN:
        raise cannot_read(error.path, cause) from error


class Paths(Files, Sequence[str]):
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
        digest.update(times_of(self._paths).tobytes())
        return digest.hexdigest()

    def plus(self, other: Files) -> Files:
        assert isinstance(other, Paths)
        return Paths([*self._paths, *other._paths])


def times_of(paths: Sequence[str]) -> npt.NDArray[np.int64]:
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
