"""Files and folders on the disk: what counts as an image, as junk, or can't be used."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.markup import escape

from convlens.data.file_types import extension, holds_image
from convlens.data.layout import printable
from convlens.data.types import PERMANENT_ERRNOS, is_image_name
from convlens.errors import DataError
from convlens.utils.console import print_status
from convlens.utils.files import cannot_read

JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
# Hidden folders of other programs; the names of their variants begin in the same way.
HIDDEN_JUNK = re.compile(
    r"\.(ipynb_checkpoints|git|svn|hg|dvc|cache|thumb|@__thumb|trash|apple|idea|vscode|venv|picasa"
    r"|spotlight|fseventsd|temporaryitems|documentrevisions|snapshot|zfs|comments)"
)
NOTICE_AFTER_S = 3.0  # time before the first notice of a long scan; doubled after each notice
MAX_DEPTH = 8  # of the folders that are searched for any image
MAX_WRAPPERS = 8  # folders in each other that are entered, each the only one inside

ScanEntry = os.DirEntry[str]


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


def is_image(entry: ScanEntry) -> bool:
    """Return whether an entry is a file with an image, by its extension or else its contents."""
    if entry.name.startswith(".") or not is_regular_file(entry):
        return False
    if is_image_name(entry.name):
        return True
    if entry.name.lower() in JUNK_FILES:
        return False
    try:
        return holds_image(entry.path)
    except OSError as error:
        if error.errno not in PERMANENT_ERRNOS:
            raise cannot_read(Path(entry.path), error) from error
        return False


@dataclass
class FolderContents:
    """Contents of a folder and the folders below; paths start with the path of the folder."""

    images: list[str] = field(default_factory=list)
    special_files: list[str] = field(default_factory=list)  # see `is_special_file`
    unreadable_folders: dict[str, str] = field(default_factory=dict)  # with the reason
    ignored: Counter[str] = field(default_factory=Counter)  # other files, by extension


class Folder:
    """A folder as the interpretation of a data set needs it; it is read when it is asked.

    A folder that can't be read counts as empty: `Scanner` reports it.
    """

    def __init__(self, path: str) -> None:
        self.path, self.name = path, os.path.basename(path)

    def __repr__(self) -> str:
        return f"Folder({self.path!r})"

    @cached_property
    def subfolders(self) -> list[Folder]:
        """The folders inside, sorted by name, without hidden ones and `JUNK_FOLDERS`."""
        return [folder for folder in self._all_folders if not folder.name.startswith(".")]

    @cached_property
    def hidden_subfolders(self) -> list[Folder]:
        """The hidden folders inside that are not known to belong to another program."""
        return [
            folder
            for folder in self._all_folders
            if folder.name.startswith(".") and not HIDDEN_JUNK.match(folder.name.casefold())
        ]

    @cached_property
    def _all_folders(self) -> list[Folder]:
        folders = [Folder(e.path) for e in self._entries() if is_directory(e)]
        junk_free = [folder for folder in folders if folder.name not in JUNK_FOLDERS]
        return sorted(junk_free, key=lambda folder: folder.name)

    @cached_property
    def has_images(self) -> bool:
        """Whether images are directly inside."""
        return any(map(is_image, self._entries()))

    @cached_property
    def holds_images(self) -> bool:
        """Whether images are inside, or in folders below (down to `MAX_DEPTH`)."""
        level = [self]
        for _ in range(MAX_DEPTH):
            if any(folder.has_images for folder in level):
                return True
            level = [inner for folder in level for inner in folder.subfolders]
        return False

    def files(self) -> list[ScanEntry]:
        """Return the regular files directly inside that are not hidden, sorted by name."""
        files = filter(is_regular_file, self._entries())
        return sorted(
            (file for file in files if not file.name.startswith(".")), key=lambda file: file.name
        )

    def _entries(self) -> Iterator[ScanEntry]:
        # The entries are not kept: a class folder may have a hundred thousand.
        try:
            with os.scandir(self.path) as entries:
                yield from entries
        except OSError:
            return


def enter_wrappers(folder: Folder, find_inner: Callable[[Folder], Folder | None]) -> Folder:
    """Return the folder to read where folders lie in each other, as archives are often unpacked.

    Args:
        folder: the outer folder.
        find_inner: returns the folder inside that is to be entered; None to stay.
    """
    for _ in range(MAX_WRAPPERS):
        inner = find_inner(folder)
        if inner is None:
            break
        folder = inner
    return folder


class Scanner:
    """Finds images below folders, with a notice if that takes long."""

    def __init__(self, root: str | Path) -> None:
        self._root, self._num_seen = printable(str(root)), 0
        self._notice_interval_s = NOTICE_AFTER_S
        self._next_notice = time.monotonic() + NOTICE_AFTER_S

    def find_images(self, top: str, *, recursive: bool = True) -> FolderContents:
        """Return all images in `top`, sorted; hidden files and junk folders are skipped.

        Args:
            top: a folder.
            recursive: look into the folders inside, too.
        """
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
                    if is_image(entry):
                        contents.images.append(entry.path)
                    elif entry.name.lower() not in JUNK_FILES:
                        contents.ignored[extension(entry.name)] += 1
                elif is_directory(entry):
                    is_junk = entry.name in JUNK_FOLDERS or not recursive
                    if not is_junk and _should_enter(entry, entered):
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
