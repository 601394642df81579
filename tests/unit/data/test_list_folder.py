"""Folders that are read by the lists in them, if there is only one reading."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from convlens.data.folder_layout import LayoutOptions
from convlens.data.layout import ClassChoice
from convlens.data.list_columns import ListOptions
from convlens.data.list_folder import find_lists
from convlens.data.sources import find_source
from convlens.data.types import DataSource
from convlens.errors import DataError, UsageError
from helpers.datasets import write_class_folders, write_image

NAMES = ["cat_0", "cat_1", "dog_0", "dog_1"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def write_images(folder: Path, names: list[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        write_image(folder / f"{name}.png", number)
    return folder


def write_list(
    path: Path,
    header: str = "file_name,label",
    row: Callable[[str], str] = lambda name: f"{name}.png,{name[:3]}",
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(filter(None, [header, *map(row, NAMES)])) + "\n")


def read(root: Path) -> DataSource:
    return find_source(str(root))


def counts(source: DataSource) -> dict[str, int]:
    return {split: len(part.labels) for split, part in source.parts.items()}


@pytest.mark.parametrize("images", [".", "images", "flowers/images"])
@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv", "list.txt"])
def test_a_folder_without_class_folders_is_read_by_its_list(
    root: Path, images: str, name: str
) -> None:
    write_images(root / images)
    folder = root / "flowers" if images.startswith("flowers") else root
    write_list(folder / name, row=lambda name: f"{name}.png{',' if 'csv' else ' '}{name[:3]}")
    (folder / "README.txt").write_text("Images of cats and dogs\n")
    source = read(root)
    assert source.classes == ("cat", "dog")
    assert counts(source) == {"train": 4}
    assert source.notes[0] == f"read from {name}"
    assert [Path(path).name for path in source.parts["train"].ids] == [f"{n}.png" for n in NAMES]


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("metadata.csv", "file_name,label", lambda n: f"{n}.png,{n[:3]}"),
        ("_classes.csv", "filename, cat, dog", lambda n: f"{n}.png, {+('c' in n)}, {+('d' in n)}"),
        ("metadata.jsonl", "", lambda n: f'{{"file_name": "{n}.png", "label": "{n[:3]}"}}'),
        ("labels.txt", "", lambda n: f"{n}.png {n[:3]}"),
    ],
)
def test_each_folder_of_a_split_may_have_its_list(
    root: Path, name: str, header: str, row: Callable[[str], str]
) -> None:
    name = "list.txt" if name == "labels.txt" else name
    for folder in ("train", "valid", "test"):
        write_images(root / folder)
        write_list(root / folder / name, header, row)
    source = read(root)
    assert source.classes == ("cat", "dog")
    assert counts(source) == {"train": 4, "val": 4, "test": 4}
    assert list(source.parts["val"].ids) == [f"valid/{n}.png" for n in NAMES]
    assert source.parts["test"].labels.tolist() == [0, 0, 1, 1]


def test_lists_named_after_splits_are_the_splits(root: Path) -> None:
    write_images(root / "img")
    for split, names in (("train", NAMES[::2]), ("val", NAMES[1:2]), ("test", NAMES[3:])):
        rows = "".join(f"img/{name}.png,{name[:3]}\n" for name in names)
        (root / f"{split}.csv").write_text(f"path,label\n{rows}")
    assert counts(read(root)) == {"train": 2, "val": 1, "test": 1}
    alone = find_source(str(root / "train.csv"))
    assert counts(alone) == {"train": 2}
    assert "not read: test.csv, val.csv; to read all splits, name the folder" in alone.notes


def test_lists_named_alike_are_the_splits(root: Path) -> None:
    write_images(root / "img")
    write_list(root / "birds_train.csv")
    (root / "birds_test.csv").write_text("file_name,label\ncat_1.png,cat\n")
    (root / "birds_train.csv").write_text("file_name,label\ncat_0.png,cat\ndog_0.png,dog\n")
    assert counts(read(root)) == {"train": 2, "test": 1}


def test_competitions_have_lists_without_labels(root: Path) -> None:
    write_images(root / "train")
    write_images(root / "test", ["7", "8"])
    write_list(root / "train.csv", "id,breed", lambda name: f"{name},{name[:3]}")
    (root / "test.csv").write_text("id\n7\n8\n")
    (root / "sample_submission.csv").write_text("id,breed\n7,cat\n8,cat\n")
    source = read(root)
    assert counts(source) == {"train": 4}
    assert source.notes[-1].startswith("test.csv is not used: no column 'label' among: id")


def test_folders_of_classes_have_priority_over_a_list_that_agrees(root: Path) -> None:
    write_class_folders(root, {"n01": 2, "n02": 2})
    rows = "".join(
        f"{c}/{i}.png,{label}\n" for c, label in (("n01", "cat"), ("n02", "dog")) for i in (0, 1)
    )
    (root / "labels.csv").write_text(f"path,label\n{rows}")
    source = read(root)
    assert source.classes == ("n01", "n02")
    assert "labels.csv is not read, since the folders give the same classes" in source.notes[-1]
    options = LayoutOptions(layout="classes")
    assert not find_source(str(root), layout=options).notes
    (root / "empty").mkdir()
    source = find_source(str(root), choice=ClassChoice(without=("empty",)))
    assert source.classes == ("n01", "n02")
    (root / "empty").rmdir()
    # Predictions of a model give some images another one of these classes.
    (root / "labels.csv").write_text("path,label\nn01/0.png,n01\nn02/0.png,n01\n")
    assert "for 1 of 2 images another one" in read(root).notes[-1]


def test_a_list_with_other_classes_than_the_folders_is_ambiguous(root: Path) -> None:
    write_class_folders(root, {"left": 2, "right": 2})
    (root / "labels.csv").write_text(
        "path,label\nleft/0.png,a\nleft/1.png,b\nright/0.png,a\nright/1.png,b\n"
    )
    with pytest.raises(DataError, match=r"two readings: labels.csv has the classes a, b") as caught:
        read(root)
    assert "folders left, right" in caught.value.what
    assert str(root / "labels.csv") in caught.value.fix
    assert find_source(str(root / "labels.csv")).classes == ("a", "b")
    options = LayoutOptions(layout="classes")
    assert find_source(str(root), layout=options).classes == ("left", "right")


def test_keys_choose_the_list_and_rename_the_classes_of_all_lists(root: Path) -> None:
    write_class_folders(root, {"left": 2, "right": 2})
    (root / "labels.csv").write_text("path,sort\nleft/0.png,Cat\nleft/1.png,dog\nright/0.png,cat\n")
    (root / "notes.csv").write_text("day,weather\n1,rain\n")
    options = ListOptions(label_column="sort", rename={"Cat": "cat"})
    source = find_source(str(root), lists=options)
    assert (source.classes, counts(source)) == (("cat", "dog"), {"train": 3})
    assert "notes.csv is not used: no column 'path'" in source.notes[-1]
    # Without keys for the list the folders are the classes, which can be renamed as well.
    source = find_source(str(root), lists=ListOptions(rename={"left": "L"}))
    assert source.classes == ("L", "right")
    with pytest.raises(UsageError, match="no column 'kid' for"):
        find_source(str(root), lists=ListOptions(label_column="kid"))


def test_two_lists_are_ambiguous(root: Path) -> None:
    write_images(root)
    write_list(root / "a.csv")
    write_list(root / "b.csv")
    with pytest.raises(
        DataError, match=r"several lists of images in this folder: a.csv, b.csv"
    ) as e:
        read(root)
    assert e.value.fix == f"name one of them: {root / 'a.csv'}"


def test_a_file_that_only_looks_like_a_list_is_named(root: Path) -> None:
    write_images(root / "img", ["1", "2", "3", "4"])
    (root / "a.csv").write_text("path,when\nimg/1.png,1\nimg/2.png,2\nimg/3.png,3\n")
    with pytest.raises(
        DataError, match=r"a.csv can't be read as a list of images: no column 'label'"
    ) as caught:
        read(root)
    assert caught.value.fix.startswith("for a.csv: the first line names the columns")


def test_a_split_without_class_folders_is_read_by_its_list(root: Path) -> None:
    """Tiny ImageNet's layout."""
    for name in ("n01", "n02"):
        write_images(root / "train" / name / "images", [f"{name}_0", f"{name}_1"])
    write_images(root / "val" / "images", ["val_0", "val_1", "val_2"])
    write_images(root / "test" / "images", ["test_0"])
    annotations = "".join(f"val_{i}.png\tn0{2 - i % 2}\t0\t0\t62\t62\n" for i in range(3))
    (root / "val" / "val_annotations.txt").write_text(annotations)
    (root / "words.txt").write_text("n01\tcat, true cat\nn02\tdog\n")
    source = read(root)
    assert source.classes == ("n01", "n02")
    assert counts(source) == {"train": 4, "val": 3}
    assert source.parts["val"].labels.tolist() == [1, 0, 1]
    assert source.parts["val"].ids[0] == "val/images/val_0.png"
    assert source.parts["train"].ids[0] == "train/n01/images/n01_0.png"
    source = find_source(str(root), choice=ClassChoice(without=("n01",)), tested=True)
    assert (source.classes, counts(source)) == (("n02",), {"train": 2, "val": 2})
    # ImageNet's list of numbers does not fit folders with names.
    (root / "val" / "val_annotations.txt").unlink()
    (root / "val.txt").write_text("".join(f"val_{i}.png {i % 2}\n" for i in range(3)))
    with pytest.raises(DataError, match="classes in val that train lacks: 0, 1"):
        read(root)


