"""Look-up by name: the entry, or an error that helps."""

from __future__ import annotations

import pytest

from convlens.errors import UsageError, close_matches, lookup

TABLE = {"cosine": 1, "constant": 2, "one-cycle": 3, "": 4}


def test_the_entry_of_that_very_name() -> None:
    assert [lookup(TABLE, name, "schedule") for name in TABLE] == [1, 2, 3, 4]


def test_near_misses_best_first() -> None:
    assert close_matches("cosin", TABLE) == ["cosine"]
    assert close_matches("constan", TABLE)[0] == "constant"
    assert close_matches("zzz", TABLE) == []
    assert len(close_matches("a", ["a1", "a2", "a3", "a4"])) == 3


def test_a_slip_is_answered_with_the_name_meant() -> None:
    with pytest.raises(UsageError) as caught:
        lookup(TABLE, "Cosine", "schedule")
    assert caught.value.what == "unknown schedule 'Cosine'"
    assert caught.value.fix == "did you mean cosine?"
    assert caught.value.exit_code == 2


def test_without_near_misses_all_names_are_given() -> None:
    with pytest.raises(UsageError, match="choose from: cosine, constant, one-cycle"):
        lookup(TABLE, "zzz", "schedule")
