"""Find a data set by name or path: built-in sets, image folders, lists of images and shards.

To add a built-in set, write a function that returns its `DataSource` and add a line to `SOURCES`;
files to download are listed in `download.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from convlens import user_code
from convlens.data import download
from convlens.data.cache import FixedSizeRecords
from convlens.data.class_names import rename_classes
from convlens.data.decode import Pixels
from convlens.data.download import WEIGHTS_FOLDER, data_roots
from convlens.data.folder_layout import LayoutOptions
from convlens.data.image_folder import read_folder
from convlens.data.image_list import LIST_SUFFIXES, read_list
from convlens.data.image_paths import is_file_url, is_url, path_of_file_url
from convlens.data.joined_lists import MAT_HELP
from convlens.data.layout import ClassChoice, list_examples, printable, split_from_name
from convlens.data.list_columns import DEFAULT_OPTIONS, ListOptions
from convlens.data.list_folder import has_lists, read_listed_folder
from convlens.data.scan import is_directory
from convlens.data.types import (
    DataSource,
    EncodedFiles,
    ImageSource,
    NumberedStrings,
    Part,
    is_image_name,
)
from convlens.data.user_dataset import read_user_dataset
from convlens.data.webdataset import holds_shards, is_pattern, read_shards
from convlens.errors import DataError, UsageError, close_matches, did_you_mean

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

_DIGITS = tuple("0123456789")
_CLASSES = {
    "mnist": _DIGITS,
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "svhn": _DIGITS,
    "stl10": (
        "airplane",
        "bird",
        "car",
        "cat",
        "deer",
        "dog",
        "horse",
        "monkey",
        "ship",
        "truck",
    ),
}
SHAPES = (
    "arrow",
    "bar",
    "circle",
    "crescent",
    "cross",
    "heart",
    "ring",
    "square",
    "star",
    "triangle",
)
SHAPES_PER_BATCH = 256  # images that are drawn at once
SHAPES_SEED = 20240

# Known facts about a set that can't be found by inspecting it; for `convlens audit`.
_TWINS = (
    "of the test images have near-duplicates in the training part (Barz & Denzler 2020; ciFAIR)"
)
REMARKS = {"cifar10": (f"3.3% {_TWINS}",), "cifar100": (f"10% {_TWINS}",)}

Plane = npt.NDArray[np.float32]


def find_configured_source(
    config: DataConfig, *, tested: bool = False, known_classes: Sequence[str] = ()
) -> DataSource:
    """Return the data set that the data section of a recipe describes; see `find_source`."""
    return find_source(
        config.name,
        count=config.count,
        image_size=None if config.image_size == "auto" else int(config.image_size),
        group=config.group,
        layout=LayoutOptions(config.layout, config.class_level, tuple(known_classes)),
        choice=ClassChoice(config.classes, config.without, config.min_images or 0),
        lists=ListOptions(
            path_column=config.path_column,
            label_column=config.label_column,
            split_column=config.split_column,
            images=config.images,
            lists=config.lists,
            rename=config.rename,
        ),
        tested=tested,
    )


def find_source(
    name: str,
    *,
    count: int | None = None,
    image_size: int | None = None,
    group: str | None = None,
    layout: LayoutOptions | None = None,
    choice: ClassChoice | None = None,
    lists: ListOptions = DEFAULT_OPTIONS,
    tested: bool = False,
) -> DataSource:
    """Return the data set called `name`: a built-in set, a path, or a folder under `data/`.

    Args:
        name: built-in names have priority, then existing paths, then folders under `data/` and
            `$CONVLENS_DATA`, then data sets of the user (`FILE.py:NAME`).
        count: number of images to generate; only for `shapes`.
        image_size: size of the generated `shapes`.
        group: a CSV column, or a regular expression for the ids of images (`_group_by_pattern`);
            images with equal values stay in one split.
        layout: how a folder is read that has several readings.
        choice: the classes to use; by default all.
        lists: how to read a list of images. Classes of other sources are renamed, too.
        tested: the set is only used to evaluate a model: `train` may be missing, there may be a
            single class, and a class may have no images or no training images.

    Raises:
        DataError: the path is missing or unusable, or a download failed.
        UsageError: the name is unknown, or an argument does not apply.
    """
    if count is not None and name != "shapes":
        raise UsageError(
            "data.count applies only to the generated set `shapes`", where=f"data.name={name}"
        )
    choice = choice or ClassChoice()
    path = None if name in SOURCES else _find_path(name)
    is_user = path is None and is_user_dataset(name)
    is_named = name in SOURCES or path is not None or is_user
    if not is_named and (is_url(name) or not is_pattern(name)):
        raise _unknown_name(name)
    _refuse_downloaded_set(path)
    lists = replace(lists, group=group)
    # Labels that are classes, although they look like missing ones.
    known_classes = (*choice.only, *choice.without, *(layout.known_classes if layout else ()))
    if path is not None and path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        source = read_list(path, name, lists, tested=tested, known_classes=known_classes)
    elif path is not None and path.is_dir() and not holds_shards(path):
        source = _read_folder(
            path, name, lists, layout, choice, tested=tested, known_classes=known_classes
        )
    else:
        _refuse_list_options(lists, name)
        if name == "shapes":
            source = _shapes(count or 2000, image_size or 32)
        elif name in SOURCES:
            source = SOURCES[name]()
        elif is_user:
            source = read_user_dataset(name)
        else:
            source = _read_path(path, name, tested)
        if lists.rename:
            source = rename_classes(source, lists.rename)
    if layout is not None:
        source = _in_known_order(source, layout.known_classes)
    choice.check(source.classes, name)
    source = source.with_classes(choice.keep(source.classes))
    if choice.min_images:
        source = _without_small_classes(source, choice.min_images)
    if choice != ClassChoice() and len(source.classes) < 2 and not tested:
        counts = f"; {source.notes[-1]}" if choice.min_images and source.notes else ""
        raise DataError(
            f"{len(source.classes)} classes are left: {list_examples(source.classes) or 'none'}"
            f"{counts}",
            where=f"data.name={name}",
            fix="change data.classes, data.without or data.min_images",
        )
    if group is not None and all(part.groups is None for part in source.parts.values()):
        source = _group_by_pattern(source, group)
    return source


def _refuse_downloaded_set(path: Path | None) -> None:
    """Refuse a folder with the files of a built-in set, which has a name of its own."""
    found = download.find_downloaded_set(path) if path is not None and path.is_dir() else None
    if found is None:
        return
    name, root = found
    fix = f"the data set is called {name}, e.g. `convlens train {name}`"
    if not any(os.path.abspath(root) == os.path.abspath(each) for each in data_roots()):
        fix += f"; it is searched for in {' and '.join(map(str, data_roots()))} ($CONVLENS_DATA)"
    raise DataError(
        f"this folder holds torchvision's files of {name}, not image files",
        where=str(path),
        fix=fix,
    )


def _read_folder(
    path: Path,
    name: str,
    lists: ListOptions,
    layout: LayoutOptions | None,
    choice: ClassChoice,
    *,
    tested: bool,
    known_classes: Sequence[str],
) -> DataSource:
    """Read a folder of images by its class folders and the lists in it."""
    # Classes that are not chosen are not scanned: they may be empty, for example.
    read_class_folders = partial(read_folder, options=layout, choice=choice)
    may_have_lists = layout is None or layout.layout == "auto"
    if may_have_lists and has_lists(path):
        return read_listed_folder(
            path,
            name,
            lists,
            read_class_folders=read_class_folders,
            tested=tested,
            known_classes=known_classes,
        )
    _refuse_list_options(lists, name)
    try:
        return read_class_folders(path, name, rename=lists.rename, tested=tested)
    except DataError as error:
        mat_files = [file.name for pattern in ("*.mat", "*/*.mat") for file in path.glob(pattern)]
        if not mat_files:
            raise
        raise DataError(
            f"{error.what}; it is not known what these files of MATLAB hold: "
            f"{list_examples(sorted(mat_files))}",
            where=error.where,
            fix=MAT_HELP,
        ) from error


def _in_known_order(source: DataSource, known_classes: Sequence[str]) -> DataSource:
    """Return a list with numbers as classes in the order of a model with the same classes.

    Earlier versions sorted the numbers by name, and drawn splits depend on the order.
    """
    is_by_name = list(source.classes) == sorted(source.classes)
    if is_by_name or set(source.classes) != set(known_classes):
        return source
    new_label = np.array([known_classes.index(name) for name in source.classes], np.int64)
    parts = {s: replace(part, labels=new_label[part.labels]) for s, part in source.parts.items()}
    return replace(source, classes=tuple(known_classes), parts=parts)


def _refuse_list_options(lists: ListOptions, name: str) -> None:
    """Refuse keys that say how to read a list; the others apply to every data set."""
    for key, value in asdict(replace(lists, rename=None, group=None)).items():
        if value is not None:
            raise UsageError(
                f"data.{key} applies only to CSV files and other lists of images",
                where=f"data.name={name}",
            )


def _read_path(path: Path | None, name: str, tested: bool) -> DataSource:
    """Read shards, or a file that is not a list; without a path, `name` is a pattern of shards."""
    if path is None:
        return read_shards(_to_path(name), name, tested=tested)
    if path.is_dir() or path.suffix.lower() == ".tar":
        return read_shards(path, name, tested=tested)
    fix = f"name a folder or a list of images ({', '.join(LIST_SUFFIXES)})"
    if path.suffix.lower() in (".zip", ".gz", ".tgz", ".xz", ".7z", ".rar"):
        fix = "unpack it and name the folder"
    elif path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        fix = "save it as CSV (UTF-8) and name that file"
    elif is_image_name(path.name):
        fix = f"name the folder of all images; `convlens predict RUN {name}` classifies one"
    elif path.suffix.lower() == ".mat":
        fix = f"name its folder if it is a list of a published data set, or {MAT_HELP}"
    raise DataError("this file is not a CSV or a tar", where=str(path), fix=fix)


def _without_small_classes(source: DataSource, min_images: int) -> DataSource:
    """Leave out classes with fewer than `min_images` training images."""
    counts = dict.fromkeys(source.classes, 0)
    if "train" in source.parts:
        bincount = np.bincount(source.parts["train"].labels, minlength=len(source.classes))
        counts = dict(zip(source.classes, bincount.tolist(), strict=True))
    small = [f"{name} ({count})" for name, count in counts.items() if count < min_images]
    if not small:
        return source
    kept = source.with_classes([name for name, count in counts.items() if count >= min_images])
    note = (
        f"{len(small)} of {len(counts)} classes have fewer than {min_images} training images and "
        f"are left out: {list_examples(small)}"
    )
    return replace(kept, notes=(*kept.notes, note))


def _group_by_pattern(source: DataSource, pattern: str) -> DataSource:
    """Group images by what a regular expression finds in their ids.

    Args:
        source: image files of a folder, a CSV file or shards. Their ids are paths relative to the
            set, with `/` on every system.
        pattern: its first group is the group of an image, or the whole match if it has none.

    Raises:
        UsageError: the pattern is invalid, or the images are not files.
        DataError: the pattern does not match all ids.
    """
    where = f"data.group={pattern}"
    if not all(isinstance(part.images, EncodedFiles) for part in source.parts.values()):
        raise UsageError("data.group applies only to image files", where=f"data.name={source.name}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"data.group is not a valid regular expression: {error}",
            where=where,
            fix="for example data.group='^(.*)_[0-9]+': the part in parentheses is the group",
        ) from error
    parts, unmatched, total = {}, list[str](), 0
    splits_of_group: dict[str, set[str]] = {}
    for split, part in source.parts.items():
        groups = []
        for image_id in part.ids:
            match = compiled.search(image_id.replace(os.sep, "/"))
            group = match and match[1 if compiled.groups else 0]
            if group is None:
                unmatched.append(image_id)
            else:
                groups.append(group)
                splits_of_group.setdefault(group, set()).add(split)
        total += len(part.ids)
        parts[split] = replace(part, groups=groups)
    if len(unmatched) == total:
        raise UsageError(
            "data.group is not a column, and as a regular expression it matches no path like "
            f"{unmatched[0]}",
            where=where,
            fix="for example data.group='^(.*)_[0-9]+': the part in parentheses is the group",
        )
    if unmatched:
        raise DataError(
            f"data.group matches {total - len(unmatched):,} of {total:,} images, but not: "
            f"{list_examples(unmatched)}",
            where=where,
            fix="it is searched for in the path of each image below the folder, as shown here",
        )
    notes = list(source.notes)
    shared = sorted(group for group, splits in splits_of_group.items() if len(splits) > 1)
    if shared:
        notes.append(
            f"{len(shared):,} groups are in more than one of the set's own splits: "
            f"{list_examples(shared)}"
        )
    return DataSource(source.name, source.classes, parts, tuple(notes))


def known_names(name: str = "") -> list[str]:
    """Return the names that `find_source` accepts.

    These are the built-in sets, the folders under `data/` that may hold images, and `name` itself
    if it is a path.
    """
    subfolders = {
        entry.name
        for root in data_roots()
        if root.is_dir()
        for entry in os.scandir(root)
        if is_directory(entry) and _may_hold_images(Path(entry))
    }
    folders = sorted(f for f in subfolders if not f.startswith(".") and f not in SOURCES)
    is_new_path = _looks_like_path(name) and name not in folders
    is_new_path = is_new_path or is_user_dataset(name)
    return [*SOURCES, *folders, *([name] if is_new_path else [])]


def _may_hold_images(folder: Path) -> bool:
    """Return whether a folder may be a data set: neither empty nor one of our downloads.

    A failed download leaves a folder with nothing but a lock.
    """
    if folder.name == WEIGHTS_FOLDER or download.find_downloaded_set(folder) is not None:
        return False
    try:
        return any(not entry.name.startswith(".") for entry in os.scandir(folder))
    except OSError:  # not readable: its own error is better than that of an unknown name
        return True


def is_available(name: str) -> bool:
    """Return whether `find_source` would find something under this name now."""
    is_known = name in SOURCES or is_pattern(name) or _find_path(name) is not None
    return is_known or is_user_dataset(name)


def is_user_dataset(name: str) -> bool:
    """Return whether a name that is not a built-in set means a data set that a user wrote."""
    is_path = _find_path(name) is not None
    return name not in SOURCES and not is_path and user_code.is_user_code("datasets", name)


def data_path(name: str) -> str | None:
    """Return the absolute path that a name stands for; None for built-in and unknown names."""
    path = None if name in SOURCES else _find_path(name)
    return None if path is None else os.path.abspath(path)


def canonical_name(name: str) -> str:
    """Return the spelling of a data set's name that recipes, and so the names of runs, use.

    `flowers`, `flowers/`, `./flowers`, `sub/../flowers` and the absolute path are one set. A path
    inside the current folder is written relative to it, or to a data root if that is shorter; any
    other path is absolute. Built-in names and names of nothing stay as they are. A link keeps its
    own name, which `is_same_data` compares with that of its target.
    """
    path = None if name in SOURCES else _find_path(name)
    try:
        if path is None:
            is_local = is_pattern(name) and not is_url(name)
            return _tidy_path(_to_path(name)) if is_local else name
        tidy = _tidy_path(path)
        below_roots = [each for root in data_roots() if (each := _below(path, root)) is not None]
    except OSError:  # the current folder was deleted
        return name
    spellings = sorted(
        [tidy, *below_roots], key=lambda text: (os.path.isabs(text), text.count("/"))
    )
    # `./digits` must not become the built-in set, nor `./~x` the folder of a user.
    for spelling in (*spellings, os.path.join(".", tidy)):
        found = None if spelling in SOURCES else _find_path(spelling)
        if found is not None and os.path.samefile(found, path):
            return spelling
    return name


def is_same_data(one: str, other: str) -> bool:
    """Return whether two names stand for the same built-in set, folder or file, links followed."""
    if canonical_name(one) == canonical_name(other):
        return True
    paths = [data_path(name) for name in (one, other)]
    return None not in paths and os.path.samefile(*map(str, paths))


def _tidy_path(path: Path) -> str:
    """Return a path relative to the current folder if it is inside, else as an absolute path."""
    absolute = os.path.abspath(path)
    if os.path.exists(path) and not os.path.samefile(path, absolute):
        absolute = os.path.realpath(path)  # in `link/..` the dots belong to the target of the link
    inside = _below(Path(absolute), Path.cwd())
    return _resolve_parents(absolute) if inside is None else inside


def _below(path: Path, folder: Path) -> str | None:
    """Return `path` relative to `folder`; None if it is not inside."""
    absolute, base = os.path.abspath(path), os.path.abspath(folder)
    for inner, outer in ((absolute, base), (_resolve_parents(absolute), os.path.realpath(base))):
        if Path(inner).is_relative_to(outer):
            return os.path.relpath(inner, outer)
    return None


def _resolve_parents(path: str) -> str:
    """Return a path with links resolved, except that of its last part."""
    folder, last = os.path.split(path)
    return os.path.join(os.path.realpath(folder), last)


def _looks_like_path(name: str) -> bool:
    """Return whether `name` is a path or written like one; then it is not a misspelled name."""
    has_separator = any(separator in name for separator in ("/", "\\", os.sep))
    path_syntax = has_separator or name.lower().endswith((*LIST_SUFFIXES, ".tar"))
    return path_syntax or _find_path(name) is not None


def _find_path(name: str) -> Path | None:
    """Return the existing path that `name` stands for, alone or below a data root."""
    if not name.strip():
        return None
    candidates = [_to_path(name), *(root / name for root in data_roots())]
    # `os.path` returns False for a name that is too long or contains a zero byte; `Path` raises.
    return next((p for p in candidates if os.path.isdir(p) or os.path.isfile(p)), None)


def _to_path(name: str) -> Path:
    """Return the path that a name is written for: with `~`, or as the address `file://...`."""
    if is_file_url(name):
        name = path_of_file_url(name)
    try:
        return Path(os.path.expanduser(name))  # keeps `~nobody`, for which `Path` raises
    except ValueError:  # zero bytes and lone surrogates can't be user names
        return Path(name)


def _unknown_name(name: str) -> DataError | UsageError:
    if foreign := _foreign_address(name):
        return foreign
    if _looks_like_path(name):
        path = _to_path(name)
        fix = "check the spelling; relative paths start at the current folder or at data/"
        if str(path).startswith("~"):
            user = str(path).partition("/")[0]
            fix = f"{user} is not a user of this machine; ~/ is your home folder"
        return DataError(
            f"no such file or folder: {name}", where=printable(os.path.abspath(path)), fix=fix
        )
    choices = known_names()
    suggestion = did_you_mean(close_matches(name, choices))
    suggestion = suggestion or f"choose from: {', '.join(choices)}"
    return UsageError(f"unknown data {name!r}", fix=f"{suggestion} (or name a folder or CSV)")


def _foreign_address(name: str) -> DataError | None:
    """Return the error about the address of another machine or system; None for other names."""
    where = f"data.name={printable(name)}"
    if is_url(name):
        return DataError(
            "a data set must be a folder or a list on this machine, not an address",
            where=where,
            fix="download it, unpack it if it is an archive, and name the folder",
        )
    if os.name == "nt" or "\\" not in name:
        return None
    fix = "write the path of the folder on this system, with / between folders"
    with_slashes = name.replace("\\", "/")
    if drive := re.match(r"([A-Za-z]):/", with_slashes):
        mounted = f"/mnt/{drive[1].lower()}/{with_slashes[3:]}"
        fix += f" (under WSL, {name} is {mounted})"
    elif name.startswith("\\\\"):
        fix = "mount the network folder, and name the folder that it is mounted to"
    elif _find_path(with_slashes) is not None:
        fix = did_you_mean([with_slashes])
    what = "this is a path of Windows, which this system does not have"
    return DataError(what, where=where, fix=fix)


def _make_part(split: str, images: ImageSource, labels: npt.NDArray[np.generic]) -> Part:
    ids = NumberedStrings(split, images.shape[0])
    return Part(images, labels.astype(np.int64).reshape(-1), ids)


def _digits() -> DataSource:
    """Return the 1,797 scanned digits of scikit-learn, 8 x 8, which need no download."""
    table = _digits_table()
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return DataSource("digits", _DIGITS, {"train": _make_part("digits", images, table[:, -1])})


def _digits_table() -> npt.NDArray[np.float64]:
    """Return one row per image: 64 pixels in 0..16 and the label, `[1797, 65]`."""
    # Read the file directly if it is at its usual path: importing sklearn.datasets takes seconds.
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


class BinaryFormat:
    """Images in files of fixed-size records that are read on demand.

    Args:
        files: the files, in order.
        image_shape: channels, height and width.
        skip: number of bytes before the pixels of a record, such as labels.
        by_column: pixels are stored column by column.
    """

    def __init__(
        self,
        files: Sequence[FixedSizeRecords],
        image_shape: tuple[int, int, int],
        *,
        skip: int = 0,
        by_column: bool = False,
    ) -> None:
        self._files, self._skip, self._by_column = files, skip, by_column
        self._starts = np.cumsum([0, *(file.count for file in files)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *image_shape)

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        file_numbers = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(file_numbers):
            mask = file_numbers == number
            records = self._files[number].read((index[mask] - self._starts[number]).tolist())
            out[mask] = records[:, self._skip :].reshape(-1, *self.shape[1:])
        return np.ascontiguousarray(out.swapaxes(2, 3)) if self._by_column else out


def _open_records(path: Path, size: int, header: int = 0) -> FixedSizeRecords:
    content = path.stat().st_size - header
    if content <= 0 or content % size:
        raise _damaged_file(path, f"{content} bytes are not a whole number of {size}-byte records")
    return FixedSizeRecords(path, size, content // size, header)


def _damaged_file(path: Path, reason: str) -> DataError:
    return DataError(
        f"damaged file: {reason}",
        where=str(path),
        fix="delete it; the next run downloads it again",
    )


def _idx(name: str) -> DataSource:
    """Read MNIST's format: two big-endian headers, then bytes (yann.lecun.com/exdb/mnist)."""
    folder = download.ensure_downloaded(name, data_roots())
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        image_file = folder / f"{stem}-images-idx3-ubyte"
        label_file = folder / f"{stem}-labels-idx1-ubyte"
        with image_file.open("rb") as file:
            magic, count, height, width = np.frombuffer(file.read(16).ljust(16), ">u4").tolist()
        if magic != 2051 or image_file.stat().st_size != 16 + count * height * width:
            raise _damaged_file(image_file, "its size does not match its header")
        labels = np.fromfile(label_file, np.uint8)[8:]
        if len(labels) != count or labels.max(initial=0) > 9:
            raise _damaged_file(
                label_file, f"{len(labels)} labels for {count} images, or labels above 9"
            )
        images = BinaryFormat([_open_records(image_file, height * width, 16)], (1, height, width))
        parts[split] = _make_part(split, images, labels)
    return DataSource(name, _CLASSES[name], parts)