def test_only_files_that_may_be_lists_are_candidates(root: Path) -> None:
    for name in ("a.csv", "b.TXT", "README.md", "readme.txt", "classes.txt", ".c.csv", "d.png"):
        (root / name).touch()
    (root / "train").mkdir()
    (root / "other").mkdir()
    (root / "train" / "e.json").touch()
    (root / "other" / "f.csv").touch()
    assert [path.name for path in find_lists(root)] == ["a.csv", "b.TXT", "e.json"]
    # A text for each image is not a list, nor is each of many.
    (root / "d.txt").touch()
    for number in range(30):
        (root / "train" / f"{number}.json").touch()
    assert [path.name for path in find_lists(root)] == ["a.csv", "b.TXT"]


# Oxford-IIIT Pets and its relatives: a folder of images, and lists in a folder of annotations

PETS = {"Abyssinian": "1 1 1", "great_pyrenees": "16 2 9"}  # class, species, breed


def write_pets(root: Path, images: str = "images") -> None:
    names = [f"{name}_{i}" for name in PETS for i in range(4)]
    write_images(root / images, names)
    write_images(root / "annotations" / "trimaps", names)  # masks have the names of the images
    for split, numbers in (("trainval", (0, 1, 2)), ("test", (3,)), ("list", range(4))):
        rows = [f"{name}_{i} {PETS[name]}" for name in PETS for i in numbers]
        comments = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
        rows = [*(comments if split == "list" else []), *rows]
        (root / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
    (root / "annotations" / "README").write_text("Pets\n")


def test_lists_in_a_folder_of_annotations_are_read(root: Path) -> None:
    write_pets(root)
    source = read(root)
    assert source.classes == ("Abyssinian", "great_pyrenees")
    assert counts(source) == {"train": 6, "test": 2}
    assert source.parts["test"].ids[0] == "images/Abyssinian_3.png"
    assert source.parts["test"].labels.tolist() == [0, 1]
    assert source.notes[:2] == (
        "read from annotations/test.txt, annotations/trainval.txt",
        "not read, since they repeat other lists: annotations/list.txt",
    )
    notes = "; ".join(source.notes)
    assert "column 1 is the path and column 2 is the label" in notes
    assert "labels are those in the names of the files, whose classes have the numbers" in notes
    # Each list alone: all images, with the same classes.
    alone = find_source(str(root / "annotations" / "list.txt"))
    assert (alone.classes, counts(alone)) == (source.classes, {"train": 8})


def test_images_and_masks_without_a_list_are_not_classes(root: Path) -> None:
    write_pets(root)
    for path in (root / "annotations").glob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match="look like images and annotations, not like") as caught:
        read(root)
    assert caught.value.fix.startswith(
        "data.without=[annotations] (2 classes: Abyssinian, great_pyrenees) or data.layout=classes"
    )
    source = find_source(str(root), choice=ClassChoice(without=("annotations",)))
    assert (source.classes, counts(source)) == (("Abyssinian", "great_pyrenees"), {"train": 8})


