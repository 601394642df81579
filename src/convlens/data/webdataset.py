"""The user's own images in shards: tars of samples as WebDataset writes them.

    FOLDER/train-000000.tar, val-000000.tar ...     FOLDER/{train,val,test}/000000.tar ...
    set-{000000..000146}.tar                        one.tar

The names of numbered classes are read from `classes.txt` (one per line) or `class_names.tsv` next
to the shards; without such a file, classes are named by their numbers.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convlens.data.layout import (
    SPLITS,
    Problem,
    normalize_name,
    printable,
    raise_problems,
    split_from_name,
)
from convlens.data.loader import WINDOW_IMAGES
from convlens.data.scan import ScanEntry, is_directory, is_regular_file, scan_entries
from convlens.data.tar_index import TarIndex, TarMembers, tar_index
from convlens.data.types import DataSource, IndexArray, PackedStrings, Part, is_image_name
from convlens.errors import DataError, UsageError

CLASS_NAME_FILES = ("classes.txt", "class_names.txt", "class_names.tsv")
SAMPLES_HELP = (
    "write samples as KEY.jpg with KEY.cls (a number), KEY.txt (a name) or KEY.json (`label`)"
)
MAX_SHARDS = 100_000  # that a pattern may name
COMPRESSED_SUFFIXES = (".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst")
# Shards count as sorted by class if two images of a shard have the same class more often than any
# two images, by more than this share of the largest possible difference.
MAX_SORTED_SHARE = 0.1
_BRACES = re.compile(r"\{([^{}]*)\}")


def holds_shards(folder: Path) -> bool:
    """Return whether a folder, or those of its splits, has tars, and no folders of images."""
    entries = _sorted_entries(folder)
    folders = [entry for entry in entries if is_directory(entry)]
    if any(map(_is_shard, entries)):
        return not any(is_image_name(e.name) for f in folders for e in scan_entries(f.path))
    splits = [entry for entry in folders if split_from_name(entry.name)]
    return any(_is_shard(entry) for split in splits for entry in scan_entries(split.path))


def is_pattern(name: str) -> bool:
    """Return whether a name stands for several shards, as `set-{000000..000146}.tar` does."""
    return name.lower().endswith(".tar") and _BRACES.search(name) is not None


@dataclass(frozen=True)
class _IndexedSplit:
    """The shards of one split with their modification times and index."""

    paths: list[str]
    times: IndexArray
    index: TarIndex


def read_shards(path: Path, name: str, *, tested: bool = False) -> DataSource:
    """Read the shards of a folder, of a pattern with braces, or a single shard.

    Args:
        path: the folder, pattern or shard.
        name: name of the data set.
        tested: as in `sources.find_source`.

    Raises:
        DataError: lists everything that is wrong, as far as the shards are readable.
        UsageError: a pattern names too many shards.
    """
    path = Path(os.path.abspath(path))
    splits = _index_all(_group_by_split(_find_shards(path), path, tested), path, tested)
    judged = tuple(splits) if tested else ("train",)
    class_names = _ClassNames.find(path if path.is_dir() else path.parent)
    indices = {split: indexed.index for split, indexed in splits.items()}
    classes, labels = _resolve_classes(indices, judged, class_names, path, tested)
    notes = []
    if ignored := sum(index.ignored for index in indices.values()):
        notes.append(f"{ignored} members that are not images or labels were ignored")
    if unused := max(0, len(class_names.names) - len(classes)):
        images = "images" if tested else "training images"
        notes.append(f"{unused} classes of {class_names.file} have no {images} and are left out")
    parts = _make_parts(splits, labels, path, notes)
    return DataSource(name, classes, parts, tuple(notes))


def _index_all(
    paths_by_split: Mapping[str, list[str]], path: Path, tested: bool
) -> dict[str, _IndexedSplit]:
    """Index the shards of every split, and raise one error for all problems of their samples."""
    splits = {}
    for split, paths in paths_by_split.items():
        index, times = tar_index(paths)
        splits[split] = _IndexedSplit(paths, times, index)
    items_of: dict[str, list[str]] = {}
    for indexed in splits.values():
        for message, items in indexed.index.problems:
            items_of.setdefault(message, []).extend(items)
    problems = [Problem(message, items) for message, items in items_of.items()]
    labels = [label for indexed in splits.values() for label in indexed.index.labels]
    examples = {type(label): repr(label) for label in labels}
    if len(examples) > 1:
        message = "classes that are numbers in some samples and names in others"
        problems.append(Problem(message, list(examples.values())))
    judged = list(splits.values()) if tested else [splits["train"]]
    if not problems and not any(len(indexed.index.keys) for indexed in judged):
        hint = "are they archives of folders?"
        problems.append(Problem("no samples in the shards for training", [hint]))
    raise_problems(problems, path, SAMPLES_HELP)
    return splits


def _make_parts(
    splits: Mapping[str, _IndexedSplit],
    labels: Mapping[str, IndexArray],
    path: Path,
    notes: list[str],
) -> dict[str, Part]:
    """Return the part of each split that has samples; append remarks to `notes`."""
    parts = {}
    for split, indexed in splits.items():
        index = indexed.index
        if not len(index.keys):
            notes.append(f"{split}: no samples in its shards, so it is not used")
            continue
        mixed = not _is_sorted(index.shard, labels[split])
        if split == "train" and not mixed and len(index.keys) > WINDOW_IMAGES:
            notes.append(
                "these shards are sorted by class, so images are drawn from all of them at once, "
                "which is slow on slow disks; `convlens shard DATA OUT` writes mixed shards"
            )
        images = TarMembers(
            indexed.paths, indexed.times, index.shard, index.offset, index.size, mixed=mixed
        )
        parts[split] = Part(images, labels[split], _make_ids(indexed.paths, index, path))
    return parts


def _find_shards(path: Path) -> list[Path]:
    """Return the shards of a folder or a pattern, or the one at `path`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return _expand_pattern(path)
    shards, compressed, unusable = list[Path](), list[str](), list[str]()
    for entry in _sorted_entries(path):
        is_split = split_from_name(entry.name) and is_directory(entry)
        for file in _sorted_entries(entry.path) if is_split else [entry]:
            if _is_shard(file):
                shards.append(Path(file.path))
            elif file.name.lower().endswith(COMPRESSED_SUFFIXES):
                compressed.append(file.name)
            elif _is_tar_name(file) and not is_regular_file(file) and not is_directory(file):
                unusable.append(file.name)
    raise_problems(
        [Problem(f"{len(compressed)} shards are compressed", compressed)],
        path,
        "unpack them to plain .tar files: their images are compressed already",
    )
    raise_problems(
        [Problem(f"{len(unusable)} shards are broken links, pipes or devices", unusable)],
        path,
        "mount their disk or remove them",
    )
    return shards


