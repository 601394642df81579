"""Images by number: in memory, in a file of pixels on the disk, or decoded when asked for.

Every kind has `shape` (N, C, H, W), `gather` (int64 `[B]` -> uint8 `[B, C, H, W]`, on the CPU,
from any thread), `resident` and `take`.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from torch import Tensor

from convlens.data.decode import Pixels, UnreadableImage, decode, fit_images
from convlens.data.encoded import Files, refuse_passing
from convlens.data.parts import Images
from convlens.data.reading import Reader
from convlens.errors import DataError
from convlens.system.console import print_status

Shape = tuple[int, int, int, int]
Sums = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Conversion:
    """What every image of a set becomes: `[channels, size, size]`, cropped, padded or stretched."""

    size: int
    channels: int
    fit: str

    @property
    def image_bytes(self) -> int:
        """Bytes of one converted image."""
        return self.channels * self.size * self.size

    def file(self, content: bytes, path: str) -> Pixels:
        """The bytes of one image file, converted."""
        return decode(content, size=self.size, channels=self.channels, fit=self.fit, name=path)

    def array(self, images: Pixels) -> Pixels:
        """uint8 `[N, C, H, W]`, converted."""
        return fit_images(images, size=self.size, channels=self.channels, fit=self.fit)


class Rows(Protocol):
    """What a split's images are, wherever they lie."""

    @property
    def shape(self) -> Shape: ...

    def gather(self, index: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` on the CPU for int64 `[B]`."""
        ...

    def resident(self) -> Tensor | None:
        """All images as one tensor where they are in memory already, else None."""
        ...

    def take(self, index: Tensor) -> Rows:
        """A view of the images `index`, in that order."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """uint8 `[N, C, H, W]` in memory."""

    images: Tensor

    @property
    def shape(self) -> Shape:
        n, c, h, w = self.images.shape
        return n, c, h, w

    def gather(self, index: Tensor) -> Tensor:
        return self.images[index]

    def resident(self) -> Tensor | None:
        return self.images

    def take(self, index: Tensor) -> Rows:
        # A copy on purpose: where nobody holds the whole any more, its memory is freed.
        return ArrayRows(self.images[index])


@dataclass(frozen=True)
class TakenRows:
    """Some rows of others, by number; holds no pixels."""

    base: Rows
    index: Tensor

    @property
    def shape(self) -> Shape:
        return (len(self.index), *self.base.shape[1:])

    def gather(self, index: Tensor) -> Tensor:
        return self.base.gather(self.index[index])

    def resident(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> Rows:
        return TakenRows(self.base, self.index[index])


class Records:
    """A file of `count` records of `size` bytes each, after `header` bytes; thread-safe."""

    def __init__(self, path: Path, size: int, count: int, header: int = 0) -> None:
        self.path, self.size, self.count, self.header = path, size, count, header
        self._reader = Reader(path)

    def read(self, numbers: Sequence[int]) -> Pixels:
        """uint8 `[B, size]`; neighbours in `numbers` are read in one go."""
        if numbers and not (min(numbers) >= 0 and max(numbers) < self.count):
            raise IndexError(f"records {min(numbers)} to {max(numbers)} of {self.count}")
        out = np.empty((len(numbers), self.size), np.uint8)
        start = 0
        while start < len(numbers):
            end = start + 1
            while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
                end += 1
            into = out[start:end].reshape(-1).data
            self._reader.fill(into, self.header + numbers[start] * self.size)
            start = end
        return out


class ConvertedRows:
    """Images of a source that are read, or drawn, and converted whenever they are asked for."""

    def __init__(self, images: Images, conversion: Conversion) -> None:
        size, channels = conversion.size, conversion.channels
        self.shape: Shape = (images.shape[0], channels, size, size)
        self._images, self._conversion = images, conversion

    def gather(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self._conversion.array(self._images[index.numpy()]))

    def resident(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> Rows:
        return TakenRows(self, index)


class DecodedRows:
    """Encoded images that are decoded whenever they are asked for, by a few threads.

    Args:
        files: where they are read from.
        digests: SHA-256 of each as it was at the start, uint8 `[N, 32]`.
        conversion: from file to uint8 `[C, H, W]`.
    """

    def __init__(
        self,
        files: Files,
        digests: Pixels,
        conversion: Conversion,
        threads: int,
    ) -> None:
        size, channels = conversion.size, conversion.channels
        self.shape: Shape = (len(files), channels, size, size)
        self._files, self._digests, self._conversion = files, digests, conversion
        self._threads = threads

    def gather(self, index: Tensor) -> Tensor:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        numbers = index.tolist()
        # A few images a task: small ones are decoded faster than a task is handed over.
        step = max(1, min(16, len(numbers) // (4 * self._threads)))

        def some(start: int) -> None:
            for place in range(start, min(start + step, len(numbers))):
                out[place] = self._image(numbers[place])

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(some, range(0, len(numbers), step)):
                pass
        return torch.from_numpy(out)

    def _image(self, number: int) -> Pixels:
        name = self._files.name(number)
        fix = "leave the images alone during a run; run the same command again"
        try:
            content = self._files.read(number)
        except UnreadableImage as error:
            refuse_passing(error)
            raise DataError(
                f"an image can't be read any more: {error.reason}", where=name, fix=fix
            ) from error
        if hashlib.sha256(content).digest() != self._digests[number].tobytes():
            raise DataError("an image has changed since the start", where=name, fix=fix)
        return self._conversion.file(content, name)

    def resident(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> Rows:
        return TakenRows(self, index)


class StoredRows:
    """Pixels in a file, row after row; only the rows asked for are read.

    Each is held against its sum. One that was damaged is decoded again, and the file is deleted,
    so that the next start makes a whole one.

    Args:
        sums: what `sums_of` said of the pixels when they were written, `[N]`.
        again: the same images, decoded from their files.
    """

    def __init__(self, path: Path, shape: Shape, sums: Sums, again: DecodedRows) -> None:
        self.shape = shape
        self._records = Records(path, int(np.prod(shape[1:])), shape[0])
        self._sums, self._again = sums, again
        self._told = False

    def gather(self, index: Tensor) -> Tensor:
        numbers = index.numpy()
        rows = self._records.read(numbers.tolist())
        damaged = np.flatnonzero(sums_of(rows) != self._sums[numbers])
        if len(damaged):
            self._mend(rows, numbers, damaged)
        return torch.from_numpy(rows).view(len(index), *self.shape[1:])

    def _mend(self, rows: Pixels, numbers: npt.NDArray[np.int64], damaged: Any) -> None:
        path = self._records.path
        if not self._told:
            self._told = True
            print_status(
                f"the cache of decoded images is damaged ({escape(str(path))}): what is damaged "
                "is decoded again, and the cache is rebuilt at the next start"
            )
            with contextlib.suppress(OSError):
                path.unlink()
        wanted = as_index(numbers[damaged])
        rows[damaged] = self._again.gather(wanted).numpy().reshape(len(damaged), -1)

    def resident(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> Rows:
        return TakenRows(self, index)


def in_memory(rows: Rows, chunk: int = 1024) -> ArrayRows:
    """The same rows read into memory once, piece by piece."""
    images = torch.empty(rows.shape, dtype=torch.uint8)
    for start in range(0, rows.shape[0], chunk):
        numbers = torch.arange(start, min(start + chunk, rows.shape[0]))
        images[start : start + chunk] = rows.gather(numbers)
    return ArrayRows(images)


def sums_of(pixels: Pixels) -> Sums:
    """CRC-32 of each image, `[N]`: any change of up to 32 neighbouring bits gives another one."""
    return np.array([zlib.crc32(image) for image in pixels], np.uint32)


def as_index(values: npt.NDArray[np.int64]) -> Tensor:
    """A NumPy index array as the int64 tensor that `gather` and `take` want."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