def test_a_list_of_annotations_that_cannot_be_read_is_named(root: Path) -> None:
    write_images(root / "images", ["1", "2", "3", "4"])
    (root / "annotations").mkdir()
    (root / "annotations" / "a.csv").write_text("path,when\n1.png,1\n2.png,2\n3.png,3\n")
    with pytest.raises(DataError, match=r"annotations/a.csv can't be read as a list") as caught:
        read(root)
    assert caught.value.fix.startswith("for annotations/a.csv: ")


def test_the_lists_of_food_101_give_its_splits(root: Path) -> None:
    """Class folders in a folder of images; each split as JSON by class and as text."""
    for name in ("apple_pie", "waffles"):
        write_images(root / "images" / name, [f"{name[0]}{i}" for i in range(3)])
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        paths = {n: [f"{n}/{n[0]}{i}" for i in numbers] for n in ("apple_pie", "waffles")}
        (root / "meta").mkdir(exist_ok=True)
        (root / "meta" / f"{split}.json").write_text(json.dumps(paths))
        (root / "meta" / f"{split}.txt").write_text("\n".join(itertools.chain(*paths.values())))
    (root / "meta" / "classes.txt").write_text("apple_pie\nwaffles\n")
    source = read(root)
    assert source.classes == ("apple_pie", "waffles")
    assert counts(source) == {"train": 4, "test": 2}
    assert source.parts["test"].ids[1] == "images/waffles/w2.png"


