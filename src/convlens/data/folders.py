"""Own images: a folder of class folders, with or without train/val/test, or a CSV."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convlens.data.encoded import Paths
from convlens.data.parts import Part, Source, is_image_name
from convlens.errors import DataError
from convlens.names import near

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {spelling: split for split, all_ in SPELLINGS.items() for spelling in all_}
_JUNK_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN"})
_JUNK_FILES = frozenset({"thumbs.db", "desktop.ini"})
LAYOUT = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"


@dataclass
class Problems:
    """Everything wrong with a source, so that it can be said at once."""

    where: str
    found: list[str] = field(default_factory=list)

    def add(self, what: str, things: Sequence[str]) -> None:
        """Notes `what` if there are any `things`; shows the first few of them and their count."""
        if things:
            rest = f" and {len(things) - 5} more" if len(things) > 5 else ""
            self.found.append(f"{what}: {', '.join(things[:5])}{rest}")

    def stop(self, fix: str = LAYOUT) -> None:
        """Raises a `DataError` with all that was noted, if anything was."""
        if self.found:
            raise DataError("; ".join(self.found), where=self.where, fix=fix)


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` for any of the usual spellings, else None."""
    return _SPLIT_OF.get(name.strip().casefold())


def normal(name: str) -> str:
    """A class name as it is compared: composed Unicode (NFC), no blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


def printable(text: str) -> str:
    """`text` without the half characters that stand for undecodable bytes in file names."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass
class _Scan:
    """One folder's class folders: `files[class]` are paths relative to the root."""

    files: dict[str, list[str]] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    ignored: int = 0
    loose: int = 0


def read_folder(root: Path, name: str, classes: Sequence[str] | None = None) -> Source:
    """A folder of class folders, directly or below train/val/test, as a source.

    Args:
        root: `root/<class>/*` or `root/{train,val,test}/<class>/*`, any depth below a class.
        name: what to call the set.
        classes: their canonical order; used if the folder has exactly these, else sorted.

    Raises:
        DataError: everything that is wrong, at once.
    """
    root = Path(os.path.abspath(root))
    problems = Problems(str(root))
    splits, notes = _split_folders(root, problems)
    problems.stop()
    scans = {split: _scan(folder, root) for split, folder in splits.items()}
    names = _class_names(scans, classes)
    _check(scans, names, root, problems)
    number = {name: i for i, name in enumerate(names)}
    parts = {}
    for split, scan in scans.items():
        ids = [i for name in names for i in scan.files.get(name, ())]
        if not ids:
            notes.append(f"{split}: no images in class folders, so it is not used")
            continue
        counts = [len(scan.files.get(name, ())) for name in names]
        labels = np.repeat(np.arange(len(number), dtype=np.int64), counts)
        prefix = f"{root}{os.sep}"
        paths = Paths([prefix + i for i in ids])
        parts[split] = Part(paths, labels, [printable(i) for i in ids])
    ignored = sum(scan.ignored for scan in scans.values())
    loose = sum(scan.loose for scan in scans.values())
    if ignored:
        notes.append(f"{ignored} files that are no images were ignored")
    if loose:
        notes.append(f"{loose} images beside the class folders were ignored")
    return Source(name, names, parts, tuple(notes))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"can't read this folder: {error.strerror}",
            where=printable(str(folder)),
            fix="check its permissions",
        ) from error


def _folders(folder: str | Path) -> list[str]:
    found = (e.name for e in _entries(folder) if e.name not in _JUNK_FOLDERS and e.is_dir())
    return sorted(found)


def _split_folders(root: Path, problems: Problems) -> tuple[dict[str, Path], list[str]]:
    """Which folder holds which split; `{"train": root}` where the root has the classes itself."""
    folders = _folders(root)
    # A class may well be called "train" or "test": a split has folders of its own inside.
    named = [f for f in folders if split_of(f) and _folders(root / f)]
    if not named:
        if not folders:
            problems.add("no class folders in", [root.name])
        elif "train" in map(split_of, folders) and all(map(split_of, folders)):
            problems.add("splits without class folders inside", folders)
        return {"train": root}, []
    splits: dict[str, Path] = {}
    for folder in named:
        split = split_of(folder) or ""
        if split in splits:
            problems.add(f"two {split} folders", [splits[split].name, folder])
        splits[split] = root / folder
    if "train" not in splits:
        problems.add("no train folder beside", named)
    rest = [printable(f) for f in folders if f not in named]
    note = f"folders that are no split, or hold no classes, were ignored: {', '.join(rest)}"
    return splits, [note] if rest else []


def _scan(folder: Path, root: Path) -> _Scan:
    scan = _Scan()
    for entry in _entries(folder):
        if entry.is_dir() and entry.name not in _JUNK_FOLDERS:
            key = normal(printable(entry.name))
            if key in scan.files:
                scan.twice.append(key)
            files, ignored = _images(entry.path, len(str(root)) + 1)
            scan.files[key] = files
            scan.ignored += ignored
        elif is_image_name(entry.name):
            scan.loose += 1
    return scan


def _images(top: str, cut: int) -> tuple[list[str], int]:
    """Images below `top`, sorted, as paths from character `cut` on, and the number of others."""
    found: list[str] = []
    ignored, waiting, seen = 0, [top], set[str]()
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.is_file():  # follows links; pipes and devices are no files
                if is_image_name(entry.name):
                    found.append(entry.path[cut:])
                else:
                    ignored += entry.name.lower() not in _JUNK_FILES
            elif entry.name not in _JUNK_FOLDERS and entry.is_dir():
                if entry.is_symlink():
                    # A link may lead back up; each real folder behind links is entered once.
                    real = os.path.realpath(entry.path)
                    here = os.path.realpath(entry.path[: -len(entry.name)])
                    if real in seen or os.path.commonpath([real, here]) == real:
                        continue
                    seen.add(real)
                waiting.append(entry.path)
    return sorted(found), ignored


def _class_names(scans: dict[str, _Scan], canonical: Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(sorted(scans["train"].files))
    return tuple(canonical) if canonical and set(canonical) == set(names) else names


def _check(scans: dict[str, _Scan], names: Iterable[str], root: Path, problems: Problems) -> None:
    train = scans["train"]
    names = list(names)
    empty = [n for n in names if not train.files[n]]
    if len(empty) == len(names):
        problems.add("no images in any class folder", empty)
        deeper = [n for n in names if any(_folders(root / n))] if (root / names[0]).is_dir() else []
        problems.stop(f"use {root / deeper[0]}" if deeper else LAYOUT)
    problems.add("class folders without images", empty)
    problems.add("two class folders with the same name but for Unicode form", train.twice)
    if len(names) < 2:
        problems.add("only one class folder", names)
    strange_any = False
    for split in ("val", "test"):
        strange = sorted(set(scans[split].files) - set(names)) if split in scans else []
        strange_any |= bool(strange)
        problems.add(
            f"classes in {split} that train lacks", [_with_near(s, names) for s in strange]
        )
    one_level = len(names) == 1 and len(_folders(root / names[0])) > 1
    fix = f"or are the classes inside it? then use {root / names[0]}" if one_level else ""
    if strange_any:
        fix = "give each class the same folder name in every split"
    elif empty and not fix:
        fix = "add images to them or delete these folders"
    problems.stop(fix or LAYOUT)


def _with_near(name: str, names: Sequence[str]) -> str:
    same = [n for n in names if n.casefold() == name.casefold()] or near(name, names)
    return f"{name!r} (train has {same[0]!r})" if same else repr(name)
