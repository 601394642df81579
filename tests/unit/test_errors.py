"""Errors, and look-up by name with suggestions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from convlens.errors import (
    ConvlensError,
    UsageError,
    check_count,
    check_path,
    close_matches,
    closest_match,
    did_you_mean_suffix,
    lookup,
)

TABLE = {"cosine": 1, "constant": 2, "one-cycle": 3, "": 4}


def test_lookup_returns_the_entry() -> None:
    assert [lookup(TABLE, name, "schedule") for name in TABLE] == [1, 2, 3, 4]


def test_similar_names_are_sorted_by_similarity() -> None:
    assert close_matches("cosin", TABLE) == ["cosine"]
    assert close_matches("constan", TABLE)[0] == "constant"
    assert close_matches("zzz", TABLE) == []
    assert len(close_matches("a", ["a1", "a2", "a3", "a4"])) == 3


def test_unrelated_names_are_not_suggested() -> None:
    assert close_matches("nix", ["f_onemix", "phoenix-2"]) == []
    assert close_matches("FashionMNIST", ["mnist", "svhn"]) == []


@pytest.mark.parametrize("typed", ["Cifar-100", "CIFAR100", "cifar_100"])
def test_a_name_that_differs_only_in_case_and_punctuation_is_the_only_suggestion(
    typed: str,
) -> None:
    assert close_matches(typed, ["cifar10", "cifar100", "cifar10-cpu"]) == ["cifar100"]
    assert close_matches("--", ["++", "cifar100"]) == []


def test_mistyped_name_is_reported_with_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        lookup(TABLE, "Cosine", "schedule")
    assert caught.value.what == "unknown schedule 'Cosine'"
    assert caught.value.fix == "did you mean cosine?"
    assert caught.value.exit_code == 2


def test_all_names_are_listed_if_none_is_similar() -> None:
    with pytest.raises(UsageError, match="choose from: cosine, constant, one-cycle"):
        lookup(TABLE, "zzz", "schedule")


def test_closest_match_prefers_a_difference_in_case() -> None:
    assert closest_match("CAT", ["cart", "cat"]) == "cat"
    assert closest_match("cst", ["cart", "cat"]) == "cat"
    assert closest_match("zzz", ["cart", "cat"]) == ""


def test_suggestions_are_joined() -> None:
    assert did_you_mean_suffix(["a", "b"]) == " (did you mean a or b?)"
    assert did_you_mean_suffix([]) == ""


def test_text_of_an_error_has_place_and_remedy() -> None:
    error = ConvlensError("bad value", where="file.yaml, line 3", fix="change it")
    assert str(error) == "bad value\n  where: file.yaml, line 3\n  do:    change it"
    assert str(ConvlensError("bad value")) == "bad value"


def test_arguments_of_other_types_are_usage_errors() -> None:
    assert check_count("top_k", np.int64(3)) == 3
    assert check_count("seed", 0, minimum=0) == 0
    assert check_path("output", Path("a")) == check_path("output", "a") == Path("a")
    for wrong in (None, 2.0, "2", True, [1], {}, b"1", np.zeros(2)):
        with pytest.raises(UsageError, match="top_k: an object of type"):
            check_count("top_k", wrong)
    with pytest.raises(UsageError, match="top_k=0: must be at least 1"):
        check_count("top_k", 0)
    for wrong in (None, 2, True, [1], {}, b"1", np.zeros(2)):
        with pytest.raises(UsageError, match="output: an object of type"):
            check_path("output", wrong)
        with pytest.raises(UsageError, match="schedule: an object of type") as error:
            lookup({"cosine": 1}, wrong, "schedule")  # type: ignore[arg-type]
        assert error.value.fix == "choose from: cosine"