def _cifar(name: str) -> DataSource:
    """Read CIFAR's binary version: label bytes, then 3,072 bytes by channel (never the pickles)."""
    folder = download.ensure_downloaded(name, data_roots())
    if name == "cifar10":
        classes, skip = _CLASSES[name], 1
        files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    else:
        # Two labels per image, coarse and fine; the names of the fine ones are in the archive.
        classes = tuple((folder / "fine_label_names.txt").read_text().split())
        files, skip = {"train": ["train.bin"], "test": ["test.bin"]}, 2
    parts = {}
    for split, names in files.items():
        records = [_open_records(folder / file, skip + 3072) for file in names]
        labels = [np.memmap(r.path, np.uint8).reshape(-1, r.size)[:, skip - 1] for r in records]
        images = BinaryFormat(records, (3, 32, 32), skip=skip)
        parts[split] = _make_part(split, images, np.concatenate(labels))
        if parts[split].labels.max() >= len(classes):
            raise _damaged_file(folder / names[0], "a label is out of range")
    return DataSource(name, classes, parts)


def _svhn() -> DataSource:
    from scipy.io import loadmat

    folder = download.ensure_downloaded("svhn", data_roots())
    parts = {}
    for split in ("train", "test"):
        path = folder / f"{split}_32x32.mat"
        try:
            content = loadmat(path, variable_names=["X", "y"])
            images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1), dtype=np.uint8)
            labels = content["y"].astype(np.int64).reshape(-1) % 10  # zero is labeled 10
        except Exception as error:  # scipy raises many kinds on damaged files
            raise _damaged_file(path, str(error) or type(error).__name__) from error
        parts[split] = _make_part(split, images, labels)
    return DataSource("svhn", _CLASSES["svhn"], parts)


