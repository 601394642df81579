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
from convlens.data.decode import Pixels
from convlens.data.encoded import Files
from convlens.data.ids import Taken
from convlens.data.order import Shards
from convlens.data.parts import Images, Part, Source
from convlens.data.rows import ArrayRows, Conversion, ConvertedRows, Rows, as_index, in_memory
from convlens.data.splits import fold_numbers, hold_out, take_per_class
from convlens.errors import UsageError

if TYPE_CHECKING:
    from convlens.schema import DataConfig

Index = npt.NDArray[np.int64]


@dataclass
class Split:
    """Images with labels: rows uint8 `[N, C, H, W]`, labels int64 `[N]`, an id for each.

    `shards` says where they lie, where the order of training goes by it.
    """

    rows: Rows
    labels: Tensor
    ids: Sequence[str]
    shards: Shards | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Opened:
    """One part of a source with its rows; `good` are the readable images.

    `digests` are the SHA-256 of its files, uint8 `[N, 32]`; None where it isn't of files.
    """

    part: Part
    rows: Rows
    content: str
    bad: dict[int, str]
    digests: Pixels | None = None

    def __post_init__(self) -> None:
        good = np.delete(np.arange(len(self.part.labels), dtype=np.int64), list(self.bad))
        self.good: Index = good
        self.labels: Index = self.part.labels[good]

    def all(self) -> Index:
        return np.arange(len(self.good), dtype=np.int64)

    def ids_of(self, index: Index) -> Sequence[str]:
        return Taken(self.part.ids, self.good[index])

    def groups(self) -> list[str] | None:
        groups = self.part.groups
        return None if groups is None else [groups[i] for i in self.good.tolist()]

    def split(self, index: Index, *, resident: bool) -> Split:
        taken = self.good[index]
        whole = len(taken) == self.rows.shape[0]
        rows = self.rows if whole else self.rows.take(as_index(taken))
        if resident and not isinstance(rows, ArrayRows):
            rows = in_memory(rows)
        return Split(rows, as_index(self.labels[index]), self.ids_of(index), self._shards(taken))

    def _shards(self, taken: Index) -> Shards | None:
        files = self.part.images
        blocks = files.blocks() if isinstance(files, Files) else None
        if blocks is None or not isinstance(files, Files):
            return None
        return Shards(as_index(blocks[taken]), files.expect)


def open_part(part: Part, conversion: Conversion, memory_budget: int) -> Opened:
    """A part's images as rows: files through the cache, arrays converted when asked for."""
    if isinstance(part.images, Files):
        found = cache.decoded(part.images, conversion, memory_budget=memory_budget)
        return Opened(part, found.rows, found.content, found.bad, found.digests)
    return Opened(part, ConvertedRows(part.images, conversion), _content(part.images), {})


def _content(images: Images) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, images.shape[0], 1024):
        index = np.arange(start, min(start + 1024, images.shape[0]))
        digest.update(images[index].data)
    return digest.hexdigest()


def check(config: DataConfig) -> None:
    """Refuses keys that contradict each other.

    Raises:
        UsageError: all that is wrong at once.
    """
    found = []
    if config.folds is None and config.fold:
        found.append(f"data.fold={config.fold} without data.folds")
    if config.folds is not None:
        if config.fold >= config.folds:
            found.append(f"data.fold={config.fold}: the {config.folds} folds are counted from 0")
        if config.val_fraction == 0:
            found.append("data.val_fraction=0 and data.folds: a fold is a validation split")
    if found:
        raise UsageError("; ".join(found), fix="set data.folds=K and data.fold=0..K-1, or neither")


def parts_of(config: DataConfig, source: Source) -> dict[str, Part]:
    """The source's parts as the recipe wants them: its own validation images join the training
    images where validation is drawn by us in any case, or not at all."""
    draws = config.folds is not None or config.total_per_class is not None
    if "val" not in source.parts or not (draws or config.val_fraction == 0):
        return source.parts
    train, val = source.parts["train"], source.parts["val"]
    # No built-in set (these are arrays) has a validation split of its own.
    assert isinstance(train.images, Files)
    assert isinstance(val.images, Files)
    both = Part(
        train.images.plus(val.images),
        np.concatenate([train.labels, val.labels]),
        [*train.ids, *val.ids],
        None if train.groups is None or val.groups is None else [*train.groups, *val.groups],
    )
    return {"train": both, **{s: part for s, part in source.parts.items() if s == "test"}}