def test_texts_of_single_images_are_no_lists(root: Path) -> None:
    write_images(root / "images")
    (root / "labels").mkdir()
    for name in NAMES:
        (root / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")  # YOLO
    assert find_lists(root) == []


def test_a_set_in_many_folders_with_a_text_beside_is_read_by_its_list(root: Path) -> None:
    inner = root / "a" / "b" / "c" / "d" / "e" / "f"
    write_images(inner / "img")
    write_list(inner / "list.csv")
    (root / "README.md").write_text("Pets\n")
    assert find_lists(root) == [inner / "list.csv"]
    assert counts(read(root)) == {"train": 4}


def test_numbers_beside_names_of_classes_say_what_to_do(root: Path) -> None:
    """ImageNet's training folders, and its list of numbers for the validation images."""
    for name in ("n01", "n02"):
        write_images(root / "train" / name, [f"{name}_0", f"{name}_1"])
    names = [f"ILSVRC2012_val_0000000{i}" for i in range(1, 5)]
    write_images(root / "val", names)
    (root / "val.txt").write_text("".join(f"{n}.png {i % 2}\n" for i, n in enumerate(names)))
    with pytest.raises(DataError, match="numbers; train has names: n01, n02") as caught:
        read(root)
    assert """'data.rename={"0": "n01"}'""" in caught.value.fix
    options = ListOptions(rename={"0": "n01", "1": "n02"})
    source = find_source(str(root), lists=options)
    assert (source.classes, counts(source)) == (("n01", "n02"), {"train": 4, "val": 4})
    assert source.parts["val"].labels.tolist() == [0, 1, 0, 1]
    # The same in one list with a column for the split.
    rows = [f"train/n0{k}/n0{k}_{i}.png,n0{k},train" for k in (1, 2) for i in (0, 1)]
    rows += [f"val/{name}.png,{i % 2},val" for i, name in enumerate(names)]
    path = root / "all.csv"
    path.write_text("path,label,split\n" + "\n".join(rows))
    with pytest.raises(DataError, match=r"0, 1 .numbers; train has names: n01, n02"):
        find_source(str(path))


def test_a_missing_label_of_a_split_is_named(root: Path) -> None:
    for name in ("n01", "n02"):
        write_images(root / "train" / name, [f"{name}_0"])
    write_images(root / "val", ["a", "b"])
    (root / "val.csv").write_text("path,label\na.png,n01\nb.png,nan\n")
    with pytest.raises(DataError, match=r"lines without a label: line 3 \(nan\)"):
        read(root)


def test_a_list_of_annotations_with_other_classes_is_not_taken_for_the_classes(root: Path) -> None:
    write_class_folders(root, {"cat": 2, "dog": 2})
    rows = "cat/0.png,day\ncat/1.png,night\ndog/0.png,day\ndog/1.png,night\n"
    (root / "annotations").mkdir()
    (root / "annotations" / "light.csv").write_text(f"path,label\n{rows}")
    source = read(root)
    assert source.classes == ("cat", "dog")
    assert "annotations/light.csv is not read: its classes (day, night) are not" in source.notes[1]
    # Below a wrapper, the folders are not certainly classes.
    (root / "images").mkdir()
    for name in ("cat", "dog"):
        (root / name).rename(root / "images" / name)
    with pytest.raises(DataError, match=r"two readings: annotations/light.csv has the classes day"):
        read(root)
    options = LayoutOptions(layout="classes")
    assert find_source(str(root), layout=options).classes == ("cat", "dog")


def test_a_list_in_a_folder_of_any_name_is_found_if_there_is_no_other(root: Path) -> None:
    write_images(root / "pics")
    write_list(root / "docs" / "list.csv")
    assert counts(read(root)) == {"train": 4}
    # A list elsewhere has priority.
    write_list(root / "labels.csv")
    assert find_lists(root) == [root / "labels.csv"]


def test_a_folder_with_a_list_of_test_images_only_says_so(root: Path) -> None:
    write_images(root)
    write_list(root / "val.csv")
    with pytest.raises(DataError, match=r"no list of training images, only val\.csv") as caught:
        read(root)
    assert caught.value.fix.endswith(str(root / "val.csv"))
    assert counts(find_source(str(root / "val.csv"))) == {"train": 4}
    assert counts(find_source(str(root), tested=True)) == {"val": 4}


# Lists of splits beside class folders


def write_eurosat(root: Path, splits: dict[str, tuple[int, ...]]) -> None:
    for name in ("Crop", "Forest"):
        write_images(root / name, [f"{name}_{i}" for i in range(4)])
    for split, numbers in splits.items():
        rows = [f"{n}/{n}_{i}.png,{k}\n" for k, n in enumerate(("Crop", "Forest")) for i in numbers]
        (root / f"{split}.csv").write_text("Filename,Label\n" + "".join(rows))


def test_lists_of_splits_beside_class_folders_give_the_splits(root: Path) -> None:
    """EuroSAT: until now the splits were drawn, and test images were trained on."""
    write_eurosat(root, {"train": (0, 3), "validation": (1,), "test": (2,)})
    source = read(root)
    assert (source.classes, counts(source)) == (
        ("Crop", "Forest"),
        {"train": 4, "val": 2, "test": 2},
    )
    assert list(source.parts["test"].ids) == ["Crop/Crop_2.png", "Forest/Forest_2.png"]
    assert source.parts["test"].labels.tolist() == [0, 1]
    note = "splits are those of test.csv, train.csv, validation.csv; classes are the folders"
    assert note in source.notes
    write_images(root / "Lake", ["Lake_0", "Lake_1"])
    rows = {"train": "Lake/Lake_0.png,2\n", "test": "Lake/Lake_1.png,2\n"}
    for split, row in rows.items():
        with (root / f"{split}.csv").open("a") as file:
            file.write(row)
    chosen = find_source(str(root), choice=ClassChoice(without=("Forest",)))
    assert (chosen.classes, counts(chosen)) == (
        ("Crop", "Lake"),
        {"train": 3, "val": 1, "test": 2},
    )


@pytest.mark.parametrize(
    "splits",
    [
        {"train": (0, 3), "test": (2,)},  # not all images
        {"train": (0, 1, 3), "test": (2, 3)},  # an image twice
        {"val": (0, 1), "test": (2, 3)},  # no list of training images
    ],
)
def test_lists_that_do_not_split_all_images_are_named(
    root: Path, splits: dict[str, tuple[int, ...]]
) -> None:
    write_eurosat(root, splits)
    source = read(root)
    assert counts(source) == {"train": 8}
    notes = "; ".join(source.notes)
    assert all(f"{split}.csv is not read" in notes for split in splits)


def test_a_file_that_may_name_numbered_classes_is_noted(root: Path) -> None:
    write_images(root / "img")
    write_list(root / "labels.csv", row=lambda name: f"{name}.png,{int(name[:3] == 'cat')}")
    (root / "classes.txt").write_text("dog\ncat\n")
    note = (
        'classes are numbers; classes.txt may name them, from 0: \'data.rename={"0": "dog"}\' ...'
    )
    assert note in read(root).notes
    (root / "classes.txt").write_text("dog\ncat\nbird\n")
    assert not any("classes.txt" in note for note in read(root).notes)


# Several lists for each split


def write_dtd(root: Path) -> None:
    """Ten splits; image `i` of each class is a test image of split `i`, as `i + 1` is of val."""
    for name in ("banded", "dotted"):
        write_images(root / "images" / name, [f"{name}_{i}" for i in range(1, 11)])
    (root / "labels").mkdir()
    for number in range(1, 11):
        chosen = {"test": {number}, "val": {number % 10 + 1}}
        chosen["train"] = set(range(1, 11)) - chosen["test"] - chosen["val"]
        for split, images in chosen.items():
            paths = [f"{n}/{n}_{i}.png" for n in ("banded", "dotted") for i in sorted(images)]
            (root / "labels" / f"{split}{number}.txt").write_text("\n".join(paths) + "\n")
    (root / "labels" / "labels_joint_anno.txt").write_text("banded/banded_1.png banded dotted\n")


def test_one_of_several_numbered_splits_is_chosen_by_a_key(root: Path) -> None:
    write_dtd(root)
    with pytest.raises(DataError, match="10 sets of lists for training and testing") as caught:
        read(root)
    assert caught.value.fix == "data.lists=1 or data.lists=2 or data.lists=3 ... chooses one"
    for number in (1, 10):
        source = find_source(str(root), lists=ListOptions(lists=str(number)))
        assert counts(source) == {"train": 16, "val": 2, "test": 2}
        ids = [f"images/{name}/{name}_{number}.png" for name in ("banded", "dotted")]
        assert source.parts["test"].ids == ids
    with pytest.raises(UsageError, match="no lists for training and testing have '11'"):
        find_source(str(root), lists=ListOptions(lists="11"))
    with pytest.raises(UsageError, match=r"data.lists applies only to folders"):
        find_source(str(root / "labels" / "train1.txt"), lists=ListOptions(lists="1"))


AIRCRAFT = {"0034309": "Boeing 707-320", "0034958": "DR-400", "0037511": "F/A-18 Hornet"}


def test_lists_about_different_labels_are_chosen_by_a_key(root: Path) -> None:
    """FGVC-Aircraft: an id, and a label with blanks; labels of three kinds."""
    makers = {"Boeing 707-320": "Boeing", "DR-400": "Robin", "F/A-18 Hornet": "McDonnell Douglas"}
    splits = {"train": "1", "val": "2", "trainval": "12", "test": "3"}
    names = [f"{image}{number}" for image in AIRCRAFT for number in (1, 2, 3)]
    write_images(root / "images", names)
    for split, numbers in splits.items():
        ids = [name for name in names if name[-1] in numbers]
        for kind in ("variant", "manufacturer"):
            labels = [AIRCRAFT[i[:-1]] for i in ids]
            labels = labels if kind == "variant" else [makers[label] for label in labels]
            lines = [f"{i} {label}\n" for i, label in zip(ids, labels, strict=True)]
            (root / f"images_{kind}_{split}.txt").write_text("".join(lines))
        (root / f"images_{split}.txt").write_text("\n".join(ids) + "\n")
    (root / "images_box.txt").write_text("".join(f"{name} 1 2 30 40\n" for name in names))
    with pytest.raises(DataError, match="2 sets of lists") as caught:
        read(root)
    assert caught.value.fix == "data.lists=variant or data.lists=manufacturer chooses one"
    source = find_source(str(root), lists=ListOptions(lists="variant"))
    assert source.classes == tuple(sorted(AIRCRAFT.values()))
    assert counts(source) == {"train": 3, "val": 3, "test": 3}
    assert source.parts["test"].ids == [f"images/{i}3.png" for i in AIRCRAFT]
    labels = [source.classes[label] for label in source.parts["test"].labels]
    assert labels == list(AIRCRAFT.values())
    source = find_source(str(root), lists=ListOptions(lists="Manufacturer"))
    assert source.classes == ("Boeing", "McDonnell Douglas", "Robin")
    (root / "images_variant_test.txt").write_text("0034309 3\n")  # a chosen list has to be read
    with pytest.raises(DataError, match=r"images_variant_test.txt: no column 'path'"):
        find_source(str(root), lists=ListOptions(lists="variant"))


# Numbers of classes in the list of a split


def write_ilsvrc(root: Path, numbers: list[int]) -> None:
    for name in ("n01", "n02", "n03"):
        write_images(root / "train" / name, [f"{name}_0", f"{name}_1"])
    names = [f"ILSVRC2012_val_{i:08}" for i in range(len(numbers))]
    write_images(root / "val", names)
    lines = [f"{name}.png {number}\n" for name, number in zip(names, numbers, strict=True)]
    (root / "val.txt").write_text("".join(lines))


def val_classes(root: Path) -> list[str]:
    source = read(root)
    return [source.classes[label] for label in source.parts["val"].labels]


def test_numbers_count_the_lines_of_a_file_that_names_all_classes(root: Path) -> None:
    write_ilsvrc(root, [1, 0, 2])
    # Not in the order of the names, so that a guess would be wrong.
    (root / "synset_words.txt").write_text("n02 goldfish, Carassius\nn03 shark\nn01 tench\n")
    assert val_classes(root) == ["n03", "n02", "n01"]
    note = "numbers of classes are those of synset_words.txt: 0 is n02, 1 is n03, 2 is n01"
    assert note in read(root).notes


def test_numbers_of_a_list_of_training_images_are_used(root: Path) -> None:
    write_ilsvrc(root, [1, 0, 2])
    number_of = {"n01": 2, "n02": 0, "n03": 1}
    lines = [f"{name}/{name}_{i}.png {n}\n" for name, n in number_of.items() for i in (0, 1)]
    (root / "train.txt").write_text("".join(lines))
    assert val_classes(root) == ["n03", "n02", "n01"]
    # A second file that contradicts it leaves the question open.
    (root / "synsets.txt").write_text("n01\nn02\nn03\n")
    with pytest.raises(DataError, match="numbers; train has names"):
        read(root)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([1, 2, 3], "n01\nn02\nn03\n"),  # from 1, as in the development kit: another order
        ([1, 2], "n01\nn02\nn03\n"),  # from 0 or 1?
        ([0, 1, 3], "n01\nn02\nn03\n"),
        ([0, 1, 2], "n01\nn02\n"),
        ([0, 1, 2], "n01\nn02\nn04\n"),
    ],
)
def test_numbers_that_may_mean_something_else_are_errors(
    root: Path, numbers: list[int], text: str
) -> None:
    write_ilsvrc(root, numbers)
    (root / "synset_words.txt").write_text(text)
    with pytest.raises(DataError, match="numbers; train has names"):
        read(root)
