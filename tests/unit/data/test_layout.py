"""Names of splits and classes, and the list of problems in an error."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from convlens.data.layout import (
    ClassChoice,
    Problem,
    is_neutral_name,
    is_unlabeled_name,
    list_examples,
    list_override,
    match_split_names,
    normalize_name,
    raise_problems,
    split_from_name,
)
from convlens.errors import DataError, UsageError
from convlens.recipe import load_recipe


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (
            "train Training train_set training_set trainset trainSet TRAINset Train_data",
            "train",
        ),
        ("train1 train2014 training.images trainImgs train_split the_train_set train_v2", "train"),
        (
            "val valid DEV validate validation val_set validset eval evaluation holdout hold-out",
            "val",
        ),
        ("hold_out HoldOut held-out dev1 development", "val"),
        ("test testing test_set test1 Test_data testImages TEST_IMAGES_2", "test"),
        ("cats trainers valley contest testament pretrained devil evaluate_me train_val 1 _", None),
        ("seg_train train_station bullet_train test_tubes xtrain", None),
    ],
)
def test_spellings_of_splits(names: str, split: str | None) -> None:
    assert {name: split_from_name(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["seg_train", "seg_test", "seg_pred"], {"seg_train": "train", "seg_test": "test"}),
        (["segTrain", "SegTest"], {"segTrain": "train", "SegTest": "test"}),
        (["train", "seg_test"], {"train": "train"}),
        (["train station", "test tubes", "car"], {}),
        (["bullet_train", "steam_train"], {}),
        (["flowers_test"], {"flowers_test": "test"}),
        (["flowers_test", "roses"], {}),
        (["train", "holdout"], {"train": "train", "holdout": "val"}),
        (["train", "valid", "hold out"], {"train": "train", "valid": "val", "hold out": "test"}),
        (["train", "test", "holdout"], {"train": "train", "test": "test", "holdout": "val"}),
        (
            ["training", "validation", "evaluation"],
            {"training": "train", "validation": "val", "evaluation": "test"},
        ),
        (["dev", "eval"], {"dev": "val", "eval": "test"}),
        (["train", "eval", "test"], {"train": "train", "eval": "val", "test": "test"}),
        (["cats", "dogs"], {}),
        ([], {}),
    ],
)
def test_names_of_splits_are_judged_together(names: list[str], splits: dict[str, str]) -> None:
    assert match_split_names(names) == splits


def test_neutral_and_unlabeled_names() -> None:
    assert all(map(is_neutral_name, ("images", "Data_set", "IMG", "photos 2")))
    assert not any(map(is_neutral_name, ("cats", "imagery", "my images")))
    assert all(map(is_unlabeled_name, ("seg_pred", "predictions", "Unlabeled images")))
    assert not any(map(is_unlabeled_name, ("predator", "test")))


NAMES = ("00012", "bird", "cat", "new folder")


@pytest.mark.parametrize(
    ("only", "without", "kept"),
    [
        ((), (), NAMES),
        (("cat", "12"), (), ("00012", "cat")),  # in the order of the set
        ((), ("12", "new folder"), ("bird", "cat")),
        (("cat", "bird"), ("bird",), ("cat",)),
    ],
)
def test_classes_are_chosen_by_name(
    only: tuple[str, ...], without: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    assert tuple(ClassChoice(only, without).keep(NAMES)) == kept


def test_unknown_classes_are_errors_with_near_misses() -> None:
    ClassChoice(("cat", "12"), ("bird",)).check(NAMES, "x")
    with pytest.raises(UsageError) as caught:
        ClassChoice(("birt", "cat"), ("Cat", "zebra")).check(NAMES, "x")
    assert caught.value.what == (
        "data.classes names classes that do not exist: birt; "
        "data.without names classes that do not exist: Cat, zebra"
    )
    assert caught.value.fix == "did you mean bird or cat?"
    with pytest.raises(UsageError) as caught:
        ClassChoice(("zzz",)).check(NAMES, "x")
    assert caught.value.fix == "the classes are: 00012, bird, cat, new folder"
    with pytest.raises(UsageError) as caught:
        ClassChoice(("cat, bird",)).check(NAMES, "x")
    assert caught.value.fix == "did you mean data.classes=[cat,bird]?"


@pytest.mark.parametrize(
    "names", [["cat", "dog-2"], ["a, b", "c#", '"'], ["new folder"], ["12", "no", ".net", "é"]]
)
def test_overrides_with_names_can_be_pasted_into_a_shell(names: list[str]) -> None:
    [override] = shlex.split(list_override("data.without", names))
    assert load_recipe("folder", [override]).data.without == tuple(names)


def test_class_names_are_composed_and_stripped() -> None:
    assert normalize_name(" cafe\u0301 ") == "caf\u00e9"


def test_only_problems_with_items_are_raised() -> None:
    raise_problems([Problem("nothing", [])], Path("here"))
    with pytest.raises(DataError, match="odd: a; even: b") as caught:
        raise_problems([Problem("odd", ["a"], "do this"), Problem("even", ["b"])], Path("here"))
    assert caught.value.fix == "do this"


def test_long_lists_are_cut() -> None:
    assert list_examples([str(i) for i in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