def _sorted_entries(folder: str | Path) -> list[ScanEntry]:
    return sorted(scan_entries(folder), key=lambda entry: entry.name)


def _is_tar_name(entry: ScanEntry) -> bool:
    return entry.name.lower().endswith(".tar")


def _is_shard(entry: ScanEntry) -> bool:
    return _is_tar_name(entry) and is_regular_file(entry)


def _expand_pattern(pattern: Path) -> list[Path]:
    """Return the files that a pattern names, in its order; all must exist."""
    paths = [Path(text) for text in itertools.islice(_expand_braces(str(pattern)), MAX_SHARDS)]
    missing = [path.name for path in paths if not path.is_file()]
    raise_problems(
        [Problem(f"{len(missing)} of {len(paths)} shards do not exist", missing)],
        pattern,
        "write {FIRST..LAST} with the leading zeros of the file names",
    )
    return paths


def _expand_braces(text: str) -> Iterator[str]:
    """Yield the texts that `a{1..3}b{x,y}` stands for in a shell."""
    match = _BRACES.search(text)
    if not match:
        yield text
        return
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", match[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        numbers = range(int(span[1]), int(span[2]) + 1)
        if not 0 < len(numbers) <= MAX_SHARDS:
            raise UsageError(
                f"{match[0]}: a pattern can name from 1 to {MAX_SHARDS:,} shards", where=text
            )
        choices: Sequence[str] = [f"{n:0{width}}" for n in numbers]
    else:
        choices = match[1].split(",")
    for suffix in _expand_braces(text[match.end() :]):
        for choice in choices:
            yield text[: match.start()] + choice + suffix


def _group_by_split(files: Sequence[Path], path: Path, tested: bool) -> dict[str, list[str]]:
    """Return the shards of each split; all are for training if no name says otherwise."""
    groups: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[-_. ]+", file.stem)
        if file.parent != path:
            words.insert(0, file.parent.name)
        splits = [split for split in map(split_from_name, words) if split]
        groups.setdefault(splits[-1] if splits else "", []).append(str(file))
    if list(groups) == [""] or (len(groups) == 1 and not path.is_dir()):
        groups = {"train": list(*groups.values())}
    without_split = [os.path.basename(file) for file in groups.get("", ())]
    problems = [
        Problem("shards without a split in their names, beside shards with one", without_split)
    ]
    if "train" not in groups and not without_split and not tested:
        problems.append(Problem("no shards for training beside those for", sorted(groups)))
    raise_problems(problems, path, "name the shards {train,val,test}-000000.tar and so on")
    # Shards stay in their order: that of the pattern, or by name in a folder.
    return {split: groups[split] for split in SPLITS if split in groups}


