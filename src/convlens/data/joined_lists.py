"""Lists of published data sets that are spread over several files, or are files of MATLAB.

- CUB-200 and NABirds: `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and
  `classes.txt`, whose lines begin with the id of an image or of a class;
- Oxford Flowers: `imagelabels.mat` and `setid.mat`;
- Stanford Cars: `cars_annos.mat`, or `cars_train_annos.mat` and `cars_test_annos_withlabels.mat`;
- Stanford Dogs: `train_list.mat` and `test_list.mat`;
- Pascal VOC: `ImageSets/Main/cat_train.txt`, ..., if each image shows objects of one class;
- ILSVRC as on Kaggle: `LOC_val_solution.csv` and class folders in `ILSVRC/Data/CLS-LOC/train`;
- RAF-DB: `EmoLabel/list_patition_label.txt`, whose images may be the aligned ones.

Each becomes a `Table`, as of one file. They are read only if all images are where they belong.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convlens.data.layout import list_examples
from convlens.data.table_files import Line, Table
from convlens.data.types import is_image_name
from convlens.errors import DataError

MAX_FOLDERS = 20  # folders that are searched for lists and for images
MAT_HELP = "write the paths and labels of the images to a CSV file (path,label) and name that file"
_IDS = "images.txt"
_ID_LABELS = "image_class_labels.txt"
_ID_SPLITS = "train_test_split.txt"
_VOC_LISTS = "ImageSets/Main"
_VOC_LIST = re.compile(r"(?P<name>.+)_(?P<split>train|val|trainval|test)\.txt").fullmatch
_ILSVRC_SOLUTION, _ILSVRC_IMAGES = "LOC_val_solution.csv", "ILSVRC/Data/CLS-LOC"
_RAF_LIST = "list_patition_label.txt"  # sic
_RAF_CLASSES = {
    "1": "surprise",
    "2": "fear",
    "3": "disgust",
    "4": "happiness",
    "5": "sadness",
    "6": "anger",
    "7": "neutral",
}


@dataclass(frozen=True)
class _Entry:
    """One image: its path below the folder of the images, its class, and its split if known."""

    path: str
    label: str
    split: str = ""


@dataclass(frozen=True)
class JoinedLists:
    """The files of one set.

    Attributes:
        folder: contains them.
        names: of the files, and of folders, that the set is recognized by.
        read: returns the images, and notes.
        others: folders with further sets of this kind.
    """

    folder: Path
    names: tuple[str, ...]
    read: Callable[[Path], tuple[list[_Entry], list[str]]]
    others: tuple[Path, ...] = ()


def find_joined_lists(root: Path) -> JoinedLists | None:
    """Return the lists in a folder, or in one of the folders inside; None if there are none."""
    inside = _subfolders(root)
    for folders in ([root], inside):
        for folder in folders:
            for names, read in _READERS:
                if _holds(folder, names):
                    others = [other for other in folders if other != folder]
                    same = tuple(other for other in others if _holds(other, names))
                    return JoinedLists(folder, names, read, same)
    return None


def _holds(folder: Path, names: Iterable[str]) -> bool:
    return all(os.path.exists(folder / name) for name in names)  # False without permission


def read_joined_lists(root: Path, lists: JoinedLists) -> Table:
    """Return the table of all images; their paths are relative to `root`.

    Raises:
        DataError: the files contradict each other, cannot be read, or images are missing.
    """
    if lists.others:
        folders = sorted([lists.folder, *lists.others])
        raise DataError(
            f"{len(folders)} data sets: {list_examples([folder.name for folder in folders])}",
            where=str(root),
            fix=f"name one of them, e.g. {folders[-1]}",
        )
    entries, notes = lists.read(lists.folder)
    folder = _folder_of_images(root, [entry.path for entry in entries], lists.folder)
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    has_splits = any(entry.split for entry in entries)
    columns = ["path", "label", *(["split"] if has_splits else [])]
    lines: list[Line] = []
    for number, entry in enumerate(entries, 1):
        cells = [prefix + entry.path, entry.label, entry.split]
        lines.append((number, cells[: len(columns)]))
    return Table(columns, lines, tuple(notes))


def _subfolders(root: Path, most: int | None = MAX_FOLDERS) -> list[Path]:
    """Return the folders in a folder; none if there are more than `most`."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir())
    except OSError:
        return []
    return folders if most is None or len(folders) <= most else []


