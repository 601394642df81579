"""Splits of a data set: which images are held out for validation and testing.

`hold_out`, `fold_numbers` and `take_per_class` turn labels into indices: stratified, seeded, with
groups kept together. `make_splits` applies them to the loaded parts of a source as a recipe asks
for, and `describe_splits` says in words what was done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens.data import cache
from convlens.data.cache import ArrayRows, ConvertedRows, ImageRows, as_index, in_memory
from convlens.data.decode import Conversion, Pixels
from convlens.data.loader import ShardOrder
from convlens.data.types import (
    DataSource,
    EncodedFiles,
    ImageSource,
    IndexArray,
    IndexedStrings,
    Part,
)
from convlens.errors import DataError, UsageError

if TYPE_CHECKING:
    from convlens.recipe import DataConfig


def hold_out(
    labels: IndexArray,
    fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    keep: int = 1,
    names: Sequence[str] | None = None,
) -> tuple[IndexArray, IndexArray]:
    """Hold out a fraction of the images of every class.

    The numbers are rounded by the largest remainder method (ties go to the lower class). The same
    seed always gives the same result. If `fraction` > 0, at least one image is held out.

    Args:
        labels: int64 `[N]`.
        fraction: Share of the images to hold out.
        seed: Seed of the random choice.
        groups: The group of each image. A group is never divided, which makes the shares
            approximate.
        keep: Number of images (or groups) that each class keeps at least, however small it is.
        names: Class names for errors.

    Returns:
        Two sorted, disjoint index arrays: the images that are kept and those held out.

    Raises:
        DataError: A class has a single image (or group), so it can't be in both parts.
    """
    all_images = np.arange(len(labels), dtype=np.int64)
    if fraction <= 0 or not len(labels):
        return all_images, all_images[:0]
    random = np.random.default_rng(seed)
    if groups is None:
        held = _hold_images(labels, fraction, random, keep, names)
    else:
        held = _hold_groups(labels, fraction, random, groups, keep, names)
    return all_images[~held], all_images[held]


def fold_numbers(
    labels: IndexArray,
    folds: int,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> IndexArray:
    """Assign each image to one of `folds` folds.

    Without groups the sizes of the folds differ by at most one image, in each class and in total.
    A group is never divided: the groups are assigned by size, the largest first, each to the fold
    that has the fewest images of its classes.

    Args:
        labels: int64 `[N]`.
        folds: Number of folds.
        seed: Seed of the random choice.
        groups: The group of each image.
        names: Class names for errors.

    Returns:
        The fold of each image, int64 `[N]`, from 0 to `folds` - 1.

    Raises:
        DataError: All images of a class would be in one fold, or there are fewer images (or
            groups) than folds.
    """
    random = np.random.default_rng(seed)
    unit = "image" if groups is None else "group"
    units = len(labels if groups is None else set(groups))
    if units < folds:
        raise DataError(
            f"data.folds={folds}, but there are only {units} {unit}s",
            fix=f"at most data.folds={units}",
        )
    if groups is not None:
        return _assign_groups(labels, folds, random, groups, names)
    _refuse_single(np.bincount(labels), unit, 1 / folds, names)
    # Round robin over all images in the order of their classes, so that each class continues with
    # the fold after that of the last image of the class before it.
    fold = np.empty(len(labels), np.int64)
    fold[np.lexsort((random.random(len(labels)), labels))] = np.arange(len(labels)) % folds
    return fold


def take_per_class(
    labels: IndexArray,
    n: int,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    key: str = "data.per_class",
) -> IndexArray:
    """Choose `n` images of every class. A larger `n` gives a superset.

    Args:
        labels: int64 `[N]`.
        n: Images of each class.
        seed: Seed of the random choice.
        names: Class names for errors.
        key: The key of the recipe that `n` comes from, for errors.

    Returns:
        Sorted indices.

    Raises:
        DataError: Classes have fewer than `n` images; the error lists them with their counts.
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


def _listed(classes: Sequence[int], counts: IndexArray, names: Sequence[str] | None) -> str:
    shown = [f"{names[c] if names else f'class {c}'} ({counts[c]})" for c in classes[:5]]
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(shown) + more