def _stl10() -> DataSource:
    folder = download.ensure_downloaded("stl10", data_roots())
    parts = {}
    for split in ("train", "test"):
        records = _open_records(folder / f"{split}_X.bin", 3 * 96 * 96)
        label_file = folder / f"{split}_y.bin"
        labels = np.fromfile(label_file, np.uint8).astype(np.int64) - 1
        if len(labels) != records.count or labels.min() < 0 or labels.max() > 9:
            raise _damaged_file(label_file, f"its labels do not fit {records.count} images")
        # Stored column by column (cs.stanford.edu/~acoates/stl10).
        images = BinaryFormat([records], (3, 96, 96), by_column=True)
        parts[split] = _make_part(split, images, labels)
    return DataSource("stl10", _CLASSES["stl10"], parts)


def _folder_or(name: str, read: Callable[[], DataSource]) -> Callable[[], DataSource]:
    """Return a reader that prefers an image folder of this name to the set's own format."""

    def read_source() -> DataSource:
        for root in data_roots():
            folder = root / name
            # It must have a train folder: on case-insensitive disks `mnist` is also `MNIST/raw`.
            if folder.is_dir() and any(map(_is_train_folder, os.scandir(folder))):
                source = read_folder(folder, name, _CLASSES.get(name))
                note = f"read as an image folder: {printable(str(folder))}"
                return DataSource(name, source.classes, source.parts, (*source.notes, note))
        return read()

    return read_source


