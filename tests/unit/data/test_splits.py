"""Held-out images, folds and images per class: rounding, seeds, groups."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from convlens.data.splits import (
    IN_NO_FOLD,
    classes_of_one,
    fold_numbers,
    hold_out,
    take_per_class,
)
from convlens.errors import DataError


def labels_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts).astype(np.int64)


def shares(labels: np.ndarray, index: np.ndarray) -> list[int]:
    return np.bincount(labels[index], minlength=labels.max() + 1).tolist()


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ((10, 10), 0.2, [2, 2]),
        # quotas 1.5 1.05 0.45: floors 1 1 0; one more of round(3.0) = 3, for the remainder .5
        ((10, 7, 3), 0.15, [2, 1, 0]),
        # quotas 0.5 0.5 0.5 0.5: round(2.0) = 2 remain; ties go to the lower classes
        ((5, 5, 5, 5), 0.1, [1, 1, 0, 0]),
        # quotas 1.8 1.8: at least one of each class stays
        ((2, 2), 0.9, [1, 1]),
        # a share that rounds to zero still holds out one image
        ((2, 3), 0.01, [0, 1]),
        # 0.3 * 10 is 2.9999999999999996 as a float: three, not two
        ((10, 100), 0.3, [3, 30]),
    ],
)
def test_shares_by_largest_remainder(
    counts: tuple[int, ...], fraction: float, expected: list[int]
) -> None:
    labels = np.random.default_rng(1).permutation(labels_of(*counts))
    kept, held = hold_out(labels, fraction, seed=0)
    assert shares(labels, held) == expected
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    assert kept.dtype == held.dtype == np.int64


def test_held_out_images_depend_on_the_seed_only() -> None:
    labels = labels_of(50, 50)
    np.random.seed(0)
    first = hold_out(labels, 0.2, 7)[1]
    np.random.seed(1)
    np.testing.assert_array_equal(hold_out(labels, 0.2, 7)[1], first)
    assert not np.array_equal(hold_out(labels, 0.2, 8)[1], first)


def test_fraction_of_zero_holds_out_nothing() -> None:
    kept, held = hold_out(labels_of(1, 5), 0.0, 0)
    assert len(kept) == 6
    assert len(held) == 0


def test_only_image_of_a_class_is_never_held_out() -> None:
    labels = labels_of(5, 1, 4, 1)
    assert classes_of_one(labels) == [1, 3]
    for seed in range(20):
        held = hold_out(labels, 0.5, seed)[1]
        # round(5.5) = 6 of 11; quotas 2.5 and 2: the classes that can give the rest, in turn.
        assert shares(labels, held) == [3, 0, 3, 0]
    with pytest.raises(DataError, match="every class has a single image, but 20% must be held out"):
        hold_out(labels_of(1, 1, 1), 0.2, 0)
    with pytest.raises(DataError, match="every class has at most 2 images") as caught:
        hold_out(labels_of(2, 1, 2), 0.2, 0, keep=2)
    assert caught.value.fix == "give the classes at least 3 images (better: dozens)"


def test_only_group_of_a_class_is_never_held_out() -> None:
    labels, groups = labels_of(3, 4), list("aaabbcc")
    assert classes_of_one(labels, groups) == [0]
    assert classes_of_one(labels) == []
    for seed in range(20):
        held = hold_out(labels, 0.3, seed, groups)[1]
        assert shares(labels, held) == [0, 2]


def test_splits_are_those_of_earlier_versions() -> None:
    """The hashes were made before classes of a single image were allowed."""
    labels = np.random.default_rng(7).integers(0, 7, 500)
    groups = [f"g{g}" for g in np.random.default_rng(8).integers(0, 90, 500)]
    indices = {
        "ef996f44fc3104c7": hold_out(labels, 0.15, 3)[1],
        "a6b150663363f6ab": hold_out(labels, 0.15, 3, groups)[1],
        "77c7f7bc29a36174": hold_out(labels, 0.3, 1, groups, keep=2)[1],
        "617c0e9025c733db": fold_numbers(labels, 5, 2),
        "002c5b24e5efe349": fold_numbers(labels, 5, 2, groups),
    }
    for digest, index in indices.items():
        assert hashlib.sha256(index.tobytes()).hexdigest()[:16] == digest


def test_holding_out_twice_leaves_images_of_each_class() -> None:
    labels = labels_of(2, 30)
    kept, held = hold_out(labels, 0.5, 0, keep=2)
    assert shares(labels, held) == [0, 16]
    again = hold_out(labels[kept], 0.5, 0)[0]
    assert shares(labels[kept], again)[0] == 1


def test_groups_stay_together_and_shares_are_near() -> None:
    random = np.random.default_rng(3)
    group = random.integers(0, 60, 600)
    labels = random.integers(0, 3, 600)
    kept, held = hold_out(labels, 0.2, 0, [f"g{g}" for g in group])
    assert not set(group[kept]) & set(group[held])
    assert len(kept) + len(held) == 600
    for c in range(3):
        share = (labels[held] == c).sum() / (labels == c).sum()
        assert abs(share - 0.2) < 0.05
    again = hold_out(labels, 0.2, 0, [f"g{g}" for g in group])[1]
    np.testing.assert_array_equal(held, again)


def test_groups_of_small_example() -> None:
    # Two classes of 4; groups of two, each of one class; a quarter is one group of each class.
    labels = labels_of(4, 4)
    kept, held = hold_out(labels, 0.5, 0, list("aabbccdd"))
    assert shares(labels, held) == [2, 2]
    assert shares(labels, kept) == [2, 2]


def test_groups_larger_than_the_share_still_give_a_split() -> None:
    labels = np.array([0, 1] * 6)
    kept, held = hold_out(labels, 0.01, 0, list("aaaabbbbcccc"))
    assert len(held) == 4
    assert len(kept) == 8


def test_groups_that_cannot_be_held_out_are_refused() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    groups = ["a", "b", "b", "c", "c", "a"]
    with pytest.raises(DataError, match="no group can be held out"):
        hold_out(labels, 0.3, 0, groups, keep=2)


def test_take_per_class_is_stratified_and_nested() -> None:
    labels = np.random.default_rng(0).permutation(labels_of(20, 30, 10))
    chosen = take_per_class(labels, 5, seed=1)
    assert shares(labels, chosen) == [5, 5, 5]
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) < set(take_per_class(labels, 10, seed=1))
    assert set(chosen) != set(take_per_class(labels, 5, seed=2))
    with pytest.raises(DataError, match=r"per_class=11.* 1 of 3 .*frog \(10\)") as caught:
        take_per_class(labels, 11, 0, names=["cat", "dog", "frog"])
    assert "data.per_class=10" in caught.value.fix


def test_folds_are_assigned_round_robin_over_classes() -> None:
    # Class 0 is assigned to folds 0 1 2 0 1 2 0, class 1 continues with 1 2 0.
    labels = np.random.default_rng(0).permutation(labels_of(7, 3))
    fold = fold_numbers(labels, 3, seed=0)
    assert [shares(labels, np.flatnonzero(fold == k)) for k in range(3)] == [
        [3, 1],
        [2, 1],
        [2, 1],
    ]
    np.testing.assert_array_equal(fold, fold_numbers(labels, 3, seed=0))
    assert not np.array_equal(fold, fold_numbers(labels, 3, seed=1))


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_differ_by_one_image_at_most(folds: int) -> None:
    labels = np.random.default_rng(1).integers(0, 5, 203)
    fold = fold_numbers(labels, folds, seed=4)
    table = np.array([np.bincount(labels[fold == k], minlength=5) for k in range(folds)])
    assert np.ptp(table, axis=0).max() <= 1
    assert np.ptp(table.sum(1)) <= 1
    assert table.sum() == 203


def test_folds_keep_groups_together() -> None:
    random = np.random.default_rng(3)
    group, labels = random.integers(0, 60, 600), random.integers(0, 3, 600)
    fold = fold_numbers(labels, 4, 0, [f"g{g}" for g in group])
    assert all(len(set(fold[group == g])) == 1 for g in set(group))
    table = np.array([np.bincount(labels[fold == k], minlength=3) for k in range(4)])
    assert np.abs(table / table.sum(0) - 0.25).max() < 0.05
    # By hand: groups of two of each class; each fold gets one of each.
    four = labels_of(4, 4)
    fold = fold_numbers(four, 2, 0, list("aabbccdd"))
    assert [shares(four, np.flatnonzero(fold == k)) for k in range(2)] == [[2, 2], [2, 2]]


def test_impossible_folds_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.folds=6, but there are only 5 images"):
        fold_numbers(labels_of(3, 2), 6, 0)
    with pytest.raises(DataError, match="only 5 images besides the only image of a class"):
        fold_numbers(labels_of(5, 1), 6, 0)
    with pytest.raises(DataError, match=r"only 4 groups\n"):
        fold_numbers(labels_of(4, 4), 5, 0, list("aabbccdd"))
    with pytest.raises(DataError, match="only 2 groups besides the only group of a class"):
        fold_numbers(labels_of(3, 4), 4, 0, list("aaabbcc"))
    with pytest.raises(DataError, match="only 0 images besides") as caught:
        fold_numbers(labels_of(1, 1), 2, 0)
    assert caught.value.fix == "add images to the classes"
    # Each class has two groups of the three, so two folds of them put both of one class together.
    with pytest.raises(DataError, match=r"class 0 \(2\)|class 1 \(2\)|class 2 \(2\)"):
        fold_numbers(np.array([0, 0, 1, 1, 2, 2]), 2, 0, ["a", "b", "b", "c", "c", "a"])


def test_only_image_or_group_of_a_class_is_in_no_fold() -> None:
    # Class 0 is assigned to folds 0 1 2 0, class 2 continues with 1 2.
    labels = labels_of(4, 1, 2)
    fold = fold_numbers(labels, 3, 0)
    assert fold[labels == 1].tolist() == [IN_NO_FOLD]
    assert [shares(labels, np.flatnonzero(fold == k)) for k in range(3)] == [
        [2, 0, 0],
        [1, 0, 1],
        [1, 0, 1],
    ]
    # Group a is the only one of class 0; it also has an image of class 1.
    labels = np.array([0, 0, 1, 1, 1, 1, 1])
    fold = fold_numbers(labels, 2, 0, list("aaabbcc"))
    assert fold[:3].tolist() == [IN_NO_FOLD] * 3
    assert sorted(fold[3:].tolist()) == [0, 0, 1, 1]
    assert fold[3] == fold[4]


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda c: max(c) > 1),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 9),
    folds=st.integers(2, 4),
    n_groups=st.none() | st.integers(1, 12),
)
def test_every_class_keeps_an_image_to_train_on(
    counts: list[int], fraction: float, seed: int, folds: int, n_groups: int | None
) -> None:
    labels = np.random.default_rng(seed).permutation(labels_of(*counts))
    groups = None
    if n_groups is not None:
        groups = [f"{g}" for g in np.random.default_rng(seed).integers(0, n_groups, len(labels))]
    refusals = () if groups is None else (DataError,)  # e.g. all images are in one group
    with contextlib.suppress(*refusals):
        kept, held = hold_out(labels, fraction, seed, groups)
        assert set(labels[kept]) == set(labels)
        assert 0 < len(held) == len(labels) - len(kept)
        if groups is not None:
            assert not {groups[i] for i in kept} & {groups[i] for i in held}
    with contextlib.suppress(DataError):  # fewer images or groups than folds
        fold = fold_numbers(labels, folds, seed, groups)
        for k in range(folds):
            assert set(labels[fold != k]) == set(labels)
            assert (fold == k).any()


def test_hold_out_of_many_images_and_classes() -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 100_000)
    kept, held = hold_out(labels, 0.15, 0)
    assert len(held) == 15_000
    assert np.bincount(labels[kept]).min() > 0
