"""Own images in shards: tars of samples as WebDataset has them, found by their names.

    FOLDER/train-000000.tar, val-000000.tar ...     FOLDER/{train,val,test}/000000.tar ...
    set-{000000..000146}.tar                        one.tar

The names of numbered classes stand in `classes.txt` (line by line) or `class_names.tsv` beside
the shards; without them classes are called by their numbers.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convlens.data.image_folder import (
    Problems,
    ScanEntry,
    is_directory,
    is_regular_file,
    normalize_name,
    printable,
    scan_entries,
    split_from_name,
)
from convlens.data.loader import WINDOW_IMAGES
from convlens.data.tar_index import TarIndex, TarMembers, tar_index
from convlens.data.types import DataSource, IndexArray, PackedStrings, Part, is_image_name
from convlens.errors import DataError, UsageError

SHARD_NAMES = ("classes.txt", "class_names.txt", "class_names.tsv")
SHARD_HELP = (
    "write samples as KEY.jpg with KEY.cls (a number), KEY.txt (a name) or KEY.json (`label`)"
)
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST = 100_000  # shards of a pattern
_PACKED = (".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst")
# Two images of a shard have the same class more often than two of the set, by this share of how
# often they could: then the shards are sorted by class.
MAX_SORTED_SHARE = 0.1


def holds_shards(folder: Path) -> bool:
    """Whether a folder is to be read as shards: tars in it, or in its splits, and no classes."""
    inside = _list_shards(folder)
    folders = [e for e in inside if is_directory(e)]
    splits = [e for e in folders if split_from_name(e.name)]
    if any(map(_is_shard, inside)):
        return not any(is_image_name(e.name) for f in folders for e in scan_entries(f.path))
    return any(_is_shard(e) for f in splits for e in scan_entries(f.path))


def is_pattern(name: str) -> bool:
    """Whether a name stands for several shards: `set-{000000..000146}.tar`."""
    return name.lower().endswith(".tar") and _BRACES.search(name) is not None


def read_shards(path: Path, name: str, *, tested: bool = False) -> DataSource:
    """The shards of a folder, of a pattern with braces or of one file, as a source.

    `tested` is that of `sources.find`.

    Raises:
        DataError: everything that is wrong with them, as far as it could be read.
    """
    path = Path(os.path.abspath(path))
    files, notes = _shard_files(path)
    problems = Problems(str(path))
    paths = _by_split(files, path, problems, tested)
    problems.stop("call the shards {train,val,test}-000000.tar and so on")
    found = {split: tar_index(some) for split, some in paths.items()}
    for what in dict.fromkeys(what for index, _ in found.values() for what, _ in index.problems):
        things = [
            t
            for index, _ in found.values()
            for w, some in index.problems
            if w == what
            for t in some
        ]
        problems.add(what, things)
    judged = tuple(found) if tested else ("train",)
    _check_samples(found, judged, problems)
    problems.stop(SHARD_HELP)
    names = _Names.beside(path if path.is_dir() else path.parent)
    indices = {split: index for split, (index, _) in found.items()}
    classes, labels = _resolve_classes(indices, judged, names, problems)
    if len(classes) < 2 and not tested:
        problems.add("only one class", classes)
    problems.stop(SHARD_HELP)
    ignored = sum(index.ignored for index, _ in found.values())
    notes += [f"{ignored} members that are no images or labels were ignored"] * bool(ignored)
    left = len(names.listed) - len(classes) if names.listed else 0
    if left:
        none = "no images" if tested else "no training images"
        notes.append(f"{left} classes of {names.file} have {none} and are left out")
    parts, unmixed = {}, False
    for split, (index, times) in found.items():
        if not len(index.keys):
            notes.append(f"{split}: no samples in its shards, so it is not used")
            continue
        mixed = not _is_sorted(index.shard, labels[split])
        unmixed |= not mixed and split == "train" and len(index.keys) > WINDOW_IMAGES
        images = TarMembers(paths[split], times, index.shard, index.offset, index.size, mixed=mixed)
        parts[split] = Part(images, labels[split], _ids(paths[split], index, path))
    if unmixed:
        notes.append(
            "these shards are sorted by class, so images are drawn from all of them at once, which "
            "slow disks are slow at; `convlens shard DATA OUT` writes mixed ones"
        )
    return DataSource(name, classes, parts, tuple(notes))


# Which files


def _shard_files(path: Path) -> tuple[list[Path], list[str]]:
    """The shards, and notes on what was left aside."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        return _expanded(path), []
    found, packed, lost = list[Path](), list[str](), list[str]()
    for entry in _list_shards(path):
        inside = (
            _list_shards(entry.path)
            if split_from_name(entry.name) and is_directory(entry)
            else [entry]
        )
        found += [Path(e.path) for e in inside if _is_shard(e)]
        packed += [e.name for e in inside if e.name.lower().endswith(_PACKED)]
        lost += [
            e.name
            for e in inside
            if _is_named(e) and not is_regular_file(e) and not is_directory(e)
        ]
    if packed:
        raise DataError(
            f"{len(packed)} shards are compressed: {', '.join(packed[:5])}",
            where=str(path),
            fix="unpack them to plain .tar files: their images are compressed already",
        )
    problems = Problems(str(path))
    problems.add(f"{len(lost)} shards are links to nothing, pipes or devices", lost)
    problems.stop("mount their disk, or take them away")
    return found, []