def _ranks(labels: IndexArray, random: np.random.Generator) -> IndexArray:
    """Return the rank of each image, from 0, in a random order of its class."""
    order = np.lexsort((random.random(len(labels)), labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def _refuse_single(
    counts: IndexArray, unit: str, fraction: float, names: Sequence[str] | None
) -> None:
    single = [int(c) for c in np.flatnonzero(counts == 1)]
    if single:
        raise DataError(
            f"{len(single)} of {np.count_nonzero(counts)} classes have a single {unit}, but "
            f"{fraction:.0%} must be held out: {_listed(single, counts, names)}",
            fix=f"give every class at least two {unit}s (better: dozens), or leave it out",
        )


def _hold_images(
    labels: IndexArray,
    fraction: float,
    random: np.random.Generator,
    keep: int,
    names: Sequence[str] | None,
) -> npt.NDArray[np.bool_]:
    """Return which images are held out, bool `[N]`; the numbers by the largest remainder method."""
    counts = np.bincount(labels)
    _refuse_single(counts, "image", fraction, names)
    quota = counts * fraction
    limit = np.maximum(counts - keep, 0)
    n_held = np.minimum(np.floor(quota + 1e-9).astype(np.int64), limit)
    remaining = max(1, round(len(labels) * fraction)) - int(n_held.sum())
    # Largest remainder first; a stable sort gives ties to the lower class. More than one round is
    # needed if small classes can't give their share: then the others give more.
    by_remainder = np.argsort(-np.round(quota - n_held, 9), kind="stable")
    while remaining > 0 and (n_held < limit).any():
        for c in by_remainder:
            if remaining > 0 and n_held[c] < limit[c]:
                n_held[c] += 1
                remaining -= 1
    held: npt.NDArray[np.bool_] = _ranks(labels, random) < n_held[labels]
    return held


def _hold_groups(
    labels: IndexArray,
    fraction: float,
    random: np.random.Generator,
    groups: Sequence[str],
    keep: int,
    names: Sequence[str] | None,
) -> npt.NDArray[np.bool_]:
    """Return which images are held out, bool `[N]`.

    Greedy: the largest groups first, each held out if this brings the class shares closer to
    `fraction`.
    """
    n_classes = int(labels.max()) + 1
    group, starts, pair_class, pair_counts = _grouped(labels, groups)
    n_kept = np.bincount(pair_class, minlength=n_classes)  # groups of each class
    _refuse_single(n_kept, "group", fraction, names)
    counts = np.bincount(labels, minlength=n_classes)
    quota = counts * fraction
    weight = 1 / np.maximum(counts, 1)
    held_counts = np.zeros(n_classes)
    held = np.zeros(len(starts) - 1, np.bool_)
    best, best_gain = -1, -np.inf
    for g in _large_first(group, random):
        rows = slice(starts[g], starts[g + 1])
        c, n = pair_class[rows], pair_counts[rows]
        if (n_kept[c] <= keep).any():
            continue
        before, after = held_counts[c] - quota[c], held_counts[c] + n - quota[c]
        gain = float((weight[c] * (before**2 - after**2)).sum())
        if gain > 0:
            held[g] = True
            held_counts[c] += n
            n_kept[c] -= 1
        elif gain > best_gain:
            best, best_gain = int(g), gain
    if not held.any():
        if best < 0:
            raise DataError(
                "no group can be held out without leaving a class without training images",
                fix="use finer groups, or drop data.group",
            )
        held[best] = True  # every group is larger than the share: take the closest one
    held_images: npt.NDArray[np.bool_] = held[group]
    return held_images


def _assign_groups(
    labels: IndexArray,
    folds: int,
    random: np.random.Generator,
    groups: Sequence[str],
    names: Sequence[str] | None,
) -> IndexArray:
    n_classes = int(labels.max()) + 1
    group, starts, pair_class, pair_counts = _grouped(labels, groups)
    _refuse_single(np.bincount(pair_class, minlength=n_classes), "group", 1 / folds, names)
    counts = np.bincount(labels, minlength=n_classes)
    weight = 1 / np.maximum(counts, 1)
    fold_counts = np.zeros((folds, n_classes))
    fold = np.zeros(len(starts) - 1, np.int64)
    for g in _large_first(group, random):
        rows = slice(starts[g], starts[g + 1])
        c, n = pair_class[rows], pair_counts[rows]
        # The increase of the sum of squared class shares, up to a factor and a constant.
        increase = np.round(fold_counts[:, c] @ (weight[c] * n), 9)
        fold[g] = np.lexsort((fold_counts.sum(1), increase))[0]
        fold_counts[fold[g], c] += n
    in_one_fold = np.flatnonzero(((fold_counts == counts) & (counts > 0)).any(0))
    if len(in_one_fold) or (fold_counts.sum(1) == 0).any():
        which = f": {_listed(in_one_fold.tolist(), counts, names)}" if len(in_one_fold) else ""
        raise DataError(
            f"the groups can't be divided into {folds} folds so that every fold leaves images of "
            f"every class to train on{which}",
            fix="use finer groups, fewer folds, or drop data.group",
        )
    fold_of_image: IndexArray = fold[group]
    return fold_of_image


def _grouped(
    labels: IndexArray, groups: Sequence[str]
) -> tuple[IndexArray, IndexArray, IndexArray, IndexArray]:
    """Return the group of each image, and the class counts of the groups as one flat table.

    Returns:
        `(group, starts, classes, counts)`. Group g has the entries `starts[g]` to `starts[g + 1]`
        of the last two arrays.
    """
    n_classes = int(labels.max()) + 1
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    # One entry per (group, class) pair that occurs: a dense table of many groups is too large.
    pairs, counts = np.unique(group * n_classes + labels, return_counts=True)
    starts = np.searchsorted(pairs // n_classes, np.arange(group.max() + 2))
    return group, starts, pairs % n_classes, counts


def _large_first(group: IndexArray, random: np.random.Generator) -> IndexArray:
    """Return the numbers of the groups by size; groups of equal size in a random order."""
    sizes = np.bincount(group)
    shuffled = random.permutation(len(sizes))
    ordered: IndexArray = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return ordered


@dataclass
class Split:
    """Images with labels.

    Args:
        rows: The images, uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
        ids: A name for each image.
        shards: The shards of the images, if the order of training depends on them.
    """

    rows: ImageRows
    labels: Tensor
    ids: Sequence[str]
    shards: ShardOrder | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class LoadedPart:
    """One part of a source with its rows.

    Args:
        part: The part.
        rows: Its images.
        content: SHA-256 over the readable images.
        bad: Number of each unreadable image -> reason.
        digests: SHA-256 of each file, uint8 `[N, 32]`; None if the images are not files.

    Attributes:
        good: Numbers of the readable images. The indices of other methods refer to these.
        labels: Labels of the readable images.
    """

    part: Part
    rows: ImageRows
    content: str
    bad: dict[int, str]
    digests: Pixels | None = None

    def __post_init__(self) -> None:
        good = np.delete(np.arange(len(self.part.labels), dtype=np.int64), list(self.bad))
        self.good: IndexArray = good
        self.labels: IndexArray = self.part.labels[good]

    def all(self) -> IndexArray:
        """Return the indices of all readable images."""
        return np.arange(len(self.good), dtype=np.int64)

    def ids_of(self, index: IndexArray) -> Sequence[str]:
        return IndexedStrings(self.part.ids, self.good[index])

    def groups_of(self, index: IndexArray) -> list[str] | None:
        """Return the group of each image; None if the part has no groups."""
        groups = self.part.groups
        return None if groups is None else [groups[i] for i in self.good[index].tolist()]

    def split(self, index: IndexArray, *, keep_in_memory: bool) -> Split:
        """Return the images `index` as a split, read into memory if `keep_in_memory`."""
        numbers = self.good[index]
        is_complete = len(numbers) == self.rows.shape[0]
        rows = self.rows if is_complete else self.rows.subset(as_index(numbers))
        if keep_in_memory and not isinstance(rows, ArrayRows):
            rows = in_memory(rows)
        return Split(rows, as_index(self.labels[index]), self.ids_of(index), self._shards(numbers))

    def _shards(self, numbers: IndexArray) -> ShardOrder | None:
        files = self.part.images
        if not isinstance(files, EncodedFiles):
            return None
        shard_ids = files.shard_ids()
        return (
            None if shard_ids is None else ShardOrder(as_index(shard_ids[numbers]), files.prefetch)
        )


def load_part(part: Part, conversion: Conversion, memory_budget: int) -> LoadedPart:
    """Load a part: files through the decode cache, arrays converted for each request."""
    if isinstance(part.images, EncodedFiles):
        decoded = cache.decode_images(part.images, conversion, memory_budget=memory_budget)
        return LoadedPart(part, decoded.rows, decoded.content, decoded.bad, decoded.digests)
    return LoadedPart(part, ConvertedRows(part.images, conversion), _content_hash(part.images), {})


def _content_hash(images: ImageSource) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    for start in range(0, images.shape[0], 1024):
        index = np.arange(start, min(start + 1024, images.shape[0]))
        digest.update(images[index].data)
    return digest.hexdigest()


def check_split_config(config: DataConfig) -> None:
    """Check that the keys about splits do not contradict each other.

    Raises:
        UsageError: They do; the error lists all contradictions.
    """
    problems = []
    if config.folds is None and config.fold:
        problems.append(f"data.fold={config.fold} without data.folds")
    if config.folds is not None:
        if config.fold >= config.folds:
            problems.append(f"data.fold={config.fold}: the {config.folds} folds are counted from 0")
        if config.val_fraction == 0:
            problems.append("data.val_fraction=0 and data.folds: a fold is a validation split")
    if problems:
        fix = "set data.folds=K and data.fold=0..K-1, or neither"
        raise UsageError("; ".join(problems), fix=fix)


def parts_of(config: DataConfig, source: DataSource) -> dict[str, Part]:
    """Return the parts of a source as the recipe uses them.

    The source's validation images join its training images if the recipe draws the validation
    split itself, or has none.
    """
    draws_validation = config.folds is not None or config.total_per_class is not None
    if "val" not in source.parts or not (draws_validation or config.val_fraction == 0):
        return source.parts
    train, val = source.parts["train"], source.parts["val"]
    # No built-in set (these are arrays) has a validation split.
    assert isinstance(train.images, EncodedFiles)
    assert isinstance(val.images, EncodedFiles)
    joined = Part(
        train.images.concat(val.images),
        np.concatenate([train.labels, val.labels]),
        [*train.ids, *val.ids],
        None if train.groups is None or val.groups is None else [*train.groups, *val.groups],
    )
    return {"train": joined, **{s: part for s, part in source.parts.items() if s == "test"}}


def is_drawn_split(config: DataConfig, source: DataSource) -> bool:
    """Return whether the splits depend on `data.seed`. They don't if the source gives them all."""
    takes_subset = config.per_class is not None or config.total_per_class is not None
    holds_out_val = "val" not in source.parts and config.validates
    is_drawn = "test" not in source.parts or holds_out_val or config.folds is not None
    return is_drawn or takes_subset


@dataclass(frozen=True)
class SplitPlan:
    """Which images of a source's training part stay there and which are held out.

    All indices refer to the readable images of the loaded training part.

    Attributes:
        train: Indices of the training images.
        held_out: Indices of the images held out for `val` and `test`, where the source has no
            such split.
        test_pool_size: Number of images that `test` was drawn from.
        selected_size: Number of images left by `data.total_per_class`; without it, all readable
            images. The share of validation images refers to it.
        after_val_size: Number of images left after validation images were held out.
    """

    train: IndexArray
    held_out: dict[str, IndexArray]
    test_pool_size: int
    selected_size: int
    after_val_size: int


def make_splits(config: DataConfig, source: DataSource, parts: dict[str, LoadedPart]) -> SplitPlan:
    """Decide which images are held out for validation and testing.

    Args:
        config: The recipe's data section.
        source: The source.
        parts: The loaded parts that `parts_of` gives.

    Raises:
        DataError: A class is too small to be split.
        UsageError: Keys of the recipe contradict each other.
    """
    check_split_config(config)
    pool = parts["train"]
    train, held_out = pool.all(), dict[str, IndexArray]()
    test_pool_size = 0
    if "test" not in parts:
        # The same images whatever the recipe does about validation, or a refit would be tested on
        # images that chose its number of epochs: they come from the source's training part, and
        # one more image per class stays for validation.
        from_train_part = pool.good < len(source.parts["train"].labels)
        test_pool_size = int(from_train_part.sum())
        keep = 1 if "val" in source.parts else 2
        kept, held_out["test"] = _hold_out_of(
            pool, train[from_train_part], config.test_fraction, config, source, keep
        )
        train = np.sort(np.concatenate([kept, train[~from_train_part]]))
    selected_size = len(pool.good)
    if config.total_per_class is not None:
        n, key = config.total_per_class, "data.total_per_class"
        chosen = take_per_class(pool.labels[train], n, config.seed, names=source.classes, key=key)
        train = train[chosen]
        selected_size = len(train)
    if "val" not in parts:
        train, held_out["val"] = _hold_out_validation(config, source, pool, train, selected_size)
    after_val_size = len(train)
    if config.per_class is not None:
        chosen = take_per_class(
            pool.labels[train], config.per_class, config.seed, names=source.classes
        )
        train = train[chosen]
    return SplitPlan(train, held_out, test_pool_size, selected_size, after_val_size)


def assumed_train_numbers(
    config: DataConfig, source: DataSource, parts: Mapping[str, Part]
) -> IndexArray:
    """Return the numbers of the training images in their part if all images are readable.

    Nothing is decoded. The arguments are as for `make_splits`, but the parts are not loaded.
    """
    no_rows = ArrayRows(torch.empty(0, 1, 1, 1, dtype=torch.uint8))
    assumed = {name: LoadedPart(part, no_rows, "", {}) for name, part in parts.items()}
    return make_splits(config, source, assumed).train


def _hold_out_validation(
    config: DataConfig,
    source: DataSource,
    pool: LoadedPart,
    available: IndexArray,
    selected_size: int,
) -> tuple[IndexArray, IndexArray]:
    """Return the images that stay and the validation images: a fold, a share, or none."""
    if config.folds is not None:
        labels, groups = pool.labels[available], pool.groups_of(available)
        fold = fold_numbers(labels, config.folds, config.seed, groups, names=source.classes)
        return available[fold != config.fold], available[fold == config.fold]
    if config.val_fraction == 0:
        return available, available[:0]
    share = config.val_fraction * selected_size / len(available)
    return _hold_out_of(pool, available, share, config, source, keep=1)


def _hold_out_of(
    pool: LoadedPart,
    available: IndexArray,
    share: float,
    config: DataConfig,
    source: DataSource,
    keep: int,
) -> tuple[IndexArray, IndexArray]:
    """Apply `hold_out` to the images `available` of `pool`."""
    kept, held = hold_out(
        pool.labels[available],
        min(1.0, share),
        config.seed,
        pool.groups_of(available),
        keep=keep,
        names=source.classes,
    )
    return available[kept], available[held]


def describe_splits(
    plan: SplitPlan, config: DataConfig, source: DataSource, parts: dict[str, LoadedPart]
) -> dict[str, str]:
    """Describe in one sentence for each split where its images come from.

    Args:
        plan: The result of `make_splits` for the other arguments.
    """
    descriptions = {
        split: f"{len(part.labels):,} images of the source's own split"
        for split, part in parts.items()
    }
    pool, held = parts["train"], plan.held_out
    kind = "stratified"
    if pool.part.groups is not None:
        kind = f"groups by {config.group!r} kept together"
    available = f"{len(pool.good):,} training images"
    if "val" in source.parts and "val" not in parts:
        available += ", including the source's own validation images"
        descriptions["train"] = available
    if "test" in held:
        descriptions["test"] = (
            f"{len(held['test']):,} of {plan.test_pool_size:,} training images held out "
            f"({config.test_fraction:.0%}, {kind}, seed {config.seed})"
        )
    if config.total_per_class is not None:
        before = len(pool.good) - len(held.get("test", ()))
        available = (
            f"{plan.selected_size:,} images ({config.total_per_class} of each class of {before:,})"
        )
    if "val" in held:
        share = f"{config.val_fraction:.0%}"
        if config.folds is not None:
            share = f"fold {config.fold} of {config.folds}"
        descriptions["val"] = (
            f"{len(held['val']):,} of {available} held out ({share}, {kind}, seed {config.seed})"
        )
        if config.val_fraction == 0:
            descriptions["val"] = "none (data.val_fraction=0)"
    if config.per_class is not None:
        descriptions["train"] = (
            f"{len(plan.train):,} of {plan.after_val_size:,} training images: {config.per_class} "
            f"of each class (seed {config.seed})"
        )
    elif plan.after_val_size < plan.selected_size:
        descriptions["train"] = f"{plan.after_val_size:,} of {available}: those not held out"
    elif plan.after_val_size < len(pool.good):
        descriptions["train"] = available
    return {split: descriptions[split] for split in ("train", "val", "test")}
