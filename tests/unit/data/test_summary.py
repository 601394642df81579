"""The line that says how a data set was interpreted."""

from __future__ import annotations

import numpy as np
import pytest

from convlens.data.summary import (
    DatasetSummary,
    describe_classes,
    describe_fit,
    describe_split_sizes,
)


def test_a_summary_in_one_line() -> None:
    summary = DatasetSummary(
        classes=("cardboard", "glass"),
        counts=np.array([403, 2124]),
        splits={"train": 1769, "val": 379, "test": 379},
        origins={"val": "held out, stratified", "test": "held out, stratified"},
        channels=3,
        image_size=160,
        fit="crop",
        kept_area=0.75,
    )
    assert str(summary) == (
        "2 classes: cardboard 403, glass 2,124 · train 1,769 · val 379 · test 379 "
        "(held out, stratified) · 3 channels · 160 px, crop keeps 75% of the area"
    )


def test_of_many_classes_only_the_largest_and_smallest_are_listed() -> None:
    names = [f"c{i:02}" for i in range(96)]
    counts = np.arange(96) * 10 + 50
    counts[[0, 1]] = 1500, 3
    assert describe_classes(names, counts) == (
        "96 classes: largest c00 1,500, c95 1,000, c94 990; smallest c03 80, c02 70, c01 3; "
        "and 90 more"
    )
    assert (
        describe_classes(names, np.full(96, 600)) == "96 classes of 600 images: c00, c01, c02, ..."
    )
    assert describe_classes(["a"], np.array([7])) == "1 class: a 7"
    long = describe_classes(["x" * 300, "b"], np.array([1, 2]))
    assert long == f"2 classes: {'x' * 40}... 1, b 2"


@pytest.mark.parametrize("n", [1, 10, 11, 10_000])
def test_the_line_stays_short(n: int) -> None:
    names = [f"{i}" + "n" * 250 for i in range(n)]
    assert len(describe_classes(names, np.arange(n) + 1)) < 600


def test_neighboring_splits_share_their_origin() -> None:
    sizes = {"train": 10, "val": 3, "test": 1000}
    given = dict.fromkeys(sizes, "given by the data set")
    assert describe_split_sizes(sizes, given) == (
        "train 10 · val 3 · test 1,000 (given by the data set)"
    )
    mixed = {"val": "fold 0 of 5, stratified", "test": "given by the data set"}
    assert describe_split_sizes(sizes, mixed) == (
        "train 10 · val 3 (fold 0 of 5, stratified) · test 1,000 (given by the data set)"
    )
    assert describe_split_sizes({"train": 4}, {}) == "train 4"


def test_the_fit_is_described_unless_images_are_square() -> None:
    assert describe_fit("crop", 0.05) == ", crop keeps 5% of the area"
    assert describe_fit("pad", 1.0) == ", padded to squares"
    assert describe_fit("stretch", 1.0) == ", stretched to squares"
    assert describe_fit("crop", 1.0) == ""
    for fit in ("crop", "pad", "stretch"):
        assert describe_fit(fit, None) == ""