def _list_shards(folder: str | Path) -> list[ScanEntry]:
    return sorted(scan_entries(folder), key=lambda entry: entry.name)


def _is_named(entry: ScanEntry) -> bool:
    return entry.name.lower().endswith(".tar")


def _is_shard(entry: ScanEntry) -> bool:
    return _is_named(entry) and is_regular_file(entry)


def _expanded(pattern: Path) -> list[Path]:
    """The files that a pattern stands for, in its order; each must be there."""
    paths = [Path(text) for text in itertools.islice(_braces(str(pattern)), _MOST)]
    lost = [path.name for path in paths if not path.is_file()]
    if lost:
        problems = Problems(str(pattern))
        problems.add(f"{len(lost)} of {len(paths)} shards do not exist", lost)
        problems.stop("write {FIRST..LAST} as the files are numbered, with their zeros")
    return paths


def _braces(text: str) -> Iterator[str]:
    """`a{1..3}b{x,y}` as a shell expands it."""
    found = _BRACES.search(text)
    if not found:
        yield text
        return
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", found[1])
    if span:
        width = len(span[1]) if span[1].startswith("0") else 0
        numbers = range(int(span[1]), int(span[2]) + 1)
        if not 0 < len(numbers) <= _MOST:
            raise UsageError(f"{found[0]}: from 1 to {_MOST:,} shards can be named", where=text)
        choices: Sequence[str] = [f"{n:0{width}}" for n in numbers]
    else:
        choices = found[1].split(",")
    for rest in _braces(text[found.end() :]):
        for choice in choices:
            yield text[: found.start()] + choice + rest


def _by_split(
    files: Sequence[Path], path: Path, problems: Problems, tested: bool
) -> dict[str, list[str]]:
    """Paths by split; all are for training where no name says otherwise."""
    named: dict[str, list[str]] = {}
    for path in files:
        words = re.split(r"[-_. ]+", path.stem)
        if path.parent != path:
            words.insert(0, path.parent.name)
        splits = [split for split in map(split_from_name, words) if split]
        named.setdefault(splits[-1] if splits else "", []).append(str(path))
    if list(named) == [""] or (len(named) == 1 and not path.is_dir()):
        named = {"train": list(*named.values())}
    problems.add(
        "shards of no split beside those of one", list(map(os.path.basename, named.get("", ())))
    )
    if "train" not in named and not problems.found and not tested:
        problems.add("no shards for training beside those for", sorted(named))
    # As they were named: a pattern's order is kept, a folder's is by name already.
    return {split: named[split] for split in ("train", "val", "test") if split in named}


def _ids(paths: Sequence[str], index: TarIndex, path: Path) -> PackedStrings:
    """`train-000000.tar/0001` for each image, whatever the folder is called."""
    root = path if path.is_dir() else path.parent
    stems = [printable(os.path.relpath(path, root)).replace(os.sep, "/") for path in paths]
    return PackedStrings.of(
        f"{stems[s]}/{key}" for s, key in zip(index.shard.tolist(), index.keys, strict=True)
    )


# Which classes


