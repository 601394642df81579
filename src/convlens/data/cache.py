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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from convlens import device
from convlens.data import decode
from convlens.data.decode import Pixels, UnreadableImage
from convlens.data.encoded import Files, refuse_passing
from convlens.data.locks import interprocess_lock
from convlens.data.rows import (
    ArrayRows,
    Conversion,
    DecodedRows,
    Rows,
    Shape,
    StoredRows,
    sums_of,
)
from convlens.system.console import print_status, progress
from convlens.system.files import (
    CorruptError,
    add_checksum,
    open_temp,
    remove_stale_temp_files,
    verify_checksum,
)

_MAGIC = b"convlns2"
_TAIL = 8 + 32 + 8
_CHUNK = 32


@dataclass(frozen=True)
class Decoded:
    """All images of one part: rows in the order of the paths, black where `bad` has a reason."""

    rows: Rows
    content: str  # SHA-256 over those of the readable files, in order
    bad: dict[int, str]
    digests: Pixels  # SHA-256 of each file, uint8 [N, 32]


def folder() -> Path:
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


def decoded(files: Files, conversion: Conversion, *, memory_budget: int) -> Decoded:
    """Image files as rows: from their store, or decoded now with a progress bar.

    Two processes that ask for the same files decode them once. Files that stream and exceed
    `memory_budget` bytes are decoded once to check them, then whenever they are needed. Where the
    cache can't be written or has no room, a notice is given and the images stay in memory, or are
    decoded again whenever they are needed if they exceed the budget.
    """
    shape: Shape = (len(files), conversion.channels, conversion.size, conversion.size)
    kind = "checked" if files.streams and int(np.prod(shape)) > memory_budget else "pixels"
    store = folder() / f"{_key(files, conversion)}.{kind}"
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


def _key(files: Files, conversion: Conversion) -> str:
    told = repr((decode.VERSION, conversion, files.stamp()))
    return hashlib.sha256(told.encode()).hexdigest()[:40]


def _opened(store: Path, shape: Shape, files: Files, conversion: Conversion) -> Decoded | None:
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
    again = DecodedRows(files, digests, conversion, device.usable_cores())
    rows: Rows = again
    if pixels:
        sums = np.frombuffer(rest, "<u4", shape[0], offset=32 * shape[0])
        rows = StoredRows(store, shape, sums, again)
    return Decoded(rows, str(facts["content"]), bad, digests)


def _pixel_bytes(store: Path, shape: Shape) -> int:
    return int(np.prod(shape)) if store.suffix == ".pixels" else 0


def _build(store: Path, files: Files, conversion: Conversion, shape: Shape) -> None:
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
                    sums[start : start + len(pixels)] = sums_of(pixels)

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
    files: Files, conversion: Conversion, shape: Shape, memory_budget: int, why: str
) -> Decoded:
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
        return Decoded(ArrayRows(torch.from_numpy(images)), _combined(digests, bad), bad, digests)
    digests, bad = _decode(files, conversion, lambda start, pixels: None)
    rows = DecodedRows(files, digests, conversion, device.usable_cores())
    return Decoded(rows, _combined(digests, bad), bad, digests)


def _combined(digests: Pixels, bad: dict[int, str]) -> str:
    readable = np.delete(digests, list(bad), axis=0)
    return hashlib.sha256(readable.tobytes()).hexdigest()


def _decode(
    files: Files, conversion: Conversion, sink: Callable[[int, Pixels], object]
) -> tuple[Pixels, dict[int, str]]:
    """Decodes all files, in threads; `sink` gets the pixels in order, a few dozen at a time."""
    digests, bad = np.zeros((len(files), 32), np.uint8), dict[int, str]()
    side = conversion.size

    def some(start: int) -> tuple[int, Pixels]:
        numbers = range(start, min(start + _CHUNK, len(files)))
        pixels = np.zeros((len(numbers), conversion.channels, side, side), np.uint8)
        for place, number in enumerate(numbers):
            try:
                content = files.read(number)
                digests[number] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
                pixels[place] = conversion.file(content, files.name(number))
            except UnreadableImage as error:
                refuse_passing(error)
                bad[number] = error.reason
        return start, pixels

    with progress("decoding images", len(files)) as bar:
        for start, pixels in _in_order(some, range(0, len(files), _CHUNK)):
            sink(start, pixels)
            bar.advance(len(pixels))
    return digests, dict(sorted(bad.items()))


def _in_order(
    work: Callable[[int], tuple[int, Pixels]], starts: Sequence[int]
) -> Iterator[tuple[int, Pixels]]:
    """Results of `work` in order, with only a few waiting: memory stays bounded."""
    threads = min(device.usable_cores(), 32)
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
