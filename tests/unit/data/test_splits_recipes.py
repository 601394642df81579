"""Splits of real data sets as recipes ask for them: folds, a total per class, no validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convlens import recipe
from convlens.data.dataset import Data, load_data
from convlens.errors import DataError, UsageError
from convlens.recipe import DataConfig
from convlens.training.resolve import validate_recipe
from helpers.commands import here, pictures, refused

BARE = ("data.val_fraction=0", "train.keep=last")


def digits(**values: Any) -> Data:
    return load_data(DataConfig(name="digits", **values), memory_budget=1 << 30)


def load(name: str | Path, **values: Any) -> Data:
    return load_data(DataConfig(name=str(name), **values), memory_budget=1 << 30)


def test_each_image_is_validated_in_one_fold_and_test_is_the_same_in_all() -> None:
    test = digits().unseal_test().ids
    parts = [digits(folds=4, fold=k) for k in range(4)]
    out = [i for data in parts for i in data.val.ids]
    assert len(out) == len(set(out)) == 1797 - len(test)
    for data in parts:
        assert data.unseal_test().ids == test
        assert {*data.train.ids, *data.val.ids} == set(out)
        assert len(data.train) + len(data.val) == len(out)
    assert [len(data.val) for data in parts] == [382, 382, 382, 381]
    assert "fold 3 of 4, stratified, seed 0" in parts[3].split_descriptions["val"]
    assert len({data.fingerprint for data in parts}) == 4
    assert set(digits(folds=4, seed=1).val.ids) != set(parts[0].val.ids)


def test_folds_of_a_csv_keep_groups_together() -> None:
    pictures(Path("x"), {"a": 24, "b": 24})
    lines = [f"x/{c}/{i:03}.png,{c},{i // 4}" for c in "ab" for i in range(24)]
    Path("l.csv").write_text("path,label,who\n" + "\n".join(lines))
    who = dict(line.split(",")[::2] for line in lines)
    seen: list[str] = []
    for k in range(2):
        data = load("l.csv", group="who", folds=2, fold=k)
        groups = [{who[i] for i in s.ids} for s in (data.train, data.val, data.unseal_test())]
        assert not groups[0] & groups[1]
        assert not (groups[0] | groups[1]) & groups[2]
        assert "groups by 'who' kept together" in data.split_descriptions["val"]
        seen += data.val.ids
    assert len(seen) == len(set(seen)) == 48 - len(data.unseal_test())


def test_total_per_class_counts_training_and_validation_images() -> None:
    full, selected = digits(), digits(total_per_class=20)
    assert selected.unseal_test().ids == full.unseal_test().ids
    both = np.bincount(selected.train.labels) + np.bincount(selected.val.labels)
    assert both.tolist() == [20] * 10
    assert len(selected.val) == 30
    assert not {*selected.train.ids, *selected.val.ids} & set(selected.unseal_test().ids)
    assert (
        selected.split_descriptions["train"]
        == "170 of 200 images (20 of each class of 1,527): those not held out"
    )
    assert selected.split_descriptions["val"].startswith(
        "30 of 200 images (20 of each class of 1,527) held out (15%"
    )
    more, other_seed = digits(total_per_class=30), digits(total_per_class=20, seed=1)
    assert {*selected.train.ids, *selected.val.ids} < {*more.train.ids, *more.val.ids}
    assert {*selected.train.ids, *selected.val.ids} != {*other_seed.train.ids, *other_seed.val.ids}
    with pytest.raises(DataError, match=r"data\.total_per_class=200") as caught:
        digits(total_per_class=200)
    assert "at most data.total_per_class=" in caught.value.fix


def test_total_per_class_with_folds() -> None:
    parts = [digits(total_per_class=6, folds=3, fold=k) for k in range(3)]
    assert [np.bincount(data.val.labels).tolist() for data in parts] == [[2] * 10] * 3
    assert [np.bincount(data.train.labels).tolist() for data in parts] == [[4] * 10] * 3


def test_without_validation_all_but_test_images_are_trained_on() -> None:
    full, bare = digits(), digits(val_fraction=0)
    assert len(bare.val) == 0
    assert set(bare.train.ids) == {*full.train.ids, *full.val.ids}
    assert bare.unseal_test().ids == full.unseal_test().ids
    assert bare.held_out == {"val": [], "test": full.held_out["test"]}
    assert bare.split_descriptions["val"] == "none (data.val_fraction=0)"
    assert bare.split_descriptions["train"] == "1,527 of 1,797 training images: those not held out"


def test_source_validation_images_join_training_if_validation_is_drawn() -> None:
    root = Path("photos")
    pictures(root / "train", {"red": 12, "green": 12})
    pictures(root / "val", {"red": 4, "green": 4}, first=100)
    default, bare = load(root), load(root, val_fraction=0)
    assert len(default.val) == 8
    assert set(bare.train.ids) == {*default.train.ids, *default.val.ids}
    # The test split is drawn from the training part in both cases, so a refit keeps it.
    assert bare.unseal_test().ids == default.unseal_test().ids
    assert all(i.startswith("train") for i in bare.unseal_test().ids)
    assert "including the source's own validation images" in bare.split_descriptions["train"]
    pixels = bare.train.rows.gather(bare.train.labels.new_tensor([0, len(bare.train) - 1]))
    first, last = bare.train.labels[0], bare.train.labels[-1]
    for image, label in zip(pixels, (first, last), strict=True):
        brightest = image.float().mean((1, 2)).argmax()
        assert bare.classes[label] == ("red", "green", "blue")[brightest]
    seen = [i for k in range(2) for i in load(root, folds=2, fold=k).val.ids]
    assert sorted(seen) == sorted(bare.train.ids)
    selected = load(root, total_per_class=5)
    assert len(selected.train) + len(selected.val) == 10


def test_refit_has_the_same_test_split_for_tiny_classes() -> None:
    root = pictures(Path("photos"), {"red": 2, "green": 30})
    assert load(root, val_fraction=0).unseal_test().ids == load(root).unseal_test().ids


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.fold=1"], ["data.fold=1 without data.folds"]),
        (["data.folds=3", "data.fold=3"], ["data.fold=3", "counted from 0"]),
        (["data.folds=3", "data.val_fraction=0"], ["a fold is a validation split"]),
        (["data.val_fraction=0"], ["train.keep=best needs one"]),
        ((*BARE, "train.patience=2"), ["train.patience=2 needs one"]),
        (["data.val_fraction=0", "data.fold=1"], ["without data.folds", "train.keep=best"]),
    ],
)
def test_contradicting_keys_are_refused(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        validate_recipe(recipe.load_recipe("digits", overrides))
    assert all(text in str(caught.value) for text in says)
    refused(here("train", "digits", *overrides), 2, *says)
    assert not Path("models").exists()


def test_audit_shows_folds_and_missing_validation_split() -> None:
    bare = here("audit", "digits", "val_fraction=0", "--json").json
    assert bare["counts"]["0"].keys() == {"train", "test"}
    fold = here("audit", "digits", "folds=3", "fold=1", "--json").json
    assert sum(of["val"] for of in fold["counts"].values()) == 509
