"""Lists of images with their classes: a CSV, a text file, JSON or parquet, or a folder with these.

`table_files` reads the cells, `list_columns` finds out what they mean, `image_paths` finds the
files. Here they become rows, which are checked together, and a `DataSource`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convlens.data.class_names import (
    check_renamed,
    describe_similar,
    similar_class_names,
    strip_invisible,
)
from convlens.data.image_folder import JUNK_FOLDERS, is_regular_file, scan_entries
from convlens.data.image_paths import PathFinder
from convlens.data.layout import (
    SPLITS,
    Problem,
    list_examples,
    normalize_name,
    printable,
    raise_problems,
    split_from_name,
)
from convlens.data.list_columns import (
    DEFAULT_OPTIONS,
    ListOptions,
    interpret_table,
    is_known_column,
)
from convlens.data.table_files import TABLE_READERS, read_table
from convlens.data.types import DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, UsageError

LIST_SUFFIXES = tuple(TABLE_READERS)
COLUMNS_HELP = "the first line names the columns: path,label[,split][,a group column]"
_FORMULA_STARTS = ("=", "+", "-", "@")
# Text files that are not lists of labeled images although they may look like one.
_OTHER_FILES = re.compile(r"readme|licen[sc]e|requirements|submission|^(classes|labels)\.txt$")


@dataclass(frozen=True)
class ListRow:
    """One image of a list.

    Attributes:
        line: number of its line, with the name of the list if there are several.
        path: its path as written.
        file: its absolute path; None if there is no such file.
        label: class name, empty if the cell is empty.
        split_cell: its split as written.
        split: `train`, `val` or `test`; None if the cell has another value.
        group: value of the group column; None without one.
    """

    line: str
    path: str
    file: str | None
    label: str
    split_cell: str
    split: str | None
    group: str | None


@dataclass
class _Rows:
    """The rows of one or more lists, what was noticed, and what is wrong so far."""

    rows: list[ListRow] = field(default_factory=list)
    short_lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)  # why files were not found
    fix: str = ""


# Checks of single rows: message, whether a row fails, and how the message names it.
_ROW_CHECKS: list[tuple[str, Callable[[ListRow], bool], Callable[[ListRow], str]]] = [
    (
        "lines without a label",
        lambda row: not row.label,
        lambda row: f"line {row.line}",
    ),
    (
        "splits that are not train, val or test",
        lambda row: row.split is None,
        lambda row: row.split_cell,
    ),
    (
        "files without the extension of an image",
        lambda row: row.file is not None and not _may_be_image(row.file),
        lambda row: row.path,
    ),
    (
        "files that do not exist",
        lambda row: row.file is None,
        lambda row: row.path or f"no path in line {row.line}",
    ),
]

# Checks for contradictions between rows: message, key, the value that all rows of a key share, and
# how the message names the key.
_CONSISTENCY_CHECKS: list[
    tuple[str, Callable[[ListRow], str | None], Callable[[ListRow], Hashable], Callable[[str], str]]
] = [
    ("files with two labels", lambda row: row.file, lambda row: row.label, os.path.basename),
    ("files in two splits", lambda row: row.file, lambda row: row.split, os.path.basename),
    ("files in two groups", lambda row: row.file, lambda row: row.group, os.path.basename),
    ("groups in two splits", lambda row: row.group, lambda row: row.split, str),
]


def read_list(
    path: Path, name: str, options: ListOptions = DEFAULT_OPTIONS, *, tested: bool = False
) -> DataSource:
    """Read a file that lists images: one of `LIST_SUFFIXES`.

    Args:
        path: the list. Its columns are found by their names (`list_columns`). Empty cells of the
            split mean training. Labels may be written by `escape_csv_formula`.
        name: name of the data set.
        options: how to read the list.
        tested: as in `sources.find_source`.

    Raises:
        DataError: lists everything that is wrong.
        UsageError: the file lacks a column that `options` names.
    """
    content = _read_rows(path, options)
    siblings = [sibling.name for sibling in _lists_of_other_splits(path)]
    if siblings and {row.split for row in content.rows} == {"train"}:
        content.notes.append(
            f"{list_examples(siblings)} beside it is not read: name the folder to read all of them"
        )
    return _make_source(content, path, name, options, tested, [row.path for row in content.rows])


def read_list_folder(
    folder: Path, name: str, options: ListOptions = DEFAULT_OPTIONS, *, tested: bool = False
) -> DataSource | None:
    """Read a folder by the lists in it or in its folders of splits; None if there is none.

    Args:
        folder: contains one list, or lists named after splits (`train.csv`, `test.csv`), or
            folders named after splits with one list in each.
        name, options, tested: as for `read_list`.

    Raises:
        DataError: it is not clear which list to read, or a list is wrong.
    """
    lists, unusable = _find_lists(folder, options)
    if not lists:
        if unusable:
            raise DataError(
                f"{list_examples([_relative(path, folder) for path in unusable])} in this folder "
                f"can't be read as a list of images: {next(iter(unusable.values())).what}",
                where=str(folder),
                fix=next(iter(unusable.values())).fix,
            )
        return None
    names = {path: _relative(path, folder) for path in lists}
    by_split: dict[str, list[Path]] = {}
    for path in lists:
        by_split.setdefault(_split_of_list(path, folder) or "", []).append(path)
    if len(lists) > 1 and ("" in by_split or any(len(paths) > 1 for paths in by_split.values())):
        raise DataError(
            f"several lists of images in this folder: {list_examples(list(names.values()))}",
            where=str(folder),
            fix=f"name one of them: {os.path.join(name, next(iter(names.values())))}",
        )
    content = _Rows()
    content.notes.append(f"read from {list_examples(list(names.values()))}")
    for path, rows in lists.items():
        _extend(content, rows, names[path], _split_of_list(path, folder), len(lists) > 1)
    for path, error in unusable.items():
        content.notes.append(f"{_relative(path, folder)} is not used: {error.what}")
    ids = [_relative(Path(row.file or row.path), folder) for row in content.rows]
    return _make_source(content, folder, name, options, tested, ids)


def has_lists(folder: Path) -> bool:
    """Return whether `read_list_folder` has files to try."""
    return bool(_candidates(folder))


def has_class_folders(folder: Path) -> bool:
    """Return whether there are several folders in `folder`, or in a folder of a split."""
    folders = [path for path in sorted(folder.iterdir()) if _is_class_folder(path)]
    split_folders = [path for path in folders if split_from_name(path.name)]
    if split_folders:
        inside = [sum(map(_is_class_folder, path.iterdir())) for path in split_folders]
        return max(inside) > 1
    return len(folders) > 1


def _is_class_folder(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in JUNK_FOLDERS and path.is_dir()


def compare_lists_with_folders(folder: Path, name: str) -> list[str]:
    """Check that lists beside class folders give the same classes, and return notes about them.

    Raises:
        DataError: a list gives the images other classes.
    """
    notes = []
    for path, content in _find_lists(folder, DEFAULT_OPTIONS)[0].items():
        pairs = set()
        for row in content.rows:
            parts = Path(_relative(Path(row.file or row.path), folder)).parts
            is_split = len(parts) > 2 and split_from_name(parts[0]) is not None
            pairs.add((row.label, parts[1] if is_split else parts[0]))
        labels, folders = {label for label, _ in pairs}, {class_name for _, class_name in pairs}
        listed = _relative(path, folder)
        if not len(labels) == len(folders) == len(pairs):
            raise DataError(
                f"two readings: {listed} has the classes {list_examples(sorted(labels))}; its "
                f"images are in the folders {list_examples(sorted(folders))}",
                where=str(folder),
                fix=f"to use the list, name it: {os.path.join(name, listed)}; to use the folders "
                "as classes, move the list out",
            )
        notes.append(
            f"{listed} has the same classes as the folders and is not read; to use it, name it: "
            f"{os.path.join(name, listed)}"
        )
    return notes


def _candidates(folder: Path) -> list[Path]:
    """Return the files that may be lists, in `folder` and in its folders of splits."""
    folders = [folder, *(path for path in sorted(folder.iterdir()) if _is_split_folder(path))]
    return [
        Path(entry.path)
        for parent in folders
        for entry in sorted(scan_entries(parent), key=lambda entry: entry.name)
        if entry.name.lower().endswith(LIST_SUFFIXES)
        and not _OTHER_FILES.search(entry.name.lower())
        and is_regular_file(entry)
    ]


def _is_split_folder(path: Path) -> bool:
    return split_from_name(path.name) is not None and path.is_dir()


def _find_lists(
    folder: Path, options: ListOptions
) -> tuple[dict[Path, _Rows], dict[Path, DataError]]:
    """Return the lists that can be read, and the errors of those that only look like lists."""
    lists, unusable = dict[Path, _Rows](), dict[Path, DataError]()
    for path in _candidates(folder):
        try:
            content = _read_rows(path, options)
        except DataError as error:
            unusable[path] = error
            continue
        if any(row.file is not None for row in content.rows):
            lists[path] = content
        else:
            missing = list_examples([row.path for row in content.rows])
            unusable[path] = DataError(f"none of its files exists: {missing}", fix=content.fix)
    return lists, unusable


def _split_of_list(path: Path, folder: Path) -> str | None:
    """Return the split that the name of a list, or of its folder, stands for."""
    return split_from_name(path.stem) or (
        split_from_name(path.parent.name) if path.parent != folder else None
    )


def _lists_of_other_splits(path: Path) -> list[Path]:
    split = split_from_name(path.stem)
    if split is None:
        return []
    return [
        sibling
        for sibling in sorted(path.parent.glob(f"*{path.suffix}"))
        if split_from_name(sibling.stem) not in (None, split)
    ]


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _extend(content: _Rows, other: _Rows, name: str, split: str | None, several: bool) -> None:
    """Add the rows of a list; its split is that of its name, unless it has a column for it."""
    prefix = f"{name}: " if several else ""
    for row in other.rows:
        row_split = split if split is not None and not row.split_cell else row.split
        line = f"{row.line} of {name}" if several else row.line
        content.rows.append(
            ListRow(line, row.path, row.file, row.label, row.split_cell, row_split, row.group)
        )
    content.short_lines += [f"{line} of {name}" if several else line for line in other.short_lines]
    content.notes += [prefix + note for note in other.notes]
    content.hints += other.hints
    content.fix = content.fix or other.fix


def _read_rows(path: Path, options: ListOptions) -> _Rows:
    """Return the rows of a list, before they are checked."""
    table = read_table(path, is_known_column)
    if not table.lines:
        raise DataError("this file lists no images", where=str(path), fix=COLUMNS_HELP)
    folder = os.path.dirname(os.path.abspath(path))
    finder = PathFinder(folder, _images_folder(folder, options.images))
    cells = interpret_table(
        table, str(path), options, share_of_files=finder.share, is_file=finder.is_file
    )
    if not cells.lines and not cells.short_lines:
        raise DataError("this file lists no images", where=str(path), fix=COLUMNS_HELP)
    resolution = finder.resolve(cells.paths)
    labels = [strip_invisible(unescape_csv_formula(label)) for label in cells.labels]
    content = _Rows(
        short_lines=[str(line) for line in cells.short_lines],
        notes=[*cells.notes, *resolution.notes],
        hints=resolution.hints,
        fix=resolution.fix,
    )
    changed = {
        label
        for label, cell in zip(labels, cells.labels, strict=True)
        if label != unescape_csv_formula(cell).strip()
    }
    if changed:
        content.notes.append(
            f"invisible characters were removed from the labels {list_examples(sorted(changed))}"
        )
    rename = options.rename or {}
    for i, line in enumerate(cells.lines):
        label = normalize_name(labels[i])
        content.rows.append(
            ListRow(
                str(line),
                cells.paths[i],
                resolution.files[i],
                rename.get(label, label),
                cells.split_cells[i],
                "train" if cells.splits is None else cells.splits[i],
                None if cells.groups is None else cells.groups[i],
            )
        )
    if options.rename:
        check_renamed(options.rename, dict.fromkeys(map(normalize_name, labels)))
    return content


def _images_folder(folder: str, images: str | None) -> str | None:
    """Return the folder of `data.images`, relative to the list or to the current folder."""
    if images is None:
        return None
    candidates = [os.path.join(folder, images), os.path.abspath(os.path.expanduser(images))]
    for candidate in candidates:
        if os.path.isdir(candidate):
            return os.path.normpath(candidate)
    raise UsageError(
        f"data.images={images}: no such folder",
        where=folder,
        fix="write it relative to the folder of the list, or to the current folder",
    )


def _make_source(
    content: _Rows,
    where: Path,
    name: str,
    options: ListOptions,
    tested: bool,
    ids: Sequence[str],
) -> DataSource:
    """Check all rows together and return them as a data source."""
    rows = content.rows
    names = _check_rows(content, where, tested)
    notes = list(content.notes)
    first = {row.file: number for number, row in reversed(list(enumerate(rows)))}
    used = [number for number, row in enumerate(rows) if first[row.file] == number]
    if len(used) < len(rows):
        notes.append(
            f"{len(rows) - len(used):,} lines that repeat a file with the same label count once"
        )
    counts = Counter(rows[number].label for number in used)
    for group in similar_class_names(names):
        images = ", ".join(f"{counts[label]:,}" for label in group)
        notes.append(
            f"classes that look like the same one: {describe_similar(group)} ({images} images); "
            "data.rename merges them"
        )
    number_of = {name: number for number, name in enumerate(names)}
    parts = {}
    for split in SPLITS:
        members = [number for number in used if rows[number].split == split]
        if members:
            parts[split] = Part(
                FilePaths([rows[number].file or "" for number in members]),
                np.array([number_of[rows[number].label] for number in members], np.int64),
                [printable(ids[number]) for number in members],
                [g for number in members if (g := rows[number].group) is not None] or None,
            )
    return DataSource(name, names, parts, tuple(notes))


def _check_rows(content: _Rows, where: Path, tested: bool) -> tuple[str, ...]:
    """Return the sorted class names.

    Raises:
        DataError: lists everything that is wrong.
    """
    rows = content.rows
    problems = [
        Problem("lines with missing cells", [f"line {line}" for line in content.short_lines])
    ]
    for message, fails, describe in _ROW_CHECKS:
        failing = dict.fromkeys(describe(row) for row in rows if fails(row))
        problems.append(Problem(message, list(failing)))
    missing = problems[-1]
    if missing.items and content.hints:
        hints = "; ".join(dict.fromkeys(content.hints))
        shown = f"{list_examples(missing.items)} ({hints})"
        problems[-1] = Problem(missing.message, [shown])
    for message, key, value, describe_key in _CONSISTENCY_CHECKS:
        keys = _keys_with_two_values((key(row), value(row)) for row in rows)
        problems.append(Problem(message, sorted(set(map(describe_key, keys)))))
    judged = SPLITS if tested else ("train",)
    names = tuple(sorted({row.label for row in rows if row.split in judged}))
    problems += _find_class_problems(rows, names, 1 if tested else 2)
    fix = "fix these lines and run the same command again"
    if missing.items:
        fix = content.fix or f"{fix}, or name the folder of the images: data.images=FOLDER"
    raise_problems(problems, where, fix)
    return names


def _may_be_image(file: str) -> bool:
    """Return whether a file has the extension of an image, or none: then its content decides."""
    name = os.path.basename(file)
    return is_image_name(name) or not os.path.splitext(name)[1]


def _keys_with_two_values(pairs: Iterable[tuple[str | None, Hashable]]) -> set[str]:
    first_value: dict[str, Hashable] = {}
    return {
        key
        for key, value in pairs
        if key is not None and first_value.setdefault(key, value) != value
    }


def _find_class_problems(
    rows: Sequence[ListRow], names: Sequence[str], min_classes: int
) -> list[Problem]:
    splits = sorted({row.split or "?" for row in rows})
    problems = [
        Problem("no training images; the splits are", [] if names else splits),
        Problem("only one class", names if len(names) < min_classes else []),
    ]
    for split in SPLITS[1:]:
        unknown = {row.label for row in rows if row.split == split and row.label} - set(names)
        problems.append(Problem(f"classes in {split} that train lacks", sorted(unknown)))
    return problems


def escape_csv_formula(cell: str) -> str:
    """Return `cell` so that a spreadsheet does not interpret it as a formula.

    An apostrophe is put before `=`, `+`, `-` and `@`, and before apostrophes that precede them, so
    that `unescape_csv_formula` is the exact inverse
    (owasp.org/www-community/attacks/CSV_Injection).
    """
    return f"'{cell}" if cell.lstrip("'").startswith(_FORMULA_STARTS) else cell


def unescape_csv_formula(cell: str) -> str:
    """Return the text that `escape_csv_formula` was called with."""
    is_escaped = cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA_STARTS)
    return cell[1:] if is_escaped else cell
