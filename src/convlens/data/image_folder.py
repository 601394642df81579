"""A folder of class folders, with or without splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from convlens.data.class_names import (
    are_numbers_for_names,
    check_renamed,
    rename_classes,
    unknown_classes,
)
from convlens.data.file_types import describe_ignored, is_text_or_archive, needs_conversion
from convlens.data.folder_layout import ClassFolder, Layout, LayoutOptions, find_layout
from convlens.data.layout import (
    LAYOUT_HELP,
    LIST_HELP,
    SPLITS,
    ClassChoice,
    Problem,
    list_examples,
    list_override,
    printable,
    raise_problems,
    split_from_name,
)
from convlens.data.scan import (
    FolderContents,
    Scanner,
    is_directory,
    is_image,
    is_special_file,
    scan_entries,
)
from convlens.data.types import DataSource, FilePaths, Part


@dataclass
class _Scan:
    """The contents of the class folders of a split."""

    files: dict[str, list[str]] = field(default_factory=dict)  # paths of images by class
    duplicates: list[str] = field(default_factory=list)  # classes with more than one folder
    special_files: list[str] = field(default_factory=list)
    unreadable_folders: dict[str, str] = field(default_factory=dict)  # with the reason
    ignored: dict[str, Counter[str]] = field(default_factory=dict)  # other files by class and kind

    def add(self, name: str, contents: FolderContents) -> None:
        if name in self.files:
            self.duplicates.append(name)
        self.files[name] = contents.images
        self.special_files += contents.special_files
        self.unreadable_folders |= contents.unreadable_folders
        self.ignored[name] = contents.ignored

    def renamed(self, new_names: Mapping[str, str]) -> _Scan:
        """Return the contents by the new names of the classes; equal names are joined."""
        scan = _Scan(special_files=self.special_files, unreadable_folders=self.unreadable_folders)
        scan.duplicates = [new_names.get(name, name) for name in self.duplicates]
        for name, files in self.files.items():
            new_name = new_names.get(name, name)
            scan.files[new_name] = [*scan.files.get(new_name, ()), *files]
            ignored = scan.ignored.get(new_name, Counter[str]())
            scan.ignored[new_name] = ignored + self.ignored[name]
        return scan


def read_folder(
    root: Path,
    name: str,
    classes: Sequence[str] | None = None,
    *,
    options: LayoutOptions | None = None,
    choice: ClassChoice | None = None,
    rename: Mapping[str, str] | None = None,
    tested: bool = False,
) -> DataSource:
    """Read a folder of class folders, directly below `root` or below its train/val/test folders.

    Args:
        root: `root/<class>/*` or `root/{train,val,test}/<class>/*`, or one of the other layouts of
            `folder_layout`; images may be at any depth below a class folder.
        name: name of the data set.
        classes: canonical order of the classes; used if the folder has exactly these.
        options: readings that the recipe chooses; by default none.
        choice: the classes that will be used, by default all. Others are neither scanned nor
            checked: they are classes without images, which `find_source` leaves out.
        rename: new names of classes. All checks, and `choice`, are about these.
        tested: as in `sources.find_source`.

    Raises:
        DataError: lists everything that is wrong.
        UsageError: besides, `choice` names classes that do not exist.
    """
    root = Path(os.path.abspath(root))
    scan_entries(root)  # raises if it is not readable
    choice = choice or ClassChoice()
    rename = rename or {}
    layout = find_layout(
        root, options or LayoutOptions(), _choice_of_folders(choice, rename), tested=tested
    )
    all_names = sorted({folder.name for found in layout.splits.values() for folder in found})
    known_names = list(dict.fromkeys([*all_names, *layout.left_out]))
    if rename:
        check_renamed(rename, known_names)
    new_names = [rename.get(name, name) for name in known_names]
    kept = choice.keep(new_names)
    used = {name for name in known_names if rename.get(name, name) in kept}
    scanner = Scanner(root)
    scans = {
        split: _scan(scanner, [folder for folder in folders if folder.name in used])
        for split, folders in layout.splits.items()
    }
    outside, num_outside = _find_outside(root, layout)
    special_paths = outside.union(*(scan.special_files for scan in scans.values()))
    prefix = len(os.path.join(root, ""))
    special = sorted(printable(path[prefix:]) for path in special_paths)
    # With new names, a class of another split may be one of the training classes.
    judged = list(scans.values()) if tested or rename else [scans["train"]]
    names = tuple(sorted({name for scan in judged for name in scan.files}))
    if classes and set(classes) == set(names):
        names = tuple(classes)
    named_like_splits = sorted(
        {new for name in names if split_from_name(new := rename.get(name, name))}
    )
    if named_like_splits:
        layout.notes.append(f"classes named like splits: {list_examples(named_like_splits)}")
    renamed = {split: scan.renamed(rename) for split, scan in scans.items()}
    problems = _find_problems(renamed, special, choice, tested)
    if any(problem.items for problem in problems):
        choice.check(new_names, name)  # a misspelled class may be the cause
    raise_problems(problems, root)

    not_used = [name for name in known_names if name not in used]
    if not_used:
        names = tuple(sorted([*names, *not_used]))
    notes, parts = layout.notes, {}
    for split, scan in renamed.items():
        empty = sorted(name for name, paths in scan.files.items() if not paths)
        if empty and split != "train" and any(scan.files.values()):
            notes.append(f"{split}: class folders without images: {list_examples(empty)}")
    for split, scan in scans.items():
        paths = [path for name in names for path in scan.files.get(name, ())]
        if not paths:
            notes.append(f"{split}: no images in class folders, so it is not used")
            continue
        counts = [len(scan.files.get(name, ())) for name in names]
        labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        parts[split] = Part(FilePaths(paths), labels, [printable(path[prefix:]) for path in paths])
    notes += _describe_ignored_files(scans.values())
    if num_outside:
        images = "image" if num_outside == 1 else "images"
        notes.append(f"ignored {num_outside:,} {images} outside the class folders")
    if special:
        notes.append(
            f"{len(special)} broken links, pipes or devices were left out: {list_examples(special)}"
        )
    source = DataSource(name, names, parts, tuple(notes))
    return rename_classes(source, rename) if rename else source


def _choice_of_folders(choice: ClassChoice, rename: Mapping[str, str]) -> ClassChoice:
    """Return a choice of renamed classes by the names of their folders."""

    def folders_of(names: Sequence[str]) -> tuple[str, ...]:
        return (*names, *(old for old, new in rename.items() if new in names and old not in names))

    return ClassChoice(folders_of(choice.only), folders_of(choice.without), choice.min_images)


def _scan(scanner: Scanner, folders: Sequence[ClassFolder]) -> _Scan:
    scan = _Scan()
    for folder in folders:
        if folder.files is not None:
            scan.add(folder.name, FolderContents(images=list(folder.files)))
        else:
            contents = scanner.find_images(folder.path, recursive=folder.recursive)
            scan.add(folder.name, contents)
    return scan


def _find_outside(root: Path, layout: Layout) -> tuple[set[str], int]:
    """Return the special files, and count the images, that are in no class folder."""
    special, num_images = set[str](), 0
    for folder in dict.fromkeys([str(root), *layout.parents]):
        for entry in scan_entries(folder):
            if is_special_file(entry):
                special.add(entry.path)
            elif folder in layout.parents and not is_directory(entry):
                num_images += is_image(entry)
    return special, num_images


def _describe_ignored_files(scans: Iterable[_Scan]) -> list[str]:
    """Say which files were not used, and in which classes these are most of the files."""
    ignored: dict[str, Counter[str]] = {}
    num_images = Counter[str]()
    for scan in scans:
        for name, counts in scan.ignored.items():
            ignored[name] = ignored.get(name, Counter()) + counts
            num_images[name] += len(scan.files[name])
    notes = describe_ignored(sum(ignored.values(), Counter[str]()))
    mostly = []
    for name, counts in ignored.items():
        lost = sum(count for suffix, count in counts.items() if not is_text_or_archive(suffix))
        if lost > num_images[name]:
            mostly.append(f"{name} ({lost} of {lost + num_images[name]})")
    if mostly:
        notes.append(f"classes that lose most of their files: {list_examples(mostly)}")
    return notes


def _find_problems(
    scans: Mapping[str, _Scan],
    special: Sequence[str],
    choice: ClassChoice,
    tested: bool,
) -> list[Problem]:
    """Return all problems of the class folders. Problems that cause others come alone."""
    unreadable = _unreadable_folders(scans)
    if unreadable.items:
        return [unreadable]
    special_files = Problem("broken links, pipes or devices", special)
    judged = list(scans.values()) if tested else [scans["train"]]
    names = sorted({name for scan in judged for name in scan.files})
    filled = {name for scan in judged for name, paths in scan.files.items() if paths}
    if not filled:
        return [_no_images(names, scans, judged), special_files]
    duplicates = [name for scan in scans.values() for name in scan.duplicates]
    problems = [Problem("class folders whose names differ only in their Unicode form", duplicates)]
    if tested:
        return problems
    problems += [
        # Those are left out, like all classes with fewer images.
        *([] if choice.min_images else [_empty_classes(names, scans)]),
        _single_class(names, choice),
        *(_unknown_classes(split, scans[split], names) for split in SPLITS[1:] if split in scans),
    ]
    if any(problem.items for problem in problems):
        problems.append(special_files)
    return problems


def _unreadable_folders(scans: Mapping[str, _Scan]) -> Problem:
    folders = [
        f"{printable(path)} ({reason})"
        for scan in scans.values()
        for path, reason in scan.unreadable_folders.items()
    ]
    return Problem("folders that can't be read", folders, "change their permissions or remove them")


def _no_images(
    names: Sequence[str], scans: Mapping[str, _Scan], judged: Sequence[_Scan]
) -> Problem:
    """Return the problem that there are no images, with the kinds of files that there are."""
    ignored = sum((counts for scan in judged for counts in scan.ignored.values()), Counter[str]())
    found = "".join(f" ({sentence})" for sentence in describe_ignored(ignored))
    others = {split: sum(map(len, scan.files.values())) for split, scan in scans.items()}
    if any(others.values()):
        counts = ", ".join(f"{split} has {count:,}" for split, count in others.items() if count)
        found = f" of train{found} ({counts})"
    fix = "convert the files to JPEG or PNG" if any(map(needs_conversion, ignored)) else LAYOUT_HELP
    return Problem(f"no images in any class folder{found}", names, fix)


def _empty_classes(names: Sequence[str], scans: Mapping[str, _Scan]) -> Problem:
    """Return the problem that classes have no training images, with what they have instead."""
    empty = [name for name in names if not scans["train"].files.get(name)]
    items = []
    for name in empty:
        ignored = scans["train"].ignored[name]
        found = [f"{count} {suffix or 'other'}" for suffix, count in ignored.items()]
        found += [
            f"{split} has {len(scan.files[name])}"
            for split, scan in scans.items()
            if scan.files.get(name)
        ]
        items.append(f"{name} ({list_examples(found)})" if found else name)
    fix = f"add images to them, or leave them out: {list_override('data.without', empty)}"
    where = " in train" if len(scans) > 1 else ""
    return Problem(f"class folders{where} without images", items, fix)


def _single_class(names: Sequence[str], choice: ClassChoice) -> Problem:
    fix = f"{LAYOUT_HELP}, or {LIST_HELP}"
    fix = "choose more classes" if choice.only or choice.without else fix
    return Problem("only one class folder", names if len(names) == 1 else [], fix)


def _unknown_classes(split: str, scan: _Scan, names: Sequence[str]) -> Problem:
    lacking = sorted(set(scan.files) - set(names))
    problem = unknown_classes(split, lacking, names, repr)
    if are_numbers_for_names(lacking, names):
        return problem
    fix = (
        "give each class the same folder name in every split, or leave classes out: "
        f"{list_override('data.without', lacking)}"
    )
    if problem.fix:
        fix = f"{problem.fix}; or {fix}"
    return replace(problem, fix=fix)