@dataclass(frozen=True)
class _Names:
    """Names of classes in the order of their numbers; empty where nobody gave them."""

    listed: tuple[str, ...] = ()
    file: str = ""

    @classmethod
    def beside(cls, folder: Path) -> _Names:
        """From the file of names in a folder of shards, or in the folder above a split's."""
        folders = [folder, *([folder.parent] if split_from_name(folder.name) else [])]
        path = next((f / n for f in folders for n in SHARD_NAMES if (f / n).is_file()), None)
        if path is None:
            return cls()
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"can't read the classes' names: {error}", where=str(path)) from error
        rows = [
            [normalize_name(cell) for cell in line.split("\t")] for line in lines if line.strip()
        ]
        numbered = all(len(row) > 1 and row[0].isdecimal() for row in rows)
        if numbered:  # number and name; else the name (perhaps with what it means) by line
            rows = sorted(rows, key=lambda row: int(row[0]))
        names = tuple(row[1] if numbered else row[0] for row in rows)
        wrong = numbered and [int(row[0]) for row in rows] != list(range(len(rows)))
        if wrong or len(set(names)) < len(names) or "" in names:
            raise DataError(
                "names of classes that are empty, twice there or not numbered 0, 1, 2 ...",
                where=str(path),
                fix="give each class one line, in the order of the numbers in .cls",
            )
        return cls(names, path.name)


def _check_samples(
    found: dict[str, tuple[TarIndex, IndexArray]], judged: Sequence[str], problems: Problems
) -> None:
    kinds = {type(label): label for index, _ in found.values() for label in index.labels}
    if len(kinds) > 1:
        both = [repr(label) for label in kinds.values()]
        problems.add("classes that are numbers in some samples and names in others", both)
    if not any(len(found[split][0].keys) for split in judged) and not problems.found:
        problems.add("no samples in the shards for training", ["are they archives of folders?"])


def _resolve_classes(
    indices: dict[str, TarIndex], judged: Sequence[str], names: _Names, problems: Problems
) -> tuple[tuple[str, ...], dict[str, IndexArray]]:
    """The classes that have images in the splits `judged`, in order, and each split's labels."""
    told = {split: _named(index, names, problems) for split, index in indices.items()}
    problems.stop("mend the labels, or list all classes in classes.txt")
    used = {told[split][i] for split in judged for i in np.unique(indices[split].label).tolist()}
    if names.listed:
        classes = tuple(name for name in names.listed if name in used)
    elif all(isinstance(label, int) for split in judged for label in indices[split].labels):
        classes = tuple(sorted(used, key=int))
    else:
        classes = tuple(sorted(used))
    number = {name: i for i, name in enumerate(classes)}
    labels = {}
    for split, index in indices.items():
        lacking = [name for name in told[split] if name not in number]
        problems.add(f"classes in {split} that train lacks", sorted(lacking))
        table = np.array([number.get(name, -1) for name in told[split]] or [0], np.int64)
        labels[split] = table[index.label]
    return classes, labels


def _named(index: TarIndex, names: _Names, problems: Problems) -> list[str]:
    """The class of each of the index's labels."""
    if not names.listed:
        return [str(label) for label in index.labels]
    count, listed = len(names.listed), set(names.listed)
    wrong = [
        str(label)
        for label in index.labels
        if (label >= count if isinstance(label, int) else label not in listed)
    ]
    problems.add(f"labels that {names.file} has no name for (its {count} count from 0)", wrong)
    return [
        names.listed[la] if isinstance(la, int) and la < count else str(la) for la in index.labels
    ]


def _is_sorted(shard: IndexArray, labels: IndexArray) -> bool:
    """Whether images of a shard are of the same class much more often than any two images."""
    n, shards = len(labels), int(shard.max(initial=0)) + 1
    if shards < 2:
        return False
    k = int(labels.max()) + 1
    each = np.unique(shard * k + labels, return_counts=True)[1].astype(np.float64)
    sizes, counts = (np.bincount(values).astype(np.float64) for values in (shard, labels))
    within = (each * (each - 1)).sum() / max(1.0, (sizes * (sizes - 1)).sum())
    overall = (counts * (counts - 1)).sum() / max(1.0, n * (n - 1.0))
    return bool(within - overall > MAX_SORTED_SHARE * (1 - overall))