def _folder_of_images(root: Path, paths: Sequence[str], lists: Path) -> Path:
    """Return the folder that all paths are relative to.

    Not the usual search of `image_paths`, which may find images of the same name: the training
    and test images of Stanford Cars have equal names.
    """
    inside = _subfolders(root)
    folders = [root, *inside, *(inner for folder in inside for inner in _subfolders(folder))]
    fewest = list(paths)
    for folder in folders:
        missing = [path for path in paths if not (folder / path).is_file()]
        if not missing:
            return folder
        fewest = min(fewest, missing, key=len)
    raise DataError(
        f"{len(fewest):,} of {len(paths):,} images of these lists do not exist: "
        f"{list_examples(fewest[:3])}",
        where=str(lists),
        fix="put the folder of the images beside the lists, as in the archive of the data set",
    )


# Lines that begin with an id


def _read_id_files(folder: Path) -> tuple[list[_Entry], list[str]]:
    paths = _read_ids(folder / _IDS)
    labels = _read_ids(folder / _ID_LABELS)
    has_splits = (folder / _ID_SPLITS).is_file()
    is_train = _read_ids(folder / _ID_SPLITS) if has_splits else {}
    classes = folder / "classes.txt"
    names = _read_ids(classes) if classes.is_file() else {label: label for label in labels.values()}
    for name, ids, known in (
        (_ID_LABELS, paths, labels),
        (_ID_SPLITS, paths if has_splits else (), is_train),
        ("classes.txt", labels.values(), names),
    ):
        without = sorted({each for each in ids if each not in known})
        if without:
            raise DataError(
                f"{name} lacks {len(without):,} ids: {list_examples(without)}",
                where=str(folder),
                fix="unpack the archive of the data set again",
            )
    if strange := sorted({value for value in is_train.values() if value not in ("0", "1")}):
        raise DataError(
            f"{_ID_SPLITS} has values that are not 0 or 1: {list_examples(strange)}",
            where=str(folder),
            fix="1 stands for training images, 0 for test images",
        )
    # Two classes of NABirds may have the same name.
    counts = Counter(names[number] for number in set(labels.values()))
    unique = {n: f"{name} ({n})" if counts[name] > 1 else name for n, name in names.items()}
    split_of = {"1": "train", "0": "test", "": ""}
    entries = [
        _Entry(path, unique[labels[number]], split_of[is_train.get(number, "")])
        for number, path in paths.items()
    ]
    used = [_IDS, _ID_LABELS, *([_ID_SPLITS] if has_splits else [])]
    used += ["classes.txt"] if classes.is_file() else []
    notes = [f"read from {', '.join(used)}, which are joined by their ids"]
    rest = sorted({path.name for path in folder.glob("*.txt")} - {*used, "README.txt"})
    rest += [f"{name}/" for name in ("parts", "attributes") if (folder / name).is_dir()]
    return entries, [*notes, f"not read: {', '.join(rest)}"] if rest else notes


def _read_ids(path: Path) -> dict[str, str]:
    """Return the rest of each line by its first word."""
    values: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"can't read this file: {error}", where=str(path)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value.strip() or key in values:
            what = "repeats an id" if key in values else "is not an id and a value"
            raise DataError(
                f"line {number} {what}: {line.strip()[:60]}",
                where=str(path),
                fix="unpack the archive of the data set again",
            )
        values[key] = value.strip()
    return values


# Files of MATLAB


