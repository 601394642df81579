"""From the parts of a source to indices of three splits: what is held out, and how it is told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from convlens.data import cache
from convlens.data.parts import Images, Part, Source
from convlens.data.rows import ArrayRows, Conversion, ConvertedRows, Rows, as_index, in_memory
from convlens.data.splits import hold_out, take_per_class

if TYPE_CHECKING:
    from convlens.schema import DataConfig

Index = npt.NDArray[np.int64]


@dataclass
class Split:
    """Images with labels: rows uint8 `[N, C, H, W]`, labels int64 `[N]`, an id for each."""

    rows: Rows
    labels: Tensor
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Opened:
    """One part of a source with its rows; `good` are the readable images."""

    part: Part
    rows: Rows
    content: str
    bad: dict[int, str]

    def __post_init__(self) -> None:
        good = np.delete(np.arange(len(self.part.labels), dtype=np.int64), list(self.bad))
        self.good: Index = good
        self.labels: Index = self.part.labels[good]

    def all(self) -> Index:
        return np.arange(len(self.good), dtype=np.int64)

    def ids_of(self, index: Index) -> list[str]:
        return [self.part.ids[i] for i in self.good[index].tolist()]

    def groups(self) -> list[str] | None:
        groups = self.part.groups
        return None if groups is None else [groups[i] for i in self.good.tolist()]

    def split(self, index: Index, *, resident: bool) -> Split:
        taken = self.good[index]
        whole = len(taken) == self.rows.shape[0]
        rows = self.rows if whole else self.rows.take(as_index(taken))
        if resident and not isinstance(rows, ArrayRows):
            rows = in_memory(rows)
        return Split(rows, as_index(self.labels[index]), self.ids_of(index))


def open_part(part: Part, conversion: Conversion, memory_budget: int) -> Opened:
    """A part's images as rows: files through the cache, arrays converted when asked for."""
    if isinstance(part.images, list):
        found = cache.decoded(part.images, conversion, memory_budget=memory_budget)
        return Opened(part, found.rows, found.content, found.bad)
    return Opened(part, ConvertedRows(part.images, conversion), _content(part.images), {})


def _content(images: Images) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, images.shape[0], 1024):
        index = np.arange(start, min(start + 1024, images.shape[0]))
        digest.update(images[index].data)
    return digest.hexdigest()


def draw(
    config: DataConfig, source: Source, opened: dict[str, Opened]
) -> tuple[Index, dict[str, Index], dict[str, str]]:
    """Indices into the readable train images that stay, those held out by split, and why."""
    pool = opened["train"]
    keep, out = pool.all(), dict[str, Index]()
    groups = pool.groups()
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    lacking = [split for split in fractions if split not in opened]
    how = {s: f"{len(o.labels):,} images of the source's own split" for s, o in opened.items()}
    for n, split in enumerate(lacking):
        # Shares are of the whole; each class keeps one image for every split still to come.
        share = min(1.0, fractions[split] * len(pool.labels) / len(keep))
        mine = None if groups is None else [groups[i] for i in keep.tolist()]
        stay, held = hold_out(
            pool.labels[keep],
            share,
            config.seed,
            mine,
            keep=len(lacking) - n,
            names=source.classes,
        )
        out[split], keep = keep[held], keep[stay]
        kind = f"groups by {config.group!r} kept together" if mine else "stratified"
        how[split] = (
            f"{len(held):,} of {len(pool.labels):,} training images held out "
            f"({fractions[split]:.0%}, {kind}, seed {config.seed})"
        )
    if lacking:
        how["train"] = (
            f"{len(keep):,} of {len(pool.labels):,} training images: what was not held out"
        )
    if config.per_class is not None:
        chosen = take_per_class(
            pool.labels[keep], config.per_class, config.seed, names=source.classes
        )
        how["train"] = (
            f"{len(chosen):,} of {len(keep):,} training images: {config.per_class} of each class "
            f"(seed {config.seed})"
        )
        keep = keep[chosen]
    return keep, out, {split: how[split] for split in ("train", "val", "test")}
