"""Errors, and look-up by name with suggestions."""

from __future__ import annotations

import pytest

from convlens.errors import (
    ConvlensError,
    UsageError,
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
