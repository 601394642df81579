"""Folders whose images are listed in files: `metadata.csv`, `train.csv` and `test.csv`, ...

Class folders have priority. A list beside them must agree with them, and a folder of a split
without class folders (`val/images/*` with `val/val_annotations.txt`) is read by its list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from convlens.data.class_names import check_renamed, unknown_classes
from convlens.data.image_folder import read_folder
from convlens.data.image_list import (
    LIST_SUFFIXES,
    ListContent,
    find_missing_labels,
    make_source,
    read_rows,
    unlabeled_lines,
)
from convlens.data.layout import (
    OTHER_TEXT_FILES,
    SPLITS,
    Problem,
    is_annotation_name,
    is_neutral_name,
    list_examples,
    match_split_names,
    raise_problems,
    split_from_name,
)
from convlens.data.list_columns import DEFAULT_OPTIONS, ListOptions, is_path_pattern
from convlens.data.scan import (
    JUNK_FOLDERS,
    Folder,
    enter_wrappers,
    is_directory,
    is_regular_file,
    scan_entries,
)
from convlens.data.types import DataSource, FilePaths, Part, is_image_name
from convlens.errors import ConvlensError, DataError, UsageError

# Folders of lists besides those of annotations, such as `annotations` and `labels`.
_LIST_FOLDERS = re.compile(r"splits?|info|image_?sets?|meta")
MAX_LISTS = 20  # in a folder


def find_lists(folder: Path) -> list[Path]:
    """Return the files that may be lists of images in `folder`.

    Folders of splits and of annotations inside are searched, too, or else those without images. If
    there is nothing but one folder in `folder`, as archives are often unpacked, it is searched
    instead.
    """
    folder = _unwrap(folder)
    subfolders = _subfolders(folder)
    image_folders = [path for path in subfolders if is_neutral_name(path.name)]
    found = _candidates(folder)
    for path in subfolders:
        if split_from_name(path.name):
            found += _candidates(path)
        elif is_annotation_name(path.name) or _LIST_FOLDERS.fullmatch(path.name.lower()):
            found += _candidates(path, image_folders)
    if not found and len(subfolders) <= MAX_LISTS:  # a folder with another name
        without_images = [
            path
            for path in subfolders
            if os.access(path, os.R_OK | os.X_OK) and not Folder(str(path)).holds_images
        ]
        found = [file for path in without_images for file in _candidates(path, image_folders)]
    return found


def _candidates(folder: Path, image_folders: Iterable[Path] = ()) -> list[Path]:
    """Return the files in `folder` that may be lists, but not those that belong to single images.

    Those have the name of their image (`1.jpg`, `1.txt`), which is in `folder` or one of
    `image_folders`, or there are many of them.
    """
    entries = sorted(scan_entries(folder), key=lambda entry: entry.name)
    beside = [entry for path in image_folders for entry in scan_entries(path)]
    images = {os.path.splitext(e.name)[0] for e in [*entries, *beside] if is_image_name(e.name)}
    candidates = [
        Path(entry.path)
        for entry in entries
        if entry.name.lower().endswith(LIST_SUFFIXES)
        and not OTHER_TEXT_FILES.search(entry.name.lower())
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
    known_classes: Collection[str] = (),
) -> DataSource:
    """Read a folder in which there are files that may be lists (`find_lists`).

    Args:
        root: contains class folders, or one list, or lists named after splits, or folders named
            after splits with a list in each.
        name, options, tested, known_classes: as for `read_list`.
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
            return _read_folders_and_lists(
                root,
                name,
                split_lists,
                read_class_folders,
                options.rename or {},
                known_classes,
                tested,
            )
        notes = _compare_with_folders(root, name, lists)
        source = read_class_folders(root, name, rename=options.rename, tested=tested)
        return replace(source, notes=(*source.notes, *notes))
    if not lists and has_options:
        raise next(iter(errors.values()))
    if not lists:
        try:
            source = read_class_folders(root, name, rename=options.rename, tested=tested)
        except DataError as error:
            raise _explain_unusable(error, root, errors) from error
        return replace(source, notes=(*source.notes, *_describe_unused(errors, root)))
    for path, rows in lists.items():
        # Lists of annotations may be about something else than the classes.
        if path.parent != root and not has_options and _has_wrapped_class_folders(root):
            pairs = _label_pairs(rows, root)
            if not _is_one_to_one(pairs):
                raise _two_readings(path, pairs, root, name)
    content, ids = _join_lists(root, name, lists, tested=tested)
    content.notes += _describe_unused(errors, root)
    return make_source(
        content, root, name, ids, tested=tested, rename=options.rename, known_classes=known_classes
    )


