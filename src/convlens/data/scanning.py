"""Folders as they lie on a disk: what is in them, and which images are below."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape

from convlens.data.encoded import ITS_OWN
from convlens.data.parts import is_image_name
from convlens.errors import DataError
from convlens.system.console import print_status
from convlens.system.files import cannot_read

JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
PATIENCE = 3.0  # seconds before it is said what takes so long; then twice as many, and so on

Entry = os.DirEntry[str]


def printable(text: str) -> str:
    """`text` without the half characters that stand for undecodable bytes in file names."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(folder: str | Path) -> list[Entry]:
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def entries(folder: str | Path) -> list[Entry]:
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


def is_file(entry: Entry) -> bool:
    """Whether it is a regular file or a link to one."""
    return _is(entry, entry.is_file)


def is_folder(entry: Entry) -> bool:
    """Whether it is a folder or a link to one."""
    return _is(entry, entry.is_dir)


def _is(entry: Entry, kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError as error:
        if error.errno not in ITS_OWN:
            raise cannot_read(Path(entry.path), error) from error
        return False  # a link to itself, or to where nobody may go


def is_odd(entry: Entry) -> bool:
    """Whether it was meant as an image, or as a folder, and is none: a link to nothing, a pipe."""
    meant = is_image_name(entry.name) or entry.is_symlink()
    return meant and not is_file(entry) and not is_folder(entry)


@dataclass
class Below:
    """What lies below a folder; paths as they were found."""

    images: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)  # see `is_odd`
    closed: dict[str, str] = field(default_factory=dict)  # folders that can't be read, and why
    ignored: int = 0  # files of other kinds


class Scanner:
    """Looks for images below folders; if that takes long, it says so."""

    def __init__(self, root: str | Path) -> None:
        self._root, self._seen = printable(str(root)), 0
        self._pause, self._due = PATIENCE, time.monotonic() + PATIENCE

    def below(self, top: str) -> Below:
        """All images below `top`, sorted; not what is hidden, nor in folders of junk."""
        found = Below()
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
                if is_file(entry):
                    if is_image_name(entry.name):
                        found.images.append(entry.path)
                    else:
                        found.ignored += entry.name.lower() not in _JUNK_FILES
                elif is_folder(entry):
                    if entry.name not in JUNK_FOLDERS and _is_new(entry, entered):
                        waiting.append(entry.path)
                elif is_odd(entry):
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


def _is_new(folder: Entry, entered: set[str]) -> bool:
    """Whether to enter it: a link may lead back up; what is behind links is entered once."""
    if not folder.is_symlink():
        return True
    real = os.path.realpath(folder.path)
    here = os.path.realpath(folder.path[: -len(folder.name)])
    if real in entered or os.path.commonpath([real, here]) == real:
        return False
    entered.add(real)
    return True