def _is_train_folder(entry: os.DirEntry[str]) -> bool:
    return split_from_name(entry.name) == "train" and is_directory(entry)


def _shapes(count: int = 2000, size: int = 32) -> DataSource:
    if count < 2 * len(SHAPES):
        raise UsageError(f"data.count={count}: at least {2 * len(SHAPES)} shapes are needed")
    images = DrawnShapes(count, size)
    return DataSource("shapes", SHAPES, {"train": _make_part("shapes", images, images.labels)})


SOURCES: dict[str, Callable[..., DataSource]] = {
    "digits": _digits,
    "shapes": _shapes,
    "mnist": _folder_or("mnist", lambda: _idx("mnist")),
    "fashion-mnist": _folder_or("fashion-mnist", lambda: _idx("fashion-mnist")),
    "kmnist": _folder_or("kmnist", lambda: _idx("kmnist")),
    "cifar10": _folder_or("cifar10", lambda: _cifar("cifar10")),
    "cifar100": _folder_or("cifar100", lambda: _cifar("cifar100")),
    "svhn": _folder_or("svhn", _svhn),
    "stl10": _folder_or("stl10", _stl10),
}


class DrawnShapes:
    """Ten kinds of shapes in random colors, drawn from their formulas on access.

    Image `i` is uint8 `[3, size, size]` and has class `i % 10`. It depends only on `i` and the
    size, so any part of a set of any length is the same whenever it is drawn.
    """

    def __init__(self, count: int, size: int) -> None:
        self.shape: tuple[int, ...] = (count, 3, size, size)
        self.labels: npt.NDArray[np.int64] = np.arange(count, dtype=np.int64) % len(SHAPES)

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        for start in range(0, len(index), SHAPES_PER_BATCH):
            batch = slice(start, start + SHAPES_PER_BATCH)
            out[batch] = _draw_shapes(index[batch], self.shape[2])
        return out