def _load(path: Path, *names: str) -> dict[str, Any]:
    """Return the variables `names` of a file of MATLAB.

    Raises:
        DataError: it cannot be read, or lacks one of them.
    """
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds; newer files are HDF5
        raise DataError(
            f"can't read this file of MATLAB: {str(error) or type(error).__name__}",
            where=str(path),
            fix=MAT_HELP,
        ) from error
    found = sorted(name for name in content if not name.startswith("__"))
    if lacking := [name for name in names if name not in content]:
        raise DataError(
            f"this file of MATLAB has no variable {lacking[0]!r}, only {list_examples(found)}",
            where=str(path),
            fix=MAT_HELP,
        )
    return content


def _integers(values: object) -> list[int]:
    return [int(value) for value in np.atleast_1d(np.asarray(values)).ravel()]


def _read_flowers(folder: Path) -> tuple[list[_Entry], list[str]]:
    labels = _integers(_load(folder / "imagelabels.mat", "labels")["labels"])
    split_of: dict[int, str] = {}
    notes = ["labels are those of imagelabels.mat: 1 belongs to image_00001.jpg"]
    if (folder / "setid.mat").is_file():
        content = _load(folder / "setid.mat", "trnid", "valid", "tstid")
        sets = {"train": content["trnid"], "val": content["valid"], "test": content["tstid"]}
        numbers = [(number, split) for split, ids in sets.items() for number in _integers(ids)]
        split_of = dict(numbers)
        if sorted(number for number, _ in numbers) != list(range(1, len(labels) + 1)):
            raise DataError(
                f"setid.mat does not name each of the {len(labels):,} images once",
                where=str(folder),
                fix="download setid.mat and imagelabels.mat of the same set",
            )
        notes.append("splits are those of setid.mat: trnid is train, valid is val, tstid is test")
    return [
        _Entry(f"image_{number:05}.jpg", str(label), split_of.get(number, ""))
        for number, label in enumerate(labels, 1)
    ], notes


def _read_all_cars(folder: Path) -> tuple[list[_Entry], list[str]]:
    content = _load(folder / "cars_annos.mat", "annotations", "class_names")
    names = _names(content["class_names"])
    entries = [
        _Entry(
            _field(row, "relative_im_path", folder),
            _class_name(names, row, folder),
            "test" if int(row.get("test", 0)) else "train",
        )
        for row in _records(content["annotations"])
    ]
    return entries, ["read from cars_annos.mat"]


def _read_cars(folder: Path) -> tuple[list[_Entry], list[str]]:
    names = _names(_load(folder / "cars_meta.mat", "class_names")["class_names"])
    entries: list[_Entry] = []
    read, unlabeled = list[str](), list[str]()
    for split, file in (
        ("train", "cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
        ("test", "cars_test_annos.mat"),
    ):
        if not (folder / file).is_file() or (split == "test" and len(read) == 2):
            continue
        rows = _records(_load(folder / file, "annotations")["annotations"])
        if not all("class" in row for row in rows):
            unlabeled.append(f"{file} has no classes, so its images are not used")
            continue
        read.append(file)
        for row in rows:
            path = f"cars_{split}/{_field(row, 'fname', folder)}"
            entries.append(_Entry(path, _class_name(names, row, folder), split))
    if "test" not in {entry.split for entry in entries}:
        entries = [_Entry(entry.path, entry.label) for entry in entries]
    return entries, [f"read from {' and '.join(read)}", *unlabeled]


def _read_dogs(folder: Path) -> tuple[list[_Entry], list[str]]:
    entries: list[_Entry] = []
    for split in ("train", "test"):
        content = _load(folder / f"{split}_list.mat", "file_list", "labels")
        paths, labels = _names(content["file_list"]), _integers(content["labels"])
        pairs = {(path.rpartition("/")[0], n) for path, n in zip(paths, labels, strict=False)}
        is_numbered = len({name for name, _ in pairs}) == len({n for _, n in pairs}) == len(pairs)
        if len(paths) != len(labels) or not is_numbered:
            raise DataError(
                f"the labels of {split}_list.mat do not number the folders of its images",
                where=str(folder),
                fix=MAT_HELP,
            )
        entries += [_Entry(path, path.rpartition("/")[0], split) for path in paths]
    return entries, ["read from train_list.mat and test_list.mat"]


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [value] if isinstance(value, dict) else list(value)


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(each) for each in value]


