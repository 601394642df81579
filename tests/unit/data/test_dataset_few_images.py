"""Few images: folds, a total per class, no validation split; and training without one."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from convlens import ImageClassifier, Run, recipe, serialization
from convlens.data.dataset import Data, load_data
from convlens.engine.loop import TrainState
from convlens.errors import DataError, UsageError
from convlens.recipe import DataConfig
from convlens.training import checkpoint, train
from convlens.training.checkpoint import EpochClock
from convlens.training.resolve import validate_recipe
from helpers.commands import DIGITS, here, pictures, refused
from helpers.support import begin, same, tiny

BARE = ("data.val_fraction=0", "train.keep=last")


def digits(**values: Any) -> Data:
    return load_data(DataConfig(name="digits", **values), memory_budget=1 << 30)


def own(name: str | Path, **values: Any) -> Data:
    return load_data(DataConfig(name=str(name), **values), memory_budget=1 << 30)


# What is held out


def test_each_image_is_out_of_its_fold_once_and_test_is_always_the_same() -> None:
    test = digits().unseal_test().ids
    parts = [digits(folds=4, fold=k) for k in range(4)]
    out = [i for data in parts for i in data.val.ids]
    assert len(out) == len(set(out)) == 1797 - len(test)
    for data in parts:
        assert data.unseal_test().ids == test
        assert {*data.train.ids, *data.val.ids} == set(out)
        assert len(data.train) + len(data.val) == len(out)
    assert [len(data.val) for data in parts] == [382, 382, 382, 381]
    assert "fold 3 of 4, stratified, seed 0" in parts[3].how["val"]
    assert len({data.fingerprint for data in parts}) == 4
    assert set(digits(folds=4, seed=1).val.ids) != set(parts[0].val.ids)


def test_folds_of_a_csv_keep_groups_together() -> None:
    pictures(Path("x"), {"a": 24, "b": 24})
    lines = [f"x/{c}/{i:03}.png,{c},{i // 4}" for c in "ab" for i in range(24)]
    Path("l.csv").write_text("path,label,who\n" + "\n".join(lines))
    who = dict(line.split(",")[::2] for line in lines)
    seen: list[str] = []
    for k in range(2):
        data = own("l.csv", group="who", folds=2, fold=k)
        groups = [{who[i] for i in s.ids} for s in (data.train, data.val, data.unseal_test())]
        assert not groups[0] & groups[1]
        assert not (groups[0] | groups[1]) & groups[2]
        assert "groups by 'who' kept together" in data.how["val"]
        seen += data.val.ids
    assert len(seen) == len(set(seen)) == 48 - len(data.unseal_test())


def test_a_total_per_class_counts_training_and_validation() -> None:
    whole, few = digits(), digits(total_per_class=20)
    assert few.unseal_test().ids == whole.unseal_test().ids
    both = np.bincount(few.train.labels) + np.bincount(few.val.labels)
    assert both.tolist() == [20] * 10
    assert len(few.val) == 30
    assert not {*few.train.ids, *few.val.ids} & set(few.unseal_test().ids)
    assert (
        few.how["train"] == "170 of 200 images (20 of each class of 1,527): what was not held out"
    )
    assert few.how["val"].startswith("30 of 200 images (20 of each class of 1,527) held out (15%")
    more, other = digits(total_per_class=30), digits(total_per_class=20, seed=1)
    assert {*few.train.ids, *few.val.ids} < {*more.train.ids, *more.val.ids}
    assert {*few.train.ids, *few.val.ids} != {*other.train.ids, *other.val.ids}
    with pytest.raises(DataError, match=r"data\.total_per_class=200") as caught:
        digits(total_per_class=200)
    assert "at most data.total_per_class=" in caught.value.fix


def test_a_total_per_class_in_folds() -> None:
    parts = [digits(total_per_class=6, folds=3, fold=k) for k in range(3)]
    assert [np.bincount(data.val.labels).tolist() for data in parts] == [[2] * 10] * 3
    assert [np.bincount(data.train.labels).tolist() for data in parts] == [[4] * 10] * 3


def test_without_a_validation_split_all_but_test_is_trained_on() -> None:
    whole, bare = digits(), digits(val_fraction=0)
    assert len(bare.val) == 0
    assert set(bare.train.ids) == {*whole.train.ids, *whole.val.ids}
    assert bare.unseal_test().ids == whole.unseal_test().ids
    assert bare.held_out == {"val": [], "test": whole.held_out["test"]}
    assert bare.how["val"] == "none (data.val_fraction=0)"
    assert bare.how["train"] == "1,527 of 1,797 training images: what was not held out"


def test_validation_images_of_the_source_are_trained_on_where_it_is_drawn_anew() -> None:
    root = Path("photos")
    pictures(root / "train", {"red": 12, "green": 12})
    pictures(root / "val", {"red": 4, "green": 4}, first=100)
    plain, bare = own(root), own(root, val_fraction=0)
    assert len(plain.val) == 8
    assert set(bare.train.ids) == {*plain.train.ids, *plain.val.ids}
    # The test split is drawn from the train part in either case: a refit meets no new images.
    assert bare.unseal_test().ids == plain.unseal_test().ids
    assert all(i.startswith("train") for i in bare.unseal_test().ids)
    assert "the source's own validation images among them" in bare.how["train"]
    pixels = bare.train.rows.gather(bare.train.labels.new_tensor([0, len(bare.train) - 1]))
    first, last = bare.train.labels[0], bare.train.labels[-1]
    for image, label in zip(pixels, (first, last), strict=True):
        brightest = image.float().mean((1, 2)).argmax()
        assert bare.classes[label] == ("red", "green", "blue")[brightest]
    seen = [i for k in range(2) for i in own(root, folds=2, fold=k).val.ids]
    assert sorted(seen) == sorted(bare.train.ids)
    few = own(root, total_per_class=5)
    assert len(few.train) + len(few.val) == 10


def test_the_test_split_of_tiny_classes_is_that_of_a_refit() -> None:
    root = pictures(Path("photos"), {"red": 2, "green": 30})
    assert own(root, val_fraction=0).unseal_test().ids == own(root).unseal_test().ids


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
def test_keys_that_contradict_each_other(overrides: list[str], says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        validate_recipe(recipe.load_recipe("digits", overrides))
    assert all(text in str(caught.value) for text in says)
    refused(here("train", "digits", *overrides), 2, *says)
    assert not Path("models").exists()


def test_the_audit_shows_folds_and_a_missing_validation_split() -> None:
    bare = here("audit", "digits", "val_fraction=0", "--json").json
    assert bare["counts"]["0"].keys() == {"train", "test"}
    fold = here("audit", "digits", "folds=3", "fold=1", "--json").json
    assert sum(of["val"] for of in fold["counts"].values()) == 509


# Training without validation


@pytest.mark.figures
def test_a_run_without_validation_from_end_to_end() -> None:
    done = here("train", *DIGITS, *BARE, "--name", "bare")
    assert done.code == 0, done.err
    assert "epoch   2/2" in done.err
    assert "validation" not in done.err + done.out
    assert "*" not in done.err
    run = Run.load("bare")
    with (run.path / "metrics.csv").open(newline="") as file:
        assert [row["val_loss"] + row["val_accuracy"] for row in csv.DictReader(file)] == ["", ""]
    assert all(math.isnan(row["val_loss"]) for row in run.metrics)
    assert (Path("plots/bare") / "curves.png").is_file()
    model_metadata = serialization.read_model_file(run.path / "model.safetensors")[1]
    assert model_metadata["chosen"] == {"epoch": 2, "validated": False, "rule": "last epoch"}
    assert [look["split"] for look in run.results] == ["test"]
    refused(here("evaluate", "bare", "--split", "val"), 3, "no validation split", "--data")
    # Seeds of it, too: the table has nothing to say of validation.
    table = here("train", *DIGITS, *BARE, "train.epochs=1", "--seeds", "2", "--name", "two")
    assert table.code == 0, table.err
    assert "validation %" in table.out


def test_validation_changes_nothing_about_the_training() -> None:
    """The same images trained on with and without looking at others after each epoch."""
    asked = tiny("train.keep=last", "train.epochs=2")
    setup, place = begin(asked, "with")
    rows, kept = train.fit(setup, place, quiet=True)
    bare, other = begin(asked, "without")
    bare.recipe = bare.recipe.replace(**{"data.val_fraction": 0})
    its_rows, its_kept = train.fit(bare, other, quiet=True)
    assert kept == its_kept == 2
    same(
        serialization.read_model_file(place.model_path)[0],
        serialization.read_model_file(other.model_path)[0],
    )
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in its_rows]
    assert math.isnan(its_rows[-1]["val_accuracy"])


def test_a_run_without_validation_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tiny(*BARE)
    setup, place = begin(asked, "whole")
    train.fit(setup, place, quiet=True)
    real, saves = checkpoint.save_checkpoint, []

    def save(*arguments: Any) -> None:
        real(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        patch.setattr(checkpoint, "SAVE_INTERVAL_S", 0.0)
        with pytest.raises(MemoryError):
            train.fit(*begin(asked, "stopped"), quiet=True)
    setup, other = begin(asked, "stopped")
    rows, kept = train.fit(setup, other, quiet=True)
    assert (len(rows), kept) == (3, 3)
    assert all(row["cpu_seconds"] > 0 for row in rows)
    same(
        serialization.read_model_file(place.model_path)[0],
        serialization.read_model_file(other.model_path)[0],
    )


def test_an_estimator_may_train_on_all_it_gets() -> None:
    images, labels = load_digits(return_X_y=True)
    images = images[:100].reshape(-1, 8, 8) / 16
    options = {"train.keep": "last", "model.widths": [4]}
    bare = ImageClassifier(epochs=1, overrides=options, val_fraction=0).fit(images, labels[:100])
    assert math.isnan(bare.history_[-1]["val_loss"])
    with pytest.raises(UsageError, match=r"train\.keep=best needs one"):
        ImageClassifier(epochs=1, val_fraction=0).fit(images, labels[:100])


# Time


def test_the_clock_goes_on_from_a_stopped_epoch() -> None:
    clock = EpochClock(TrainState(seconds=100.0, cpu_seconds=50.0))
    wall, cpu = clock.read()
    assert 100 <= wall < 160
    assert 50 <= cpu < 110
    sum(range(100_000))
    later, spent = clock.read()
    assert later > wall
    assert spent > cpu
    clock.start()
    assert clock.read()[0] < 60
