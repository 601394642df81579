"""Own images: a folder of class folders, with or without train/val/test, or a CSV."""

from __future__ import annotations

import csv
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.markup import escape

from convlens.data.types import PERMANENT_ERRNOS, DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, UsageError, close_matches, closest_match, did_you_mean
from convlens.utils.console import print_status
from convlens.utils.files import cannot_read

SPLIT_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {spelling: split for split, all_ in SPLIT_SPELLINGS.items() for spelling in all_}
LAYOUT_HELP = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"
_MAX_ODD = "links to nothing, pipes or devices"


@dataclass
class Problems:
    """Everything wrong with a source, so that it can be said at once."""

    where: str
    found: list[str] = field(default_factory=list)

    def add(self, what: str, things: Sequence[str]) -> None:
        """Notes `what` if there are any `things`; shows the first few of them and their count."""
        if things:
            self.found.append(f"{what}: {_some(things)}")

    def stop(self, fix: str = LAYOUT_HELP) -> None:
        """Raises a `DataError` with all that was noted, if anything was."""
        if self.found:
            raise DataError("; ".join(self.found), where=self.where, fix=fix)


def _some(things: Sequence[str]) -> str:
    rest = f" and {len(things) - 5} more" if len(things) > 5 else ""
    return f"{', '.join(things[:5])}{rest}"


def split_from_name(name: str) -> str | None:
    """`train`, `val` or `test` for any of the usual spellings, else None."""
    return _SPLIT_OF.get(name.strip().casefold())