def _field(row: Mapping[str, Any], name: str, folder: Path) -> str:
    if name not in row:
        raise DataError(
            f"the annotations have no field {name!r}, only {list_examples(list(row))}",
            where=str(folder),
            fix=MAT_HELP,
        )
    return str(row[name])


def _class_name(names: Sequence[str], row: Mapping[str, Any], folder: Path) -> str:
    number = int(_field(row, "class", folder))
    if not 1 <= number <= len(names):
        raise DataError(
            f"class {number} is not one of the {len(names)} names", where=str(folder), fix=MAT_HELP
        )
    return names[number - 1]


# Pascal VOC


def _read_voc(folder: Path) -> tuple[list[_Entry], list[str]]:
    """Return the images of Pascal VOC if each of them shows objects of one class only.

    Each line of `cat_train.txt` has an image and 1 if it shows a cat, -1 if it does not, and 0 if
    it only shows cats that are difficult to recognize.
    """
    main = folder / _VOC_LISTS
    lists = {path: match for path in sorted(main.glob("*.txt")) if (match := _VOC_LIST(path.name))}
    found = {match["split"] for match in lists.values()}
    if not lists:
        raise DataError(
            f"Pascal VOC: {_VOC_LISTS} has no lists of classes, such as cat_train.txt",
            where=str(folder),
            fix=f"if each image shows one class, {MAT_HELP}",
        )
    names = sorted({match["name"] for match in lists.values()})
    classes_of: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    difficult = ""  # the key that leaves out difficult images of the first class
    for path, match in lists.items():
        split = "train" if match["split"] == "trainval" else match["split"]
        if split != match["split"] and "train" in found:
            continue  # repeats the others
        for image, flag in _read_ids(path).items():
            classes = classes_of.setdefault(image, [])
            split_of[image] = split
            if flag == "1":
                classes.append(match["name"])
            elif flag == "0" and match["name"] == names[0]:
                difficult = """ 'data.without=["0"]'"""
    several = {image: classes for image, classes in classes_of.items() if len(classes) > 1}
    if several:
        image, classes = next(iter(several.items()))
        rename = json.dumps({"1": names[0], "-1": "other"})
        raise DataError(
            f"Pascal VOC is a multi-label set: {len(several):,} of {len(classes_of):,} images show "
            f"several of {len(names)} classes ({image}: {', '.join(classes)}); convlens trains "
            "single-label classifiers",
            where=str(folder),
            fix=f"one class against the others: convlens train {main} data.images=../../JPEGImages "
            f"data.lists={names[0]} 'data.rename={rename}'{difficult}",
        )
    entries = [
        _Entry(f"JPEGImages/{image}.jpg", classes[0], split_of[image])
        for image, classes in classes_of.items()
        if classes
    ]
    notes = [f"read from the lists of {len(names)} classes in {_VOC_LISTS}"]
    if left_out := len(classes_of) - len(entries):
        notes.append(f"{left_out:,} images without a class in these lists are left out")
    return entries, notes


# ILSVRC as on Kaggle


