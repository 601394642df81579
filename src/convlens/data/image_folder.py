"""The user's own images: a folder of class folders, with or without splits, or a CSV file."""

from __future__ import annotations

import csv
import os
import time
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.markup import escape

from convlens.data.types import PERMANENT_ERRNOS, DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, UsageError, close_matches, closest_match, did_you_mean
from convlens.utils.console import print_status
from convlens.utils.files import cannot_read

SPLITS = ("train", "val", "test")
SPLIT_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, spellings in SPLIT_SPELLINGS.items() for name in spellings}
LAYOUT_HELP = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"
COLUMNS_HELP = "the first line names the columns: path,label[,split][,a group column]"
PATH_COLUMNS = ("path", "file", "filename", "filepath", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMNS = ("split", "subset", "set")
JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
MAX_EXAMPLES = 5  # items that a message lists before it counts the others
NOTICE_AFTER_S = 3.0  # time before the first notice of a long scan; doubled after each notice
_FORMULA_STARTS = ("=", "+", "-", "@")

ScanEntry = os.DirEntry[str]


@dataclass(frozen=True)
class Problem:
    """Something that may be wrong with a source. Without `items` there is no problem."""

    message: str
    items: Sequence[str]
    fix: str = ""


def raise_problems(problems: Iterable[Problem], where: Path, fix: str = LAYOUT_HELP) -> None:
    """Raise one error for all problems.

    Args:
        problems: those without items are ignored.
        where: the source.
        fix: what the user can do, unless a problem says so; the last one that does decides.

    Raises:
        DataError: at least one problem has items.
    """
    actual = [problem for problem in problems if problem.items]
    if actual:
        raise DataError(
            "; ".join(f"{problem.message}: {_examples(problem.items)}" for problem in actual),
            where=str(where),
            fix=next((problem.fix for problem in reversed(actual) if problem.fix), fix),
        )


def _examples(items: Sequence[str]) -> str:
    more = len(items) - MAX_EXAMPLES
    return ", ".join(items[:MAX_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def split_from_name(name: str) -> str | None:
    """Return `train`, `val` or `test` for any of their usual spellings, else None."""
    return _SPLIT_OF.get(name.strip().casefold())


def normalize_name(name: str) -> str:
    """Return a class name in composed Unicode (NFC), without surrounding blanks."""
    return unicodedata.normalize("NFC", name).strip()


def printable(text: str) -> str:
    """Return `text` with escapes for the surrogates that stand for undecodable file name bytes."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class _ClassFolders:
    """The contents of a folder of class folders."""

    files: dict[str, list[str]] = field(default_factory=dict)  # paths of images by class
    duplicates: list[str] = field(default_factory=list)  # classes with more than one folder
    special_files: list[str] = field(default_factory=list)
    unreadable_folders: dict[str, str] = field(default_factory=dict)  # with the reason
    num_ignored: int = 0  # files of other types in class folders
    num_outside: int = 0  # images outside the class folders


def read_folder(
    root: Path, name: str, classes: Sequence[str] | None = None, *, tested: bool = False
) -> DataSource:
    """Read a folder of class folders, directly below `root` or below its train/val/test folders.

    Args:
        root: `root/<class>/*` or `root/{train,val,test}/<class>/*`; images may be at any depth
            below a class folder.
        name: name of the data set.
        classes: canonical order of the classes; used if the folder has exactly these.
        tested: as in `sources.find_source`.

    Raises:
        DataError: lists everything that is wrong.
    """
    root = Path(os.path.abspath(root))
    splits, notes = _find_split_folders(root, tested)
    scanner = Scanner(root)
    scans = {split: _scan_class_folders(folder, scanner) for split, folder in splits.items()}
    special_paths = {entry.path for entry in scan_entries(root) if is_special_file(entry)}
    special_paths = special_paths.union(*(scan.special_files for scan in scans.values()))
    prefix = len(os.path.join(root, ""))
    special = sorted(printable(path[prefix:]) for path in special_paths)

    judged = list(scans.values()) if tested else [scans["train"]]
    names = tuple(sorted({name for scan in judged for name in scan.files}))
    if classes and set(classes) == set(names):
        names = tuple(classes)
    raise_problems(_find_problems(scans, names, root, special, tested), root)

    parts = {}
    for split, scan in scans.items():
        paths = [path for name in names for path in scan.files.get(name, ())]
        if not paths:
            notes.append(f"{split}: no images in class folders, so it is not used")
            continue
        counts = [len(scan.files.get(name, ())) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        parts[split] = Part(FilePaths(paths), labels, [printable(path[prefix:]) for path in paths])
    ignored = sum(scan.num_ignored for scan in scans.values())
    outside = sum(scan.num_outside for scan in scans.values())
    if ignored:
        notes.append(f"{ignored} files that are not images were ignored")
    if outside:
        notes.append(f"{outside} images outside the class folders were ignored")
    if special:
        notes.append(
            f"{len(special)} broken links, pipes or devices were left out: {_examples(special)}"
        )
    return DataSource(name, names, parts, tuple(notes))


def _find_split_folders(root: Path, tested: bool) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split, and notes; `{"train": root}` if the classes are in `root`.

    A class may be called "train" or "test", too: the folder of a split has folders inside.
    """
    folders = _subfolders(root)
    split_folders = [f for f in folders if split_from_name(f) and _subfolders(root / f)]
    if not split_folders:
        spelled = {split_from_name(folder) for folder in folders}
        only_splits = "train" in spelled and None not in spelled
        problems = [
            Problem("no class folders in", [] if folders else [root.name]),
            Problem("splits without class folders inside", folders if only_splits else []),
        ]
        raise_problems(problems, root)
        return {"train": root}, []
    splits: dict[str, Path] = {}
    problems = []
    for folder in split_folders:
        split = split_from_name(folder) or ""
        if split in splits:
            problems.append(Problem(f"two {split} folders", [splits[split].name, folder]))
        splits[split] = root / folder
    if "train" not in splits and not tested:
        problems.append(Problem("no train folder beside", split_folders))
    raise_problems(problems, root)
    ignored = [printable(folder) for folder in folders if folder not in split_folders]
    note = (
        f"folders that are not splits or have no class folders were ignored: {', '.join(ignored)}"
    )
    return splits, [note] if ignored else []


def _subfolders(folder: str | Path) -> list[str]:
    return sorted(
        entry.name
        for entry in scan_entries(folder)
        if entry.name not in JUNK_FOLDERS and is_directory(entry)
    )


def _scan_class_folders(folder: Path, scanner: Scanner) -> _ClassFolders:
    scan = _ClassFolders()
    for entry in scan_entries(folder):
        if is_directory(entry) and entry.name not in JUNK_FOLDERS:
            name = normalize_name(printable(entry.name))
            if name in scan.files:
                scan.duplicates.append(name)
            contents = scanner.find_images(entry.path)
            scan.files[name] = contents.images
            scan.special_files += contents.special_files
            scan.unreadable_folders |= contents.unreadable_folders
            scan.num_ignored += contents.num_ignored
        elif is_special_file(entry):
            scan.special_files.append(entry.path)
        elif is_regular_file(entry) and is_image_name(entry.name):
            scan.num_outside += 1
    return scan


def _find_problems(
    scans: Mapping[str, _ClassFolders],
    names: Sequence[str],
    root: Path,
    special: Sequence[str],
    tested: bool,
) -> list[Problem]:
    """Return all problems of the class folders. Problems that cause others come alone."""
    unreadable = _unreadable_folders(scans)
    if unreadable.items:
        return [unreadable]
    special_files = Problem("broken links, pipes or devices", special)
    judged = list(scans.values()) if tested else [scans["train"]]
    filled = {name for scan in judged for name, paths in scan.files.items() if paths}
    if not filled:
        return [_no_images(names, root), special_files]
    duplicates = [name for scan in scans.values() for name in scan.duplicates]
    problems = [Problem("class folders whose names differ only in their Unicode form", duplicates)]
    if tested:
        return problems
    problems += [
        _empty_classes([name for name in names if name not in filled]),
        _single_class(names, root),
        *(_unknown_classes(split, scans[split], names) for split in SPLITS[1:] if split in scans),
    ]
    if any(problem.items for problem in problems):
        problems.append(special_files)
    return problems


def _unreadable_folders(scans: Mapping[str, _ClassFolders]) -> Problem:
    folders = [
        f"{printable(path)} ({reason})"
        for scan in scans.values()
        for path, reason in scan.unreadable_folders.items()
    ]
    return Problem("folders that can't be read", folders, "change their permissions or remove them")


def _no_images(names: Sequence[str], root: Path) -> Problem:
    deeper = ""
    if (root / names[0]).is_dir():
        deeper = next((name for name in names if _subfolders(root / name)), "")
    fix = f"use {root / deeper}" if deeper else LAYOUT_HELP
    return Problem("no images in any class folder", names, fix)


def _empty_classes(empty: Sequence[str]) -> Problem:
    fix = "add images to them or delete these folders"
    return Problem("class folders without images", empty, fix)


def _single_class(names: Sequence[str], root: Path) -> Problem:
    if len(names) != 1:
        return Problem("only one class folder", [])
    folder = root / names[0]
    has_classes = folder.is_dir() and len(_subfolders(folder)) > 1
    fix = f"if the classes are the folders inside it, use {folder}" if has_classes else ""
    return Problem("only one class folder", names, fix)


def _unknown_classes(split: str, scan: _ClassFolders, names: Sequence[str]) -> Problem:
    unknown = []
    for name in sorted(set(scan.files) - set(names)):
        similar = closest_match(name, names)
        unknown.append(f"{name!r} (train has {similar!r})" if similar else repr(name))
    fix = "give each class the same folder name in every split"
    return Problem(f"classes in {split} that train lacks", unknown, fix)


def _list_visible(folder: str | Path) -> list[ScanEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def scan_entries(folder: str | Path) -> list[ScanEntry]:
    """Return the entries of a folder that are not hidden, in no particular order.

    Raises:
        DataError: the folder is not readable.
    """
    try:
        return _list_visible(folder)
    except OSError as error:
        raise DataError(
            f"can't read this folder: {error.strerror}",
            where=printable(str(folder)),
            fix="check its permissions",
        ) from error


def is_regular_file(entry: ScanEntry) -> bool:
    """Return whether an entry is a regular file or a link to one."""
    return _is_type(entry, entry.is_file)


def is_directory(entry: ScanEntry) -> bool:
    """Return whether an entry is a folder or a link to one."""
    return _is_type(entry, entry.is_dir)


def _is_type(entry: ScanEntry, test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError as error:
        if error.errno not in PERMANENT_ERRNOS:
            raise cannot_read(Path(entry.path), error) from error
        return False  # a link to itself, or to a forbidden folder


def is_special_file(entry: ScanEntry) -> bool:
    """Return whether an entry is named like an image, or is a link, but can't be used.

    These are broken links, pipes, sockets and devices.
    """
    is_candidate = is_image_name(entry.name) or entry.is_symlink()
    return is_candidate and not is_regular_file(entry) and not is_directory(entry)


@dataclass
class FolderContents:
    """Contents of a folder and the folders below; paths start with the path of the folder."""

    images: list[str] = field(default_factory=list)
    special_files: list[str] = field(default_factory=list)  # see `is_special_file`
    unreadable_folders: dict[str, str] = field(default_factory=dict)  # with the reason
    num_ignored: int = 0  # files of other types


class Scanner:
    """Finds images below folders, with a notice if that takes long."""

    def __init__(self, root: str | Path) -> None:
        self._root, self._num_seen = printable(str(root)), 0
        self._notice_interval_s = NOTICE_AFTER_S
        self._next_notice = time.monotonic() + NOTICE_AFTER_S

    def find_images(self, top: str) -> FolderContents:
        """Return all images below `top`, sorted; hidden files and junk folders are skipped."""
        contents = FolderContents()
        waiting, entered = [top], set[str]()
        while waiting:
            folder = waiting.pop()
            try:
                entries = _list_visible(folder)
            except OSError as error:
                contents.unreadable_folders[folder] = error.strerror or str(error)
                continue
            self._report_progress(len(entries))
            for entry in entries:
                if is_regular_file(entry):
                    if is_image_name(entry.name):
                        contents.images.append(entry.path)
                    else:
                        contents.num_ignored += entry.name.lower() not in JUNK_FILES
                elif is_directory(entry):
                    if entry.name not in JUNK_FOLDERS and _should_enter(entry, entered):
                        waiting.append(entry.path)
                elif is_special_file(entry):
                    contents.special_files.append(entry.path)
        contents.images.sort()
        return contents

    def _report_progress(self, count: int) -> None:
        self._num_seen += count
        if time.monotonic() < self._next_notice:
            return
        print_status(escape(f"{self._root}: looking for images, {self._num_seen:,} files so far"))
        self._notice_interval_s *= 2
        self._next_notice = time.monotonic() + self._notice_interval_s


def _should_enter(folder: ScanEntry, entered: set[str]) -> bool:
    """Return whether to enter a folder. The target of a link is entered once, and never if it is
    an ancestor of the link."""
    if not folder.is_symlink():
        return True
    target = os.path.realpath(folder.path)
    parent = os.path.realpath(folder.path[: -len(folder.name)])
    if target in entered or os.path.commonpath([target, parent]) == target:
        return False
    entered.add(target)
    return True


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
    if group is not None and group not in columns:
        suggestion = did_you_mean(close_matches(group, columns)[:1])
        raise UsageError(
            f"no column {group!r} for data.group",
            where=str(path),
            fix=suggestion or f"columns: {', '.join(columns)}",
        )
    group_column = columns.index(group) if group is not None else None
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
