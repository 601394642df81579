"""How folders are read as splits and classes: as people have them, or an error with the choices."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from convlens.data.folder_layout import (
    Layout,
    LayoutOptions,
    find_layout,
)
from convlens.data.layout import ClassChoice, split_from_name
from convlens.data.sources import find_source
from convlens.errors import DataError
from helpers.datasets import write_image

Counts = dict[str, dict[str, int]]  # split -> class -> number of images


def write_files(root: Path, counts: dict[str, int], files: Collection[str] = ()) -> Path:
    """Write that many images into each folder, and single files: images if they end with .png."""
    content = write_image(root.parent / "one.png").read_bytes()
    root.mkdir()
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}.png").write_bytes(content)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content if file.endswith(".png") else b"x")
    return root


def read(
    root: Path,
    layout: str = "auto",
    level: str = "auto",
    *,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    known: tuple[str, ...] = (),
    tested: bool = False,
) -> tuple[Counts, tuple[str, ...]]:
    """Return the images of each class of each split, and the notes."""
    source = find_source(
        str(root),
        layout=LayoutOptions(layout, level, known),
        choice=ClassChoice(only, without),
        tested=tested,
    )
    counts: Counts = {}
    for split, part in source.parts.items():
        names = [source.classes[label] for label in part.labels]
        counts[split] = {name: names.count(name) for name in dict.fromkeys(names)}
    return counts, source.notes


# The sets that people unpack and point at (the fault log's names).
PETS = {"cats": 3, "dogs": 2}
READINGS: dict[str, tuple[dict[str, int], list[str], Counts, list[str]]] = {
    "intel": (
        {
            "seg_train/seg_train/sea": 3,
            "seg_train/seg_train/forest": 2,
            "seg_test/seg_test/sea": 1,
            "seg_test/seg_test/forest": 1,
            "seg_pred/seg_pred": 4,
        },
        [],
        {"train": {"forest": 2, "sea": 3}, "test": {"forest": 1, "sea": 1}},
        [
            "splits: train is seg_train/seg_train, test is seg_test/seg_test",
            "seg_pred/seg_pred is not used: 4 images without class folders",
        ],
    ),
    "cat-and-dog": (
        {
            "training_set/training_set/cats": 3,
            "training_set/training_set/dogs": 2,
            "test_set/test_set/cats": 1,
        },
        [],
        {"train": PETS, "test": {"cats": 1}},
        ["splits: train is training_set/training_set, test is test_set/test_set"],
    ),
    "splits in other languages": (
        {
            "train/cats": 3,
            "train/dogs": 2,
            "Validierung/cats": 1,
            "Validierung/dogs": 1,
            "datos de prueba/dogs": 1,
        },
        [],
        {"train": PETS, "val": {"cats": 1, "dogs": 1}, "test": {"dogs": 1}},
        ["splits: train is train, val is Validierung, test is datos de prueba"],
    ),
    "capital letters": (
        {"Train_data/cats": 3, "Train_data/dogs": 2, "Test_data/dogs": 1},
        [],
        {"train": PETS, "test": {"dogs": 1}},
        ["splits: train is Train_data, test is Test_data"],
    ),
    "own validation split": (
        {"train/cats": 3, "train/dogs": 2, "validate/dogs": 1},
        [],
        {"train": PETS, "val": {"dogs": 1}},
        ["splits: train is train, val is validate"],
    ),
    "holdout": (
        {"train/cats": 3, "train/dogs": 2, "hold-out/dogs": 1},
        [],
        {"train": PETS, "val": {"dogs": 1}},
        ["splits: train is train, val is hold-out"],
    ),
    "holdout beside validation": (
        {"train/cats": 3, "train/dogs": 2, "val/cats": 1, "holdout/dogs": 1},
        [],
        {"train": PETS, "val": {"cats": 1}, "test": {"dogs": 1}},
        ["splits: train is train, val is val, test is holdout"],
    ),
    "splits in a folder": (
        {"images/train/cats": 3, "images/train/dogs": 2, "images/val/cats": 1},
        ["annotations/a.xml"],
        {"train": PETS, "val": {"cats": 1}},
        ["read from images, the only folder with images"],
    ),
    "archive in its own folder": (
        {"pets-main/pets-main/cats": 3, "pets-main/pets-main/dogs": 2},
        [],
        {"train": PETS},
        ["read from pets-main/pets-main, the only folder with images"],
    ),
    "test beside the classes": (
        {"cats": 3, "dogs": 2, "test/cats": 1, "test/dogs": 1},
        [],
        {"train": PETS, "test": {"cats": 1, "dogs": 1}},
        ["splits: train is the other folders, test is test"],
    ),
    "splits within classes": (
        {"cats/train": 3, "cats/test": 1, "dogs/train": 2},
        [],
        {"train": PETS, "test": {"cats": 1}},
        ["each class folder holds its own splits"],
    ),
    "dogs-vs-cats": (
        {"test1": 3},
        [f"train/{name}.png" for name in ("cats.0", "cats.1", "cats.2", "dogs.0", "dogs.1")],
        {"train": PETS},
        [
            "test1 is not used: 3 images without class folders",
            "classes are read from the names of the files (cats.0.png): cats, dogs",
        ],
    ),
    "labels in all splits": (
        {},
        [f"train/{name}.png" for name in ("big cat_1", "big cat_2", "dog (1)", "dog (2)")]
        + ["val/dog (3).png"],
        {"train": {"big cat": 2, "dog": 2}, "val": {"dog": 1}},
        ["classes are read from the names of the files (big cat_1.png): big cat, dog"],
    ),
    "tiny-imagenet": (
        {"train/n1/images": 2, "train/n2/images": 2, "val/images": 3, "test/images": 1},
        ["val/val_annotations.txt", "wnids.txt"],
        {"train": {"n1": 2, "n2": 2}},
        [
            "test/images is not used: 1 image without class folders",
            "val/images is not used: 3 images without class folders "
            "(lists that are not read: val_annotations.txt)",
        ],
    ),
    "imagenet": (
        {"train/n1": 2, "train/n2": 2, "val": 3},
        ["val.txt"],
        {"train": {"n1": 2, "n2": 2}},
        [
            "val is not used: 3 images without class folders (lists that are not read: val.txt)",
        ],
    ),
    "classes and splits in the names of the folders": (
        {"cats_train": 3, "dogs_train": 2, "cats_test": 1, "dogs_test": 1},
        [],
        {"train": PETS, "test": {"cats": 1, "dogs": 1}},
        ["folders are named after classes and splits: cats_test is cats in test"],
    ),
    "numbered classes and splits": (
        {"class1_train": 2, "class2_train": 1, "Class1_test": 1},
        [],
        {"train": {"Class1": 2, "class2": 1}, "test": {"Class1": 1}},
        ["folders are named after classes and splits: Class1_test is Class1 in test"],
    ),
    "a class without test images": (
        {"cats_train": 3, "dogs_train": 2, "cats_test": 1, "empty": 0},
        [],
        {"train": PETS, "test": {"cats": 1}},
        ["folders are named after classes and splits: cats_test is cats in test"],
    ),
    "CycleGAN": (
        {"trainA": 3, "trainB": 2, "testA": 1, "testB": 1},
        [],
        {"train": {"A": 3, "B": 2}, "test": {"A": 1, "B": 1}},
        ["folders are named after classes and splits: testA is A in test"],
    ),
    "training and validation together": (
        {"trainval/cats": 3, "trainval/dogs": 2, "test/dogs": 1},
        [],
        {"train": PETS, "test": {"dogs": 1}},
        ["splits: train is trainval, test is test"],
    ),
    "numbers of classes in names": (
        {},
        [f"digits/{label}_{i}.png" for label in range(2) for i in range(3)],
        {"train": {"0": 3, "1": 3}},
        [
            "read from digits, the only folder with images",
            "classes are read from the names of the files (0_0.png): 0, 1",
        ],
    ),
    "words that contain others": (
        {"train station": 1, "test tubes": 1, "valley": 1, "trainers": 1, "bullet_train": 1},
        [],
        {
            "train": {
                "bullet_train": 1,
                "test tubes": 1,
                "train station": 1,
                "trainers": 1,
                "valley": 1,
            }
        },
        [],
    ),
    "folders within some classes": (
        {"cat": 2, "dog/husky": 1, "dog/poodle": 1},
        [],
        {"train": {"cat": 2, "dog": 2}},
        [
            "class folders that hold only folders: dog; the folders inside (husky, poodle) are "
            "parts of them, unless data.class_level=leaf"
        ],
    ),
    "images and masks": (
        {"cat/images": 1, "dog/images": 1},
        ["cat/annotations/0.xml", "dog/annotations/0.xml"],
        {"train": {"cat": 1, "dog": 1}},
        ["ignored 2 files that are not images: 2 .xml"],
    ),
    "the same folders within all classes": (
        {"good/a": 1, "good/b": 1, "bad/a": 1, "bad/b": 1},
        [],
        {"train": {"bad": 2, "good": 2}},
        [
            "class folders that hold only folders: bad, good; the folders inside (a, b) are "
            "parts of them, unless data.class_level=leaf; if they are splits, rename them train, "
            "val and test"
        ],
    ),
    "hidden class": (
        {".net/a": 1, ".net": 3, "java": 2, "c#": 2, ".thumbnails": 2, ".cache": 1, ".x": 0},
        [],
        {"train": {"c#": 2, "java": 2}},
        [
            "hidden folder .net is not used (4 images); name it in data.classes to use it, e.g. "
            """'data.classes=[".net","c#",java]'"""
        ],
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_folders_as_people_have_them_are_read_and_explained(tmp_path: Path, name: str) -> None:
    counts, files, expected, notes = READINGS[name]
    found, said = read(write_files(tmp_path / "x", counts, files))
    assert found == expected
    assert list(said) == notes


SCENES = {"a/airfield": 2, "a/alcove": 1, "b/beach/indoor": 2, "b/beach/outdoor": 1}


@pytest.mark.parametrize(
    ("counts", "what", "readings"),
    [
        (
            {"cat": 2, "dog": 2, "test": 2},
            "could be splits or classes: test",
            ["data.layout=classes (3 classes: cat, dog, test)", "data.without=[test] (2 classes"],
        ),
        (
            {"gato": 2, "perro": 2, "prueba": 2},
            "could be splits or classes: prueba",
            ["data.layout=classes (3 classes: gato, perro, prueba)", "data.without=[prueba]"],
        ),
        (
            {"train/steam": 1, "train/diesel": 1, "plane": 1, "car": 1},
            "could be splits or classes: train",
            [
                "data.layout=classes (3 classes: car, plane, train)",
                "data.layout=splits (train has 2 classes: diesel, steam)",
                "data.without=[train] (2 classes: car, plane)",
            ],
        ),
        (
            {"pets/train/cat": 1, "pets/train/dog": 1, "test": 1},
            "could be splits or classes: test",
            ["data.without=[test] (what is inside pets)"],
        ),
        ({"valid": 2, "invalid": 2}, "splits or classes: valid", ["data.layout=classes"]),
        (
            {"train_test/a": 1, "train_test/b": 1, "test/a": 1},
            "splits or classes: test",
            ["rename"],
        ),
        (
            {f"{name}_{split}/x": 1 for name in ("cat", "dog") for split in ("train", "test")},
            "two train folders: cat_train, dog_train",
            ["data.layout=classes"],
        ),
        (
            {f"{split}/{name}": 1 for split in ("train", "train_small", "val") for name in "ab"},
            "two train folders: train, train_small",
            [
                "data.without=[train_small] (uses train)",
                "data.without=[train] (uses train_small)",
                "data.layout=classes",
            ],
        ),
        (
            {"images": 2, "masks": 2},
            "look like images and annotations, not like classes: masks, images",
            ["data.layout=classes (2 classes: masks, images)"],
        ),
        (
            {"img/cat": 1, "img/dog": 1, "annotations/cat": 1, "annotations/dog": 1},
            "look like images and annotations",
            ["data.without=[annotations] (2 classes: cat, dog)"],
        ),
        (
            {"train/images": 2, "train/labels": 0, "val/images": 1},
            "images and annotations",
            ["list"],
        ),
        (
            SCENES,
            "class folders that hold only folders: a, b",
            [
                "data.class_level=top (2 classes: a, b)",
                "data.class_level=leaf (4 classes: a/airfield, a/alcove, b/beach/indoor, b/beach/",
            ],
        ),
        (
            {"train": 2, "test": 2},
            "splits without class folders inside: train; 2 images",
            ["<class"],
        ),
        ({"test/a": 1, "test/b": 1}, "no train folder beside: test", ["<class>"]),
    ],
)
def test_two_readings_stop_with_both_and_the_keys_that_choose(
    tmp_path: Path, counts: dict[str, int], what: str, readings: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read(write_files(tmp_path / "x", counts))
    assert what in caught.value.what
    for reading in readings:
        assert reading in caught.value.fix


def test_images_without_labels_are_no_class_silently(tmp_path: Path) -> None:
    counts = {"labelled/cats": 2, "labelled/dogs": 3, "unlabelled": 4}
    root = write_files(tmp_path / "x", counts)
    with pytest.raises(DataError, match="images without labels, or be classes: unlabelled") as e:
        read(root)
    assert "data.without=[unlabelled] (what is inside labelled)" in e.value.fix
    assert read(root, without=("unlabelled",))[0] == {"train": {"cats": 2, "dogs": 3}}
    flat = write_files(tmp_path / "flat", {"cats": 2, "dogs": 3, "Unlabeled_data": 4})
    with pytest.raises(DataError) as e:
        read(flat)
    assert "data.without=[Unlabeled_data] (2 classes: cats, dogs)" in e.value.fix
    assert set(read(flat, "classes")[0]["train"]) == {"Unlabeled_data", "cats", "dogs"}
    assert set(read(flat, only=("cats", "dogs"))[0]["train"]) == {"cats", "dogs"}


def test_versions_of_the_same_images_are_no_classes(tmp_path: Path) -> None:
    """PlantVillage holds its classes three times."""
    versions = ("color", "grayscale", "segmented")
    counts = {f"{each}/{name}": 2 for each in versions for name in ("Apple___scab", "Grape___rot")}
    root = write_files(tmp_path / "x", counts)
    with pytest.raises(DataError, match="versions of the same images: color, grayscale, segm") as e:
        read(root)
    one = f"name one of them: {root / 'color'} (2 classes: Apple___scab, Grape___rot)"
    assert e.value.fix.startswith(one)
    assert read(root / "color")[0] == {"train": {"Apple___scab": 2, "Grape___rot": 2}}
    assert read(root, level="top")[0] == {"train": dict.fromkeys(versions, 4)}


def test_masks_inside_class_folders_are_no_images(tmp_path: Path) -> None:
    """The COVID-19 Radiography Database: each class holds `images` and `masks`."""
    counts = {"COVID/images": 3, "COVID/masks": 3, "Normal/images": 2, "Normal/masks": 2}
    root = write_files(tmp_path / "x", counts)
    images, notes = read(root)
    assert images == {"train": {"COVID": 3, "Normal": 2}}
    assert notes == ("only the folder images of each class is read, not the annotations beside it",)
    assert read(root, level="top")[0] == {"train": {"COVID": 6, "Normal": 4}}


def test_keys_choose_between_two_readings(tmp_path: Path) -> None:
    pets = write_files(tmp_path / "pets", {"cat": 2, "dog": 2, "test": 1})
    assert read(pets, "classes")[0] == {"train": {"cat": 2, "dog": 2, "test": 1}}
    assert read(pets, without=("test",))[0] == {"train": {"cat": 2, "dog": 2}}
    assert read(pets, only=("cat", "test"))[0] == {"train": {"cat": 2, "test": 1}}
    assert "classes named like splits: test" in read(pets, "classes")[1]
    trains = write_files(
        tmp_path / "t", {"train/steam": 1, "train/diesel": 2, "plane": 1, "car": 1}
    )
    assert read(trains, "splits")[0] == {"train": {"diesel": 2, "steam": 1}}
    assert read(trains, "classes")[0] == {"train": {"car": 1, "plane": 1, "train": 3}}
    nested = {"pets/train/cat": 1, "pets/train/dog": 1, "test": 1}
    nested_pets = write_files(tmp_path / "nested", nested)
    assert read(nested_pets, without=("test",))[0] == {"train": {"cat": 1, "dog": 1}}
    with pytest.raises(DataError, match=r"data.layout=splits, but no folder .*: a, b"):
        read(write_files(tmp_path / "ab", {"a": 1, "b": 1}), "splits")
    scenes = write_files(tmp_path / "scenes", SCENES)
    assert read(scenes, level="top")[0] == {"train": {"a": 3, "b": 3}}
    assert read(scenes, level="leaf")[0] == {
        "train": {"a/airfield": 2, "a/alcove": 1, "b/beach/indoor": 2, "b/beach/outdoor": 1}
    }
    languages = write_files(tmp_path / "languages", {".net": 1, "java": 1, "c#": 1})
    assert read(languages, only=(".net", "java"))[0] == {"train": {".net": 1, "java": 1}}


def test_one_of_several_folders_of_a_split_is_chosen(tmp_path: Path) -> None:
    counts = {"train/a": 2, "train/b": 2, "train_small/a": 1, "train_small/b": 1, "test/a": 1}
    root = write_files(tmp_path / "x", counts)
    found, notes = read(root, without=("train_small",))
    assert found == {"train": {"a": 2, "b": 2}, "test": {"a": 1}}
    assert "ignored folders: train_small" in notes
    assert read(root, without=("train",))[0] == {"train": {"a": 1, "b": 1}, "test": {"a": 1}}


def test_numbers_in_names_that_may_not_be_classes_are_an_error(tmp_path: Path) -> None:
    files = [f"{year}_{i}.png" for year in (2018, 2019) for i in range(3)]
    with pytest.raises(DataError, match="6 images whose names do not tell a class") as caught:
        read(write_files(tmp_path / "x", {}, files))
    assert "path,label" in caught.value.fix


def test_leaf_classes_are_named_alike_in_all_splits(tmp_path: Path) -> None:
    counts = {"train/a/airfield": 2, "train/b/barn": 1, "train/b": 1, "val/b/barn": 1}
    found, _ = read(write_files(tmp_path / "x", counts), level="leaf")
    assert found == {"train": {"a/airfield": 2, "b": 1, "b/barn": 1}, "val": {"b/barn": 1}}


def test_the_classes_of_a_model_settle_what_is_ambiguous(tmp_path: Path) -> None:
    vehicles = write_files(tmp_path / "v", {"train": 1, "plane": 1})
    found, _ = read(vehicles, known=("car", "plane", "train"), tested=True)
    assert found == {"train": {"plane": 1, "train": 1}}
    with pytest.raises(DataError, match="could be splits or classes"):
        read(vehicles, known=("car", "plane"), tested=True)
    # A folder of a split stays one, although there is a class of that name.
    splits = write_files(tmp_path / "s", {"train/car": 1, "train/train": 2})
    assert read(splits, known=("car", "train"), tested=True)[0] == {"train": {"car": 1, "train": 2}}
    scenes = write_files(tmp_path / "scenes", SCENES)
    assert set(read(scenes, known=("a", "b", "c"), tested=True)[0]["train"]) == {"a", "b"}
    leaves = read(scenes, known=("a/airfield", "x"), tested=True)[0]["train"]
    assert len(leaves) == 4


def test_flat_folders_without_labels_say_what_they_hold(tmp_path: Path) -> None:
    files = ["IMG_1.png", "IMG_2.png", "DSC_1.png", "DSC_2.png", "labels.csv"]
    with pytest.raises(DataError, match="4 images whose names do not tell a class") as caught:
        read(write_files(tmp_path / "x", {}, files))
    assert "labels.csv can't be read as a list of images" in caught.value.what


# Random layouts

CLASS_NAMES = (
    "cat,dog,valley,trainers,test tubes,train station,straining,contest,pretest,invalid,devil"
    ",Évaluation finale,10,2,new folder,c#,猫"
)
SPLIT_NAMES = {
    "train": ["train", "training"],
    "val": ["val", "valid", "validate", "validation", "eval", "dev", "holdout", "hold-out"],
    "test": ["test", "testing"],
}
SUFFIXES = ("", "_set", "-set", " set", "set", "Set", "_data", "Data", "1", "_2014", ".images")
PREFIXES = ["", "", "", "seg_", "my-", "Pets "]
CASES = [str.lower, str.upper, str.capitalize]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, int], Counts]:
    """Return the number of images in each folder, and the reference reading."""
    names = draw(
        st.lists(st.sampled_from(CLASS_NAMES.split(",")), min_size=2, max_size=4, unique=True)
    )
    splits = draw(
        st.sampled_from([("train",), ("train", "val"), ("train", "test"), ("train", "val", "test")])
    )
    # Splits above the classes; beside them, as if training images had no folder; or inside them.
    shape = draw(st.sampled_from(["plain", "above", "above", "beside", "inside"]))
    prefix = ""
    if len(splits) > 1 and shape != "beside":
        prefix = draw(st.sampled_from(PREFIXES))
    suffix, case = draw(st.sampled_from(SUFFIXES)), draw(st.sampled_from(CASES))
    words = {s: prefix + case(draw(st.sampled_from(SPLIT_NAMES[s]))) + suffix for s in splits}
    wrapper = draw(st.sampled_from(["", "", "images/", "pets-main/", "a/a/"]))
    is_doubled = draw(st.booleans())
    counts: dict[str, int] = {}
    expected: Counts = {}
    for split in ("train",) if shape == "plain" else splits:
        word = f"{words[split]}/{words[split]}" if is_doubled else words[split]
        for name in names if split == "train" else names[: draw(st.integers(1, len(names)))]:
            folder = f"{word}/{name}"
            if shape == "plain" or (shape == "beside" and split == "train"):
                folder = name
            elif shape == "inside":
                folder = f"{name}/{words[split]}"
            expected.setdefault(split, {})[name] = counts[wrapper + folder] = draw(
                st.integers(1, 2)
            )
    for junk in draw(st.lists(st.sampled_from(["__MACOSX", ".git", "@eaDir"]), max_size=2)):
        parent = draw(st.sampled_from(sorted(counts)))
        counts[f"{junk}/x"] = counts[f"{parent}/{junk}"] = 1
    return counts, expected


@settings(max_examples=80, deadline=None)
@given(layouts())
def test_any_usual_layout_is_read_as_it_is_meant(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, int], Counts]
) -> None:
    counts, expected = case
    assert read(write_files(tmp_path_factory.mktemp("x") / "x", counts))[0] == expected


FOLDERS = (
    "train,test,val,train_set,seg_train,seg_test,Test1,holdout,pred,cat,dog,images,valley,train car"
)
PATHS = st.lists(st.sampled_from(FOLDERS.split(",")), min_size=1, max_size=3).map("/".join)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(PATHS, st.integers(0, 2), max_size=8))
def test_no_class_is_silently_named_like_a_split(
    tmp_path_factory: pytest.TempPathFactory, counts: dict[str, int]
) -> None:
    """For any nest of folders there is an error, or a note names each class that is so called."""
    root = write_files(tmp_path_factory.mktemp("x") / "x", counts)
    try:
        found, notes = read(root)
    except DataError:
        return
    names = {name for classes in found.values() for name in classes}
    named_like_splits = sorted(name for name in names if split_from_name(name))
    if named_like_splits:
        assert f"classes named like splits: {', '.join(named_like_splits)}" in notes
    # Splits that are read are never empty, and hold nothing that is not an image of the folders.
    assert all(count > 0 for classes in found.values() for count in classes.values())
    assert sum(sum(classes.values()) for classes in found.values()) <= sum(counts.values())


def test_a_layout_names_the_folders_outside_of_classes(tmp_path: Path) -> None:
    root = write_files(tmp_path / "x", {"train/a": 1, "train/b": 1})
    layout = find_layout(root, LayoutOptions(), ClassChoice())
    assert isinstance(layout, Layout)
    assert layout.parents == [str(root / "train")]
    assert [folder.name for folder in layout.splits["train"]] == ["a", "b"]
