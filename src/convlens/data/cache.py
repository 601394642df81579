"""Decode once: image files become a file of uint8 pixels that the next start only opens.

A store is one file, so that one rename makes it whole or absent:
pixels `[N, C, H, W]` | SHA-256 of each image file `[N, 32]` | CRC-32 of each image's pixels
`[N, 4]` | JSON | its length (8 bytes) | SHA-256 of all but the pixels | magic.
Its name is a hash over paths, sizes and times of all files and over the conversion. Of images
that stay where they are (shards beyond the memory budget) the store has all but the pixels.

What is damaged is never trusted: a store whose end has another hash is made anew, and an image
whose pixels have another sum is decoded from its file again (looking through all pixels at each
start would read sets larger than memory once more).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from torch import Tensor

from convlens.data.decode import VERSION, Pixels, UnreadableImage, decode, fit_arrays
from convlens.data.types import EncodedFiles, ImageSource, raise_if_transient
from convlens.device import usable_cores
from convlens.errors import DataError
from convlens.utils.console import print_status, progress_bar
from convlens.utils.files import (
    CorruptError,
    add_checksum,
    cannot_read,
    interprocess_lock,
    open_temp,
    remove_stale_temp_files,
    verify_checksum,
)

# ---- rows ----------------------------------------
# Images by number: in memory, in a file of pixels on the disk, or decoded when asked for.
#
# Every kind has `shape` (N, C, H, W), `gather` (int64 `[B]` -> uint8 `[B, C, H, W]`, on the CPU,
# from any thread), `resident` and `take`.

Shape = tuple[int, int, int, int]
ChannelSums = npt.NDArray[np.uint32]


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
        return fit_arrays(images, size=self.size, channels=self.channels, fit=self.fit)


class ImageRows(Protocol):
    """What a split's images are, wherever they lie."""

    @property
    def shape(self) -> Shape: ...

    def gather(self, index: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` on the CPU for int64 `[B]`."""
        ...

    def in_memory_tensor(self) -> Tensor | None:
        """All images as one tensor where they are in memory already, else None."""
        ...

    def take(self, index: Tensor) -> ImageRows:
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

    def in_memory_tensor(self) -> Tensor | None:
        return self.images

    def take(self, index: Tensor) -> ImageRows:
        # A copy on purpose: where nobody holds the whole any more, its memory is freed.
        return ArrayRows(self.images[index])


@dataclass(frozen=True)
class TakenRows:
    """Some rows of others, by number; holds no pixels."""

    base: ImageRows
    index: Tensor

    @property
    def shape(self) -> Shape:
        return (len(self.index), *self.base.shape[1:])

    def gather(self, index: Tensor) -> Tensor:
        return self.base.gather(self.index[index])

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> ImageRows:
        return TakenRows(self.base, self.index[index])


class FixedSizeRecords:
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

    def __init__(self, images: ImageSource, conversion: Conversion) -> None:
        size, channels = conversion.size, conversion.channels
        self.shape: Shape = (images.shape[0], channels, size, size)
        self._images, self._conversion = images, conversion

    def gather(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self._conversion.array(self._images[index.numpy()]))

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> ImageRows:
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
        files: EncodedFiles,
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
            for position in range(start, min(start + step, len(numbers))):
                out[position] = self._image(numbers[position])

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
            raise_if_transient(error)
            raise DataError(
                f"an image can't be read any more: {error.reason}", where=name, fix=fix
            ) from error
        if hashlib.sha256(content).digest() != self._digests[number].tobytes():
            raise DataError("an image has changed since the start", where=name, fix=fix)
        return self._conversion.file(content, name)

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> ImageRows:
        return TakenRows(self, index)


class StoredRows:
    """Pixels in a file, row after row; only the rows asked for are read.

    Each is held against its sum. One that was damaged is decoded again, and the file is deleted,
    so that the next start makes a whole one.

    Args:
        sums: what `sums_of` said of the pixels when they were written, `[N]`.
        again: the same images, decoded from their files.
    """

    def __init__(self, path: Path, shape: Shape, sums: ChannelSums, again: DecodedRows) -> None:
        self.shape = shape
        self._records = FixedSizeRecords(path, int(np.prod(shape[1:])), shape[0])
        self._sums, self._again = sums, again
        self._told = False

    def gather(self, index: Tensor) -> Tensor:
        numbers = index.numpy()
        rows = self._records.read(numbers.tolist())
        damaged = np.flatnonzero(channel_sums(rows) != self._sums[numbers])
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

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def take(self, index: Tensor) -> ImageRows:
        return TakenRows(self, index)


def in_memory(rows: ImageRows, chunk: int = 1024) -> ArrayRows:
    """The same rows read into memory once, piece by piece."""
    images = torch.empty(rows.shape, dtype=torch.uint8)
    for start in range(0, rows.shape[0], chunk):
        numbers = torch.arange(start, min(start + chunk, rows.shape[0]))
        images[start : start + chunk] = rows.gather(numbers)
    return ArrayRows(images)


def channel_sums(pixels: Pixels) -> ChannelSums:
    """CRC-32 of each image, `[N]`: any change of up to 32 neighbouring bits gives another one."""
    return np.array([zlib.crc32(image) for image in pixels], np.uint32)


def as_index(values: npt.NDArray[np.int64]) -> Tensor:
    """A NumPy index array as the int64 tensor that `gather` and `take` want."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


_MAGIC = b"convlns2"
_TAIL = 8 + 32 + 8
_CHUNK = 32


@dataclass(frozen=True)
class DecodedPart:
    """All images of one part: rows in the order of the paths, black where `bad` has a reason."""

    rows: ImageRows
    content: str  # SHA-256 over those of the readable files, in order
    bad: dict[int, str]
    digests: Pixels  # SHA-256 of each file, uint8 [N, 32]


def cache_folder() -> Path:
    """Where stores lie: `$CONVLENS_CACHE`, or the user's cache folder of this system."""
    if asked := os.environ.get("CONVLENS_CACHE"):
        return Path(asked)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "convlens"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "convlens"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "convlens" / "Cache"
    return Path.home() / ".cache" / "convlens"


def decode_images(
    files: EncodedFiles, conversion: Conversion, *, memory_budget: int
) -> DecodedPart:
    """Image files as rows: from their store, or decoded now with a progress bar.

    Two processes that ask for the same files decode them once. Files that stream and exceed
    `memory_budget` bytes are decoded once to check them, then whenever they are needed. Where the
    cache can't be written or has no room, a notice is given and the images stay in memory, or are
    decoded again whenever they are needed if they exceed the budget.
    """
    shape: Shape = (len(files), conversion.channels, conversion.size, conversion.size)
    kind = "checked" if files.streams and int(np.prod(shape)) > memory_budget else "pixels"
    store = cache_folder() / f"{_key(files, conversion)}.{kind}"
    opened = partial(_opened, store, shape, files, conversion)
    if found := opened():
        return found
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(store.with_suffix(".lock"), "decoding these images"):
            found = opened()
            if found is None:
                _build(store, files, conversion, shape)
                found = opened()
        if found:
            return found
        why = "what was written could not be read back"
    except OSError as error:
        why = error.strerror or str(error)
    return _without_store(files, conversion, shape, memory_budget, f"{store.parent}: {why}")


def _key(files: EncodedFiles, conversion: Conversion) -> str:
    told = repr((VERSION, conversion, files.stat_digest()))
    return hashlib.sha256(told.encode()).hexdigest()[:40]


def _opened(
    store: Path, shape: Shape, files: EncodedFiles, conversion: Conversion
) -> DecodedPart | None:
    """A whole store of this shape, or None: absent, cut short, damaged, of another version."""
    pixels = _pixel_bytes(store, shape)
    try:
        with store.open("rb") as file:
            file.seek(pixels)
            rest = file.read()
    except OSError:
        return None
    length = int.from_bytes(rest[-_TAIL:][:8], "little")
    body = (32 + 4) * shape[0]
    if rest[-len(_MAGIC) :] != _MAGIC or body + length + _TAIL != len(rest):
        return None
    try:
        facts = json.loads(verify_checksum(rest[: -len(_MAGIC)])[body:-8])
    except CorruptError:
        return None
    bad = {int(i): str(reason) for i, reason in facts["bad"].items()}
    digests = np.frombuffer(rest, np.uint8, 32 * shape[0]).reshape(-1, 32)
    again = DecodedRows(files, digests, conversion, usable_cores())
    rows: ImageRows = again
    if pixels:
        sums = np.frombuffer(rest, "<u4", shape[0], offset=32 * shape[0])
        rows = StoredRows(store, shape, sums, again)
    return DecodedPart(rows, str(facts["content"]), bad, digests)


def _pixel_bytes(store: Path, shape: Shape) -> int:
    return int(np.prod(shape)) if store.suffix == ".pixels" else 0


def _build(store: Path, files: EncodedFiles, conversion: Conversion, shape: Shape) -> None:
    """Makes the store; its lock is held."""
    remove_stale_temp_files(store.parent, [store.name], alone=True)
    pixel_bytes = _pixel_bytes(store, shape)
    needed = pixel_bytes + (32 + 4) * shape[0]
    if shutil.disk_usage(store.parent).free < needed + (64 << 20):
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, the disk has not that much left")
    handle, temporary = open_temp(store)
    try:
        with os.fdopen(handle, "wb") as file:
            sums = np.zeros(shape[0], "<u4")

            def keep(start: int, pixels: Pixels) -> None:
                if pixel_bytes:
                    file.write(pixels.data)
                    sums[start : start + len(pixels)] = channel_sums(pixels)

            digests, bad = _decode(files, conversion, keep)
            facts = json.dumps({"content": _combined(digests, bad), "bad": bad}).encode()
            rest = digests.tobytes() + sums.tobytes() + facts + len(facts).to_bytes(8, "little")
            file.write(add_checksum(rest) + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _without_store(
    files: EncodedFiles, conversion: Conversion, shape: Shape, memory_budget: int, why: str
) -> DecodedPart:
    fits = int(np.prod(shape)) <= memory_budget
    then = "kept in memory" if fits else "decoded again whenever they are needed, which is slow"
    print_status(
        f"no cache of decoded images ({why}); they are {then}. $CONVLENS_CACHE names another place"
    )
    if fits:
        images = np.zeros(shape, np.uint8)

        def keep(start: int, pixels: Pixels) -> None:
            images[start : start + len(pixels)] = pixels

        digests, bad = _decode(files, conversion, keep)
        return DecodedPart(
            ArrayRows(torch.from_numpy(images)), _combined(digests, bad), bad, digests
        )
    digests, bad = _decode(files, conversion, lambda start, pixels: None)
    rows = DecodedRows(files, digests, conversion, usable_cores())
    return DecodedPart(rows, _combined(digests, bad), bad, digests)


def _combined(digests: Pixels, bad: dict[int, str]) -> str:
    readable = np.delete(digests, list(bad), axis=0)
    return hashlib.sha256(readable.tobytes()).hexdigest()


def _decode(
    files: EncodedFiles, conversion: Conversion, sink: Callable[[int, Pixels], object]
) -> tuple[Pixels, dict[int, str]]:
    """Decodes all files, in threads; `sink` gets the pixels in order, a few dozen at a time."""
    digests, bad = np.zeros((len(files), 32), np.uint8), dict[int, str]()
    side = conversion.size

    def some(start: int) -> tuple[int, Pixels]:
        numbers = range(start, min(start + _CHUNK, len(files)))
        pixels = np.zeros((len(numbers), conversion.channels, side, side), np.uint8)
        for position, number in enumerate(numbers):
            try:
                content = files.read(number)
                digests[number] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
                pixels[position] = conversion.file(content, files.name(number))
            except UnreadableImage as error:
                raise_if_transient(error)
                bad[number] = error.reason
        return start, pixels

    with progress_bar("decoding images", len(files)) as bar:
        for start, pixels in _in_order(some, range(0, len(files), _CHUNK)):
            sink(start, pixels)
            bar.advance(len(pixels))
    return digests, dict(sorted(bad.items()))


def _in_order(
    work: Callable[[int], tuple[int, Pixels]], starts: Sequence[int]
) -> Iterator[tuple[int, Pixels]]:
    """Results of `work` in order, with only a few waiting: memory stays bounded."""
    threads = min(usable_cores(), 32)
    waiting = collections.deque[Future[tuple[int, Pixels]]]()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in starts:
            waiting.append(pool.submit(work, start))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- reading ----------------------------------------
# A file that several threads read at any place at once.


class Reader:
    """One open file: it stays readable even if someone deletes it or puts another in its place.

    Reads with `preadv` and not through a memory map: pages of a map count as ours, so that a set
    larger than the budget would seem to (and under a memory limit, would) break it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = os.fspath(path)
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (open as long as we are)
        self._lock = threading.Lock()

    def facts(self) -> os.stat_result:
        """What the system says of the open file."""
        return os.fstat(self._file.fileno())

    def fill(self, into: memoryview, offset: int) -> None:
        """Fills `into` with the bytes from `offset` on.

        Raises:
            DataError: the file ends before that. ResourceError: the disk or the network fails.
        """
        while len(into):
            try:
                got = self._some(into, offset)
            except OSError as error:
                raise cannot_read(self.path, error) from error
            if got == 0:
                raise DataError(
                    "a file of images was cut short while in use",
                    where=self.path,
                    fix="delete it and run the same command again",
                )
            into, offset = into[got:], offset + got

    def _some(self, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(into) or 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening it failed
            self._file.close()