def _read_kaggle_ilsvrc(folder: Path) -> tuple[list[_Entry], list[str]]:
    """Return the images in the class folders of `train`, and those of `val` by their solution."""
    table = folder / _ILSVRC_SOLUTION
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"ImageId", "PredictionString"} <= rows[0].keys():
        raise DataError(
            "this file does not have the columns ImageId and PredictionString",
            where=str(table),
            fix="unpack the archive of the data set again",
        )
    entries = []
    for path in _subfolders(folder / _ILSVRC_IMAGES / "train", most=None):
        entries += [
            _Entry(f"{_ILSVRC_IMAGES}/train/{path.name}/{name}", path.name, "train")
            for name in sorted(os.listdir(path))
            if is_image_name(name)
        ]
    for row in rows:
        # A class and the four sides of a box for each object.
        classes = set(row["PredictionString"].split()[::5])
        if len(classes) != 1:
            raise DataError(
                f"{row['ImageId']} has {len(classes)} classes: {list_examples(sorted(classes))}",
                where=str(table),
                fix="give each image one class",
            )
        image = f"{_ILSVRC_IMAGES}/val/{row['ImageId']}.JPEG"
        entries.append(_Entry(image, classes.pop(), "val"))
    notes = [f"train is read from its class folders, val from {_ILSVRC_SOLUTION}"]
    if (folder / _ILSVRC_IMAGES / "test").is_dir():
        notes.append(f"{_ILSVRC_IMAGES}/test is not used: its images have no labels")
    return entries, notes


def _explain_ilsvrc(folder: Path) -> tuple[list[_Entry], list[str]]:
    """Say what to name instead of the folder `ILSVRC`, which has no labels of `val`."""
    above = Path(os.path.dirname(os.path.abspath(folder)))
    images = f"{folder / 'Data' / 'CLS-LOC'} (the training images, in class folders)"
    with_val = f"{above} (also val, by {_ILSVRC_SOLUTION}) or "
    raise DataError(
        "this is the folder ILSVRC as on Kaggle, which has no labels of the validation images",
        where=str(folder),
        fix=f"name {with_val if (above / _ILSVRC_SOLUTION).is_file() else ''}{images}",
    )


# RAF-DB


def _read_raf(folder: Path) -> tuple[list[_Entry], list[str]]:
    """Return the images of RAF-DB: the aligned faces if they are there, else the originals."""
    images = folder.parent / "Image"
    kinds = [kind for kind in ("aligned", "original") if (images / kind).is_dir()]
    ending = "_aligned" if kinds[:1] == ["aligned"] else ""
    where = "/".join(["Image", *kinds[:1]])
    entries = []
    for name, label in _read_ids(folder / _RAF_LIST).items():
        stem, extension = os.path.splitext(name)
        split = stem.partition("_")[0]
        path = f"{where}/{stem}{ending}{extension}"
        entries.append(_Entry(path, label, split if split in ("train", "test") else ""))
    notes = [f"read from {folder.name}/{_RAF_LIST} with the images in {where}"]
    if len(kinds) > 1:
        notes.append("Image/original is not read; to use it, move Image/aligned out of the folder")
    labels = {entry.label for entry in entries}
    if labels <= _RAF_CLASSES.keys():
        pairs = [f"{number} is {_RAF_CLASSES[number]}" for number in sorted(labels)]
        notes.append(f"classes are the numbers of RAF-DB: {', '.join(pairs)}")
    return entries, notes


_READERS: Sequence[tuple[tuple[str, ...], Callable[[Path], tuple[list[_Entry], list[str]]]]] = (
    ((_IDS, _ID_LABELS), _read_id_files),
    (("imagelabels.mat",), _read_flowers),
    (("cars_annos.mat",), _read_all_cars),
    (("cars_train_annos.mat", "cars_meta.mat"), _read_cars),
    (("train_list.mat", "test_list.mat"), _read_dogs),
    ((_VOC_LISTS, "JPEGImages"), _read_voc),
    ((_ILSVRC_SOLUTION, f"{_ILSVRC_IMAGES}/train"), _read_kaggle_ilsvrc),
    (("Data/CLS-LOC/train", "ImageSets/CLS-LOC"), _explain_ilsvrc),
    ((_RAF_LIST,), _read_raf),
)
