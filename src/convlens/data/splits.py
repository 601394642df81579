"""Splits of a data set: which images are held out for validation and testing.

`hold_out`, `fold_numbers` and `take_per_class` turn labels into indices: stratified, seeded, with
groups kept together. `make_splits` applies them to the loaded parts of a source as a recipe asks
for, and `describe_splits` says in words what was done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convlens.data import cache, duplicates
from convlens.data.cache import ArrayRows, ConvertedRows, ImageRows, as_index, in_memory
from convlens.data.decode import Conversion, Pixels
from convlens.data.layout import list_examples
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


IN_NO_FOLD = -1  # trained on by the models of all folds


def hold_out(
    labels: IndexArray,
    fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    keep: int = 1,
) -> tuple[IndexArray, IndexArray]:
    """Hold out a fraction of the images of every class.

    The numbers are rounded by the largest remainder method (ties go to the lower class). The same
    seed always gives the same result. If `fraction` > 0, at least one image is held out, but never
    the only image (or group) of a class.

    Args:
        labels: int64 `[N]`.
        fraction: Share of the images to hold out.
        seed: Seed of the random choice.
        groups: The group of each image. A group is never divided, which makes the shares
            approximate.
        keep: Number of images (or groups) that each class keeps at least, however small it is.

    Returns:
        Two sorted, disjoint index arrays: the images that are kept and those held out.

    Raises:
        DataError: No class has more than `keep` images, or no group can be held out.
    """
    all_images = np.arange(len(labels), dtype=np.int64)
    if fraction <= 0 or not len(labels):
        return all_images, all_images[:0]
    random = np.random.default_rng(seed)
    if groups is None:
        held = _hold_images(labels, fraction, random, keep)
    else:
        held = _hold_groups(labels, fraction, random, groups, keep)
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
    that has the fewest images of its classes. The only image (or group) of a class is in no fold,
    so every model trains on it.

    Args:
        labels: int64 `[N]`.
        folds: Number of folds.
        seed: Seed of the random choice.
        groups: The group of each image.
        names: Class names for errors.

    Returns:
        The fold of each image, int64 `[N]`, from 0 to `folds` - 1; `IN_NO_FOLD` for the only image
        (or group) of a class.

    Raises:
        DataError: All images of a class would be in one fold, or there are fewer images (or
            groups) to divide than folds.
    """
    random = np.random.default_rng(seed)
    if groups is not None:
        return _assign_groups(labels, folds, random, groups, names)
    fold = np.full(len(labels), IN_NO_FOLD, np.int64)
    divided = np.flatnonzero(np.bincount(labels)[labels] > 1)
    _check_folds(folds, len(divided), "image", is_complete=len(divided) == len(labels))
    # Round robin over all images in the order of their classes, so that each class continues with
    # the fold after that of the last image of the class before it.
    order = np.lexsort((random.random(len(divided)), labels[divided]))
    fold[divided[order]] = np.arange(len(divided)) % folds
    return fold


def _check_folds(folds: int, units: int, unit: str, *, is_complete: bool) -> None:
    """Refuse more folds than images (or groups).

    Args:
        is_complete: Whether these are all images, and none is the only one of its class.
    """
    if units < folds:
        rest = "" if is_complete else f" besides the only {unit} of a class"
        raise DataError(
            f"data.folds={folds}, but there are only {units} {unit}s{rest}",
            fix=f"at most data.folds={units}" if units > 1 else f"add {unit}s to the classes",
        )


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


def classes_of_one(labels: IndexArray, groups: Sequence[str] | None = None) -> list[int]:
    """Return the classes with a single image (or group). It is never held out."""
    if not len(labels):
        return []
    units = labels if groups is None else _grouped(labels, groups)[2]
    return np.flatnonzero(np.bincount(units) == 1).tolist()


