"""A CSV file that lists images with their classes."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
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
from convlens.data.types import DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, UsageError, close_matches, did_you_mean

COLUMNS_HELP = "the first line names the columns: path,label[,split][,a group column]"
PATH_COLUMNS = ("path", "file", "filename", "filepath", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "set")
_FORMULA_STARTS = ("=", "+", "-", "@")


@dataclass(frozen=True)
class CsvRow:
    """One image of a CSV file.

    Attributes:
        line: number of its line.
        path: its path as written.
        file: its absolute path.
        label: class name, empty if the cell is empty.
        split_cell: its split as written.
        split: `train`, `val` or `test`; None if the cell has another value.
        group: value of the group column; None without one.
    """

    line: int
    path: str
    file: str
    label: str
    split_cell: str
    split: str | None
    group: str | None


# Checks of single rows: message, whether a row fails, and how the message names it.
_ROW_CHECKS: list[tuple[str, Callable[[CsvRow], bool], Callable[[CsvRow], str]]] = [
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
        "files that do not exist",
        lambda row: not os.path.isfile(row.file),
        lambda row: row.path,
    ),
    (
        "files without the extension of an image",
        lambda row: not is_image_name(os.path.basename(row.path)) and os.path.isfile(row.file),
        lambda row: row.path,
    ),
]

# Checks for contradictions between rows: message, key, the value that all rows of a key share, and
# how the message names the key.
_CONSISTENCY_CHECKS: list[
    tuple[str, Callable[[CsvRow], str | None], Callable[[CsvRow], Hashable], Callable[[str], str]]
] = [
    ("files with two labels", lambda row: row.file, lambda row: row.label, os.path.basename),
    ("files in two splits", lambda row: row.file, lambda row: row.split, os.path.basename),
    ("groups in two splits", lambda row: row.group, lambda row: row.split, str),
]


def read_csv(path: Path, name: str, group: str | None = None, tested: bool = False) -> DataSource:
    """Read a CSV file (comma, semicolon or tab; with a header) that lists images.

    Args:
        path: the CSV file, with columns `path` and `label` and optionally `split` (empty cells mean
            train). Paths are relative to the file. Labels may be written by `escape_csv_formula`.
        name: name of the data set.
        group: a column; images with equal values stay in one split.
        tested: as in `sources.find_source`.

    Raises:
        DataError: lists everything that is wrong.
        UsageError: the file has no column `group`.
    """
    columns, lines = _read_lines(path)
    rows = _parse_rows(lines, columns, path, group)
    short = [f"line {line}" for line, cells in lines if len(cells) < len(columns)]
    problems = [Problem("lines with missing cells", short)]
    for message, fails, describe in _ROW_CHECKS:
        failing = dict.fromkeys(describe(row) for row in rows if fails(row))
        problems.append(Problem(message, list(failing)))
    for message, key, value, describe_key in _CONSISTENCY_CHECKS:
        keys = _keys_with_two_values((key(row), value(row)) for row in rows)
        problems.append(Problem(message, sorted(set(map(describe_key, keys)))))
    judged = SPLITS if tested else ("train",)
    names = tuple(sorted({row.label for row in rows if row.split in judged}))
    problems += _find_class_problems(rows, names, 1 if tested else 2)
    raise_problems(problems, path, "fix these lines and run the same command again")

    number_of = {name: number for number, name in enumerate(names)}
    parts = {}
    for split in SPLITS:
        members = [row for row in rows if row.split == split]
        if members:
            parts[split] = Part(
                FilePaths([row.file for row in members]),
                np.array([number_of[row.label] for row in members], np.int64),
                [printable(row.path) for row in members],
                [row.group for row in members if row.group is not None] or None,
            )
    return DataSource(name, names, parts)


def _read_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names, and number and cells of each further line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=header.count))
            lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except UnicodeDecodeError as error:
        raise DataError(
            "this CSV is not UTF-8 text", where=str(path), fix="save it as UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"can't read this CSV: {error}", where=str(path)) from error
    if len(lines) < 2:
        raise DataError("this CSV lists no images", where=str(path), fix=COLUMNS_HELP)
    return [cell.strip() for cell in lines[0][1]], lines[1:]


def _parse_rows(
    lines: Sequence[tuple[int, list[str]]], columns: list[str], path: Path, group: str | None
) -> list[CsvRow]:
    """Return the lines that have all cells as rows."""
    path_column = _find_column(columns, PATH_COLUMNS)
    label_column = _find_column(columns, LABEL_COLUMNS)
    split_column = _find_column(columns, SPLIT_COLUMNS)
    if path_column is None or label_column is None:
        missing = "path" if path_column is None else "label"
        raise DataError(
            f"no column {missing!r} among: {', '.join(columns)}",
            where=str(path),
            fix=COLUMNS_HELP,
        )
    # Anything else but a plain name is a regular expression for the paths: see `find_source`.
    if group is not None and group not in columns and re.fullmatch(r"[\w ]+", group):
        suggestion = did_you_mean(close_matches(group, columns)[:1])
        raise UsageError(
            f"no column {group!r} for data.group",
            where=str(path),
            fix=suggestion or f"columns: {', '.join(columns)}",
        )
    group_column = columns.index(group) if group in columns else None
    folder = os.path.dirname(os.path.abspath(path))
    rows = []
    for line, cells in lines:
        if len(cells) < len(columns):
            continue
        image_path = cells[path_column].strip()
        split_cell = "" if split_column is None else cells[split_column]
        rows.append(
            CsvRow(
                line,
                image_path,
                os.path.normpath(os.path.join(folder, image_path)),
                normalize_name(unescape_csv_formula(cells[label_column].strip())),
                split_cell,
                split_from_name(split_cell) if split_cell.strip() else "train",
                None if group_column is None else cells[group_column],
            )
        )
    return rows


def _find_column(columns: Sequence[str], names: Sequence[str]) -> int | None:
    folded = [column.casefold() for column in columns]
    return next((folded.index(name) for name in names if name in folded), None)


def _keys_with_two_values(pairs: Iterable[tuple[str | None, Hashable]]) -> set[str]:
    first_value: dict[str, Hashable] = {}
    return {
        key
        for key, value in pairs
        if key is not None and first_value.setdefault(key, value) != value
    }


def _find_class_problems(
    rows: Sequence[CsvRow], names: Sequence[str], min_classes: int
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
