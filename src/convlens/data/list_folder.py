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

from convlens.data.class_names import check_renamed, format_rename, unknown_classes
from convlens.data.image_folder import read_folder
from convlens.data.image_list import (
    LIST_SUFFIXES,
    ListContent,
    find_missing_labels,
    make_source,
    read_rows,
    rows_of_table,
    unlabeled_lines,
)
from convlens.data.joined_lists import find_joined_lists, read_joined_lists
from convlens.data.layout import (
    OTHER_TEXT_FILES,
    SPLITS,
    Problem,
    is_annotation_name,
    is_neutral_name,
    list_examples,
    match_split_names,
    parse_split_name,
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
MAX_NUMBERED_LISTS = 100  # in a folder, if their names are those of splits with numbers
MAX_LIST_NOTES = 3  # files that are not used, with the reason of each
MAX_CHOICES = 3  # in the text of an error


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


def has_lists(folder: Path) -> bool:
    """Return whether there are files that may be lists of the images in `folder`."""
    return bool(find_lists(folder)) or find_joined_lists(_unwrap(folder)) is not None


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
    others = [path for path in candidates if split_from_name(path.stem) is None]
    splits = {split_from_name(path.stem) for path in candidates}
    are_numbered = {"train", "test"} <= splits and len(candidates) <= MAX_NUMBERED_LISTS
    are_few = len(others if are_numbered else candidates) <= MAX_LISTS
    return candidates if are_few else []


def read_listed_folder(
    root: Path,
    name: str,
    options: ListOptions = DEFAULT_OPTIONS,
    *,
    read_class_folders: Callable[..., DataSource] = read_folder,
    tested: bool = False,
    known_classes: Collection[str] = (),
) -> DataSource:
    """Read a folder in which there are files that may be lists (`has_lists`).

    Args:
        root: contains class folders, or one list, or lists named after splits, or folders named
            after splits with a list in each.
        name, options, tested, known_classes: as for `read_list`.
        read_class_folders: reads class folders, with the arguments of `read_folder`.

    Raises:
        DataError: it is not clear what to read, or a list is wrong.
    """
    outer, root = root, _unwrap(root)
    joined = find_joined_lists(root)
    if joined is not None:
        content = rows_of_table(read_joined_lists(root, joined), root, str(root), options)
        ids = [_relative(Path(row.file or row.path), root) for row in content.rows]
        return make_source(
            content,
            root,
            name,
            ids,
            tested=tested,
            rename=options.rename,
            known_classes=known_classes,
        )
    shown_root = os.path.normpath(os.path.join(name, _relative(root, outer)))
    lists, errors = _read_lists(root, options)
    lists, not_chosen = _choose_lists(lists, options.lists, root)
    if options.lists is not None:
        _refuse_unread_lists(options.lists, errors, root)
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
                lists,
                read_class_folders,
                options.rename or {},
                known_classes,
                tested,
            )
        source = read_class_folders(root, name, rename=options.rename, tested=tested)
        by_lists = _split_by_lists(source, lists, root)
        if by_lists is not None:
            return by_lists
        notes = _compare_with_folders(root, shown_root, lists)
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
                raise _two_readings(path, pairs, root, shown_root)
    content, ids = _join_lists(root, name, lists, tested=tested)
    content.notes += _describe_class_names(root, content)
    if not_chosen:
        shown = list_examples([_relative(path, root) for path in not_chosen])
        content.notes.append(f"lists that are not read: {shown}")
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
    path = Path(outer.path)
    return None if _candidates(path) or find_joined_lists(path) else folders[0]


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
    if len(errors) > MAX_LIST_NOTES:
        return [f"not used: {list_examples([_relative(path, root) for path in errors])}"]
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


def _choose_lists(
    lists: Mapping[Path, ListContent], chosen: str | None, root: Path
) -> tuple[dict[Path, ListContent], list[Path]]:
    """Choose one of several sets of lists, each with one for training and others.

    Such sets are `train1.txt`, `test1.txt` and `train2.txt`, `test2.txt` (DTD has ten), or
    `images_variant_train.txt` and `images_family_train.txt` with their `..._test.txt` (Aircraft).

    Args:
        chosen: what the names of the set have in common (`data.lists`).

    Returns:
        The lists to read, and those that are not read.

    Raises:
        DataError: there are several sets, and none is chosen.
        UsageError: there is no such set.
    """
    sets: dict[str, dict[Path, str]] = {}  # splits of the lists, by what their names share
    for path in lists:
        key, parsed = _shared_name(path), parse_split_name(path.stem)
        if key is not None and parsed is not None:
            sets.setdefault(key, {})[path] = parsed.split
    complete = {
        key: splits
        for key, splits in sets.items()
        if "train" in splits.values() and len(set(splits.values())) > 1
    }
    if len(complete) < 2 and chosen is None:
        return dict(lists), []
    keys = sorted(complete, key=lambda key: (len(key), key))
    choices = " or ".join(f"data.lists={_quote(key)}" for key in keys[:MAX_CHOICES] if key)
    if chosen is None:
        examples = [
            _relative(next(path for path, split in complete[key].items() if split == "train"), root)
            for key in keys
        ]
        raise DataError(
            f"{len(complete)} sets of lists for training and testing: {list_examples(examples)}",
            where=str(root),
            fix=f"{choices}{' ...' if len(keys) > MAX_CHOICES else ''} chooses one",
        )
    wanted = _fold_chosen(chosen)
    if wanted not in complete:
        raise UsageError(
            f"no lists for training and testing have {chosen!r} in their names",
            where=str(root),
            fix=f"{choices} is possible" if choices else "leave data.lists out",
        )
    kept = {path: content for path, content in lists.items() if path in complete[wanted]}
    return kept, [path for path in lists if path not in kept]