def _hold_images(
    labels: IndexArray,
    fraction: float,
    random: np.random.Generator,
    keep: int,
) -> npt.NDArray[np.bool_]:
    """Return which images are held out, bool `[N]`; the numbers by the largest remainder method."""
    counts = np.bincount(labels)
    if counts.max() <= keep:
        most = "a single image" if counts.max() == 1 else f"at most {counts.max()} images"
        raise DataError(
            f"every class has {most}, but {fraction:.0%} must be held out",
            fix=f"give the classes at least {keep + 1} images (better: dozens)",
        )
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
) -> npt.NDArray[np.bool_]:
    """Return which images are held out, bool `[N]`.

    Greedy: the largest groups first, each held out if this brings the class shares closer to
    `fraction`.
    """
    n_classes = int(labels.max()) + 1
    group, starts, pair_class, pair_counts = _grouped(labels, groups)
    n_kept = np.bincount(pair_class, minlength=n_classes)  # groups of each class
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
    has_one_group = np.bincount(pair_class, minlength=n_classes) == 1
    is_only_group = np.logical_or.reduceat(has_one_group[pair_class], starts[:-1])
    divided = len(is_only_group) - int(is_only_group.sum())
    _check_folds(folds, divided, "group", is_complete=not is_only_group.any())
    counts = np.bincount(labels, minlength=n_classes)
    weight = 1 / np.maximum(counts, 1)
    fold_counts = np.zeros((folds, n_classes))
    fold = np.full(len(starts) - 1, IN_NO_FOLD, np.int64)
    for g in _large_first(group, random):
        if is_only_group[g]:
            continue
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
        dropped: Numbers of images that are left out by `data.duplicates=drop`.

    Attributes:
        good: Numbers of the images that are readable and not dropped. The indices of other methods
            refer to these.
        labels: Labels of the images `good`.
    """

    part: Part
    rows: ImageRows
    content: str
    bad: dict[int, str]
    digests: Pixels | None = None
    dropped: Sequence[int] = ()

    def __post_init__(self) -> None:
        left_out = [*self.bad, *self.dropped]
        good = np.delete(np.arange(len(self.part.labels), dtype=np.int64), left_out)
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


def apply_duplicates(
    config: DataConfig, source: DataSource, parts: dict[str, LoadedPart]
) -> tuple[dict[str, LoadedPart], list[str]]:
    """Drop copies of images, or make each image and its copies a group, as the recipe says.

    Copies are files that are equal byte for byte, or equal pixels in built-in sets. Of copies in
    several parts `drop` keeps the one in `test`, or else in `val`, so that results on a split that
    comes with the data set stay comparable.

    Returns:
        The parts, and notes for people.

    Raises:
        DataError: A class has no training image left.
    """
    if config.duplicates == "keep":
        return parts, []
    if config.duplicates == "group":
        return _group_copies(parts)
    order = [name for name in ("test", "val", "train") if name in parts]
    digests = np.concatenate([_good_digests(parts[name]) for name in order])
    labels = np.concatenate([parts[name].labels for name in order])
    owners = [(name, number) for name in order for number in parts[name].good.tolist()]
    copies, conflicting = duplicates.copies_to_drop(digests, labels)
    dropped: dict[str, list[int]] = {name: [] for name in order}
    positions = [i for group in copies for i in group[1:]]
    positions += [i for group in conflicting for i in group]
    for position in positions:
        name, number = owners[position]
        dropped[name].append(number)
    kept = {name: replace(part, dropped=sorted(dropped[name])) for name, part in parts.items()}
    before, after = (
        np.bincount(of["train"].labels, minlength=len(source.classes)) for of in (parts, kept)
    )
    empty = [source.classes[c] for c in np.flatnonzero((before > 0) & (after == 0))]
    if empty:
        raise DataError(
            f"data.duplicates=drop leaves no training image of: {list_examples(empty)}",
            where=source.name,
            fix=f"`convlens audit {config.name}` lists the copies; correct the labels, or set "
            "data.duplicates=keep",
        )
    notes = []
    if copies:
        count = sum(len(group) - 1 for group in copies)
        copy = "copy of another image is" if count == 1 else "copies of other images are"
        notes.append(f"{count:,} {copy} left out (data.duplicates=drop)")
    if conflicting:
        count = sum(len(group) for group in conflicting)
        name, number = owners[conflicting[0][0]]
        notes.append(
            f"{count:,} equal images under different labels are all left out "
            f"(data.duplicates=drop), e.g. {parts[name].part.ids[number]}"
        )
    return kept, notes


def _group_copies(parts: dict[str, LoadedPart]) -> tuple[dict[str, LoadedPart], list[str]]:
    """Make each training image and its copies a group. The other parts are splits already."""
    train = parts["train"]
    in_groups = train.groups_of(train.all())
    joined, count = duplicates.groups_with_copies(_good_digests(train), in_groups)
    if joined is None or not count:
        return parts, []
    groups = [""] * len(train.part.labels)
    for number, group in zip(train.good.tolist(), joined, strict=True):
        groups[number] = group
    grouped = replace(train, part=replace(train.part, groups=groups))
    unit = "group" if count == 1 else "groups"
    note = f"{count:,} {unit} of equal images, each kept in one split (data.duplicates=group)"
    return {**parts, "train": grouped}, [note]


def _good_digests(part: LoadedPart) -> Pixels:
    """Return the digest of each image `part.good`: of its file, or of its pixels."""
    if part.digests is not None:
        return part.digests[part.good]
    images = part.part.images
    assert not isinstance(images, EncodedFiles)
    digests = [
        hashlib.sha256(np.ascontiguousarray(image).data).digest()
        for start in range(0, len(part.good), 1024)
        for image in images[part.good[start : start + 1024]]
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


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
        notes: For people.
    """

    train: IndexArray
    held_out: dict[str, IndexArray]
    test_pool_size: int
    selected_size: int
    after_val_size: int
    notes: tuple[str, ...] = ()


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
            pool, train[from_train_part], config.test_fraction, config, keep
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
    notes: tuple[str, ...] = ()
    if any(map(len, held_out.values())):
        groups = pool.groups_of(pool.all())
        unit = "image" if config.group is None else "group"
        notes = single_image_notes(source.classes, classes_of_one(pool.labels, groups), unit)
    return SplitPlan(train, held_out, test_pool_size, selected_size, after_val_size, notes)


