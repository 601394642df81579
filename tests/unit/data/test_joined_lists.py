"""Published data sets whose lists are several files, or files of MATLAB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from convlens.data.list_columns import ListOptions
from convlens.data.sources import find_source
from convlens.data.types import DataSource
from convlens.errors import DataError, UsageError
from helpers.datasets import write_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def labels_by_id(source: DataSource) -> dict[str, dict[str, str]]:
    return {
        split: {i: source.classes[label] for i, label in zip(part.ids, part.labels, strict=True)}
        for split, part in source.parts.items()
    }


# CUB-200 and NABirds

BIRDS = {"1": "001.Albatross", "2": "002.Auk"}
# id, path, class, whether it is a training image; not in the order of the ids.
CUB = [
    ("3", "002.Auk/Auk_1.png", "2", "1"),
    ("1", "001.Albatross/Albatross_1.png", "1", "1"),
    ("2", "001.Albatross/Albatross_2.png", "1", "0"),
    ("4", "002.Auk/Auk_2.png", "2", "0"),
]


def write_cub(root: Path) -> None:
    for number, path, _, _ in CUB:
        write_image(root / "images" / path, int(number))
    columns = {"images.txt": 1, "image_class_labels.txt": 2, "train_test_split.txt": 3}
    for name, column in columns.items():
        # The files need not have the same order.
        rows = sorted(CUB) if column == 2 else CUB
        (root / name).write_text("".join(f"{row[0]} {row[column]}\n" for row in rows))
    (root / "classes.txt").write_text("".join(f"{n} {name}\n" for n, name in BIRDS.items()))
    (root / "bounding_boxes.txt").write_text("".join(f"{row[0]} 1.0 2.0 3.0 4.0\n" for row in CUB))
    (root / "parts").mkdir()
    (root / "parts" / "parts.txt").write_text("1 back\n2 beak\n")


def test_files_that_begin_with_ids_are_joined(root: Path) -> None:
    write_cub(root)
    source = find_source(str(root))
    assert labels_by_id(source) == {
        "train": {
            "images/002.Auk/Auk_1.png": "002.Auk",
            "images/001.Albatross/Albatross_1.png": "001.Albatross",
        },
        "test": {
            "images/001.Albatross/Albatross_2.png": "001.Albatross",
            "images/002.Auk/Auk_2.png": "002.Auk",
        },
    }
    assert source.notes[:2] == (
        "read from images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, which "
        "are joined by their ids",
        "not read: bounding_boxes.txt, parts/",
    )
    # One of the files alone says that there are more.
    alone = find_source(str(root / "images.txt"))
    assert alone.notes[-1].startswith("images.txt is one of several lists that belong together")


def test_keys_about_lists_apply_to_joined_files(root: Path) -> None:
    write_cub(root)
    options = ListOptions(split_column="none", rename={"002.Auk": "auk"})
    source = find_source(str(root), lists=options)
    assert (source.classes, list(source.parts)) == (("001.Albatross", "auk"), ["train"])
    with pytest.raises(UsageError, match="no column 'kind'"):
        find_source(str(root), lists=ListOptions(label_column="kind"))


def test_classes_of_the_same_name_stay_two_classes(root: Path) -> None:
    """NABirds has several classes of one name, and names with blanks."""
    write_cub(root)
    (root / "classes.txt").write_text("1 Snow Goose\n2 Snow Goose\n3 Mallard\n")
    assert find_source(str(root)).classes == ("Snow Goose (1)", "Snow Goose (2)")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n", "image_class_labels.txt lacks 1 ids: 4"),
        ("train_test_split.txt", "1 1\n2 0\n3 1\n4 2\n", "values that are not 0 or 1: 2"),
        ("classes.txt", "1 Albatross\n", "classes.txt lacks 1 ids: 2"),
        ("images.txt", "1 a.png\n1 b.png\n", "line 2 repeats an id: 1 b.png"),
        ("images.txt", "1\n", "line 1 is not an id and a value: 1"),
    ],
)
def test_files_that_contradict_each_other_are_errors(
    root: Path, file: str, content: str, message: str
) -> None:
    write_cub(root)
    (root / file).write_text(content)
    with pytest.raises(DataError, match=message):
        find_source(str(root))


# Files of MATLAB


def write_flowers(root: Path) -> None:
    for number in range(1, 7):
        write_image(root / "jpg" / f"image_{number:05}.jpg", number)
    savemat(root / "imagelabels.mat", {"labels": np.array([[2, 1, 2, 1, 2, 1]], np.uint8)})
    sets = {"trnid": [6, 5], "valid": [1, 4], "tstid": [2, 3]}
    savemat(root / "setid.mat", {n: np.array([ids], np.uint16) for n, ids in sets.items()})


def test_the_splits_of_oxford_flowers_are_those_of_its_files(root: Path) -> None:
    write_flowers(root)
    assert labels_by_id(find_source(str(root))) == {
        "train": {"jpg/image_00005.jpg": "2", "jpg/image_00006.jpg": "1"},
        "val": {"jpg/image_00001.jpg": "2", "jpg/image_00004.jpg": "1"},
        "test": {"jpg/image_00002.jpg": "1", "jpg/image_00003.jpg": "2"},
    }
    (root / "setid.mat").unlink()
    assert list(find_source(str(root)).parts) == ["train"]
    write_flowers(root)
    (root / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images .* do not exist: image_00003.jpg"):
        find_source(str(root))


def test_sets_of_another_version_are_an_error(root: Path) -> None:
    write_flowers(root)
    savemat(root / "imagelabels.mat", {"labels": np.array([[2, 1, 2, 1, 2]], np.uint8)})
    with pytest.raises(DataError, match=r"setid.mat does not name each of the 5 images once"):
        find_source(str(root))


def annotations(rows: list[dict[str, Any]]) -> Any:
    """Return a struct array of MATLAB, `[1, N]`."""
    array = np.empty((1, len(rows)), [(name, "O") for name in rows[0]])
    for number, row in enumerate(rows):
        array[0, number] = tuple(row.values())
    return array


def cell(names: list[str]) -> Any:
    array = np.empty((1, len(names)), object)
    array[0, :] = names
    return array


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]


def test_all_stanford_cars_in_one_file(root: Path) -> None:
    rows = []
    for number in range(1, 5):
        write_image(root / "car_ims" / f"{number:06}.jpg", number)
        path = f"car_ims/{number:06}.jpg"
        car = {"relative_im_path": path, "bbox_x1": 1, "class": 2 - number % 2}
        rows.append({**car, "test": int(number > 2)})
    savemat(root / "cars_annos.mat", {"annotations": annotations(rows), "class_names": cell(CARS)})
    assert labels_by_id(find_source(str(root))) == {
        "train": {"car_ims/000001.jpg": CARS[0], "car_ims/000002.jpg": CARS[1]},
        "test": {"car_ims/000003.jpg": CARS[0], "car_ims/000004.jpg": CARS[1]},
    }


def write_cars(root: Path) -> None:
    (root / "devkit").mkdir()
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cell(CARS)})
    for split in ("train", "test"):
        rows = []
        for number in (1, 2):  # equal names in both folders
            write_image(root / f"cars_{split}" / f"{number:05}.jpg", number)
            fname = f"{number:05}.jpg"
            rows.append({"class": number, "fname": fname} if split == "train" else {"fname": fname})
        savemat(root / "devkit" / f"cars_{split}_annos.mat", {"annotations": annotations(rows)})


def test_stanford_cars_in_a_folder_for_each_split(root: Path) -> None:
    write_cars(root)
    train = {"cars_train/00001.jpg": CARS[0], "cars_train/00002.jpg": CARS[1]}
    source = find_source(str(root))
    assert labels_by_id(source) == {"train": train}
    assert "cars_test_annos.mat has no classes, so its images are not used" in source.notes
    labeled = annotations([{"class": 3 - n, "fname": f"{n:05}.jpg"} for n in (1, 2)])
    savemat(root / "devkit" / "cars_test_annos_withlabels.mat", {"annotations": labeled})
    test = {"cars_test/00001.jpg": CARS[1], "cars_test/00002.jpg": CARS[0]}
    assert labels_by_id(find_source(str(root))) == {"train": train, "test": test}


def test_training_images_of_cars_are_not_taken_from_the_test_folder(root: Path) -> None:
    write_cars(root)
    for path in (root / "cars_train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"2 of 2 images .* do not exist: cars_train/00001.jpg"):
        find_source(str(root))


def test_a_class_without_a_name_is_an_error(root: Path) -> None:
    write_cars(root)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cell(CARS[:1])})
    with pytest.raises(DataError, match="class 2 is not one of the 1 names"):
        find_source(str(root))


def test_the_splits_of_stanford_dogs(root: Path) -> None:
    breeds = ["n1-Chihuahua", "n2-Maltese_dog"]
    for split in ("train", "test"):
        paths = [f"{breed}/{split}.jpg" for breed in breeds]
        for path in paths:
            write_image(root / "Images" / path, len(path))
        (root / "lists").mkdir(exist_ok=True)
        content = {"file_list": cell(paths), "labels": np.array([[1], [2]], np.uint8)}
        savemat(root / "lists" / f"{split}_list.mat", content)
    source = find_source(str(root))
    assert labels_by_id(source) == {
        split: {f"Images/{breed}/{split}.jpg": breed for breed in breeds}
        for split in ("train", "test")
    }
    shifted = {"file_list": cell(paths), "labels": np.array([[1], [1]], np.uint8)}
    savemat(root / "lists" / "test_list.mat", shifted)
    with pytest.raises(DataError, match=r"labels of test_list.mat do not number the folders"):
        find_source(str(root))


def test_other_files_of_matlab_are_named(root: Path) -> None:
    write_image(root / "jpg" / "1.png")
    savemat(root / "imdb.mat", {"images": 1})
    with pytest.raises(DataError, match=r"what these files of MATLAB hold: imdb.mat") as caught:
        find_source(str(root))
    assert "CSV" in caught.value.fix
    with pytest.raises(DataError, match="not a CSV") as caught:
        find_source(str(root / "imdb.mat"))
    assert "CSV" in caught.value.fix
    (root / "imagelabels.mat").write_bytes(b"MATLAB 7.3 MAT-file" + bytes(500))
    with pytest.raises(DataError, match="can't read this file of MATLAB"):
        find_source(str(root))
    savemat(root / "imagelabels.mat", {"y": 1})
    with pytest.raises(DataError, match="has no variable 'labels', only y"):
        find_source(str(root))
