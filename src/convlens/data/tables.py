"""Own images listed in a CSV: path, label, and if wanted split and a group column."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convlens.data.encoded import Paths
from convlens.data.folders import Problems, normal, split_of
from convlens.data.parts import Part, Source, is_image_name
from convlens.data.scanning import printable
from convlens.errors import DataError, UsageError
from convlens.names import did_you_mean, near

_PATH = ("path", "file", "filename", "filepath", "image")
_LABEL = ("label", "class", "category", "target")
_FORMULA = ("=", "+", "-", "@")
_COLUMNS = "the first line names the columns: path,label[,split][,a group column]"


def read_csv(path: Path, name: str, group: str | None = None, *, tested: bool = False) -> Source:
    """A CSV (comma, semicolon or tab; with a header) as a source; paths are relative to it.

    Args:
        path: the CSV. Columns `path` and `label`, perhaps `split` (empty means train). A label
            may be `guarded`.
        name: what to call the set.
        group: a column whose equal values must stay in one split.
        tested: as for `sources.find`.

    Raises:
        DataError: everything that is wrong, at once.
        UsageError: there is no column called `group`.
    """
    rows, columns = _rows(path)
    at_path, at_label, at_split = _columns(columns, path)
    if group is not None and group not in columns:
        fix = did_you_mean(near(group, columns)[:1]) or f"columns: {', '.join(columns)}"
        raise UsageError(f"no column {group!r} for data.group", where=str(path), fix=fix)
    at_group = columns.index(group) if group else None
    base = os.path.dirname(os.path.abspath(path))
    problems = Problems(str(path))
    problems.add(
        "lines with missing cells", [f"line {n}" for n, r in rows if len(r) < len(columns)]
    )
    rows = [(n, r) for n, r in rows if len(r) >= len(columns)]
    unlabelled = [f"line {n}" for n, r in rows if not r[at_label].strip()]
    problems.add("lines without a label", unlabelled)
    splits = [_split(r, at_split) for _, r in rows]
    strange = sorted({r[at_split] for (_, r), s in zip(rows, splits, strict=True)
                      if s is None and at_split is not None})  # fmt: skip
    problems.add("splits that are not train, val or test", strange)
    files = [os.path.normpath(os.path.join(base, r[at_path].strip())) for _, r in rows]
    lost = [r[at_path] for (_, r), f in zip(rows, files, strict=True) if not os.path.isfile(f)]
    problems.add("files that do not exist", lost)
    wrong = [r[at_path] for _, r in rows if not is_image_name(os.path.basename(r[at_path].strip()))]
    problems.add("files that are no images by their extension", [w for w in wrong if w not in lost])
    labels = [normal(unguarded(r[at_label].strip())) for _, r in rows]
    groups = [r[at_group] for _, r in rows] if at_group is not None else None
    _consistent(files, labels, splits, groups, problems)
    judged = ("train", "val", "test") if tested else ("train",)
    names = tuple(sorted({la for la, s in zip(labels, splits, strict=True) if s in judged}))
    _classes(labels, splits, names, problems, fewest=1 if tested else 2)
    problems.stop("mend these lines and run the same command again")
    number = {n: i for i, n in enumerate(names)}
    parts = {}
    for split in ("train", "val", "test"):
        mine = [i for i, s in enumerate(splits) if s == split]
        if mine:
            parts[split] = Part(
                Paths([files[i] for i in mine]),
                np.array([number[labels[i]] for i in mine], np.int64),
                [printable(rows[i][1][at_path].strip()) for i in mine],
                [groups[i] for i in mine] if groups is not None else None,
            )
    return Source(name, names, parts)


def guarded(cell: str) -> str:
    """`cell` for a CSV that people open in a spreadsheet: no formula, whatever it begins with.

    An apostrophe goes before `=`, `+`, `-` and `@` (owasp.org/www-community/attacks/CSV_Injection),
    and before a cell that begins with such a one already, so that `unguarded` can take it away.
    """
    return f"'{cell}" if cell.lstrip("'").startswith(_FORMULA) else cell


def unguarded(cell: str) -> str:
    """What `guarded` was given."""
    begins = cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA)
    return cell[1:] if begins else cell


def _rows(path: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(file, delimiter=separator)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise DataError(
            "this CSV is not UTF-8 text", where=str(path), fix="save it as UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"can't read this CSV: {error}", where=str(path)) from error
    if len(rows) < 2:
        raise DataError("this CSV lists no images", where=str(path), fix=_COLUMNS)
    return rows[1:], [cell.strip() for cell in rows[0][1]]


def _columns(columns: Sequence[str], path: Path) -> tuple[int, int, int | None]:
    lower = [c.casefold() for c in columns]

    def find(names: Sequence[str]) -> int | None:
        return next((lower.index(n) for n in names if n in lower), None)

    at_path, at_label = find(_PATH), find(_LABEL)
    if at_path is None or at_label is None:
        missing = "path" if at_path is None else "label"
        raise DataError(
            f"no column {missing!r} among: {', '.join(columns)}", where=str(path), fix=_COLUMNS
        )
    return at_path, at_label, find(("split", "subset", "set"))


def _split(row: Sequence[str], at_split: int | None) -> str | None:
    if at_split is None or not row[at_split].strip():
        return "train"
    return split_of(row[at_split])


def _consistent(
    files: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[str | None],
    groups: Sequence[str] | None,
    problems: Problems,
) -> None:
    """A file has one label and one split, a group one split."""
    label_of: dict[str, str] = {}
    split_of_file: dict[str, str | None] = {}
    two_labels, two_splits = set[str](), set[str]()
    for file, label, split in zip(files, labels, splits, strict=True):
        if label_of.setdefault(file, label) != label:
            two_labels.add(os.path.basename(file))
        if split_of_file.setdefault(file, split) != split:
            two_splits.add(os.path.basename(file))
    problems.add("files with two labels", sorted(two_labels))
    problems.add("files in two splits", sorted(two_splits))
    split_of_group: dict[str, str | None] = {}
    torn = {
        group
        for group, split in zip(groups or (), splits, strict=groups is not None)
        if split_of_group.setdefault(group, split) != split
    }
    problems.add("groups in two splits", sorted(torn))


def _classes(
    labels: Sequence[str],
    splits: Sequence[str | None],
    names: Sequence[str],
    problems: Problems,
    fewest: int,
) -> None:
    if not names:
        problems.add("no training images; splits", sorted({s or "?" for s in splits}))
    elif len(names) < fewest:
        problems.add("only one class", names)
    known = set(names)
    for split in ("val", "test"):
        mine = {la for la, s in zip(labels, splits, strict=True) if s == split and la}
        problems.add(f"classes in {split} that train lacks", sorted(mine - known))
