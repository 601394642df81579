"""Exact duplicates by digest, near duplicates by perceptual hash."""

from __future__ import annotations

import time

import numpy as np

from convlens.data import duplicates
from convlens.data.duplicates import DuplicateGroup, Duplicates


def test_equal_digests_are_grouped() -> None:
    digests = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2]], np.uint8)
    assert duplicates.exact_duplicates(digests) == [[0, 2, 5], [1, 4]]
    assert duplicates.exact_duplicates(digests[:2]) == []


def test_copies_under_one_label_and_under_several_are_told_apart() -> None:
    digests = np.array([[1], [2], [1], [3], [2], [1], [4]], np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 0, 1])
    assert duplicates.copies_to_drop(digests, labels) == ([[0, 2, 5]], [[1, 4]])
    assert duplicates.copies_to_drop(digests[:2], labels[:2]) == ([], [])


def test_copies_join_groups() -> None:
    digests = np.array([[1], [2], [1], [3], [2], [4]], np.uint8)
    alone, count = duplicates.groups_with_copies(digests, None)
    assert count == 2
    assert alone is not None
    assert [alone.index(group) for group in alone] == [0, 1, 0, 3, 1, 5]
    # Images 0 and 2 join x and y, images 1 and 4 join x and z; w stays alone.
    joined, count = duplicates.groups_with_copies(digests, list("xxywzz"))
    assert count == 2
    assert joined is not None
    assert [joined.index(group) for group in joined] == [0, 0, 0, 3, 0, 0]
    assert duplicates.groups_with_copies(digests[[0, 1, 3]], None) == (None, 0)
    assert duplicates.groups_with_copies(digests[[0, 1]], list("ab")) == (["a", "b"], 0)


def test_groups_across_splits_come_first_then_those_of_two_labels() -> None:
    columns = (list("abcdef"), ["train"] * 5 + ["test"], ["x", "x", "x", "y", "z", "z"])
    result = Duplicates.of([[0, 1], [2, 3], [4, 5]], *columns)
    assert (result.groups, result.across_splits, result.two_labels) == (3, 1, 1)
    assert result.listed == (
        DuplicateGroup(("e", "f"), ("train", "test"), ("z", "z")),
        DuplicateGroup(("c", "d"), ("train", "train"), ("x", "y")),
        DuplicateGroup(("a", "b"), ("train", "train"), ("x", "x")),
    )


def test_close_pairs_equal_those_of_an_exhaustive_search() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 1 << 62, 400).astype(np.uint64) << np.uint64(1)
    for i in range(0, 200, 2):  # flips 0 to 7 random bits of the neighbour
        bits = random.choice(63, i // 2 % 8, replace=False) + 1
        hashes[i + 1] = hashes[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64))
    hashes[300:320] = hashes[300]
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(apart <= duplicates.MAX_HASH_DISTANCE, 1))
    found, complete = duplicates.close_pairs(hashes)
    assert complete
    assert np.array_equal(found, expected)
    assert len(expected) > 240
    limited, complete = duplicates.close_pairs(hashes, max_pairs=50)
    assert not complete
    assert len(limited) == 50


def test_no_pairs_of_zero_or_one_image() -> None:
    for n in (0, 1):
        thumbs = np.zeros((n, duplicates.HASH_SIDE, duplicates.HASH_SIDE), np.uint8)
        pairs, complete = duplicates.near_duplicates(thumbs, np.zeros((n, 32), np.uint8))
        assert pairs.shape == (0, 2)
        assert complete


def test_search_of_many_hashes_is_not_quadratic() -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 20_000).astype(np.uint64)
    start = time.perf_counter()
    pairs, complete = duplicates.close_pairs(hashes)
    assert complete
    assert len(pairs) == 0
    assert time.perf_counter() - start < 5  # about 0.1 s; pairs one by one would take minutes
