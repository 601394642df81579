"""Lists of images with their classes: a CSV, a text file, JSON or parquet, or a folder with these.

`table_files` reads the cells, `list_columns` finds out what they mean, `image_paths` finds the
files. Here they become rows, which are checked together, and a `DataSource`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from convlens.data.class_names import (
    check_renamed,
    describe_similar,
    format_rename,
    is_missing_label,
    may_be_missing_label,
    similar_class_names,
    sort_classes,
    strip_invisible,
    unknown_classes,
    whole_numbers,
)
from convlens.data.image_paths import PathFinder
from convlens.data.joined_lists import JoinedLists, find_joined_lists
from convlens.data.layout import (
    SPLITS,
    Problem,
    list_examples,
    list_override,
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
from convlens.data.table_files import TABLE_READERS, Table, read_table
from convlens.data.types import DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, UsageError

LIST_SUFFIXES = tuple(TABLE_READERS)
COLUMNS_HELP = "the first line names the columns: path,label[,split][,a group column]"
_FORMULA_STARTS = ("=", "+", "-", "@")


@dataclass(frozen=True, slots=True)
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
class ListContent:
    """The rows of one or more lists before they are checked.

    Attributes:
        rows: the images.
        short_lines: lines that lack cells.
        notes: how the lists were read.
        hints: why files were not found.
        fix: what helps against missing files.
    """

    rows: list[ListRow] = field(default_factory=list)
    short_lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    fix: str = ""


# Checks of single rows: message, whether a row fails, and how the message names it.
_ROW_CHECKS: list[tuple[str, Callable[[ListRow], bool], Callable[[ListRow], str]]] = [
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

_TWO_LABELS = "files with two labels"
_MULTI_LABEL_HELP = (
    "give each image one label; convlens trains single-label classifiers, so a multi-label set, "
    "with several lines for each image, can't be used"
)

# Checks for contradictions between rows: message, key, the value that all rows of a key share, and
# how the message names the key.
_CONSISTENCY_CHECKS: list[
    tuple[str, Callable[[ListRow], str | None], Callable[[ListRow], Hashable], Callable[[str], str]]
] = [
    (_TWO_LABELS, lambda row: row.file, lambda row: row.label, os.path.basename),
    ("files in two splits", lambda row: row.file, lambda row: row.split, os.path.basename),
    ("files in two groups", lambda row: row.file, lambda row: row.group, os.path.basename),
    ("groups in two splits", lambda row: row.group, lambda row: row.split, str),
]


def read_list(
    path: Path,
    name: str,
    options: ListOptions = DEFAULT_OPTIONS,
    *,
    tested: bool = False,
    known_classes: Collection[str] = (),
) -> DataSource:
    """Read a file that lists images: one of `LIST_SUFFIXES`.

    Args:
        path: the list. Its columns are found by their names (`list_columns`). Empty cells of the
            split mean training. Labels may be written by `escape_csv_formula`.
        name: name of the data set.
        options: how to read the list.
        tested: as in `sources.find_source`.
        known_classes: labels that are classes, although they look like a missing one (`None`).

    Raises:
        DataError: lists everything that is wrong.
        UsageError: the file lacks a column that `options` names.
    """
    if options.lists is not None:
        raise UsageError(
            "data.lists applies only to folders with several lists", where=f"data.name={name}"
        )
    joined = find_joined_lists(path.parent)
    if joined is not None and path.name not in joined.names:
        joined = None
    try:
        content = read_rows(path, options)
    except DataError as error:
        if joined is None:
            raise
        raise DataError(error.what, where=error.where, fix=_name_folder(path, joined)) from error
    split = split_from_name(path.stem)
    siblings = [
        sibling.name
        for sibling in sorted(path.parent.glob(f"*{path.suffix}"))
        if split_from_name(sibling.stem) not in (None, split)
    ]
    if split is not None and siblings and {row.split for row in content.rows} == {"train"}:
        content.notes.append(
            f"not read: {list_examples(siblings)}; to read all splits, name the folder"
        )
    if joined is not None and len(joined.names) > 1:
        content.notes.append(
            f"{path.name} is one of several lists that belong together; to read all of them, with "
            "their splits, name the folder"
        )
    elif joined is not None and all(row.file is None for row in content.rows):
        content.fix = _name_folder(path, joined)
    ids = [row.path for row in content.rows]
    return make_source(
        content, path, name, ids, tested=tested, rename=options.rename, known_classes=known_classes
    )


def _name_folder(path: Path, joined: JoinedLists) -> str:
    """Return the advice to name the folder of a set instead of one of its lists."""
    is_beside_images = len(joined.names) > 1
    folder = path.parent if is_beside_images else path.absolute().parent.parent
    return f"name the folder of the data set: {folder}"


def read_rows(path: Path, options: ListOptions) -> ListContent:
    """Return the rows of a list, before they are checked.

    Raises:
        DataError: the file is not a list of images.
        UsageError: a column or folder that `options` names does not exist.
    """
    folder = os.path.dirname(os.path.abspath(path))
    return rows_of_table(read_table(path, is_known_column), path, folder, options)


def rows_of_table(table: Table, path: Path, folder: str, options: ListOptions) -> ListContent:
    """Return the rows of a table, before they are checked.

    Args:
        path: the list, or the folder of several, for messages.
        folder: the paths are relative to it.

    Raises:
        DataError, UsageError: as by `read_rows`.
    """
    if not table.lines:
        raise DataError("this file lists no images", where=str(path), fix=COLUMNS_HELP)
    finder = PathFinder(folder, _images_folder(folder, options.images), path.stem)
    cells = interpret_table(
        table, str(path), options, share_of_files=finder.share, is_file=finder.is_file
    )
    if not cells.lines and not cells.short_lines:
        raise DataError("this file lists no images", where=str(path), fix=COLUMNS_HELP)
    resolution = finder.resolve(cells.paths)
    labels = [strip_invisible(unescape_csv_formula(label)) for label in cells.labels]
    content = ListContent(
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
    for i, line in enumerate(cells.lines):
        content.rows.append(
            ListRow(
                str(line),
                cells.paths[i],
                resolution.files[i],
                normalize_name(labels[i]),
                cells.split_cells[i],
                "train" if cells.splits is None else cells.splits[i],
                None if cells.groups is None else cells.groups[i],
            )
        )
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


def make_source(
    content: ListContent,
    where: Path,
    name: str,
    ids: Sequence[str],
    *,
    tested: bool,
    rename: Mapping[str, str] | None = None,
    known_classes: Collection[str] = (),
) -> DataSource:
    """Check all rows together and return them as a data source.

    Args:
        where: the list or its folder, for messages.
        ids: name of the image of each row.
        tested: as in `sources.find_source`.
        rename: new names of classes.
        known_classes: as for `read_list`.

    Raises:
        DataError: lists everything that is wrong.
        UsageError: `rename` names a class that does not exist.
    """
    named = {*known_classes, *(rename or ())}
    missing = find_missing_labels(content.rows, named)
    whole = whole_numbers(row.label for row in content.rows)
    if whole.keys().isdisjoint(named):  # else a run of an earlier version, for example
        content = _with_whole_numbers(content, whole)
    if rename:
        check_renamed(rename, sorted({row.label for row in content.rows}))
        renamed = [replace(row, label=rename.get(row.label, row.label)) for row in content.rows]
        content = replace(content, rows=renamed)
    rows = content.rows
    names = _check_rows(content, where, tested, missing)
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
    notes += [
        f"the class {label} ({counts[label]:,} images) may stand for a missing label: "
        f"{list_override('data.without', [label])} leaves it out"
        for label in names
        if may_be_missing_label(label) and label not in known_classes
    ]
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


def _with_whole_numbers(content: ListContent, whole: Mapping[str, str]) -> ListContent:
    """Return the rows with the labels that `whole` names replaced, and a note about it."""
    if not whole:
        return content
    rows = [replace(row, label=whole.get(row.label, row.label)) for row in content.rows]
    examples = [f"{label} is {number}" for label, number in whole.items()]
    note = f"labels are whole numbers with decimals: {list_examples(examples)}"
    return replace(content, rows=rows, notes=[*content.notes, note])


def _check_rows(
    content: ListContent, where: Path, tested: bool, missing_labels: Collection[str]
) -> tuple[str, ...]:
    """Return the class names, sorted by name, or by number if all are numbers.

    Args:
        missing_labels: labels that are no classes.

    Raises:
        DataError: lists everything that is wrong.
    """
    rows = content.rows
    problems = [
        Problem("lines with missing cells", [f"line {line}" for line in content.short_lines]),
        unlabeled_lines(rows, missing_labels),
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
        fix = _MULTI_LABEL_HELP if message == _TWO_LABELS and len(keys) > 1 else ""
        problems.append(Problem(message, sorted(set(map(describe_key, keys))), fix))
    judged = SPLITS if tested else ("train",)
    labeled = [row for row in rows if row.label not in missing_labels]
    names = sort_classes({row.label for row in labeled if row.split in judged})
    problems += _find_class_problems(labeled, names, 1 if tested else 2)
    fix = "fix these lines and run the same command again"
    if missing.items:
        fix = content.fix or f"{fix}, or name the folder of the images: data.images=FOLDER"
    elif (unknown := {row.split_cell for row in rows if row.split is None}) == set("012"):
        fix = "name this column `partition` if 0, 1, 2 mean train, val, test, as in CelebA"
    elif unknown == {"0", "1"}:
        fix = (
            "name this column `is_test` if 1 marks test images, `is_train` if it marks training "
            "images, or set data.split_column=none"
        )
    raise_problems(problems, where, fix)
    return names


def find_missing_labels(rows: Iterable[ListRow], known_classes: Collection[str]) -> set[str]:
    """Return the labels that stand for a missing one, except those that are known to be classes."""
    labels = {row.label for row in rows}
    return {label for label in labels if is_missing_label(label) and label not in known_classes}


def unlabeled_lines(rows: Iterable[ListRow], missing_labels: Collection[str]) -> Problem:
    """Return the problem that lines have no label, or one of `missing_labels`."""
    lines = [
        f"line {row.line}" + (f" ({row.label})" if row.label else "")
        for row in rows
        if row.label in missing_labels
    ]
    without = list_override("data.without", sorted(missing_labels))
    fix = f"write the labels, or leave these lines out: {without}"
    if words := sorted(filter(None, missing_labels)):
        example = format_rename(words[0], f"class {words[0]}")
        fix += f"; if {words[0]} is a class, name all classes in data.classes, or {example}"
    return Problem("lines without a label", lines, fix)


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
        unknown = {row.label for row in rows if row.split == split} - set(names)
        problems.append(unknown_classes(split, sort_classes(unknown), names))
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
