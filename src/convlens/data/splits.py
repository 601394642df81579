"""Which images are held out: stratified, seeded, groups kept together. Labels in, indices out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from convlens.data import cache
from convlens.data.cache import ArrayRows, Conversion, ConvertedRows, ImageRows, as_index, in_memory
from convlens.data.decode import Pixels
from convlens.data.loader import ShardOrder
from convlens.data.types import DataSource, EncodedFiles, ImageSource, IndexedStrings, Part
from convlens.errors import DataError, UsageError

if TYPE_CHECKING:
    from convlens.recipe import DataConfig


ImageIndex = npt.NDArray[np.int64]


def hold_out(
    labels: ImageIndex,
    fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    keep: int = 1,
    names: Sequence[str] | None = None,
) -> tuple[ImageIndex, ImageIndex]:
    """Two sorted, disjoint index arrays: the images kept and the images held out.

    Every class gives its share of `fraction`; what rounding leaves goes to the classes of
    largest remainder (ties: the lower class). The same seed always gives the same answer. At
    least one image is held out where `fraction` > 0.

    Args:
        labels: int64 `[N]`.
        groups: a name for each image; a group is held out whole or not at all, which makes the
            shares approximate.
        keep: each class keeps at least this many images (or groups), however small it is.
        names: class names for errors.

    Raises:
        DataError: a class has fewer than two images (or groups): it can't be in both parts.
    """
    everything = np.arange(len(labels), dtype=np.int64)
    if fraction <= 0 or not len(labels):
        return everything, everything[:0]
    random = np.random.default_rng(seed)
    if groups is None:
        held = _hold_images(labels, fraction, random, keep, names)
    else:
        held = _hold_groups(labels, fraction, random, groups, keep, names)
    return everything[~held], everything[held]


def fold_numbers(
    labels: ImageIndex,
    folds: int,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> ImageIndex:
    """The fold of each image, int64 `[N]` from 0 to `folds` - 1: every image is in exactly one.

    Without groups the folds differ by at most one image, in each class and in all. A group is in
    one fold whole; large ones are dealt first, each to the fold that has the least of its classes.

    Raises:
        DataError: a class that would have no image left outside a fold; fewer images (or groups)
            than folds.
    """
    random = np.random.default_rng(seed)
    unit = "image" if groups is None else "group"
    units = len(labels if groups is None else set(groups))
    if units < folds:
        raise DataError(
            f"data.folds={folds}, but there are only {units} {unit}s to be dealt",
            fix=f"at most data.folds={units}",
        )
    if groups is not None:
        return _deal_groups(labels, folds, random, groups, names)
    _refuse_single(np.bincount(labels), unit, 1 / folds, names)
    # Dealt like cards, class after class: each class goes on where the one before it ended.
    dealt = np.empty(len(labels), np.int64)
    dealt[np.lexsort((random.random(len(labels)), labels))] = np.arange(len(labels)) % folds
    return dealt


def take_per_class(
    labels: ImageIndex,
    n: int,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    key: str = "data.per_class",
) -> ImageIndex:
    """Sorted indices of `n` images of every class; a larger `n` gives a superset.

    Raises:
        DataError: a class has fewer than `n` images; names every such class with its count.
    """
    counts = np.bincount(labels)
    short = [int(c) for c in np.flatnonzero(counts) if counts[c] < n]
    if short:
        raise DataError(
            f"{key}={n}, but {len(short)} of {np.count_nonzero(counts)} classes have "
            f"fewer training images: {_listed(short, counts, names)}",
            fix=f"at most {key}={int(counts[counts > 0].min())}",
        )
    ranks = _ranks(labels, np.random.default_rng(seed))
    return np.flatnonzero(ranks < n).astype(np.int64)


def _listed(classes: Sequence[int], counts: ImageIndex, names: Sequence[str] | None) -> str:
    shown = [f"{names[c] if names else f'class {c}'} ({counts[c]})" for c in classes[:5]]
    rest = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(shown) + rest


def _ranks(labels: ImageIndex, random: np.random.Generator) -> ImageIndex:
    """Each image's place, from 0, in a random order of its own class."""
    order = np.lexsort((random.random(len(labels)), labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def _refuse_single(
    counts: ImageIndex, unit: str, fraction: float, names: Sequence[str] | None
) -> None:
    single = [int(c) for c in np.flatnonzero(counts == 1)]
    if single:
        raise DataError(
            f"{len(single)} of {np.count_nonzero(counts)} classes have a single {unit}, but "
            f"{fraction:.0%} must be held out: {_listed(single, counts, names)}",
            fix=f"give every class at least two {unit}s (better: dozens), or leave it out",
        )


def _hold_images(
    labels: ImageIndex,
    fraction: float,
    random: np.random.Generator,
    keep: int,
    names: Sequence[str] | None,
) -> npt.NDArray[np.bool_]:
    counts = np.bincount(labels)
    _refuse_single(counts, "image", fraction, names)
    quota = counts * fraction
    most = np.maximum(counts - keep, 0)
    take = np.minimum(np.floor(quota + 1e-9).astype(np.int64), most)
    left = max(1, round(len(labels) * fraction)) - int(take.sum())
    # Largest remainder first; a stable sort gives ties to the lower class. `left` may exceed one
    # round where small classes can't give what they owe: then the others go on giving.
    by_remainder = np.argsort(-np.round(quota - take, 9), kind="stable")
    while left > 0 and (take < most).any():
        for c in by_remainder:
            if left > 0 and take[c] < most[c]:
                take[c] += 1
                left -= 1
    held: npt.NDArray[np.bool_] = _ranks(labels, random) < take[labels]
    return held


def _hold_groups(
    labels: ImageIndex,
    fraction: float,
    random: np.random.Generator,
    groups: Sequence[str],
    keep: int,
    names: Sequence[str] | None,
) -> npt.NDArray[np.bool_]:
    """Greedy: large groups first, each held out where that brings the class shares closer."""
    n_classes = int(labels.max()) + 1
    group, starts, pair_class, pair_counts = _grouped(labels, groups)
    left = np.bincount(pair_class, minlength=n_classes)  # groups of each class still kept
    _refuse_single(left, "group", fraction, names)
    counts = np.bincount(labels, minlength=n_classes)
    quota = counts * fraction
    weight = 1 / np.maximum(counts, 1)
    held_counts = np.zeros(n_classes)
    held = np.zeros(len(starts) - 1, np.bool_)
    best, best_gain = -1, -np.inf
    for g in _large_first(group, random):
        rows = slice(starts[g], starts[g + 1])
        c, n = pair_class[rows], pair_counts[rows]
        if (left[c] <= keep).any():
            continue
        before, after = held_counts[c] - quota[c], held_counts[c] + n - quota[c]
        gain = float((weight[c] * (before**2 - after**2)).sum())
        if gain > 0:
            held[g] = True
            held_counts[c] += n
            left[c] -= 1
        elif gain > best_gain:
            best, best_gain = int(g), gain
    if not held.any():
        if best < 0:
            raise DataError(
                "no group can be held out without leaving a class without training images",
                fix="use finer groups, or drop data.group",
            )
        held[best] = True  # every group is larger than the share: the least bad one
    by_image: npt.NDArray[np.bool_] = held[group]
    return by_image


def _deal_groups(
    labels: ImageIndex,
    folds: int,
    random: np.random.Generator,
    groups: Sequence[str],
    names: Sequence[str] | None,
) -> ImageIndex:
    n_classes = int(labels.max()) + 1
    group, starts, pair_class, pair_counts = _grouped(labels, groups)
    _refuse_single(np.bincount(pair_class, minlength=n_classes), "group", 1 / folds, names)
    counts = np.bincount(labels, minlength=n_classes)
    weight = 1 / np.maximum(counts, 1)
    have = np.zeros((folds, n_classes))
    fold = np.zeros(len(starts) - 1, np.int64)
    for g in _large_first(group, random):
        rows = slice(starts[g], starts[g + 1])
        c, n = pair_class[rows], pair_counts[rows]
        # What the sum of squared class shares would grow by, up to a factor and a constant.
        growth = np.round(have[:, c] @ (weight[c] * n), 9)
        fold[g] = np.lexsort((have.sum(1), growth))[0]
        have[fold[g], c] += n
    torn = np.flatnonzero(((have == counts) & (counts > 0)).any(0))
    if len(torn) or (have.sum(1) == 0).any():
        which = f": {_listed(torn.tolist(), counts, names)}" if len(torn) else ""
        raise DataError(
            f"the groups can't be dealt to {folds} folds so that every fold leaves images of "
            f"every class to train on{which}",
            fix="use finer groups, fewer folds, or drop data.group",
        )
    dealt: ImageIndex = fold[group]
    return dealt


def _grouped(
    labels: ImageIndex, groups: Sequence[str]
) -> tuple[ImageIndex, ImageIndex, ImageIndex, ImageIndex]:
    """Each image's group, and each group's classes with their counts as one flat table.

    Group g has the entries `starts[g]` to `starts[g + 1]` of the last two arrays.
    """
    n_classes = int(labels.max()) + 1
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    # One entry per (group, class) that occurs: a dense table would not fit for many groups.
    pairs, counts = np.unique(group * n_classes + labels, return_counts=True)
    starts = np.searchsorted(pairs // n_classes, np.arange(group.max() + 2))
    return group, starts, pairs % n_classes, counts


def _large_first(group: ImageIndex, random: np.random.Generator) -> ImageIndex:
    """Numbers of groups, by size, in a random order where sizes are equal."""
    sizes = np.bincount(group)
    shuffled = random.permutation(len(sizes))
    ordered: ImageIndex = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return ordered


# ---- opening ----------------------------------------
# From the parts of a source to indices of three splits: what is held out, and how it is told.

IndexTensor = npt.NDArray[np.int64]


@dataclass
class Split:
    """Images with labels: rows uint8 `[N, C, H, W]`, labels int64 `[N]`, an id for each.

    `shards` says where they lie, where the order of training goes by it.
    """

    rows: ImageRows
    labels: Tensor
    ids: Sequence[str]
    shards: ShardOrder | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class LoadedPart:
    """One part of a source with its rows; `good` are the readable images.

    `digests` are the SHA-256 of its files, uint8 `[N, 32]`; None where it isn't of files.
    """

    part: Part
    rows: ImageRows
    content: str
    bad: dict[int, str]
    digests: Pixels | None = None

    def __post_init__(self) -> None:
        good = np.delete(np.arange(len(self.part.labels), dtype=np.int64), list(self.bad))
        self.good: IndexTensor = good
        self.labels: IndexTensor = self.part.labels[good]

    def all(self) -> IndexTensor:
        return np.arange(len(self.good), dtype=np.int64)

    def ids_of(self, index: IndexTensor) -> Sequence[str]:
        return IndexedStrings(self.part.ids, self.good[index])

    def groups(self) -> list[str] | None:
        groups = self.part.groups
        return None if groups is None else [groups[i] for i in self.good.tolist()]

    def split(self, index: IndexTensor, *, resident: bool) -> Split:
        taken = self.good[index]
        whole = len(taken) == self.rows.shape[0]
        rows = self.rows if whole else self.rows.take(as_index(taken))
        if resident and not isinstance(rows, ArrayRows):
            rows = in_memory(rows)
        return Split(rows, as_index(self.labels[index]), self.ids_of(index), self._shards(taken))

    def _shards(self, taken: IndexTensor) -> ShardOrder | None:
        files = self.part.images
        shard_ids = files.shard_ids() if isinstance(files, EncodedFiles) else None
        if shard_ids is None or not isinstance(files, EncodedFiles):
            return None
        return ShardOrder(as_index(shard_ids[taken]), files.prefetch)


def load_part(part: Part, conversion: Conversion, memory_budget: int) -> LoadedPart:
    """A part's images as rows: files through the cache, arrays converted when asked for."""
    if isinstance(part.images, EncodedFiles):
        found = cache.decode_images(part.images, conversion, memory_budget=memory_budget)
        return LoadedPart(part, found.rows, found.content, found.bad, found.digests)
    return LoadedPart(part, ConvertedRows(part.images, conversion), _content(part.images), {})


def _content(images: ImageSource) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, images.shape[0], 1024):
        index = np.arange(start, min(start + 1024, images.shape[0]))
        digest.update(images[index].data)
    return digest.hexdigest()


def check_split_config(config: DataConfig) -> None:
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


def parts_of(config: DataConfig, source: DataSource) -> dict[str, Part]:
    """The source's parts as the recipe wants them: its own validation images join the training
    images where validation is drawn by us in any case, or not at all."""
    draws = config.folds is not None or config.total_per_class is not None
    if "val" not in source.parts or not (draws or config.val_fraction == 0):
        return source.parts
    train, val = source.parts["train"], source.parts["val"]
    # No built-in set (these are arrays) has a validation split of its own.
    assert isinstance(train.images, EncodedFiles)
    assert isinstance(val.images, EncodedFiles)
    both = Part(
        train.images.concat(val.images),
        np.concatenate([train.labels, val.labels]),
        [*train.ids, *val.ids],
        None if train.groups is None or val.groups is None else [*train.groups, *val.groups],
    )
    return {"train": both, **{s: part for s, part in source.parts.items() if s == "test"}}


def is_drawn_split(config: DataConfig, source: DataSource) -> bool:
    """Whether `data.seed` decides anything: not where all splits are the source's own."""
    some = config.per_class is not None or config.total_per_class is not None
    holds_out = "val" not in source.parts and config.validates
    return "test" not in source.parts or holds_out or config.folds is not None or some


@dataclass(frozen=True)
class _Splitter:
    """One recipe's way of holding images out of a source's training images."""

    config: DataConfig
    classes: Sequence[str]
    pool: LoadedPart

    @property
    def kind(self) -> str:
        grouped = self.pool.part.groups is not None
        return f"groups by {self.config.group!r} kept together" if grouped else "stratified"

    def groups(self, among: IndexTensor) -> list[str] | None:
        groups = self.pool.groups()
        return None if groups is None else [groups[i] for i in among.tolist()]

    def hold(self, among: IndexTensor, share: float, each: int) -> tuple[IndexTensor, IndexTensor]:
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

    def fold(self, among: IndexTensor) -> tuple[IndexTensor, IndexTensor]:
        """The images outside and inside of the recipe's fold."""
        labels, folds = self.pool.labels[among], int(self.config.folds or 0)
        numbers = fold_numbers(
            labels, folds, self.config.seed, self.groups(among), names=self.classes
        )
        return among[numbers != self.config.fold], among[numbers == self.config.fold]

    def some(self, among: IndexTensor, n: int, key: str) -> IndexTensor:
        """`n` images of each class."""
        chosen = take_per_class(
            self.pool.labels[among], n, self.config.seed, names=self.classes, key=key
        )
        return among[chosen]


def make_splits(
    config: DataConfig, source: DataSource, opened: dict[str, LoadedPart]
) -> tuple[IndexTensor, dict[str, IndexTensor], dict[str, str]]:
    """Indices into the readable train images that stay, those held out by split, and why.

    `opened` are the parts that `parts_of` gives.
    """
    check_split_config(config)
    by = _Splitter(config, source.classes, opened["train"])
    keep, out = by.pool.all(), dict[str, IndexTensor]()
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


def _validation(
    by: _Splitter, among: IndexTensor, whole: int, told: str
) -> tuple[IndexTensor, IndexTensor, str]:
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