def _make_ids(paths: Sequence[str], index: TarIndex, path: Path) -> PackedStrings:
    """Return ids such as `train-000000.tar/0001`, which do not depend on the folder's path."""
    root = path if path.is_dir() else path.parent
    files = [printable(os.path.relpath(file, root)).replace(os.sep, "/") for file in paths]
    return PackedStrings.of(
        f"{files[shard]}/{key}" for shard, key in zip(index.shard.tolist(), index.keys, strict=True)
    )


@dataclass(frozen=True)
class _ClassNames:
    """Class names in the order of their numbers, and their file; empty without such a file."""

    names: tuple[str, ...] = ()
    file: str = ""

    @classmethod
    def find(cls, folder: Path) -> _ClassNames:
        """Read the file of class names in `folder`, or above it if it is the folder of a split."""
        folders = [folder, *([folder.parent] if split_from_name(folder.name) else [])]
        candidates = [folder / name for folder in folders for name in CLASS_NAME_FILES]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            return cls()
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"can't read the class names: {error}", where=str(path)) from error
        rows = [list(map(normalize_name, line.split("\t"))) for line in lines if line.strip()]
        # Columns: number and name; or the name (and perhaps a description), in order.
        is_numbered = all(len(row) > 1 and row[0].isdecimal() for row in rows)
        if is_numbered:
            rows = sorted(rows, key=lambda row: int(row[0]))
        names = tuple(row[1] if is_numbered else row[0] for row in rows)
        has_gaps = is_numbered and [int(row[0]) for row in rows] != list(range(len(rows)))
        if has_gaps or len(set(names)) < len(names) or "" in names:
            raise DataError(
                "class names that are empty, duplicated or not numbered 0, 1, 2 ...",
                where=str(path),
                fix="give each class one line, in the order of the numbers in .cls",
            )
        return cls(names, path.name)


def _resolve_classes(
    indices: Mapping[str, TarIndex],
    judged: Sequence[str],
    class_names: _ClassNames,
    path: Path,
    tested: bool,
) -> tuple[tuple[str, ...], dict[str, IndexArray]]:
    """Return the classes, and the class numbers of each split's images.

    Args:
        indices: index of each split.
        judged: splits that define the classes: those that have images in them.
        class_names: names of numbered classes.
        path: the source, for errors.
        tested: as in `read_shards`.
    """
    raise_problems(
        [_unnamed_labels(index, class_names) for index in indices.values()],
        path,
        "fix the labels, or list all classes in classes.txt",
    )
    names_of = {split: _label_names(index, class_names) for split, index in indices.items()}
    used = {names_of[split][i] for split in judged for i in np.unique(indices[split].label)}
    if class_names.names:
        classes = tuple(name for name in class_names.names if name in used)
    elif all(isinstance(label, int) for split in judged for label in indices[split].labels):
        classes = tuple(sorted(used, key=int))
    else:
        classes = tuple(sorted(used))
    number_of = {name: number for number, name in enumerate(classes)}
    problems, labels = [], {}
    for split, index in indices.items():
        unknown = sorted(name for name in names_of[split] if name not in number_of)
        problems.append(Problem(f"classes in {split} that train lacks", unknown))
        table = np.array([number_of.get(name, -1) for name in names_of[split]] or [0], np.int64)
        labels[split] = table[index.label]
    if len(classes) < 2 and not tested:
        problems.append(Problem("only one class", classes))
    raise_problems(problems, path, SAMPLES_HELP)
    return classes, labels


def _unnamed_labels(index: TarIndex, class_names: _ClassNames) -> Problem:
    count, names = len(class_names.names), set(class_names.names)
    unnamed = [
        str(label)
        for label in index.labels
        if (label >= count if isinstance(label, int) else label not in names)
    ]
    message = f"labels without a name in {class_names.file}, which has {count} (numbered from 0)"
    return Problem(message, unnamed if names else [])


def _label_names(index: TarIndex, class_names: _ClassNames) -> list[str]:
    """Return the class name of each of the index's labels."""
    names = class_names.names
    return [
        names[label] if names and isinstance(label, int) else str(label) for label in index.labels
    ]


def _is_sorted(shard: IndexArray, labels: IndexArray) -> bool:
    """Return whether two images of a shard have the same class much more often than any two.

    Args:
        shard: shard of each image, `[N]`.
        labels: class of each image, `[N]`.
    """
    n, num_shards = len(labels), int(shard.max(initial=0)) + 1
    if num_shards < 2:
        return False
    num_classes = int(labels.max()) + 1
    cells = np.unique(shard * num_classes + labels, return_counts=True)[1].astype(np.float64)
    shard_sizes, class_sizes = (np.bincount(x).astype(np.float64) for x in (shard, labels))
    within = (cells * (cells - 1)).sum() / max(1.0, (shard_sizes * (shard_sizes - 1)).sum())
    overall = (class_sizes * (class_sizes - 1)).sum() / max(1.0, n * (n - 1.0))
    return bool(within - overall > MAX_SORTED_SHARE * (1 - overall))