def _shared_name(path: Path) -> str | None:
    """Return the words and numbers of the name of a list beside that of its split; None without."""
    parsed = parse_split_name(path.stem)
    if parsed is None:
        return None
    return " ".join([*parsed.rest, *re.findall(r"\d+", path.stem)])


def _fold_chosen(chosen: str) -> str:
    """Return `data.lists` in the form of `_shared_name`."""
    return " ".join([*re.findall(r"[^\W\d_]+", chosen.casefold()), *re.findall(r"\d+", chosen)])


def _quote(key: str) -> str:
    return key.replace(" ", "_")


def _refuse_unread_lists(chosen: str, errors: Mapping[Path, ConvlensError], root: Path) -> None:
    """Raise the error of a list that is chosen by `data.lists` and cannot be read."""
    for path, error in errors.items():
        if _shared_name(path) == _fold_chosen(chosen):
            what = f"{_relative(path, root)}: {error.what}"
            raise DataError(what, where=error.where or str(root), fix=error.fix) from error


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
    all_notes = [content.notes for content in lists.values()]
    shared_notes = [note for note in all_notes[0] if all(note in notes for notes in all_notes)]
    joined.notes += [f"each list: {note}" if len(lists) > 1 else note for note in shared_notes]
    for path, content in lists.items():
        in_list = f" of {names[path]}" if len(lists) > 1 else ""
        for row in content.rows:
            # A column for the split has priority over the name of the list.
            split = (split_of[path] if not row.split_cell else None) or row.split
            joined.rows.append(replace(row, line=row.line + in_list, split=split))
        joined.short_lines += [line + in_list for line in content.short_lines]
        prefix = f"{names[path]}: " if len(lists) > 1 else ""
        joined.notes += [prefix + note for note in content.notes if note not in shared_notes]
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
    all_lists: Mapping[Path, ListContent],
    read_class_folders: Callable[..., DataSource],
    rename: Mapping[str, str],
    known_classes: Collection[str],
    tested: bool,
) -> DataSource:
    """Read splits with class folders, and the other splits by their lists.

    Args:
        lists: those of splits without class folders.
        all_lists: also those of training images, which may tell the numbers of the classes.
    """
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
    numbering_notes = list[str]()
    if "train" in sources and labels.isdisjoint(rename):
        others = {p: c for p, c in all_lists.items() if p not in {p for p, _ in lists.values()}}
        folders_of_classes = sources["train"].classes
        names, note = _names_of_numbers(root, labels, folders_of_classes, others)
        if names:
            lists = {split: (p, _with_names(c, names)) for split, (p, c) in lists.items()}
            labels, numbering_notes = {names[label] for label in labels}, [note]
    check_renamed(rename, sorted(labels.union(*(s.classes for s in sources.values()))))
    renamed = {
        split: [rename.get(each, each) for each in source.classes]
        for split, source in sources.items()
    }
    classes = sorted({rename.get(label, label) for label in labels}.union(*renamed.values()))
    classes = classes if tested else sorted(set(renamed["train"]))
    no_labels = set[str]()
    parts, notes, problems = dict[str, Part](), numbering_notes, list[Problem]()
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


def _split_by_lists(
    source: DataSource, lists: Mapping[Path, ListContent], root: Path
) -> DataSource | None:
    """Return the images of class folders in the splits of `train.csv`, `test.csv`, ...

    None if there are no such lists, or they do not name each image once, or their labels are not
    the classes of the folders.
    """
    split_of = {path: split for path, split in _splits_of_lists(lists, root).items() if split}
    files: dict[str, str] = {}
    for path, split in split_of.items():
        for row in lists[path].rows:
            if row.file is None or files.setdefault(row.file, split) != split:
                return None
    if list(source.parts) != ["train"] or not {"train"} < set(files.values()):
        return None
    part = source.parts["train"]
    if not isinstance(part.images, FilePaths):
        return None
    paths = [os.path.abspath(str(part.images[i])) for i in range(len(part.ids))]
    pairs = {pair for path in split_of for pair in _label_pairs(lists[path], root)}
    # Images of classes that are left out (`data.without`) were not scanned.
    others = {_class_folder(file, root) for file in files.keys() - set(paths)}
    scanned = {source.classes[label] for label in set(part.labels.tolist())}
    is_complete = files.keys() >= set(paths) and others.isdisjoint(scanned)
    if not is_complete or not _is_one_to_one(pairs):
        return None
    splits = np.array([files[path] for path in paths])
    parts = {
        split: part.subset(np.flatnonzero(splits == split)) for split in SPLITS if split in splits
    }
    names = [_relative(path, root) for path in split_of]
    note = f"splits are those of {list_examples(names)}; classes are the folders"
    return replace(source, parts=parts, notes=(*source.notes, note))


