"""Names of splits and classes, and the list of problems in an error."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from convlens.data.layout import (
    ClassChoice,
    Problem,
    group_by_label,
    is_annotation_name,
    is_neutral_name,
    is_unlabeled_name,
    labels_from_names,
    list_examples,
    list_override,
    match_split_names,
    name_without_split,
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
        ("trainval train_val TrainVal trainval_set train-and-val", "train"),
        (
            "train1 train2014 training.images trainImgs train_split the_train_set train_v2",
            "train",
        ),
        (
            "val valid DEV validate validation val_set validset eval evaluation holdout hold-out",
            "val",
        ),
        ("hold_out HoldOut hold-outset HOLD-OUTset held-out dev1 development", "val"),
        ("test testing test_set test1 Test_data testImages TEST_IMAGES_2", "test"),
        ("Training Trainingsdaten TrainingsBilder trainingssatz Trainingsmenge", "train"),
        ("Validierung validierungsdaten Validierungs_Bilder Validierungsdatensatz", "val"),
        ("Testdaten TESTBILDER Testdatensatz", "test"),
        ("apprentissage entraînement Entrainement donnees_d_apprentissage", "train"),
        ("validation jeu_de_validation évaluation", "val"),
        ("test jeu-de-test images_de_test", "test"),
        ("entrenamiento datos_de_entrenamiento addestramento treino treinamento", "train"),
        ("validación validacion validazione convalida validação dados_de_validação", "val"),
        ("prueba pruebas conjunto_de_prueba dati_di_prova teste testes", "test"),
        # Decomposed, as macOS may write it.
        ("entrai\u0302nement", "train"),
        ("train_de test_fr Bildertraining proben valide testo", None),
        (
            "cats trainers valley contest testament pretrained devil evaluate_me train_test 1 _",
            None,
        ),
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
        (["trainval", "test"], {"trainval": "train", "test": "test"}),
        (["train", "val", "trainval"], {"train": "train", "val": "val"}),
        (["trainA", "testA"], {"trainA": "train", "testA": "test"}),
        (
            ["Training", "Validierung", "Test"],
            {"Training": "train", "Validierung": "val", "Test": "test"},
        ),
        (
            ["train", "validación", "evaluación"],
            {"train": "train", "validación": "val", "evaluación": "test"},
        ),
        (["katzen_training", "hunde_prueba"], {}),
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


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        ("cats_train", "cats"),
        ("Train - Golden Retriever", "Golden Retriever"),
        ("trainA", "A"),
        ("catsTest", "cats"),
        ("TRAINset_b", "b"),
        ("class1_train_2", "class1 2"),
        ("cats", "cats"),
    ],
)
def test_the_word_for_a_split_is_cut_off(name: str, rest: str) -> None:
    assert name_without_split(name) == rest


def test_names_of_annotations() -> None:
    assert all(
        map(is_annotation_name, ("annotations", "Labels", "trimaps", "gt_test", "mask_images"))
    )
    assert not any(map(is_annotation_name, ("images", "no_mask", "label peeling", "test", "cats")))


def test_labels_in_names_are_words_or_numbers_before_a_number() -> None:
    assert group_by_label(["cat.0.jpg", "cat_1.png", "big-dog 12.jpg", "dog (3).jpg"]) == {
        "cat": ["cat.0.jpg", "cat_1.png"],
        "big-dog": ["big-dog 12.jpg"],
        "dog": ["dog (3).jpg"],
    }
    assert group_by_label(["0_12.jpg", "1-3.jpg"]) == {"0": ["0_12.jpg"], "1": ["1-3.jpg"]}
    for name in (
        "cat0.jpg",
        "cat.jpg",
        "7.jpg",
        "IMG_7.jpg",
        "images-7.jpg",
        "a1_7.jpg",
        "a_7b.jpg",
    ):
        assert group_by_label(["cat.0.jpg", name]) is None
    assert group_by_label(["cat.0.jpg", "0_7.jpg"]) is None
    two = ["cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.jpg"]
    assert set(labels_from_names(two)) == {"cat", "dog"}
    assert not labels_from_names(two[:3])  # a single image of a class
    assert not labels_from_names(two[:2])
    assert not labels_from_names([*two, "Cat.7.jpg", "Cat.8.jpg"])
    assert not labels_from_names([])


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (range(3), range(10, 15), {"0", "1", "2"}),
        (range(1, 4), range(4), {"1", "2", "3"}),
        (range(2017, 2020), range(5), set()),  # years
        ([0, 2], range(5), set()),  # a class is missing
        (range(10), range(3), set()),  # the second number may be the class
        (range(3), range(3), set()),
    ],
)
def test_numbers_in_names_are_labels_if_they_can_only_be_classes(
    labels: Iterable[int], numbers: Iterable[int], classes: set[str]
) -> None:
    assert set(labels_from_names(f"{i}_{j}.jpg" for i in labels for j in numbers)) == classes


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