def is_drawn(config: DataConfig, source: Source) -> bool:
    """Whether `data.seed` decides anything: not where all splits are the source's own."""
    some = config.per_class is not None or config.total_per_class is not None
    holds_out = "val" not in source.parts and config.validates
    return "test" not in source.parts or holds_out or config.folds is not None or some


@dataclass(frozen=True)
class _Drawing:
    """One recipe's way of holding images out of a source's training images."""

    config: DataConfig
    classes: Sequence[str]
    pool: Opened

    @property
    def kind(self) -> str:
        grouped = self.pool.part.groups is not None
        return f"groups by {self.config.group!r} kept together" if grouped else "stratified"

    def groups(self, among: Index) -> list[str] | None:
        groups = self.pool.groups()
        return None if groups is None else [groups[i] for i in among.tolist()]

    def hold(self, among: Index, share: float, each: int) -> tuple[Index, Index]:
        """`share` of the images `among` held out, `each` of every class staying at least."""
        stay, held = hold_out(
            self.pool.labels[among],
            min(1.0, share),
            self.config.seed,
            self.groups(among),
            keep=each,
            names=self.classes,
        )
        return among[stay], among[held]

    def fold(self, among: Index) -> tuple[Index, Index]:
        """The images outside and inside of the recipe's fold."""
        labels, folds = self.pool.labels[among], int(self.config.folds or 0)
        numbers = fold_numbers(
            labels, folds, self.config.seed, self.groups(among), names=self.classes
        )
        return among[numbers != self.config.fold], among[numbers == self.config.fold]

    def some(self, among: Index, n: int, key: str) -> Index:
        """`n` images of each class."""
        chosen = take_per_class(
            self.pool.labels[among], n, self.config.seed, names=self.classes, key=key
        )
        return among[chosen]


def draw(
    config: DataConfig, source: Source, opened: dict[str, Opened]
) -> tuple[Index, dict[str, Index], dict[str, str]]:
    """Indices into the readable train images that stay, those held out by split, and why.

    `opened` are the parts that `parts_of` gives.
    """
    check(config)
    by = _Drawing(config, source.classes, opened["train"])
    keep, out = by.pool.all(), dict[str, Index]()
    how = {s: f"{len(o.labels):,} images of the source's own split" for s, o in opened.items()}
    joined = "val" in source.parts and "val" not in opened
    told, whole = f"{len(keep):,} training images", len(keep)
    if joined:
        how["train"] = told = f"{told}, the source's own validation images among them"
    if "test" not in opened:
        # The same images whatever the recipe does about validation, or a refit would be tested on
        # what chose its length: from the source's train part, a validation image kept aside.
        ours = by.pool.good < len(source.parts["train"].labels)
        each = 1 if "val" in source.parts else 2
        stay, out["test"] = by.hold(keep[ours], config.test_fraction, each)
        keep = np.sort(np.concatenate([stay, keep[~ours]]))
        how["test"] = (
            f"{len(out['test']):,} of {int(ours.sum()):,} training images held out "
            f"({config.test_fraction:.0%}, {by.kind}, seed {config.seed})"
        )
    if config.total_per_class is not None:
        n, before = config.total_per_class, len(keep)
        keep = by.some(keep, n, "data.total_per_class")
        told, whole = f"{len(keep):,} images ({n} of each class of {before:,})", len(keep)
    if "val" not in opened:
        keep, out["val"], how["val"] = _validation(by, keep, whole, told)
    if len(keep) < len(by.pool.good):
        how["train"] = told
    if len(keep) < whole:
        how["train"] = f"{len(keep):,} of {told}: what was not held out"
    if config.per_class is not None:
        before = len(keep)
        keep = by.some(keep, config.per_class, "data.per_class")
        how["train"] = (
            f"{len(keep):,} of {before:,} training images: {config.per_class} of each class "
            f"(seed {config.seed})"
        )
    return keep, out, {split: how[split] for split in ("train", "val", "test")}


def _validation(by: _Drawing, among: Index, whole: int, told: str) -> tuple[Index, Index, str]:
    """What stays, the validation split, and how it came about; shares are of the `whole`."""
    config = by.config
    if config.folds is not None:
        stay, held = by.fold(among)
        said = f"fold {config.fold} of {config.folds}"
    elif config.val_fraction:
        stay, held = by.hold(among, config.val_fraction * whole / len(among), 1)
        said = f"{config.val_fraction:.0%}"
    else:
        return among, among[:0], "none (data.val_fraction=0)"
    return stay, held, (f"{len(held):,} of {told} held out ({said}, {by.kind}, seed {config.seed})")
