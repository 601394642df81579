"""Class names in several forms: matched one to one, renamed, and recognized as look-alikes."""

from __future__ import annotations

import numpy as np
import pytest

from convlens.data.class_names import (
    describe_similar,
    fold_class_name,
    is_missing_label,
    match_class_names,
    may_be_missing_label,
    rename_classes,
    similar_class_names,
    sort_classes,
    strip_invisible,
    unknown_classes,
)
from convlens.data.types import DataSource, FilePaths, Part
from convlens.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat\u200b", "cat"),
        ("\ufeffcat ", "cat"),
        ("c\u2060at", "cat"),
        ("\u200ecat\u200f\xa0", "cat"),
        # Joiners belong to words of Persian and to emoji, except at the ends.
        ("می\u200cخواهم\u200c", "می\u200cخواهم"),
        ("👨\u200d🌾", "👨\u200d🌾"),
    ],
)
def test_invisible_characters_are_removed(name: str, expected: str) -> None:
    assert strip_invisible(name) == expected


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["cat", "dog"], []),
        (["cat", "Cat", "dog"], [["cat", "Cat"]]),
        (["hot dog", "hot_dog", "hotdog", "dog"], [["hot dog", "hot_dog", "hotdog"]]),
        (["cat", "c\u0430t"], [["cat", "c\u0430t"]]),
        (["1", "01", "1.0", "10"], [["1", "01", "1.0"]]),
        (["1.5", "15"], []),
    ],
)
def test_similar_names_are_grouped(names: list[str], groups: list[list[str]]) -> None:
    assert similar_class_names(names) == groups


def test_letters_of_other_scripts_are_named() -> None:
    assert describe_similar(["cat", "c\u0430t"]) == "'cat' and 'c\u0430t' (with Cyrillic letters)"


@pytest.mark.parametrize(
    ("name", "folded"), [("00012", "12"), ("12.0", "12"), ("-0", "0"), ("Ä", "ä")]
)
def test_names_are_folded(name: str, folded: str) -> None:
    assert fold_class_name(name) == folded


@pytest.mark.parametrize(
    ("names", "known", "matches"),
    [
        (["12", "16"], ["00012", "00016", "00017"], {"12": "00012", "16": "00016"}),
        (["cat", "DOG"], ["Cat", "dog"], {"cat": "Cat", "DOG": "dog"}),
        # Equal names have priority over others that differ in case.
        (["cat"], ["Cat", "cat"], {"cat": "cat"}),
    ],
)
def test_names_that_differ_in_form_are_matched(
    names: list[str], known: list[str], matches: dict[str, str]
) -> None:
    assert match_class_names(names, known, "set") == matches


@pytest.mark.parametrize(
    ("names", "known", "unknown"),
    [
        (["Cat", "cat"], ["cat"], "1 of the classes: Cat (it has cat)"),
        (["012"], ["12", "0012"], "1 of the classes: 012"),
        (["kat", "dog"], ["cat", "dog"], "1 of the classes: kat (it has cat)"),
    ],
)
def test_names_that_match_no_class_or_two_are_refused(
    names: list[str], known: list[str], unknown: str
) -> None:
    with pytest.raises(DataError) as caught:
        match_class_names(names, known, "set")
    assert unknown in caught.value.what
    assert "data.rename={" in caught.value.fix


def make_source(labels: list[int]) -> DataSource:
    part = Part(FilePaths(["a", "b", "c"]), np.array(labels), ["a", "b", "c"], ["g", "g", "h"])
    return DataSource("set", ("Cat", "cat", "dog"), {"train": part}, ("note",))


def test_renamed_classes_are_merged_and_sorted() -> None:
    source = rename_classes(make_source([0, 1, 2]), {"Cat": "cat", "dog": "a dog"})
    assert source.classes == ("a dog", "cat")
    assert source.parts["train"].labels.tolist() == [1, 1, 0]
    assert source.parts["train"].groups == ["g", "g", "h"]
    assert source.notes == ("note",)


def test_an_unknown_class_can_not_be_renamed() -> None:
    with pytest.raises(UsageError, match="no class 'dogs'") as caught:
        rename_classes(make_source([0, 1, 2]), {"dogs": "cat"})
    assert caught.value.fix == "did you mean dog?"


def test_words_for_a_missing_label_are_recognized() -> None:
    assert all(map(is_missing_label, ("", "nan", "NaN", "None", "null", "N/A", "<NA>")))
    assert not any(map(is_missing_label, ("none", "cat", "nanny", "0", "N")))
    assert all(map(may_be_missing_label, ("none", "?", "Unlabeled")))
    assert not any(map(may_be_missing_label, ("cat", "nones")))


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["010", "9"], ("9", "010")),
        (["10", "9", "n2"], ("10", "9", "n2")),
        ([], ()),
    ],
)
def test_classes_are_sorted_by_number_if_all_are_numbers(
    names: list[str], order: tuple[str, ...]
) -> None:
    assert sort_classes(names) == order


def test_numbers_beside_names_are_explained() -> None:
    problem = unknown_classes("val", ["0", "1"], ["cat", "dog"])
    assert problem.items == ["0, 1 (numbers; train has names: cat, dog)"]
    assert """'data.rename={"0": "cat"}'""" in problem.fix
    assert unknown_classes("val", ["7"], ["1", "2"]).items == ["7"]
    assert unknown_classes("val", ["7", "x"], ["cat"]).items == ["7", "x"]
    assert not unknown_classes("val", [], ["cat"]).items
    assert not unknown_classes("val", [], ["cat"]).fix
    assert unknown_classes("val", ["7"], []).items == ["7"]


def test_similar_classes_of_another_split_can_be_renamed() -> None:
    problem = unknown_classes("val", ["cat", "DOG", "wolf"], ["Cat", "dog"])
    assert problem.items == ["cat (train has Cat)", "DOG (train has dog)", "wolf"]
    assert problem.fix == (
        """if they are the same classes: 'data.rename={"cat": "Cat", "DOG": "dog"}'"""
    )
    quoted = unknown_classes("val", ["cat"], ["Cat"], repr)
    assert quoted.items == ["'cat' (train has 'Cat')"]
    assert quoted.fix == """if it is the same class: 'data.rename={"cat": "Cat"}'"""
    numbers = unknown_classes("val", ["12", "21"], ["00012", "2"])
    assert numbers.items == ["12 (train has 00012)", "21"]
    names = [f"class {letter}" for letter in "abcdefg"]
    many = unknown_classes("val", [name.upper() for name in names], names)
    assert many.fix.count('": "') == 5
    assert many.fix.endswith("}' ...")
