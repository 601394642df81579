"""Own images: a folder of class folders, with or without train/val/test, or a CSV."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convlens.data.encoded import Paths
from convlens.data.parts import Part, Source, is_image_name
from convlens.data.scanning import (
    JUNK_FOLDERS,
    Scanner,
    entries,
    is_file,
    is_folder,
    is_odd,
    printable,
)
from convlens.errors import DataError
from convlens.names import alike

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {spelling: split for split, all_ in SPELLINGS.items() for spelling in all_}
LAYOUT = "make one folder per class, each with its images: FOLDER/<class>/*.jpg"
_ODD = "links to nothing, pipes or devices"


@dataclass
class Problems:
    """Everything wrong with a source, so that it can be said at once."""

    where: str
    found: list[str] = field(default_factory=list)

    def add(self, what: str, things: Sequence[str]) -> None:
        """Notes `what` if there are any `things`; shows the first few of them and their count."""
        if things:
            self.found.append(f"{what}: {_some(things)}")

    def stop(self, fix: str = LAYOUT) -> None:
        """Raises a `DataError` with all that was noted, if anything was."""
        if self.found:
            raise DataError("; ".join(self.found), where=self.where, fix=fix)


def _some(things: Sequence[str]) -> str:
    rest = f" and {len(things) - 5} more" if len(things) > 5 else ""
    return f"{', '.join(things[:5])}{rest}"


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` for any of the usual spellings, else None."""
    return _SPLIT_OF.get(name.strip().casefold())


def normal(name: str) -> str:
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
) -> Source:
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
    lost = {e.path for e in entries(root) if is_odd(e)}.union(*(scan.odd for scan in found))
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
        parts[split] = Part(Paths(paths), labels, [printable(path[cut:]) for path in paths])
    ignored, loose = sum(scan.ignored for scan in found), sum(scan.loose for scan in found)
    if ignored:
        notes.append(f"{ignored} files that are no images were ignored")
    if loose:
        notes.append(f"{loose} images beside the class folders were ignored")
    if odd:
        notes.append(f"{len(odd)} {_ODD} were left out: {_some(odd)}")
    return Source(name, names, parts, tuple(notes))


def _folders(folder: str | Path) -> list[str]:
    return sorted(e.name for e in entries(folder) if e.name not in JUNK_FOLDERS and is_folder(e))


def _split_folders(
    root: Path, problems: Problems, tested: bool
) -> tuple[dict[str, Path], list[str]]:
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
    if "train" not in splits and not tested:
        problems.add("no train folder beside", named)
    rest = [printable(f) for f in folders if f not in named]
    note = f"folders that are no split, or hold no classes, were ignored: {', '.join(rest)}"
    return splits, [note] if rest else []


def _scan(folder: Path, scanner: Scanner) -> _Scan:
    scan = _Scan()
    for entry in entries(folder):
        if is_folder(entry) and entry.name not in JUNK_FOLDERS:
            key = normal(printable(entry.name))
            if key in scan.files:
                scan.twice.append(key)
            below = scanner.below(entry.path)
            scan.files[key] = below.images
            scan.odd += below.odd
            scan.closed |= below.closed
            scan.ignored += below.ignored
        elif is_odd(entry):
            scan.odd.append(entry.path)
        elif is_file(entry) and is_image_name(entry.name):
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
    filled = {n for scan in (every if tested else [scans["train"]])
              for n, files in scan.files.items() if files}  # fmt: skip
    empty = [n for n in names if n not in filled]
    if not filled:
        problems.add("no images in any class folder", empty)
        problems.add(_ODD, odd)
        deeper = [n for n in names if any(_folders(root / n))] if (root / names[0]).is_dir() else []
        problems.stop(f"use {root / deeper[0]}" if deeper else LAYOUT)
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
        problems.add(_ODD, odd)
    one_level = len(names) == 1 and len(_folders(root / names[0])) > 1
    fix = f"or are the classes inside it? then use {root / names[0]}" if one_level else ""
    if strange_any:
        fix = "give each class the same folder name in every split"
    elif empty and not fix:
        fix = "add images to them or delete these folders"
    problems.stop(fix or LAYOUT)


def _with_near(name: str, names: Sequence[str]) -> str:
    near = alike(name, names)
    return f"{name!r} (train has {near!r})" if near else repr(name)
