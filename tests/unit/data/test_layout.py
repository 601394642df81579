"""Names of splits and classes, and the list of problems in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlens.data.layout import (
    Problem,
    list_examples,
    normalize_name,
    raise_problems,
    split_from_name,
)
from convlens.errors import DataError


def test_spellings_of_splits() -> None:
    names = ("Training", " valid ", "DEV", "testing", "cats")
    assert [split_from_name(name) for name in names] == ["train", "val", "val", "test", None]


def test_class_names_are_composed_and_stripped() -> None:
    assert normalize_name(" cafe\u0301 ") == "caf\u00e9"


def test_only_problems_with_items_are_raised() -> None:
    raise_problems([Problem("nothing", [])], Path("here"))
    with pytest.raises(DataError, match="odd: a; even: b") as caught:
        raise_problems([Problem("odd", ["a"], "do this"), Problem("even", ["b"])], Path("here"))
    assert caught.value.fix == "do this"


def test_long_lists_are_cut() -> None:
    assert list_examples([str(i) for i in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
