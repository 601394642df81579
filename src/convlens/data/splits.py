"""Which images are held out: stratified, seeded, groups kept together. Labels in, indices out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convlens.errors import DataError

Index = npt.NDArray[np.int64]


def hold_out(
    labels: Index,
    fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    keep: int = 1,
    names: Sequence[str] | None = None,
) -> tuple[Index, Index]:
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
    labels: Index,
    folds: int,
    seed: int,
    groups: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Index:
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
    labels: Index,
    n: int,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    key: str = "data.per_class",
) -> Index:
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


def _listed(classes: Sequence[int], counts: Index, names: Sequence[str] | None) -> str:
    shown = [f"{names[c] if names else f'class {c}'} ({counts[c]})" for c in classes[:5]]
    rest = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(shown) + rest


def _ranks(labels: Index, random: np.random.Generator) -> Index:
    """Each image's place, from 0, in a random order of its own class."""
    order = np.lexsort((random.random(len(labels)), labels))
    ordered = labels[order]
    first = np.searchsorted(ordered, ordered)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def _refuse_single(counts: Index, unit: str, fraction: float, names: Sequence[str] | None) -> None:
    single = [int(c) for c in np.flatnonzero(counts == 1)]
    if single:
        raise DataError(
            f"{len(single)} of {np.count_nonzero(counts)} classes have a single {unit}, but "
            f"{fraction:.0%} must be held out: {_listed(single, counts, names)}",
            fix=f"give every class at least two {unit}s (better: dozens), or leave it out",
        )


def _hold_images(
    labels: Index,
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
    labels: Index,
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
    labels: Index,
    folds: int,
    random: np.random.Generator,
    groups: Sequence[str],
    names: Sequence[str] | None,
) -> Index:
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
    dealt: Index = fold[group]
    return dealt


def _grouped(labels: Index, groups: Sequence[str]) -> tuple[Index, Index, Index, Index]:
    """Each image's group, and each group's classes with their counts as one flat table.

    Group g has the entries `starts[g]` to `starts[g + 1]` of the last two arrays.
    """
    n_classes = int(labels.max()) + 1
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    # One entry per (group, class) that occurs: a dense table would not fit for many groups.
    pairs, counts = np.unique(group * n_classes + labels, return_counts=True)
    starts = np.searchsorted(pairs // n_classes, np.arange(group.max() + 2))
    return group, starts, pairs % n_classes, counts


def _large_first(group: Index, random: np.random.Generator) -> Index:
    """Numbers of groups, by size, in a random order where sizes are equal."""
    sizes = np.bincount(group)
    shuffled = random.permutation(len(sizes))
    ordered: Index = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return ordered
