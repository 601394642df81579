"""Folders whose images are listed in files: `metadata.csv`, `train.csv` and `test.csv`, ...

Class folders have priority. A list beside them must agree with them, and a folder of a split
without class folders (`val/images/*` with `val/val_annotations.txt`) is read by its list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convlens.data.class_names import rename_classes
from convlens.data.image_folder import read_folder
from convlens.data.image_list import LIST_SUFFIXES, ListContent, make_source, read_rows
from convlens.data.layout import (
    SPLITS,
    Problem,
    list_examples,
    match_split_names,
    raise_problems,
    split_from_name,
)
from convlens.data.list_columns import DEFAULT_OPTIONS, ListOptions, is_path_pattern
from convlens.data.scan import JUNK_FOLDERS, is_directory, is_regular_file, scan_entries
from convlens.data.types import DataSource, FilePaths, Part, is_image_name
from convlens.errors import ConvlensError, DataError, UsageError

# Text files that are not lists of labeled images although they may look like one.
_OTHER_FILES = re.compile(r"readme|licen[sc]e|requirements|submission|^(classes|labels)\.txt$")
MAX_LISTS = 20  # in a folder
MAX_WRAPPERS = 4  # folders with a single folder inside that are entered one after the other


def find_lists(folder: Path) -> list[Path]:
    """Return the files that may be lists of images, in `folder` and in its folders of splits.

    If there is nothing but one folder in `folder`, as archives are often unpacked, it is searched
    instead.
    """
    folder = _unwrap(folder)
    split_folders = [path for path in _subfolders(folder) if split_from_name(path.name)]
    return [path for parent in (folder, *split_folders) for path in _candidates(parent)]


def _candidates(folder: Path) -> list[Path]:
    """Return the files in `folder` that may be lists, but not those that belong to single images.

    Those have the name of their image (`1.jpg`, `1.txt`), or there are many of them.
    """
    entries = sorted(scan_entries(folder), key=lambda entry: entry.name)
    images = {os.path.splitext(entry.name)[0] for entry in entries if is_image_name(entry.name)}
    candidates = [
        Path(entry.path)
        for entry in entries
        if entry.name.lower().endswith(LIST_SUFFIXES)
        and not _OTHER_FILES.search(entry.name.lower())
        and os.path.splitext(entry.name)[0] not in images
        and is_regular_file(entry)
    ]
    return candidates if len(candidates) <= MAX_LISTS else []


def read_listed_folder(
    root: Path,
    name: str,
    options: ListOptions = DEFAULT_OPTIONS,
    *,
    read_class_folders: Callable[..., DataSource] = read_folder,
    tested: bool = False,
) -> DataSource:
    """Read a folder in which there are files that may be lists (`find_lists`).

    Args:
        root: contains class folders, or one list, or lists named after splits, or folders named
            after splits with a list in each.
        name, options, tested: as for `read_list`.
        read_class_folders: reads class folders, with the arguments of `read_folder`.

    Raises:
        DataError: it is not clear what to read, or a list is wrong.
    """
    root = _unwrap(root)
    lists, errors = _read_lists(root, options)
    # Keys about a list are given, so there has to be one.
    column_of_group = None if options.group and is_path_pattern(options.group) else options.group
    has_options = replace(options, rename=None, group=column_of_group) != DEFAULT_OPTIONS
    if _has_class_folders(root) and not has_options:
        split_lists = _lists_of_split_folders(root, lists)
        if split_lists:
            source = _read_folders_and_lists(root, name, split_lists, read_class_folders, tested)
        else:
            notes = _compare_with_folders(root, name, lists)
            source = read_class_folders(root, name, tested=tested)
            source = replace(source, notes=(*source.notes, *notes))
        return rename_classes(source, options.rename) if options.rename else source
    if not lists and has_options:
        raise next(iter(errors.values()))
    if not lists:
        try:
            source = read_class_folders(root, name, tested=tested)
        except DataError as error:
            raise _explain_unusable(error, root, errors) from error
        source = replace(source, notes=(*source.notes, *_describe_unused(errors, root)))
        return rename_classes(source, options.rename) if options.rename else source
    content, ids = _join_lists(root, name, lists)
    content.notes += _describe_unused(errors, root)
    return make_source(content, root, name, ids, tested=tested, rename=options.rename)


def _unwrap(folder: Path) -> Path:
    """Return the folder inside, if there is nothing else in `folder`."""
    for _ in range(MAX_WRAPPERS):
        entries = [e for e in scan_entries(folder) if e.name not in JUNK_FOLDERS]
        if len(entries) != 1 or not is_directory(entries[0]) or split_from_name(entries[0].name):
            break
        folder = Path(entries[0].path)
    return folder


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        Path(entry.path)
        for entry in scan_entries(folder)
        if is_directory(entry) and entry.name not in JUNK_FOLDERS
    )


def _has_class_folders(root: Path) -> bool:
    """Return whether several folders hold images or folders, in `root` or in that of a split."""
    split_folders = [path for path in _subfolders(root) if split_from_name(path.name)]
    return any(len(_filled_folders(folder)) > 1 for folder in split_folders or [root])


def _filled_folders(folder: Path) -> list[Path]:
    """Return the folders in `folder` that hold images or folders."""
    return [
        path
        for path in _subfolders(folder)
        if any(is_image_name(entry.name) or is_directory(entry) for entry in scan_entries(path))
    ]


def _read_lists(
    root: Path, options: ListOptions
) -> tuple[dict[Path, ListContent], dict[Path, ConvlensError]]:
    """Return the lists that can be read, and the errors of files that only look like lists."""
    lists, errors = dict[Path, ListContent](), dict[Path, ConvlensError]()
    for path in find_lists(root):
        try:
            content = read_rows(path, options)
        except (DataError, UsageError) as error:
            errors[path] = error
            continue
        if any(row.file is not None for row in content.rows):
            lists[path] = content
        else:
            missing = list_examples([row.path for row in content.rows])
            errors[path] = DataError(f"none of its files exists: {missing}", fix=content.fix)
    return lists, errors


def _describe_unused(errors: Mapping[Path, ConvlensError], root: Path) -> list[str]:
    return [f"{_relative(path, root)} is not used: {error.what}" for path, error in errors.items()]


def _explain_unusable(
    error: DataError, root: Path, errors: Mapping[Path, ConvlensError]
) -> DataError:
    """Return the error of a folder without class folders that names the file that may be a list."""
    path, list_error = next(iter(errors.items()))
    return DataError(
        f"{error.what}; {_relative(path, root)} can't be read as a list of images: "
        f"{list_error.what}",
        where=error.where,
        fix=f"for {_relative(path, root)}: {list_error.fix}" if list_error.fix else error.fix,
    )


def _join_lists(
    root: Path, name: str, lists: Mapping[Path, ListContent]
) -> tuple[ListContent, list[str]]:
    """Return the rows of all lists, and the path of each image below `root`.

    Raises:
        DataError: there are several lists, but not one for each split.
    """
    names = {path: _relative(path, root) for path in lists}
    split_of = _splits_of_lists(lists, root)
    if len(lists) > 1 and (None in split_of.values() or len(set(split_of.values())) < len(lists)):
        raise DataError(
            f"several lists of images in this folder: {list_examples(list(names.values()))}",
            where=str(root),
            fix=f"name one of them: {os.path.join(name, next(iter(names.values())))}",
        )
    joined = ListContent(notes=[f"read from {list_examples(list(names.values()))}"])
    for path, content in lists.items():
        in_list = f" of {names[path]}" if len(lists) > 1 else ""
        for row in content.rows:
            # A column for the split has priority over the name of the list.
            split = (split_of[path] if not row.split_cell else None) or row.split
            joined.rows.append(replace(row, line=row.line + in_list, split=split))
        joined.short_lines += [line + in_list for line in content.short_lines]
        prefix = f"{names[path]}: " if len(lists) > 1 else ""
        joined.notes += [prefix + note for note in content.notes]
        joined.hints += content.hints
        joined.fix = joined.fix or content.fix
    return joined, [_relative(Path(row.file or row.path), root) for row in joined.rows]


def _splits_of_lists(paths: Iterable[Path], root: Path) -> dict[Path, str | None]:
    """Return the split that the name of each list, or of its folder, stands for."""
    by_name = match_split_names([path.stem for path in paths])
    return {
        path: by_name.get(path.stem)
        or (split_from_name(path.parent.name) if path.parent != root else None)
        for path in paths
    }


def _lists_of_split_folders(
    root: Path, lists: Mapping[Path, ListContent]
) -> dict[str, tuple[Path, ListContent]]:
    """Return the lists of those folders of splits that have no class folders.

    A list is in the folder (`val/val_annotations.txt`) or beside it, with its name (`val.txt`).
    """
    found: dict[str, tuple[Path, ListContent]] = {}
    for folder in _subfolders(root):
        split = split_from_name(folder.name)
        if split is None or len(_filled_folders(folder)) > 1:
            continue
        for path, content in lists.items():
            if path.parent == folder or split_from_name(path.stem) == split:
                found.setdefault(split, (path, content))
    return found


def _read_folders_and_lists(
    root: Path,
    name: str,
    lists: Mapping[str, tuple[Path, ListContent]],
    read_class_folders: Callable[..., DataSource],
    tested: bool,
) -> DataSource:
    """Read splits with class folders, and the other splits by their lists."""
    folders = {split_from_name(f.name): f for f in _subfolders(root) if len(_filled_folders(f)) > 1}
    if "train" not in folders and not tested:
        raise DataError("no train folder with class folders", where=str(root))
    sources = {
        # Classes of the lists are chosen afterwards, so those of the folders are, too.
        split: read_class_folders(folders[split], name, choice=None, tested=split != "train")
        for split in SPLITS
        if split in folders
    }
    labels = {row.label for _, content in lists.values() for row in content.rows}
    source = sources.get("train")
    classes = sorted({*labels, *(c for s in sources.values() for c in s.classes)})
    classes = list(source.classes) if source is not None and not tested else classes
    parts, notes, problems = dict[str, Part](), list[str](), list[Problem]()
    for split in SPLITS:
        if split in sources:
            part = sources[split].parts["train"]
            ids = [f"{folders[split].name}/{image_id}" for image_id in part.ids]
            class_names = [sources[split].classes[label] for label in part.labels]
            images, notes = part.images, [*notes, *sources[split].notes]
        elif split in lists:
            path, content = lists[split]
            rows = content.rows
            ids = [_relative(Path(row.file or row.path), root) for row in rows]
            class_names = [row.label for row in rows]
            images = FilePaths([row.file or "" for row in rows])
            notes += [f"{split} is read from {_relative(path, root)}", *content.notes]
            missing = [row.path for row in rows if row.file is None]
            problems.append(Problem("files that do not exist", missing))
        else:
            continue
        unknown = sorted(set(class_names) - set(classes))
        problems.append(Problem(f"classes in {split} that train lacks", unknown))
        numbers = {class_name: number for number, class_name in enumerate(classes)}
        labels_of_part = np.array([numbers.get(c, -1) for c in class_names], np.int64)
        parts[split] = Part(images, labels_of_part, ids)
    raise_problems(problems, root, "correct the list, or move it out of the folder")
    return DataSource(name, tuple(classes), parts, tuple(notes))


def _compare_with_folders(root: Path, name: str, lists: Mapping[Path, ListContent]) -> list[str]:
    """Check that lists beside class folders give the same classes, and return notes about them.

    Raises:
        DataError: a list gives the images other classes.
    """
    notes = []
    for path, content in lists.items():
        pairs = [(row.label, _class_folder(row.file, root)) for row in content.rows if row.file]
        labels, folders = (sorted(set(column)) for column in zip(*pairs, strict=True))
        listed = _relative(path, root)
        to_use = f"to use it, name it: {os.path.join(name, listed)}"
        if len(labels) == len(folders) == len(set(pairs)):
            notes.append(f"{listed} is not read, since the folders give the same classes; {to_use}")
        elif set(labels) <= set(folders):  # predictions, for example
            count = sum(label != folder for label, folder in pairs)
            notes.append(
                f"{listed} is not read: its classes are those of the folders, but for {count:,} of "
                f"{len(pairs):,} images another one; {to_use}"
            )
        else:
            raise DataError(
                f"two readings: {listed} has the classes {list_examples(labels)}; its images are "
                f"in the folders {list_examples(folders)}",
                where=str(root),
                fix=f"for the list, name it: {os.path.join(name, listed)}; for the folders as "
                "classes, data.layout=classes",
            )
    return notes


def _class_folder(file: str, root: Path) -> str:
    """Return the folder below `root`, or below that of a split, that a file is in."""
    parts: Sequence[str] = _relative(Path(file), root).split("/")
    return parts[1] if len(parts) > 2 and split_from_name(parts[0]) else parts[0]


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")