def _names_of_numbers(
    root: Path, labels: set[str], classes: Sequence[str], lists: Mapping[Path, ListContent]
) -> tuple[dict[str, str], str]:
    """Return the class of each number in `labels`, and a note; nothing if it is not certain.

    The numbers are those of a list of training images (`train.txt` beside `val.txt`), or count the
    lines of a file that names all classes, from 0 (`synset_words.txt` of ILSVRC). The numbers of
    ILSVRC's development kit, from 1, have another order.
    """
    if not labels or not all(label.isdecimal() for label in labels):
        return {}, ""
    found = list[tuple[str, dict[str, str]]]()
    for path, content in lists.items():
        pairs = _label_pairs(content, root)
        if _is_one_to_one(pairs) and all(label.isdecimal() for label, _ in pairs):
            found.append((_relative(path, root), dict(pairs)))
    for path in sorted(root.glob("*.txt")):
        names = _names_in_lines(path, classes)
        if names and "0" in labels:
            found.append((_relative(path, root), {str(n): name for n, name in enumerate(names)}))
    found = [(file, names) for file, names in found if labels <= names.keys() and len(names) > 1]
    used = [{label: names[label] for label in labels} for _, names in found]
    if (
        not found
        or any(names != used[0] for names in used)
        or not set(used[0].values()) <= {*classes}
    ):
        return {}, ""
    examples = [f"{number} is {used[0][number]}" for number in sorted(labels, key=int)]
    return used[0], f"numbers of classes are those of {found[0][0]}: {list_examples(examples)}"


def _names_in_lines(path: Path, classes: Sequence[str]) -> list[str]:
    """Return the classes in the order of a file that names each of them in a line; else nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for names in ([line.strip() for line in lines], [line.partition(" ")[0] for line in lines]):
        names = list(filter(None, names))
        if sorted(names) == sorted(classes):
            return names
    return []


def _describe_class_names(root: Path, content: ListContent) -> list[str]:
    """Return a note if classes are numbers and a file beside the list may name them."""
    labels = {row.label for row in content.rows}
    for path in sorted(root.glob("*.txt")):
        if not re.fullmatch(r"(class|label|categor)\w*\.txt", path.name.lower()):
            continue
        names = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
        names = list(filter(None, names))
        if len(names) > 1 and labels == {str(number) for number in range(len(names))}:
            rename = format_rename("0", names[0])
            return [f"classes are numbers; {path.name} may name them, from 0: {rename} ..."]
    return []


def _with_names(content: ListContent, names: Mapping[str, str]) -> ListContent:
    return replace(content, rows=[replace(row, label=names[row.label]) for row in content.rows])


def _compare_with_folders(
    root: Path, shown_root: str, lists: Mapping[Path, ListContent]
) -> list[str]:
    """Check that lists beside class folders give the same classes, and return notes about them.

    Args:
        shown_root: the root as the user would name it.

    Raises:
        DataError: a list gives the images other classes. In a folder of annotations it may be
            about something else.
    """
    notes = []
    for path, content in lists.items():
        pairs = _label_pairs(content, root)
        labels, folders = (sorted(set(column)) for column in zip(*pairs, strict=True))
        listed = _relative(path, root)
        to_use = f"to use it, name it: {os.path.join(shown_root, listed)}"
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
            raise _two_readings(path, pairs, root, shown_root)
    return notes


def _label_pairs(content: ListContent, root: Path) -> list[tuple[str, str]]:
    """Return the label and the class folder of each image of a list."""
    return [(row.label, _class_folder(row.file, root)) for row in content.rows if row.file]


def _is_one_to_one(pairs: Collection[tuple[str, str]]) -> bool:
    labels, folders = (set(column) for column in zip(*pairs, strict=True))
    return len(labels) == len(folders) == len(set(pairs))


def _two_readings(
    path: Path, pairs: Collection[tuple[str, str]], root: Path, shown_root: str
) -> DataError:
    """Return the error about a list that gives the images of class folders other classes."""
    labels, folders = (sorted(set(column)) for column in zip(*pairs, strict=True))
    listed = _relative(path, root)
    return DataError(
        f"two readings: {listed} has the classes {list_examples(labels)}; its images are "
        f"in the folders {list_examples(folders)}",
        where=str(root),
        fix=f"for the list, name it: {os.path.join(shown_root, listed)}; for the folders as "
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