def normalize_name(name: str) -> str:
    """A class name as it is compared: composed Unicode (NFC), no blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


@dataclass
class _Scan:
    """One folder's class folders: `files[class]` are paths of images."""

    files: dict[str, list[str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    loose: int = 0


def read_folder(
    root: Path, name: str, classes: Sequence[str] | None = None, *, tested: bool = False
) -> DataSource:
    """A folder of class folders, directly or below train/val/test, as a source.

    Args:
        root: `root/<class>/*` or `root/{train,val,test}/<class>/*`, any depth below a class.
        name: what to call the set.
        classes: their canonical order; used if the folder has exactly these, else sorted.
        tested: as for `sources.find`.

    Raises:
        DataError: everything that is wrong, at once.
    """
    root = Path(os.path.abspath(root))
    problems = Problems(str(root))
    splits, notes = _split_folders(root, problems, tested)
    problems.stop()
    scanner = Scanner(root)
    scans = {split: _scan(folder, scanner) for split, folder in splits.items()}
    found, cut = list(scans.values()), len(os.path.join(root, ""))
    lost = {e.path for e in scan_entries(root) if is_special_file(e)}.union(
        *(scan.odd for scan in found)
    )
    odd = sorted(printable(path[cut:]) for path in lost)
    names = _class_names(found if tested else [scans["train"]], classes)
    _check(scans, names, root, odd, problems, tested)
    parts = {}
    for split, scan in scans.items():
        paths = [path for name in names for path in scan.files.get(name, ())]
        if not paths:
            notes.append(f"{split}: no images in class folders, so it is not used")
            continue
        counts = [len(scan.files.get(name, ())) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        parts[split] = Part(FilePaths(paths), labels, [printable(path[cut:]) for path in paths])
    ignored, loose = sum(scan.ignored for scan in found), sum(scan.loose for scan in found)
    if ignored:
        notes.append(f"{ignored} files that are no images were ignored")
    if loose:
        notes.append(f"{loose} images beside the class folders were ignored")
    if odd:
        notes.append(f"{len(odd)} {_MAX_ODD} were left out: {_some(odd)}")
    return DataSource(name, names, parts, tuple(notes))


def _folders(folder: str | Path) -> list[str]:
    return sorted(
        e.name for e in scan_entries(folder) if e.name not in JUNK_FOLDERS and is_directory(e)
    )


def _split_folders(
    root: Path, problems: Problems, tested: bool
) -> tuple[dict[str, Path], list[str]]:
    """Which folder holds which split; `{"train": root}` where the root has the classes itself."""
    folders = _folders(root)
    # A class may well be called "train" or "test": a split has folders of its own inside.
    named = [f for f in folders if split_from_name(f) and _folders(root / f)]
    if not named:
        if not folders:
            problems.add("no class folders in", [root.name])
        elif "train" in map(split_from_name, folders) and all(map(split_from_name, folders)):
            problems.add("splits without class folders inside", folders)
        return {"train": root}, []
    splits: dict[str, Path] = {}
    for folder in named:
        split = split_from_name(folder) or ""
        if split in splits:
            problems.add(f"two {split} folders", [splits[split].name, folder])
        splits[split] = root / folder
    if "train" not in splits and not tested:
        problems.add("no train folder beside", named)
    rest = [printable(f) for f in folders if f not in named]
    note = f"folders that are no split, or hold no classes, were ignored: {', '.join(rest)}"
    return splits, [note] if rest else []


def _scan(folder: Path, scanner: Scanner) -> _Scan:
    scan = _Scan()
    for entry in scan_entries(folder):
        if is_directory(entry) and entry.name not in JUNK_FOLDERS:
            key = normalize_name(printable(entry.name))
            if key in scan.files:
                scan.twice.append(key)
            below = scanner.below(entry.path)
            scan.files[key] = below.images
            scan.odd += below.odd
            scan.closed |= below.closed
            scan.ignored += below.ignored
        elif is_special_file(entry):
            scan.odd.append(entry.path)
        elif is_regular_file(entry) and is_image_name(entry.name):
            scan.loose += 1
    return scan


def _class_names(scans: Iterable[_Scan], canonical: Sequence[str] | None) -> tuple[str, ...]:
    names = sorted({name for scan in scans for name in scan.files})
    return tuple(canonical) if canonical and set(canonical) == set(names) else tuple(names)


def _check(
    scans: Mapping[str, _Scan],
    names: Sequence[str],
    root: Path,
    odd: Sequence[str],
    problems: Problems,
    tested: bool,
) -> None:
    every = list(scans.values())
    closed = [f"{printable(p)} ({why})" for scan in every for p, why in scan.closed.items()]
    problems.add("folders that can't be read", closed)
    problems.stop("change their permissions, or take them away")
    filled = {
        n
        for scan in (every if tested else [scans["train"]])
        for n, files in scan.files.items()
        if files
    }
    empty = [n for n in names if n not in filled]
    if not filled:
        problems.add("no images in any class folder", empty)
        problems.add(_MAX_ODD, odd)
        deeper = [n for n in names if any(_folders(root / n))] if (root / names[0]).is_dir() else []
        problems.stop(f"use {root / deeper[0]}" if deeper else LAYOUT_HELP)
    twice = [name for scan in every for name in scan.twice]
    problems.add("two class folders with the same name but for Unicode form", twice)
    if tested:
        problems.stop()
        return
    problems.add("class folders without images", empty)
    if len(names) < 2:
        problems.add("only one class folder", names)
    strange_any = False
    for split in ("val", "test"):
        strange = sorted(set(scans[split].files) - set(names)) if split in scans else []
        strange_any |= bool(strange)
        problems.add(
            f"classes in {split} that train lacks", [_with_near(s, names) for s in strange]
        )
    if problems.found:
        problems.add(_MAX_ODD, odd)
    one_level = len(names) == 1 and len(_folders(root / names[0])) > 1
    fix = f"or are the classes inside it? then use {root / names[0]}" if one_level else ""
    if strange_any:
        fix = "give each class the same folder name in every split"
    elif empty and not fix:
        fix = "add images to them or delete these folders"
    problems.stop(fix or LAYOUT_HELP)


def _with_near(name: str, names: Sequence[str]) -> str:
    near = closest_match(name, names)
    return f"{name!r} (train has {near!r})" if near else repr(name)


# ---- scanning ----------------------------------------
# Folders as they lie on a disk: what is in them, and which images are below.

JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
NOTICE_AFTER_S = 3.0  # seconds before it is said what takes so long; then twice as many, and so on

ScanEntry = os.DirEntry[str]


def printable(text: str) -> str:
    """`text` without the half characters that stand for undecodable bytes in file names."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(folder: str | Path) -> list[ScanEntry]:
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def scan_entries(folder: str | Path) -> list[ScanEntry]:
    """What is in a folder and isn't hidden, in no order.

    Raises:
        DataError: it can't be read.
    """
    try:
        return _listed(folder)
    except OSError as error:
        raise DataError(
            f"can't read this folder: {error.strerror}",
            where=printable(str(folder)),
            fix="check its permissions",
        ) from error


def is_regular_file(entry: ScanEntry) -> bool:
    """Whether it is a regular file or a link to one."""
    return _is(entry, entry.is_file)


def is_directory(entry: ScanEntry) -> bool:
    """Whether it is a folder or a link to one."""
    return _is(entry, entry.is_dir)


def _is(entry: ScanEntry, kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError as error:
        if error.errno not in PERMANENT_ERRNOS:
            raise cannot_read(Path(entry.path), error) from error
        return False  # a link to itself, or to where nobody may go


def is_special_file(entry: ScanEntry) -> bool:
    """Whether it was meant as an image, or as a folder, and is none: a link to nothing, a pipe."""
    meant = is_image_name(entry.name) or entry.is_symlink()
    return meant and not is_regular_file(entry) and not is_directory(entry)


@dataclass
class FolderContents:
    """What lies below a folder; paths as they were found."""

    images: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)  # see `is_odd`
    closed: dict[str, str] = field(default_factory=dict)  # folders that can't be read, and why
    ignored: int = 0  # files of other kinds


class Scanner:
    """Looks for images below folders; if that takes long, it says so."""

    def __init__(self, root: str | Path) -> None:
        self._root, self._seen = printable(str(root)), 0
        self._pause, self._due = NOTICE_AFTER_S, time.monotonic() + NOTICE_AFTER_S

    def below(self, top: str) -> FolderContents:
        """All images below `top`, sorted; not what is hidden, nor in folders of junk."""
        found = FolderContents()
        waiting, entered = [top], set[str]()
        while waiting:
            folder = waiting.pop()
            try:
                inside = _listed(folder)
            except OSError as error:
                found.closed[folder] = error.strerror or str(error)
                continue
            self._tell(len(inside))
            for entry in inside:
                if is_regular_file(entry):
                    if is_image_name(entry.name):
                        found.images.append(entry.path)
                    else:
                        found.ignored += entry.name.lower() not in _JUNK_FILES
                elif is_directory(entry):
                    if entry.name not in JUNK_FOLDERS and _is_new(entry, entered):
                        waiting.append(entry.path)
                elif is_special_file(entry):
                    found.odd.append(entry.path)
        found.images.sort()
        return found

    def _tell(self, more: int) -> None:
        self._seen += more
        if time.monotonic() < self._due:
            return
        print_status(escape(f"{self._root}: looking for images, {self._seen:,} files so far"))
        self._pause *= 2
        self._due = time.monotonic() + self._pause


def _is_new(folder: ScanEntry, entered: set[str]) -> bool:
    """Whether to enter it: a link may lead back up; what is behind links is entered once."""
    if not folder.is_symlink():
        return True
    real = os.path.realpath(folder.path)
    here = os.path.realpath(folder.path[: -len(folder.name)])
    if real in entered or os.path.commonpath([real, here]) == real:
        return False
    entered.add(real)
    return True


# ---- tables ----------------------------------------
# Own images listed in a CSV: path, label, and if wanted split and a group column.

_PATH = ("path", "file", "filename", "filepath", "image")
_LABEL = ("label", "class", "category", "target")
_FORMULA = ("=", "+", "-", "@")
_COLUMNS = "the first line names the columns: path,label[,split][,a group column]"


def read_csv(
    path: Path, name: str, group: str | None = None, *, tested: bool = False
) -> DataSource:
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
    rows, columns = _csv_rows(path)
    at_path, at_label, at_split = _columns(columns, path)
    if group is not None and group not in columns:
        fix = did_you_mean(close_matches(group, columns)[:1]) or f"columns: {', '.join(columns)}"
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
    strange = sorted(
        {
            r[at_split]
            for (_, r), s in zip(rows, splits, strict=True)
            if s is None and at_split is not None
        }
    )
    problems.add("splits that are not train, val or test", strange)
    files = [os.path.normpath(os.path.join(base, r[at_path].strip())) for _, r in rows]
    lost = [r[at_path] for (_, r), f in zip(rows, files, strict=True) if not os.path.isfile(f)]
    problems.add("files that do not exist", lost)
    wrong = [r[at_path] for _, r in rows if not is_image_name(os.path.basename(r[at_path].strip()))]
    problems.add("files that are no images by their extension", [w for w in wrong if w not in lost])
    labels = [normalize_name(unescape_csv_formula(r[at_label].strip())) for _, r in rows]
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
                FilePaths([files[i] for i in mine]),
                np.array([number[labels[i]] for i in mine], np.int64),
                [printable(rows[i][1][at_path].strip()) for i in mine],
                [groups[i] for i in mine] if groups is not None else None,
            )
    return DataSource(name, names, parts)


def escape_csv_formula(cell: str) -> str:
    """`cell` for a CSV that people open in a spreadsheet: no formula, whatever it begins with.

    An apostrophe goes before `=`, `+`, `-` and `@` (owasp.org/www-community/attacks/CSV_Injection),
    and before a cell that begins with such a one already, so that `unguarded` can take it away.
    """
    return f"'{cell}" if cell.lstrip("'").startswith(_FORMULA) else cell


def unescape_csv_formula(cell: str) -> str:
    """What `guarded` was given."""
    begins = cell.startswith("'") and cell.lstrip("'").startswith(_FORMULA)
    return cell[1:] if begins else cell


def _csv_rows(path: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
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
    return split_from_name(row[at_split])


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
