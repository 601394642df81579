"""Images by number, as rows, and the decode cache that keeps decoded images on disk.

Rows give uint8 images for their numbers, whether they are in memory (`ArrayRows`), in a file of
pixels (`StoredRows`), or converted (`ConvertedRows`) or decoded (`DecodedRows`) for each request.

`decode_images` decodes image files once; the next start only opens the file of pixels, the store.
A store is one file, so that one rename makes it complete or absent:
pixels `[N, C, H, W]` | SHA-256 of each image file `[N, 32]` | CRC-32 of each image's pixels
`[N, 4]` | JSON | length of the JSON (8 bytes) | SHA-256 of all but the pixels | magic.
Its name is a hash over the conversion and the paths, sizes and times of all files. If the images
stay in their files (shards beyond the memory budget), the store has all parts but the pixels.

Damaged data are never used: a store whose end has another hash is built again, and an image whose
pixels have another checksum is decoded from its file again. (Checking all pixels at each start
would read sets that exceed the memory one more time.)
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from torch import Tensor

from convlens.data.decode import NAN_REFUSED, VERSION, Conversion, Pixels, UnreadableImage
from convlens.data.loader import RowReader
from convlens.data.types import EncodedFiles, ImageSource, IndexArray, raise_if_transient
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
from convlens.utils.process import submit_task, wait_for_result

Shape = tuple[int, int, int, int]
T = TypeVar("T")
Checksums = npt.NDArray[np.uint32]

_MAGIC = b"convlns2"
_TAIL_BYTES = 8 + 32 + 8  # length of the JSON, SHA-256, magic
_SHA256_BYTES, _CRC32_BYTES = 32, 4  # of each image
_DECODE_CHUNK = 32  # images
_MIN_FREE_BYTES = 64 << 20  # left on the disk by a new store
_MAX_THREADS = 32


class ImageRows(RowReader, Protocol):
    """Images by number. Any thread may call `gather`."""

    def subset(self, index: Tensor) -> ImageRows:
        """Return a view of the images `index` (int64), in that order."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """Images in memory, uint8 `[N, C, H, W]`."""

    images: Tensor

    @property
    def shape(self) -> Shape:
        n, c, h, w = self.images.shape
        return n, c, h, w

    def gather(self, index: Tensor) -> Tensor:
        return self.images[index]

    def in_memory_tensor(self) -> Tensor | None:
        return self.images

    def subset(self, index: Tensor) -> ImageRows:
        # A copy on purpose: the memory of the full tensor is freed once nothing refers to it.
        return ArrayRows(self.images[index])


@dataclass(frozen=True)
class IndexedRows:
    """A selection of other rows, by number. Holds no pixels."""

    base: ImageRows
    index: Tensor

    @property
    def shape(self) -> Shape:
        return (len(self.index), *self.base.shape[1:])

    def gather(self, index: Tensor) -> Tensor:
        return self.base.gather(self.index[index])

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def subset(self, index: Tensor) -> ImageRows:
        return IndexedRows(self.base, self.index[index])


class Reader:
    """A file that several threads can read at any offset at the same time.

    It stays readable if the file is deleted or replaced. It reads with `preadv` and not through a
    memory map: the pages of a map count as memory of the process, so that a set larger than the
    budget would exceed it.

    Raises:
        OSError: The file can't be opened.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = os.fspath(path)
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (closed in `__del__`)
        self._lock = threading.Lock()

    def facts(self) -> os.stat_result:
        """Return the status of the open file."""
        return os.fstat(self._file.fileno())

    def fill(self, into: memoryview, offset: int) -> None:
        """Fill `into` with the bytes from `offset` on.

        Raises:
            DataError: The file ends before that.
            ResourceError: The disk or the network fails.
        """
        while len(into):
            try:
                count = self._read_into(into, offset)
            except OSError as error:
                raise cannot_read(self.path, error) from error
            if count == 0:
                raise DataError(
                    "a file of images was cut short while in use",
                    where=self.path,
                    fix="delete it and run the same command again",
                )
            into, offset = into[count:], offset + count

    def _read_into(self, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(into) or 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not set if the file could not be opened
            self._file.close()


class FixedSizeRecords:
    """A file of `count` records of `size` bytes each, after `header` bytes. Thread-safe."""

    def __init__(self, path: Path, size: int, count: int, header: int = 0) -> None:
        self.path, self.size, self.count, self.header = path, size, count, header
        self._reader = Reader(path)

    def read(self, numbers: Sequence[int]) -> Pixels:
        """Return the records `numbers`, uint8 `[B, size]`. Consecutive numbers are read at once.

        Raises:
            IndexError: A number is out of range.
        """
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
    """Images of a source that are converted for each request."""

    def __init__(self, images: ImageSource, conversion: Conversion) -> None:
        size, channels = conversion.size, conversion.channels
        self.shape: Shape = (images.shape[0], channels, size, size)
        self._images, self._conversion = images, conversion

    def gather(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self._conversion.array(self._images[index.numpy()]))

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def subset(self, index: Tensor) -> ImageRows:
        return IndexedRows(self, index)


class DecodedRows:
    """Image files that several threads decode for each request.

    Args:
        files: The image files.
        digests: SHA-256 of each file at the start, uint8 `[N, 32]`.
        conversion: The shape of the result.
        threads: Number of threads.
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
        # Several images per task: a small image is decoded faster than a task is submitted.
        step = max(1, min(16, len(numbers) // (4 * self._threads)))

        def decode_range(start: int) -> None:
            for position in range(start, min(start + step, len(numbers))):
                out[position] = self._decode(numbers[position])

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(decode_range, range(0, len(numbers), step)):
                pass
        return torch.from_numpy(out)

    def _decode(self, number: int) -> Pixels:
        name = self._files.name(number)
        fix = "do not change the images during a run; run the same command again"
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

    def subset(self, index: Tensor) -> ImageRows:
        return IndexedRows(self, index)


class StoredRows:
    """Images in a file of pixels; only the requested rows are read.

    The checksum of each row is verified. A damaged row is decoded from its image file again, and
    the file of pixels is deleted, so that the next start builds it again.

    Args:
        path: The file of pixels.
        shape: Shape of all images, `(N, C, H, W)`.
        checksums: `image_checksums` of the pixels when they were written, `[N]`.
        source: The same images, decoded from their files.
    """

    def __init__(self, path: Path, shape: Shape, checksums: Checksums, source: DecodedRows) -> None:
        self.shape = shape
        self._records = FixedSizeRecords(path, int(np.prod(shape[1:])), shape[0])
        self._checksums, self._source = checksums, source
        self._damage_reported = False

    def gather(self, index: Tensor) -> Tensor:
        numbers = index.numpy()
        rows = self._records.read(numbers.tolist())
        damaged = np.flatnonzero(image_checksums(rows) != self._checksums[numbers])
        if len(damaged):
            self._report_damage()
            repaired = self._source.gather(as_index(numbers[damaged]))
            rows[damaged] = repaired.numpy().reshape(len(damaged), -1)
        return torch.from_numpy(rows).view(len(index), *self.shape[1:])

    def _report_damage(self) -> None:
        if self._damage_reported:
            return
        self._damage_reported = True
        path = self._records.path
        print_status(
            f"the cache of decoded images is damaged ({escape(str(path))}): damaged images are "
            "decoded again, and the cache is rebuilt at the next start"
        )
        with contextlib.suppress(OSError):
            path.unlink()

    def in_memory_tensor(self) -> Tensor | None:
        return None

    def subset(self, index: Tensor) -> ImageRows:
        return IndexedRows(self, index)


def in_memory(rows: ImageRows, chunk: int = 1024) -> ArrayRows:
    """Read all rows into memory, `chunk` images at a time."""
    images = torch.empty(rows.shape, dtype=torch.uint8)
    for start in range(0, rows.shape[0], chunk):
        numbers = torch.arange(start, min(start + chunk, rows.shape[0]))
        images[start : start + chunk] = rows.gather(numbers)
    return ArrayRows(images)


def image_checksums(pixels: Pixels) -> Checksums:
    """Return the CRC-32 of each image, `[N]`. It detects any change within 32 consecutive bits."""
    return np.array([zlib.crc32(image) for image in pixels], np.uint32)


def as_index(values: IndexArray) -> Tensor:
    """Convert a NumPy index array to the int64 tensor that `gather` and `subset` take."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


@dataclass(frozen=True)
class DecodedPart:
    """All images of one part, in the order of its files."""

    rows: ImageRows  # unreadable images are black
    content: str  # SHA-256 over the SHA-256 of the readable files, in order
    bad: dict[int, str]  # number of each unreadable image -> reason
    digests: Pixels  # SHA-256 of each file, uint8 [N, 32]


def cache_folder() -> Path:
    """Return the cache folder: `$CONVLENS_CACHE`, or the system's cache folder of the user."""
    if folder := os.environ.get("CONVLENS_CACHE"):
        return Path(folder)
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
    """Return image files as rows, from their store or decoded now with a progress bar.

    Two processes that need the same files decode them once. Files that stream and exceed the
    budget are decoded once to check them, and again for each request. If the cache can't be
    written or the disk is full, a message is printed and the images stay in memory, or are decoded
    for each request if they exceed the budget.

    Args:
        files: The image files.
        conversion: The shape of the images.
        memory_budget: In bytes.
    """
    shape: Shape = (len(files), conversion.channels, conversion.size, conversion.size)
    kind = "checked" if files.streams and int(np.prod(shape)) > memory_budget else "pixels"
    store = cache_folder() / f"{_key(files, conversion)}.{kind}"
    open_store = partial(_open_store, store, shape, files, conversion)
    if part := open_store():
        return part
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with interprocess_lock(store.with_suffix(".lock"), "decoding these images"):
            part = open_store()
            if part is None:
                _build_store(store, files, conversion, shape)
                part = open_store()
        if part:
            return part
        reason = "the written file could not be read back"
    except OSError as error:
        reason = error.strerror or str(error)
    return _without_store(files, conversion, shape, memory_budget, f"{store.parent}: {reason}")


def _key(files: EncodedFiles, conversion: Conversion) -> str:
    inputs = repr((VERSION, conversion, files.stat_digest()))
    return hashlib.sha256(inputs.encode()).hexdigest()[:40]


def _open_store(
    store: Path, shape: Shape, files: EncodedFiles, conversion: Conversion
) -> DecodedPart | None:
    """Open a store; None if it is missing, cut short, damaged, or of another version or shape."""
    pixel_bytes = _pixel_bytes(store, shape)
    try:
        with store.open("rb") as file:
            file.seek(pixel_bytes)
            tail = file.read()
    except OSError:
        return None
    json_bytes = int.from_bytes(tail[-_TAIL_BYTES:][:8], "little")
    json_start = (_SHA256_BYTES + _CRC32_BYTES) * shape[0]
    if tail[-len(_MAGIC) :] != _MAGIC or json_start + json_bytes + _TAIL_BYTES != len(tail):
        return None
    try:
        facts = json.loads(verify_checksum(tail[: -len(_MAGIC)])[json_start:-8])
    except CorruptError:
        return None
    bad = {int(i): str(reason) for i, reason in facts["bad"].items()}
    if any(NAN_REFUSED in reason for reason in bad.values()):
        return None  # of an earlier version; this one can read these images
    digests_bytes = _SHA256_BYTES * shape[0]
    digests = np.frombuffer(tail, np.uint8, digests_bytes).reshape(-1, _SHA256_BYTES)
    decoded = DecodedRows(files, digests, conversion, usable_cores())
    rows: ImageRows = decoded
    if pixel_bytes:
        checksums = np.frombuffer(tail, "<u4", shape[0], offset=digests_bytes)
        rows = StoredRows(store, shape, checksums, decoded)
    return DecodedPart(rows, str(facts["content"]), bad, digests)


def _pixel_bytes(store: Path, shape: Shape) -> int:
    return int(np.prod(shape)) if store.suffix == ".pixels" else 0


def _build_store(store: Path, files: EncodedFiles, conversion: Conversion, shape: Shape) -> None:
    """Decode all files into a new store. The caller holds its lock.

    Raises:
        OSError: The disk is full or can't be written.
    """
    remove_stale_temp_files(store.parent, [store.name], alone=True)
    pixel_bytes = _pixel_bytes(store, shape)
    needed = pixel_bytes + (_SHA256_BYTES + _CRC32_BYTES) * shape[0]
    if shutil.disk_usage(store.parent).free < needed + _MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, f"not enough disk space: {needed >> 20} MiB are needed")
    handle, temporary = open_temp(store)
    try:
        with os.fdopen(handle, "wb") as file:
            checksums = np.zeros(shape[0], "<u4")

            def write(start: int, pixels: Pixels) -> None:
                if pixel_bytes:
                    file.write(pixels.data)
                    checksums[start : start + len(pixels)] = image_checksums(pixels)

            digests, bad = _decode_all(files, conversion, write)
            facts = json.dumps({"content": _content_digest(digests, bad), "bad": bad}).encode()
            facts += len(facts).to_bytes(8, "little")
            file.write(add_checksum(digests.tobytes() + checksums.tobytes() + facts) + _MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _without_store(
    files: EncodedFiles, conversion: Conversion, shape: Shape, memory_budget: int, reason: str
) -> DecodedPart:
    """Decode all files into memory; above the budget, only check them."""
    fits = int(np.prod(shape)) <= memory_budget
    handling = "kept in memory" if fits else "decoded again for each use, which is slow"
    print_status(
        f"no cache of decoded images ({reason}): images are {handling}; set $CONVLENS_CACHE to "
        "choose another folder"
    )
    rows: ImageRows
    if fits:
        images = np.zeros(shape, np.uint8)

        def keep(start: int, pixels: Pixels) -> None:
            images[start : start + len(pixels)] = pixels

        digests, bad = _decode_all(files, conversion, keep)
        rows = ArrayRows(torch.from_numpy(images))
    else:
        digests, bad = _decode_all(files, conversion, lambda start, pixels: None)
        rows = DecodedRows(files, digests, conversion, usable_cores())
    return DecodedPart(rows, _content_digest(digests, bad), bad, digests)


def _content_digest(digests: Pixels, bad: dict[int, str]) -> str:
    readable = np.delete(digests, list(bad), axis=0)
    return hashlib.sha256(readable.tobytes()).hexdigest()


def _decode_all(
    files: EncodedFiles, conversion: Conversion, sink: Callable[[int, Pixels], object]
) -> tuple[Pixels, dict[int, str]]:
    """Decode all files in threads.

    Args:
        sink: Called with the number of the first image and the pixels of each chunk, in order.

    Returns:
        The SHA-256 of each file, uint8 `[N, 32]`, and the reason for each unreadable image.
    """
    digests, bad = np.zeros((len(files), _SHA256_BYTES), np.uint8), dict[int, str]()
    shape = (conversion.channels, conversion.size, conversion.size)

    def decode_chunk(start: int) -> tuple[int, Pixels]:
        numbers = range(start, min(start + _DECODE_CHUNK, len(files)))
        pixels = np.zeros((len(numbers), *shape), np.uint8)
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
        for start, pixels in map_in_order(decode_chunk, range(0, len(files), _DECODE_CHUNK)):
            sink(start, pixels)
            bar.advance(len(pixels))
    return digests, dict(sorted(bad.items()))


def map_in_order(function: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """Map `function` over `numbers` in threads, in order.

    Unlike `Executor.map`, the number of pending results is limited, which bounds the memory.
    """
    threads = min(usable_cores(), _MAX_THREADS)
    pending = collections.deque[Future[T]]()
    pool = ThreadPoolExecutor(threads)
    try:
        for number in numbers:
            pending.append(submit_task(pool, function, number))
            if len(pending) > 2 * threads:
                yield wait_for_result(pending.popleft())
        while pending:
            yield wait_for_result(pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
