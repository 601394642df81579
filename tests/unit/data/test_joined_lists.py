"""Published data sets whose lists are several files, or files of MATLAB."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from convlens.data.list_columns import ListOptions
from convlens.data.sources import find_configured_source, find_source
from convlens.data.types import DataSource
from convlens.errors import DataError, UsageError
from convlens.recipe import load_recipe
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


# Pascal VOC

# Image -> classes, its split, and the class of which it shows difficult objects only.
VOC: dict[str, tuple[list[str], str, str]] = {
    "2008_000001": (["cat"], "train", ""),
    "2008_000002": (["dog"], "train", ""),
    "2008_000003": (["cat"], "train", "dog"),
    "2008_000004": (["dog"], "val", ""),
    "2008_000005": (["cat"], "val", ""),
    "2008_000006": ([], "val", "cat"),
    "2008_000007": ([], "train", "cat"),
}


def write_voc(root: Path, images: dict[str, tuple[list[str], str, str]]) -> None:
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "Annotations").mkdir()
    write_image(root / "SegmentationClass" / "2008_000001.png")
    for number, image in enumerate(images):
        write_image(root / "JPEGImages" / f"{image}.jpg", number)
        (root / "Annotations" / f"{image}.xml").write_text("<annotation/>")
    for split in ("train", "val", "trainval"):
        in_split = [image for image, found in images.items() if found[1] in split]
        (lists / f"{split}.txt").write_text("".join(f"{image}\n" for image in in_split))
        for name in ("cat", "dog"):
            lines = []
            for image in in_split:
                classes, _, difficult = images[image]
                flag = 1 if name in classes else 0 if name == difficult else -1
                lines.append(f"{image} {flag:2}\n")
            (lists / f"{name}_{split}.txt").write_text("".join(lines))


def test_pascal_voc_is_read_if_each_image_shows_one_class(root: Path) -> None:
    write_voc(root / "VOCdevkit" / "VOC2012", VOC)
    source = find_source(str(root))
    folder = "VOC2012/JPEGImages"
    assert labels_by_id(source) == {
        "train": {
            f"{folder}/2008_000001.jpg": "cat",
            f"{folder}/2008_000002.jpg": "dog",
            f"{folder}/2008_000003.jpg": "cat",
        },
        "val": {f"{folder}/2008_000004.jpg": "dog", f"{folder}/2008_000005.jpg": "cat"},
    }
    assert source.notes == (
        "read from the lists of 2 classes in ImageSets/Main",
        "2 images without a class in these lists are left out",
    )


def test_pascal_voc_with_several_classes_says_which_command_reads_one_of_them(root: Path) -> None:
    write_voc(root, {**VOC, "2008_000008": (["cat", "dog"], "train", "")})
    with pytest.raises(DataError) as caught:
        find_source(str(root))
    assert caught.value.what == (
        "Pascal VOC is a multi-label set: 1 of 8 images show several of 2 classes (2008_000008: "
        "cat, dog); convlens trains single-label classifiers"
    )
    _, *words = shlex.split(caught.value.fix.partition(": convlens ")[2])
    recipe = load_recipe("folder", [f"data.name={words[0]}", *words[1:]])
    source = find_configured_source(recipe.data)
    # Images with a difficult cat are no examples of either.
    assert labels_by_id(source) == {
        "train": {
            "../../JPEGImages/2008_000001.jpg": "cat",
            "../../JPEGImages/2008_000002.jpg": "other",
            "../../JPEGImages/2008_000003.jpg": "cat",
            "../../JPEGImages/2008_000008.jpg": "cat",
        },
        "val": {
            "../../JPEGImages/2008_000004.jpg": "other",
            "../../JPEGImages/2008_000005.jpg": "cat",
        },
    }


def test_two_years_of_pascal_voc_are_not_two_classes(root: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        write_voc(root / year, VOC)
    with pytest.raises(DataError, match="2 data sets: VOC2007, VOC2012") as caught:
        find_source(str(root))
    assert caught.value.fix == f"name one of them, e.g. {root / 'VOC2012'}"
    for path in (root / "VOC2012" / "ImageSets" / "Main").glob("*_*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"no lists of classes, such as cat_train.txt"):
        find_source(str(root / "VOC2012"))


# ILSVRC as on Kaggle


def write_ilsvrc(root: Path) -> Path:
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for name in ("n01", "n02"):
        write_image(images / "train" / name / f"{name}_1.JPEG", 1)
        write_image(images / "train" / name / f"{name}_2.JPEG", 2)
        (root / "ILSVRC" / "Annotations" / "CLS-LOC" / "train" / name).mkdir(parents=True)
    rows = ["ImageId,PredictionString"]
    for number in (1, 2):
        image = f"ILSVRC2012_val_{number:08}"
        write_image(images / "val" / f"{image}.JPEG", number)
        rows.append(f"{image},{f'n0{3 - number} 1 2 3 4 ' * number}")
    write_image(images / "test" / "ILSVRC2012_test_00000001.JPEG")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows))
    (root / "LOC_train_solution.csv").write_text("ImageId,PredictionString\nn01_1,n01 1 2 3 4\n")
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    (root / "ILSVRC" / "ImageSets" / "CLS-LOC").mkdir(parents=True)
    (root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "val.txt").write_text("ILSVRC2012_val_1 1\n")
    return images


def test_ilsvrc_of_kaggle_has_the_labels_of_its_validation_images_in_a_table(root: Path) -> None:
    images = write_ilsvrc(root)
    source = find_source(str(root))
    folder = "ILSVRC/Data/CLS-LOC"
    assert labels_by_id(source) == {
        "train": {f"{folder}/train/{n}/{n}_{i}.JPEG": n for n in ("n01", "n02") for i in (1, 2)},
        "val": {
            f"{folder}/val/ILSVRC2012_val_00000001.JPEG": "n02",
            f"{folder}/val/ILSVRC2012_val_00000002.JPEG": "n01",
        },
    }
    assert source.notes == (
        "train is read from its class folders, val from LOC_val_solution.csv",
        f"{folder}/test is not used: its images have no labels",
    )
    # Its parts say what to name instead.
    with pytest.raises(DataError) as caught:
        find_source(str(root / "LOC_val_solution.csv"))
    assert caught.value.fix == f"name the folder of the data set: {root}"
    with pytest.raises(DataError) as caught:
        find_source(str(root / "ILSVRC"))
    assert f"name {root} (also val" in caught.value.fix
    assert f"{images} (the training images" in caught.value.fix
    assert labels_by_id(find_source(str(images)))["train"].keys() == {
        f"train/{n}/{n}_{i}.JPEG" for n in ("n01", "n02") for i in (1, 2)
    }


def test_ilsvrc_without_the_labels_of_validation_is_explained(root: Path) -> None:
    images = write_ilsvrc(root)
    (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\na,n01 1 2 3 4 n02 1 2 3 4"
    )
    with pytest.raises(DataError, match="a has 2 classes: n01, n02"):
        find_source(str(root))
    (root / "LOC_val_solution.csv").write_text("id,label\na,n01")
    with pytest.raises(DataError, match="columns ImageId and PredictionString"):
        find_source(str(root))
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(DataError) as caught:
        find_source(str(root))
    assert caught.value.fix == f"name {images} (the training images, in class folders)"


# RAF-DB


def write_raf(root: Path, kinds: dict[str, str]) -> Path:
    """Write six images of each of `kinds`, which have that ending."""
    lines = []
    for number in range(1, 7):
        name = f"{'train' if number < 5 else 'test'}_{number:05}"
        for kind, ending in kinds.items():
            write_image(root / "Image" / kind / f"{name}{ending}.jpg", number)
        lines.append(f"{name}.jpg {number % 2 + 4}\n")
    path = root / "EmoLabel" / "list_patition_label.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines))
    box = root / "Annotation" / "boundingbox" / "train_00001_boundingbox.txt"
    box.parent.mkdir(parents=True)
    box.write_text("1.0 2.0 3.0 4.0\n")
    return path


RAF_NAMES = "classes are the numbers of RAF-DB: 4 is happiness, 5 is sadness"


def test_the_aligned_images_of_raf_have_other_names_than_in_its_list(root: Path) -> None:
    path = write_raf(root / "basic", {"aligned": "_aligned"})
    source = find_source(str(root))
    assert labels_by_id(source) == {
        "train": {f"Image/aligned/train_{n:05}_aligned.jpg": str(n % 2 + 4) for n in range(1, 5)},
        "test": {f"Image/aligned/test_{n:05}_aligned.jpg": str(n % 2 + 4) for n in (5, 6)},
    }
    read = "read from EmoLabel/list_patition_label.txt with the images in Image/"
    assert source.notes == (f"{read}aligned", RAF_NAMES)
    with pytest.raises(DataError, match=r"files that do not exist: train_00001\.jpg") as caught:
        find_source(str(path))
    assert caught.value.fix == f"name the folder of the data set: {root / 'basic'}"


def test_the_original_images_of_raf_are_read_if_there_are_no_aligned_ones(root: Path) -> None:
    write_raf(root, {"original": ""})
    source = find_source(str(root))
    assert set(labels_by_id(source)["test"]) == {f"Image/original/test_{n:05}.jpg" for n in (5, 6)}
    for number in range(1, 7):
        name = f"{'train' if number < 5 else 'test'}_{number:05}"
        write_image(root / "Image" / "aligned" / f"{name}_aligned.jpg")
    both = find_source(str(root))
    assert set(labels_by_id(both)["test"]) == {
        f"Image/aligned/test_{n:05}_aligned.jpg" for n in (5, 6)
    }
    assert "Image/original is not read" in both.notes[1]