def _unwrap(folder: Path) -> Path:
    """Return the folder that holds the set: `folder`, or one inside if there is nothing else."""
    return Path(enter_wrappers(Folder(str(folder)), _wrapped_folder).path)


def _wrapped_folder(outer: Folder) -> Folder | None:
    """Return the only folder inside, unless there are images or lists beside it."""
    folders = outer.subfolders
    if len(folders) != 1 or split_from_name(folders[0].name) or outer.has_images:
        return None
    return None if _candidates(Path(outer.path)) else folders[0]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        Path(entry.path)
        for entry in scan_entries(folder)
        if is_directory(entry) and entry.name not in JUNK_FOLDERS
    )


def _has_class_folders(root: Path) -> bool:
    """Return whether there are several class folders, in `root` or in the folder of a split."""
    split_folders = [path for path in _subfolders(root) if split_from_name(path.name)]
    return any(len(_class_folders(folder)) > 1 for folder in split_folders or [root])


def _has_wrapped_class_folders(root: Path) -> bool:
    """Return whether there are several class folders in the only folder of images, `images/*`."""
    folders = [path for path in _subfolders(root) if is_neutral_name(path.name)]
    return len(folders) == 1 and len(_class_folders(folders[0])) > 1


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders in `folder` that hold images or folders.

    There are none if these are images and their annotations, such as masks.
    """
    filled = [
        path
        for path in _subfolders(folder)
        if any(is_image_name(entry.name) or is_directory(entry) for entry in scan_entries(path))
    ]
    annotations = [path for path in filled if is_annotation_name(path.name)]
    images = [path for path in filled if path not in annotations]
    are_classes = not annotations or not all(is_neutral_name(path.name) for path in images)
    return filled if are_classes else []


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
    root: Path, name: str, lists: Mapping[Path, ListContent], *, tested: bool
) -> tuple[ListContent, list[str]]:
    """Return the rows of all lists, and the path of each image below `root`.

    Raises:
        DataError: there are several lists, but not one for each split; or none for training.
    """
    all_names = {path: _relative(path, root) for path in lists}
    split_of = _splits_of_lists(lists, root)
    lists = _leave_out_repeated(lists, split_of)
    names = {path: all_names[path] for path in lists}
    splits = [split_of[path] for path in lists]
    if len(lists) > 1 and (None in splits or len(set(splits)) < len(lists)):
        raise DataError(
            f"several lists of images in this folder: {list_examples(list(names.values()))}",
            where=str(root),
            fix=f"name one of them: {os.path.join(name, next(iter(names.values())))}",
        )
    if not tested and splits and "train" not in splits and None not in splits:
        # Named alone, a list has no split but that in its columns.
        raise DataError(
            f"there is no list of training images, only {list_examples(list(names.values()))}",
            where=str(root),
            fix=f"to train on these images, name the list: "
            f"{os.path.join(name, next(iter(names.values())))}",
        )

    joined = ListContent(notes=[f"read from {list_examples(list(names.values()))}"])
    repeated = [shown for path, shown in all_names.items() if path not in lists]
    if repeated:
        joined.notes.append(f"not read, since they repeat other lists: {list_examples(repeated)}")
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


def _leave_out_repeated(
    lists: Mapping[Path, ListContent], split_of: Mapping[Path, str | None]
) -> dict[Path, ListContent]:
    """Return the lists without those that repeat others.

    These are copies in another format (`train.json`, `train.txt`), and lists without a split whose
    images are all in those of splits (`list.txt`, `train.txt` and `test.txt`).
    """
    labels = {path: {(row.file, row.label) for row in lists[path].rows} for path in lists}
    kept = dict[Path, ListContent]()
    for path in sorted(lists, key=lambda path: split_of[path] is None):  # those of splits first
        copies = [other for other in kept if (other.parent, other.stem) == (path.parent, path.stem)]
        of_splits = [labels[other] for other in kept if split_of[other]]
        has_own_splits = any(row.split_cell for row in lists[path].rows)
        is_copy = any(labels[other] == labels[path] for other in copies)
        is_union = split_of[path] is None and labels[path] <= set[object]().union(*of_splits)
        if not (is_copy or (is_union and not has_own_splits)):
            kept[path] = lists[path]
    return kept


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
        if split is None or len(_class_folders(folder)) > 1:
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
    rename: Mapping[str, str],
    known_classes: Collection[str],
    tested: bool,
) -> DataSource:
    """Read splits with class folders, and the other splits by their lists."""
    folders = {split_from_name(f.name): f for f in _subfolders(root) if len(_class_folders(f)) > 1}
    if "train" not in folders and not tested:
        raise DataError("no train folder with class folders", where=str(root))
    sources = {
        # Classes of the lists are chosen and renamed afterwards, so those of the folders are, too.
        split: read_class_folders(folders[split], name, choice=None, tested=split != "train")
        for split in SPLITS
        if split in folders
    }
    labels = {row.label for _, content in lists.values() for row in content.rows}
    check_renamed(rename, sorted(labels.union(*(s.classes for s in sources.values()))))
    renamed = {
        split: [rename.get(each, each) for each in source.classes]
        for split, source in sources.items()
    }
    classes = sorted({rename.get(label, label) for label in labels}.union(*renamed.values()))
    classes = classes if tested else sorted(set(renamed["train"]))
    no_labels = set[str]()
    parts, notes, problems = dict[str, Part](), list[str](), list[Problem]()
    for split in SPLITS:
        if split in sources:
            part = sources[split].parts["train"]
            ids = [f"{folders[split].name}/{image_id}" for image_id in part.ids]
            class_names = [renamed[split][label] for label in part.labels]
            images, notes = part.images, [*notes, *sources[split].notes]
        elif split in lists:
            path, content = lists[split]
            rows = content.rows
            ids = [_relative(Path(row.file or row.path), root) for row in rows]
            class_names = [rename.get(row.label, row.label) for row in rows]
            images = FilePaths([row.file or "" for row in rows])
            notes += [f"{split} is read from {_relative(path, root)}", *content.notes]
            no_labels = find_missing_labels(rows, {*known_classes, *rename, *classes})
            problems.append(unlabeled_lines(rows, no_labels))
            missing = [row.path for row in rows if row.file is None]
            problems.append(Problem("files that do not exist", missing))
        else:
            continue
        unknown = sorted(set(class_names) - {*classes, *no_labels})
        problems.append(unknown_classes(split, unknown, classes))
        numbers = {class_name: number for number, class_name in enumerate(classes)}
        labels_of_part = np.array([numbers.get(c, -1) for c in class_names], np.int64)
        parts[split] = Part(images, labels_of_part, ids)
    raise_problems(problems, root, "correct the list, or move it out of the folder")
    return DataSource(name, tuple(classes), parts, tuple(notes))


def _compare_with_folders(root: Path, name: str, lists: Mapping[Path, ListContent]) -> list[str]:
    """Check that lists beside class folders give the same classes, and return notes about them.

    Raises:
        DataError: a list gives the images other classes. In a folder of annotations it may be
            about something else.
    """
    notes = []
    for path, content in lists.items():
        pairs = _label_pairs(content, root)
        labels, folders = (sorted(set(column)) for column in zip(*pairs, strict=True))
        listed = _relative(path, root)
        to_use = f"to use it, name it: {os.path.join(name, listed)}"
        if _is_one_to_one(pairs):
            notes.append(f"{listed} is not read, since the folders give the same classes; {to_use}")
        elif set(labels) <= set(folders):  # predictions, for example
            count = sum(label != folder for label, folder in pairs)
            notes.append(
                f"{listed} is not read: its classes are those of the folders, but for {count:,} of "
                f"{len(pairs):,} images another one; {to_use}"
            )
        elif path.parent != root and not split_from_name(path.parent.name):
            notes.append(
                f"{listed} is not read: its classes ({list_examples(labels)}) are not those of the "
                f"folders; {to_use}"
            )
        else:
            raise _two_readings(path, pairs, root, name)
    return notes


def _label_pairs(content: ListContent, root: Path) -> list[tuple[str, str]]:
    """Return the label and the class folder of each image of a list."""
    return [(row.label, _class_folder(row.file, root)) for row in content.rows if row.file]


def _is_one_to_one(pairs: Collection[tuple[str, str]]) -> bool:
    labels, folders = (set(column) for column in zip(*pairs, strict=True))
    return len(labels) == len(folders) == len(set(pairs))


def _two_readings(
    path: Path, pairs: Collection[tuple[str, str]], root: Path, name: str
) -> DataError:
    """Return the error about a list that gives the images of class folders other classes."""
    labels, folders = (sorted(set(column)) for column in zip(*pairs, strict=True))
    listed = _relative(path, root)
    return DataError(
        f"two readings: {listed} has the classes {list_examples(labels)}; its images are "
        f"in the folders {list_examples(folders)}",
        where=str(root),
        fix=f"for the list, name it: {os.path.join(name, listed)}; for the folders as "
        "classes, data.layout=classes",
    )


def _class_folder(file: str, root: Path) -> str:
    """Return the folder that a file is in: below `root`, a split, or a folder like `images`."""
    parts: Sequence[str] = _relative(Path(file), root).split("/")
    while len(parts) > 2 and (split_from_name(parts[0]) or is_neutral_name(parts[0])):
        parts = parts[1:]
    return parts[0]


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")
