"""Reads every image of a part once and keeps a few facts of each, for the audit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from convlens import device
from convlens.data import similar
from convlens.data.decode import MAX_PIXELS, Pixels, UnreadableImage, decode, fit_images, probe
from convlens.data.encoded import Files
from convlens.data.locks import MemorySemaphore
from convlens.data.parts import Part
from convlens.system.console import Bar

_CHUNK = 512
# Pixels of images at their own size, for all threads.
_FULL_SIZE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)
Index = npt.NDArray[np.int64]

# What is kept of one image. A structured array: a million images need 1.2 GB, and no objects.
FACTS = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("mode", "U12"),
        ("grey", np.bool_),
        ("turned", np.bool_),  # these three as in `ImageFacts`
        ("alpha", np.bool_),
        ("frames", np.bool_),
        ("digest", np.uint8, 32),  # SHA-256 of size and pixels as RGB
        ("thumb", np.uint8, (similar.SIDE, similar.SIDE)),
        ("mean", np.float64, 3),  # of each RGB channel, 0..1
        ("square", np.float64, 3),  # mean of squares
    ]
)
Facts = npt.NDArray[np.void]


@dataclass
class Look:
    """One part of the source: facts of all its images, of which `good` could be read."""

    part: Part
    facts: Facts
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def good(self) -> Index:
        return np.delete(np.arange(len(self.facts), dtype=np.int64), list(self.bad))


def look(part: Part, bar: Bar) -> Look:
    found = Look(part, np.zeros(len(part.labels), FACTS))
    for start in range(0, len(part.labels), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(part.labels)))
        if isinstance(part.images, Files):
            for i, seen in zip(index, _of_files(part.images, index.tolist()), strict=True):
                if isinstance(seen, str):
                    found.bad[int(i)] = seen
                else:
                    found.facts[i] = seen
        else:
            found.facts[index] = facts_of(part.images[index])
        bar.advance(len(index))
    return found


def _of_files(files: Files, numbers: Sequence[int]) -> Iterator[np.void | str]:
    pool = ThreadPoolExecutor(min(device.usable_cores(), 32))
    try:
        yield from pool.map(lambda number: _of_file(files, number), numbers)
    finally:
        pool.shutdown(cancel_futures=True)


def _of_file(files: Files, number: int) -> np.void | str:
    """Facts of one file, or the reason why there are none."""
    try:
        content, path = files.read(number), files.name(number)
        header = probe(content, path)
        # Before the semaphore of `decode`, never after it: the other order could deadlock.
        with _FULL_SIZE_MEMORY.acquire(header.width * header.height):
            pixels = decode(content, size=None, channels=3, fit="crop", name=path)
            facts = facts_of(pixels[None])
    except UnreadableImage as error:
        return error.reason
    for name in ("mode", "grey", "turned", "alpha", "frames"):
        facts[name] = getattr(header, name)
    record: np.void = facts[0]
    return record


def facts_of(images: Pixels) -> Facts:
    """Facts of uint8 `[N, C, H, W]`; grey pictures count as RGB pictures with equal channels."""
    n, channels, height, width = images.shape
    facts = np.zeros(n, FACTS)
    facts["width"], facts["height"] = width, height
    facts["mode"], facts["grey"] = ("L", True) if channels == 1 else ("RGB", False)
    flat = images.reshape(n, channels, -1)
    facts["mean"] = flat.mean(axis=2) / 255
    squares = np.einsum("ncp,ncp->nc", flat, flat, dtype=np.float64, casting="unsafe")
    facts["square"] = squares / (height * width * 255**2)
    facts["thumb"] = fit_images(images, size=similar.SIDE, channels=1, fit="stretch")[:, 0]
    size = f"{height} x {width}".encode()
    for row, image in zip(facts, images, strict=True):
        content = image if channels == 3 else np.repeat(image, 3, axis=0)
        digest = hashlib.sha256(size)
        digest.update(np.ascontiguousarray(content).data)
        row["digest"] = np.frombuffer(digest.digest(), np.uint8)
    return facts
