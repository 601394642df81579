"""A folder of class folders, with or without splits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.markup import escape

from convlens.data.layout import (
    LAYOUT_HELP,
    SPLITS,
    Problem,
    list_examples,
    normalize_name,
    printable,
    raise_problems,
    split_from_name,
)
from convlens.data.types import PERMANENT_ERRNOS, DataSource, FilePaths, Part, is_image_name
from convlens.errors import DataError, closest_match
from convlens.utils.console import print_status
from convlens.utils.files import cannot_read

JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
NOTICE_AFTER_S = 3.0  # time before the first notice of a long scan; doubled after each notice

ScanEntry = os.DirEntry[str]


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
            f"{len(special)} broken links, pipes or devices were left out: {list_examples(special)}"
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