def single_image_notes(
    classes: Sequence[str], single: Sequence[int], unit: str = "image"
) -> tuple[str, ...]:
    """Return a note on the classes whose only image (or group) was not held out."""
    if not single:
        return ()
    have = "class has" if len(single) == 1 else "classes have"
    names = list_examples([classes[c] for c in single])
    return (f"{len(single)} {have} a single {unit}, which stays in training: {names}",)


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
    return _hold_out_of(pool, available, share, config, keep=1)


def _hold_out_of(
    pool: LoadedPart,
    available: IndexArray,
    share: float,
    config: DataConfig,
    keep: int,
) -> tuple[IndexArray, IndexArray]:
    """Apply `hold_out` to the images `available` of `pool`."""
    kept, held = hold_out(
        pool.labels[available],
        min(1.0, share),
        config.seed,
        pool.groups_of(available),
        keep=keep,
    )
    return available[kept], available[held]


def _describe_kind(config: DataConfig, pool: LoadedPart) -> str:
    """Return how images were drawn from `pool`: stratified, or in groups."""
    if pool.part.groups is None:
        return "stratified"
    if config.group is None:
        return "copies kept together"
    copies = " and copies" if config.duplicates == "group" else ""
    return f"groups by {config.group!r}{copies} kept together"


def describe_origins(plan: SplitPlan, config: DataConfig, pool: LoadedPart) -> dict[str, str]:
    """Describe in a few words for each split how it came about; `train` may have no entry.

    Args:
        plan: The result of `make_splits`.
        pool: The loaded training part.
    """
    kind = _describe_kind(config, pool)
    origins = {}
    for split in ("val", "test"):
        if split not in plan.held_out:
            origins[split] = "given by the data set"
        elif split == "val" and config.folds is not None:
            origins[split] = f"fold {config.fold} of {config.folds}, {kind}"
        elif split == "val" and config.val_fraction == 0:
            origins[split] = "data.val_fraction=0"
        else:
            origins[split] = f"held out, {kind}"
    if config.per_class is not None:
        origins["train"] = f"{config.per_class} of each class"
    elif config.total_per_class is not None:
        origins["train"] = f"with val {config.total_per_class} of each class"
    elif not plan.held_out:
        origins["train"] = "given by the data set"
    return origins


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
    kind = _describe_kind(config, pool)
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