def _draw_shapes(index: npt.NDArray[np.int64], size: int) -> Pixels:
    n = len(index)
    uniform = np.empty((n, 16), np.float32)
    noise = np.empty((n, 3, size, size), np.float32)
    for row, i in enumerate(index.tolist()):
        random = np.random.default_rng([SHAPES_SEED, i])
        uniform[row] = random.random(16, np.float32)
        noise[row] = random.standard_normal((3, size, size), np.float32)
    u = uniform.T[:, :, None, None]
    scale = 0.45 + 0.4 * u[0]  # in units of half the side of the image
    angle = 2 * np.pi * u[1]
    margin = 1 - 0.8 * scale
    center_x, center_y = (2 * u[2] - 1) * margin, (2 * u[3] - 1) * margin
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    dx, dy = grid[None, None, :] - center_x, grid[None, :, None] - center_y
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    y = (np.cos(angle) * dy - np.sin(angle) * dx) / scale
    inside = np.empty((n, size, size), np.float32)
    for label, shape in enumerate(SHAPES):
        mask = index % len(SHAPES) == label
        inside[mask] = _FORMULAS[shape](x[mask], y[mask])
    # From distance (approximate, in units of the shape) to coverage: edges are one pixel soft.
    coverage = np.clip(inside * scale * (size / 2) + 0.5, 0, 1)[:, None]
    background = uniform[:, 4:7, None, None]
    color = uniform[:, 7:10, None, None]
    # Too similar to tell apart: move the color away from the background in each channel.
    similar = np.abs(color - background).max(axis=1, keepdims=True) < 0.35
    contrast = np.where(background < 0.5, background + 0.5, background - 0.5)
    color = np.where(similar, contrast, color)
    slope = (u[10] - 0.5) * grid[None, None, :] + (u[11] - 0.5) * grid[None, :, None]
    image = background + 0.5 * slope[:, None] + coverage * (color - background)
    image += (0.02 + 0.1 * u[12])[:, None] * noise
    pixels: Pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels


def _box(x: Plane, y: Plane, half_x: float, half_y: float) -> Plane:
    inside: Plane = np.minimum(half_x - np.abs(x), half_y - np.abs(y))
    return inside


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    distance: Plane = np.subtract(np.float32(radius), np.hypot(x, y))
    return distance


def _triangle(x: Plane, y: Plane) -> Plane:
    # Three half-planes at 120 degrees; 0.5 is the inradius of a triangle in the unit circle.
    bottom = 0.5 - y
    inside: Plane = np.minimum(bottom, 0.5 + 0.5 * y - np.float32(0.8660254) * np.abs(x))
    return inside


def _star(x: Plane, y: Plane) -> Plane:
    """A star with five points; its edge is a line in each tenth of the circle."""
    tenth = np.pi / 5
    fold = np.abs((np.arctan2(x, y) % (2 * tenth)) - tenth)
    radius = np.hypot(x, y)
    # The line goes from the tip (radius 1, fold = tenth) to the notch (radius 0.42, fold = 0).
    px, py = radius * np.cos(fold), radius * np.sin(fold)
    tip_x, tip_y = np.cos(tenth), np.sin(tenth)
    normal_x, normal_y = tip_y, 0.42 - tip_x
    length = np.hypot(normal_x, normal_y)
    edge: Plane = -((px - 0.42) * normal_x + py * normal_y) / length
    return edge


def _heart(x: Plane, y: Plane) -> Plane:
    """A square standing on a corner, with two half discs."""
    half = 0.5
    a, b = (x + y) * np.float32(0.70710678), (x - y) * np.float32(0.70710678)
    square = _box(a, b, half, half)
    left, right = _disc(a + half, b, half), _disc(a, b - half, half)
    return np.maximum(square, np.maximum(left, right))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = np.minimum(y + 0.1, (0.9 - y) * 0.75 - np.abs(x) * 0.8)
    inside: Plane = np.maximum(head, _box(x, y + 0.45, 0.2, 0.45))
    return inside


# Approximate signed distance to the edge of each shape, positive inside.
_FORMULAS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "arrow": _arrow,
    "bar": lambda x, y: _box(x, y, 0.95, 0.28),
    "circle": lambda x, y: _disc(x, y, 0.8),
    "crescent": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x - 0.45, y, 0.75)),
    "cross": lambda x, y: np.maximum(_box(x, y, 0.9, 0.25), _box(x, y, 0.25, 0.9)),
    "heart": _heart,
    "ring": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x, y, 0.55)),
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "star": _star,
    "triangle": _triangle,
}
