"""How a folder of images is divided into splits and classes.

`find_layout` reads a folder by the names and contents of the folders inside. A reading that is not
the plain one (`FOLDER/<class>/*`, `FOLDER/{train,val,test}/<class>/*`) is stated in a note. If two
readings are possible, the error names both and the key of the recipe that chooses.

    FOLDER/images/{train,val}/<class>/*     one folder inside the other: entered
    seg_train/seg_train/<class>/*           the same within a split
    <class>/*, test/<class>/*               a split beside the classes it is about
    <class>/{train,test}/*                  splits within classes
    cats_train/*, dogs_train/*, cats_test/*  both in the names of the folders
    a/airfield/*, b/beach/indoor/*          class folders with folders only: `data.class_level`
    train/cat.0.jpg, train/0_12.jpg         labels in the names of the files
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convlens.data.file_types import describe_ignored, extension
from convlens.data.layout import (
    LAYOUT_HELP,
    LIST_HELP,
    MAX_EXAMPLES,
    OTHER_TEXT_FILES,
    SPLITS,
    ClassChoice,
    Problem,
    group_by_label,
    is_annotation_name,
    is_neutral_name,
    is_unlabeled_name,
    labels_from_names,
    list_examples,
    list_override,
    match_split_names,
    name_without_split,
    normalize_name,
    parse_split_name,
    printable,
    raise_problems,
    split_from_name,
    split_words,
)
from convlens.data.scan import MAX_DEPTH, Folder, Scanner, enter_wrappers, is_image
from convlens.errors import DataError

_LIST_EXTENSIONS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Folders, and lists in each, that are searched for a list to name in an error.
MAX_SEARCHED_FOLDERS, MAX_SEARCHED_LISTS = 50, 20
_VERSION_WORD = re.compile(
    r"colou?rs?|gr[ae]y(scale)?|rgb|hsv|bw|segment(ed|ation)|augment(ed|ation)|original|raw|resized"
    r"|cropped|processed|preprocessed|depth|n?ir|infrared|thermal|edges?|images?|data"
)
_UNLABELED = re.compile(r"(^|[^a-z])unlabell?ed([^a-z]|$)")


@dataclass(frozen=True)
class LayoutOptions:
    """The keys `data.layout` and `data.class_level` of a recipe.

    Attributes:
        layout: `auto`, `classes` or `splits`.
        class_level: `auto`, `top` or `leaf`.
        known_classes: classes of a model. If the folder has these, what is `auto` is settled.
    """

    layout: str = "auto"
    class_level: str = "auto"
    known_classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassFolder:
    """The images of one class in one split.

    Attributes:
        name: the class.
        path: the folder.
        files: paths of its images, if their names tell the class; None for all images in `path`.
        recursive: folders inside count, too.
    """

    name: str
    path: str
    files: tuple[str, ...] | None = None
    recursive: bool = True


@dataclass
class Layout:
    """The classes of each split, and notes about the reading.

    Attributes:
        splits: split -> its classes.
        notes: sentences for people.
        parents: folders that hold class folders; images directly inside belong to no class.
        left_out: folders that are not read because `data.without` names them.
    """

    splits: dict[str, list[ClassFolder]]
    notes: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def find_layout(
    root: Path, options: LayoutOptions, choice: ClassChoice, *, tested: bool = False
) -> Layout:
    """Find the splits of a folder and the classes of each split.

    Args:
        root: the folder.
        options: readings that the recipe chooses.
        choice: classes that are chosen or left out by name. They settle what is ambiguous: a
            folder that is left out is not taken for a split.
        tested: as in `sources.find_source`.

    Raises:
        DataError: there are no classes, or two readings are possible.
    """
    return _LayoutFinder(root, options, choice, tested).find()


def class_name(folder: Folder) -> str:
    """Return the class that a folder is named after."""
    return normalize_name(printable(folder.name))


def _image_names(folder: Folder) -> list[str]:
    return [entry.name for entry in folder.files() if is_image(entry)]


def _count_classes(names: Sequence[str]) -> str:
    return f"{len(names)} classes: {list_examples(names)}"


@dataclass
class _Body:
    """The folder that holds the class folders of a split, or its images."""

    folder: Folder
    classes: list[Folder]


class _LayoutFinder:
    """Collects the notes while it goes through a folder from the top down."""

    def __init__(
        self, root: Path, options: LayoutOptions, choice: ClassChoice, tested: bool
    ) -> None:
        self._root, self._options, self._choice, self._tested = root, options, choice, tested
        self._layout = Layout({})

    def find(self) -> Layout:
        top = self._enter_wrappers(Folder(str(self._root)))
        folders = self._folders(top)
        splits = self._classes_with_splits(top, folders)
        split_of = {} if splits else self._match_splits(folders)
        is_auto = (self._options.layout, self._options.class_level) == ("auto", "auto")
        if not splits and not split_of and is_auto:
            splits = self._splits_inside_classes(folders)
        if not splits:
            bodies = {"train": _Body(top, folders)}
            if split_of:
                bodies = self._split_bodies(top, folders, split_of)
            splits = self._classes_of(bodies)
        self._layout.splits = {split: splits[split] for split in SPLITS if split in splits}
        return self._layout

    def _note(self, sentence: str) -> None:
        self._layout.notes.append(sentence)

    def _shown(self, folder: Folder) -> str:
        """Return the path of a folder below the root, for messages."""
        return printable(os.path.relpath(folder.path, self._root).replace(os.sep, "/"))

    def _folders(self, folder: Folder) -> list[Folder]:
        """Return the folders inside that may be read: hidden ones if `data.classes` names them."""
        hidden = [f for f in folder.hidden_subfolders if class_name(f) in self._choice.only]
        return sorted([*folder.subfolders, *hidden], key=lambda inner: inner.name)

    def _without_left_out(self, folders: Sequence[Folder]) -> list[Folder]:
        """Return the folders that `data.without` does not name, and remember the others."""
        left_out = [f for f in folders if class_name(f) in self._choice.without]
        self._layout.left_out += map(class_name, left_out)
        return [folder for folder in folders if folder not in left_out]

    def _is_used(self, folder: Folder) -> bool:
        """Return whether the recipe doesn't leave out the class of this folder."""
        name = class_name(folder)
        only = self._choice.only
        return name not in self._choice.without and (name in only or not only)

    def _enter_wrappers(self, outer: Folder) -> Folder:
        """Return the folder to read: `outer`, or the one inside if it holds nothing else."""
        top = enter_wrappers(outer, self._wrapped_folder)
        if top is not outer:
            self._note(f"read from {self._shown(top)}, the only folder with images")
        return top

    def _wrapped_folder(self, outer: Folder) -> Folder | None:
        """Return the only folder inside with images, unless it is a class."""
        folders = self._without_left_out(self._folders(outer))
        if match_split_names([folder.name for folder in folders]):
            return None
        # Two are enough to decide; a search in many folders without images would take long.
        filled = list(itertools.islice((f for f in folders if f.holds_images), 2))
        if len(filled) != 1:
            return None
        inner = filled[0]
        # A folder of images is a class, unless their names tell several classes.
        is_class = inner.has_images and (
            self._tested or inner.subfolders or not labels_from_names(_image_names(inner))
        )
        has_classes = inner.has_images or len(inner.subfolders) > 1
        # Otherwise the other folders are empty classes.
        return inner if not is_class and (has_classes or len(folders) == 1) else None

    def _match_splits(self, folders: Sequence[Folder]) -> dict[str, str]:
        """Return the split of each folder that stands for one; empty if all are classes.

        Raises:
            DataError: the folders could be splits or classes.
        """
        layout = self._options.layout
        considered = self._without_left_out(folders)
        names = {class_name(folder) for folder in considered}
        are_chosen = bool(self._choice.only) and names.issuperset(self._choice.only)
        if layout == "classes" or (layout == "auto" and are_chosen):
            return {}
        split_of = match_split_names([folder.name for folder in considered])
        if layout == "splits":
            if not split_of:
                raise DataError(
                    f"data.layout=splits, but no folder is named like a split: "
                    f"{list_examples([printable(folder.name) for folder in considered])}",
                    where=str(self._root),
                    fix="name them train, val and test",
                )
            return split_of
        if not split_of:
            return {}
        named = [folder for folder in considered if folder.name in split_of]
        others = [
            folder
            for folder in considered
            if folder not in named and not is_unlabeled_name(folder.name) and folder.holds_images
        ]
        names = set(map(class_name, [*named, *others]))
        if len(names) > 1 and names.issubset(self._options.known_classes):
            return {}
        if others and not self._are_splits(named, others, split_of):
            raise self._ambiguous_splits(named, others, split_of)
        return split_of

    def _are_splits(
        self, named: Sequence[Folder], others: Sequence[Folder], split_of: dict[str, str]
    ) -> bool:
        """Return whether the folders `named` like splits are splits, although there are others."""
        class_names = {folder: self._names_inside(folder) for folder in named}
        train = {n for f in named if split_of[f.name] == "train" for n in class_names[f]}
        num_splits = len({split_of[folder.name] for folder in named})
        if num_splits > 1 and (train or (self._tested and any(class_names.values()))):
            return True
        if train:
            return all((self._names_inside(f) | {class_name(f)}) & train for f in others)
        return self._are_beside_their_classes(class_names.values(), others)

    def _names_inside(self, folder: Folder) -> set[str]:
        """Return the names of the class folders in the folder of a split."""
        return {class_name(inner) for inner in self._folders(self._enter_split(folder))}

    @staticmethod
    def _are_beside_their_classes(
        class_names: Iterable[set[str]], others: Sequence[Folder]
    ) -> bool:
        """Return whether val and test hold the same class folders as lie beside them."""
        filled = [names for names in class_names if names]
        beside = {class_name(other) for other in others}
        return bool(filled) and all(names <= beside for names in filled)

    def _ambiguous_splits(
        self, named: Sequence[Folder], others: Sequence[Folder], split_of: dict[str, str]
    ) -> DataError:
        everything = sorted(class_name(folder) for folder in [*named, *others])
        readings = [f"rename them or set data.layout=classes ({_count_classes(everything)})"]
        train = [folder for folder in named if split_of[folder.name] == "train"]
        inside = sorted(name for folder in train for name in self._names_inside(folder))
        beside = sorted(class_name(folder) for folder in others)
        if inside:
            readings.append(f"data.layout=splits (train has {_count_classes(inside)})")
        left_out = list_override("data.without", map(class_name, named))
        if len(beside) > 1:
            readings.append(f"{left_out} ({_count_classes(beside)})")
        elif not others[0].has_images:
            readings.append(f"{left_out} (what is inside {beside[0]})")
        shown = [printable(folder.name) for folder in named]
        return DataError(
            f"these folders could be splits or classes: {list_examples(shown)}",
            where=str(self._root),
            fix=" or ".join(readings),
        )

    def _split_bodies(
        self, top: Folder, folders: Sequence[Folder], split_of: dict[str, str]
    ) -> dict[str, _Body]:
        """Return the body of each split, and note which folders are not used."""
        named = [folder for folder in folders if folder.name in split_of]
        others = [folder for folder in folders if folder not in named]
        bodies: dict[str, _Body] = {}
        same: dict[str, list[Folder]] = {}
        unlabeled = []
        for folder in sorted(named, key=lambda f: SPLITS.index(split_of[f.name])):
            split = split_of[folder.name]
            train = self._class_names(bodies["train"]) if "train" in bodies else set()
            inner = self._enter_split(folder, train)
            body = _Body(inner, self._folders(inner))
            if split != "train" and not self._is_labeled(body, train):
                unlabeled.append(folder)
            else:
                bodies.setdefault(split, body)
                same.setdefault(split, []).append(folder)
        problems = self._several_folders({s: each for s, each in same.items() if len(each) > 1})
        class_names = map(self._class_names, bodies.values())
        if "train" not in bodies and self._are_beside_their_classes(class_names, others):
            bodies["train"], others = _Body(top, others), []
        if "train" not in bodies and not self._tested:
            problems.append(Problem("no train folder beside", [printable(f.name) for f in named]))
        raise_problems(problems, self._root)
        self._note_splits(top, bodies)
        self._note_unused(top, others, unlabeled)
        return bodies

    @staticmethod
    def _several_folders(same: dict[str, list[Folder]]) -> list[Problem]:
        """Return the problem that splits have several folders, with the keys that choose one.

        Args:
            same: split -> its folders.
        """
        # The shortest name is the plainest: `train` beside `train_small`.
        same = {s: sorted(folders, key=lambda f: len(f.name)) for s, folders in same.items()}
        first = [class_name(folders[0]) for folders in same.values()]
        others = [class_name(folder) for folders in same.values() for folder in folders[1:]]
        used = [class_name(folders[1]) for folders in same.values()]
        not_used = [name for name in [*first, *others] if name not in used]
        fix = (
            f"{list_override('data.without', others)} (uses {list_examples(first)}) or "
            f"{list_override('data.without', not_used)} (uses {list_examples(used)}), or set "
            "data.layout=classes if all of these are classes"
        )
        return [
            Problem(
                f"{'two' if len(folders) == 2 else len(folders)} {split} folders",
                list(map(class_name, folders)),
                fix,
            )
            for split, folders in same.items()
        ]

    def _class_names(self, body: _Body) -> set[str]:
        if body.classes:
            return {class_name(folder) for folder in body.classes}
        return set(labels_from_names(_image_names(body.folder)))

    def _enter_split(self, folder: Folder, train: Collection[str] = ()) -> Folder:
        """Return the folder that holds the classes: archives are often unpacked as `test/test/*`.

        Args:
            folder: the folder of a split.
            train: the training classes; their folders are not entered.
        """

        def find_inner(outer: Folder) -> Folder | None:
            folders = self._without_left_out(self._folders(outer))
            if len(folders) != 1 or outer.has_images or class_name(folders[0]) in train:
                return None
            inner = folders[0]
            split = split_from_name(inner.name)
            is_same = inner.name == outer.name or (
                split is not None and split == split_from_name(outer.name)
            )
            holds_folders = bool(inner.subfolders) and not inner.has_images
            return inner if is_same or holds_folders else None

        return enter_wrappers(folder, find_inner)

    def _is_labeled(self, body: _Body, train: Collection[str]) -> bool:
        """Return whether the classes of validation or test images are known."""
        if body.classes:
            # One folder like `images`, which is not a class, holds the images themselves.
            first = body.classes[0]
            is_wrapper = len(body.classes) == 1 and is_neutral_name(first.name)
            return not (is_wrapper and train and class_name(first) not in train)
        names = _image_names(body.folder)
        labels = group_by_label(names) if train else labels_from_names(names)
        return bool(labels) and (not train or all(label in train for label in labels or ()))

    def _note_splits(self, top: Folder, bodies: dict[str, _Body]) -> None:
        """State which folder is which split, unless each has the name of its split."""
        shown = {
            split: "the other folders" if body.folder is top else self._shown(body.folder)
            for split, body in bodies.items()
        }
        if any(os.path.relpath(b.folder.path, top.path) != split for split, b in bodies.items()):
            pairs = [f"{split} is {shown[split]}" for split in SPLITS if split in shown]
            self._note(f"splits: {', '.join(pairs)}")

    def _note_unused(
        self, top: Folder, others: Sequence[Folder], unlabeled: Sequence[Folder]
    ) -> None:
        """State which folders are not used, and which lists may have the classes of their images.

        Args:
            top: the folder that holds them.
            others: folders that are not splits.
            unlabeled: validation and test images without class folders.
        """
        ignored = []
        for folder in sorted([*others, *unlabeled], key=lambda f: f.name):
            inner = enter_wrappers(self._enter_split(folder), _only_folder)
            count = len(_image_names(inner))
            if not count or (folder in others and not is_unlabeled_name(folder.name)):
                ignored.append(printable(folder.name))
                continue
            stem, searched = folder.name.casefold(), [folder, inner][: 1 if inner is folder else 2]
            files = [file.name for each in searched for file in each.files()]
            files += [file.name for file in top.files() if stem in file.name.casefold()]
            lists = [printable(name) for name in files if extension(name) in _LIST_EXTENSIONS]
            images = "image" if count == 1 else "images"
            self._note(
                f"{self._shown(inner)} is not used: {count:,} {images} without class folders"
                + (f" (lists that are not read: {list_examples(lists)})" if lists else "")
            )
        if ignored:
            self._note(f"ignored folders: {list_examples(ignored)}")

    def _splits_inside_classes(self, folders: Sequence[Folder]) -> dict[str, list[ClassFolder]]:
        """Return the classes of each split if all class folders hold splits: `cat/{train,test}`."""
        splits: dict[str, list[ClassFolder]] = {}
        for folder in filter(self._is_used, folders):
            split_of = match_split_names([inner.name for inner in folder.subfolders])
            if folder.has_images or len(split_of) != len(folder.subfolders) or not split_of:
                return {}
            for inner in folder.subfolders:
                entry = ClassFolder(class_name(folder), inner.path)
                splits.setdefault(split_of[inner.name], []).append(entry)
        if len(splits.get("train", ())) < 2:
            return {}
        self._note("each class folder holds its own splits")
        return splits

    def _classes_with_splits(
        self, top: Folder, folders: Sequence[Folder]
    ) -> dict[str, list[ClassFolder]]:
        """Return the classes of each split if folders are named after both: `cats_train`, `testB`.

        They must hold images only, and each class must have training images.
        """
        considered = self._without_left_out(folders)
        if not any(parse_split_name(folder.name) for folder in considered):
            return {}
        considered = [f for f in considered if parse_split_name(f.name) or f.holds_images]
        folder_names = set(map(class_name, considered))
        are_chosen = bool(self._choice.only) and folder_names.issuperset(self._choice.only)
        are_known = folder_names <= set(self._options.known_classes)
        parsed = {folder: parse_split_name(folder.name) for folder in considered}
        if self._options.layout == "classes" or are_chosen or are_known or None in parsed.values():
            return {}
        names: dict[str, str] = {}  # classes by their names in lower case
        splits: dict[str, list[ClassFolder]] = {}
        for folder, found in parsed.items():
            if found is None or not found.rest or folder.subfolders or not folder.has_images:
                return {}
            name = name_without_split(class_name(folder))
            entry = ClassFolder(names.setdefault(name.casefold(), name), folder.path)
            splits.setdefault(found.split, []).append(entry)
        classes = {split: {entry.name for entry in entries} for split, entries in splits.items()}
        is_unique = all(len(classes[split]) == len(splits[split]) for split in splits)
        is_complete = len(names) > 1 and classes.get("train") == set(names.values())
        if len(splits) < 2 or not is_unique or not is_complete:
            return {}
        split = max(splits, key=SPLITS.index)
        example = splits[split][0]
        shown = printable(os.path.basename(example.path))
        self._note(
            f"folders are named after classes and splits: {shown} is {example.name} in {split}"
        )
        self._layout.parents.append(top.path)
        return splits

    def _classes_of(self, bodies: dict[str, _Body]) -> dict[str, list[ClassFolder]]:
        """Return the classes of each split: its folders, those further down, or labels in names."""
        fallback = next(iter(bodies.values()), _Body(Folder(str(self._root)), []))
        main = bodies.get("train", fallback)
        if not self._class_names(main):
            raise self._no_classes(main)
        self._refuse_annotations(main.classes)
        self._refuse_unlabeled(main.classes)
        for body in bodies.values():
            body.classes = self._without_annotations(body.classes)
        level = self._class_level(main.classes)
        splits = {}
        for split, body in bodies.items():
            if not body.classes:
                splits[split] = _labeled_files(body.folder)
                continue
            self._layout.parents.append(body.folder.path)
            self._note_hidden(body)
            if level == "leaf":
                splits[split] = list(_leaf_folders(body))
            else:
                splits[split] = list(map(self._class_folder, body.classes))
        if not main.classes:
            example = printable(_image_names(main.folder)[0])
            names = list_examples(sorted(self._class_names(main)))
            self._note(f"classes are read from the names of the files ({example}): {names}")
        return splits

    def _class_folder(self, folder: Folder) -> ClassFolder:
        """Return a class; if it holds `images` and `masks`, only the former are its images."""
        images = _images_beside_annotations(folder)
        if images is None or self._options.class_level == "top":
            return ClassFolder(class_name(folder), folder.path)
        name = printable(images.name)
        note = f"only the folder {name} of each class is read, not the annotations beside it"
        if note not in self._layout.notes:
            self._note(note)
        return ClassFolder(class_name(folder), images.path)

    def _refuse_unlabeled(self, folders: Sequence[Folder]) -> None:
        """Raise an error if a folder seems to hold images without labels, beside classes."""
        folders = self._without_left_out(folders)
        unlabeled = [f for f in folders if _UNLABELED.search(f.name.casefold())]
        names = sorted(class_name(folder) for folder in folders if folder not in unlabeled)
        left_out = list(map(class_name, unlabeled))
        is_settled = self._options.layout == "classes" or bool(self._choice.only)
        is_settled = is_settled or set(left_out) <= set(self._options.known_classes)
        if not unlabeled or not names or is_settled:
            return
        inside = f"what is inside {names[0]}" if len(names) == 1 else _count_classes(names)
        raise DataError(
            f"these folders could hold images without labels, or be classes: "
            f"{list_examples(left_out)}",
            where=str(self._root),
            fix=f"{list_override('data.without', left_out)} ({inside}) or data.layout=classes "
            f"({_count_classes(sorted([*names, *left_out]))})",
        )

    def _refuse_annotations(self, folders: Sequence[Folder]) -> None:
        """Raise an error if folders seem to be images and their annotations, not classes."""
        folders = self._without_left_out(folders)
        annotations = [folder for folder in folders if is_annotation_name(folder.name)]
        images = [folder for folder in folders if folder not in annotations]
        names = [class_name(folder) for folder in [*annotations, *images]]
        is_settled = self._options.layout == "classes" or bool(self._choice.only)
        is_settled = is_settled or set(names) <= set(self._options.known_classes)
        if is_settled or not (annotations and images):
            return
        if not all(is_neutral_name(folder.name) for folder in images):
            return
        are_filled = all(folder.holds_images for folder in folders)
        readings = [f"data.layout=classes ({_count_classes(names)})"] if are_filled else []
        inside = sorted(self._class_names(_Body(images[0], self._folders(images[0]))))
        if len(images) == 1 and len(inside) > 1:
            without = list_override("data.without", names[: len(annotations)])
            readings.insert(0, f"{without} ({_count_classes(inside)})")
        lists = self._lists_below(_parent(folders[0]))
        readings.append(
            f"if {lists[0]} lists the images with their classes, name that file"
            if lists
            else LIST_HELP
        )
        raise DataError(
            "these folders look like images and annotations, not like classes: "
            f"{list_examples(names)}",
            where=str(self._root),
            fix=" or ".join(readings),
        )

    def _without_annotations(self, folders: Sequence[Folder]) -> list[Folder]:
        """Return class folders without those of annotations, which hold no images, with a note."""
        if self._options.layout == "classes" or self._choice.only:
            return list(folders)
        annotations = [f for f in folders if is_annotation_name(f.name) and not f.holds_images]
        if not annotations or len(annotations) == len(folders):
            return list(folders)
        self._note(f"ignored folders: {list_examples(list(map(self._shown, annotations)))}")
        return [folder for folder in folders if folder not in annotations]

    def _lists_below(self, folder: Folder) -> list[str]:
        """Return the paths below the root of text files that may list images, but not one each."""
        found = list[str]()
        searched_folders = [folder, *folder.subfolders[:MAX_SEARCHED_FOLDERS]]
        images = {os.path.splitext(n)[0] for each in searched_folders for n in _image_names(each)}
        for searched in searched_folders:
            files = [
                file
                for file in searched.files()
                if extension(file.name) in _LIST_EXTENSIONS
                and not OTHER_TEXT_FILES.search(file.name.lower())
                and os.path.splitext(file.name)[0] not in images
            ]
            if len(files) <= MAX_SEARCHED_LISTS:
                found += [self._shown(Folder(file.path)) for file in files]
        return found

    def _no_classes(self, body: _Body) -> DataError:
        """Return the error about a folder that has neither class folders nor labels in names."""
        images = _image_names(body.folder)
        files = [file.name for file in body.folder.files() if file.name not in images]
        root = Folder(str(self._root))
        lists = self._lists_below(body.folder) or self._lists_below(root)
        what = f"no class folders in: {printable(body.folder.name)}"
        if split_from_name(body.folder.name):
            what = f"splits without class folders inside: {self._shown(body.folder)}"
        if images:
            examples = list_examples([printable(name) for name in images[:2]])
            what += f"; {len(images):,} images whose names do not tell a class ({examples})"
        if files:
            what += "; " + "; ".join(describe_ignored(Counter(map(extension, files))))
        fix = f"{LAYOUT_HELP}, or {LIST_HELP}" if images else LAYOUT_HELP
        if lists:
            fix = f"if {printable(lists[0])} lists the images with their classes, name that file"
        return DataError(what, where=str(self._root), fix=fix)

    def _class_level(self, folders: Sequence[Folder]) -> str:
        """Return whether the class folders are these (`top`) or the folders further down (`leaf`).

        Raises:
            DataError: both are possible.
        """
        if self._options.class_level != "auto":
            return self._options.class_level
        used = list(filter(self._is_used, folders))
        nested = [
            folder
            for folder in used
            if not folder.has_images and any(inner.holds_images for inner in folder.subfolders)
        ]
        if not nested:
            return "top"
        inside = [
            frozenset(inner.name.casefold() for inner in f.subfolders if inner.holds_images)
            for f in nested
        ]
        is_wrapped = all(len(names) == 1 for names in inside) and (
            len(set(inside)) == 1 or all(is_neutral_name(*names) for names in inside)
        )
        if is_wrapped:  # `cat/images/*`
            return "top"
        names = [class_name(folder) for folder in nested]
        if self._options.known_classes:
            return "top" if set(names) & set(self._options.known_classes) else "leaf"
        subfolders = sorted({printable(f.name) for folder in nested for f in folder.subfolders})
        have_own_images = sum(folder.has_images for folder in used)
        have_same_folders = len(set(inside)) == 1 and len(nested) > 1
        if all(_images_beside_annotations(folder) for folder in nested):
            return "top"
        if have_same_folders and not have_own_images and all(map(_is_version_name, names)):
            first = self._shown(nested[0])
            raise DataError(
                f"these folders look like versions of the same images: {list_examples(names)}",
                where=str(self._root),
                fix=f"name one of them: {os.path.join(self._root, first)} "
                f"({_count_classes(subfolders)}), or data.class_level=top "
                f"({_count_classes(names)})",
            )
        if have_own_images >= len(nested) or have_same_folders:
            note = (
                f"class folders that hold only folders: {list_examples(names)}; the folders inside "
                f"({list_examples(subfolders)}) are parts of them, unless data.class_level=leaf"
            )
            if have_same_folders and not have_own_images:  # `fold1` and `fold2`
                note += "; if they are splits, rename them train, val and test"
            self._note(note)
            return "top"
        leaves = [leaf.name for leaf in _leaf_folders(_Body(_parent(used[0]), used))]
        raise DataError(
            f"class folders that hold only folders: {list_examples(names)}",
            where=str(self._root),
            fix=f"data.class_level=top ({_count_classes([class_name(f) for f in used])}) or "
            f"data.class_level=leaf ({_count_classes(leaves)})",
        )

    def _note_hidden(self, body: _Body) -> None:
        """State which hidden folders beside the class folders have images."""
        names = [class_name(folder) for folder in body.classes]
        for folder in body.folder.hidden_subfolders:
            name = class_name(folder)
            count = len(Scanner(folder.path).find_images(folder.path).images)
            if count and folder not in body.classes and name not in self._choice.without:
                example = list_override("data.classes", sorted([name, *names[:MAX_EXAMPLES]]))
                self._note(
                    f"hidden folder {name} is not used ({count:,} images); name it in data.classes "
                    f"to use it, e.g. {example}"
                )


def _only_folder(folder: Folder) -> Folder | None:
    """Return the folder inside if there is one, and no image beside it."""
    is_only = len(folder.subfolders) == 1 and not folder.has_images
    return folder.subfolders[0] if is_only else None


def _is_version_name(name: str) -> bool:
    """Return whether a name says how images were processed, like `color` and `segmented`."""
    words = split_words(name)
    return bool(words) and all(map(_VERSION_WORD.fullmatch, words))


def _images_beside_annotations(folder: Folder) -> Folder | None:
    """Return the folder of images if all others inside hold annotations, such as masks."""
    inner = [f for f in folder.subfolders if f.holds_images]
    images = [f for f in inner if not is_annotation_name(f.name)]
    is_pair = len(images) == 1 < len(inner) and is_neutral_name(images[0].name)
    return images[0] if is_pair and not folder.has_images else None


def _labeled_files(folder: Folder) -> list[ClassFolder]:
    """Return the classes that the names of the files in a folder tell."""
    labels = group_by_label(_image_names(folder)) or {}
    return [
        ClassFolder(label, folder.path, tuple(os.path.join(folder.path, name) for name in names))
        for label, names in sorted(labels.items())
    ]


def _leaf_folders(body: _Body) -> Iterator[ClassFolder]:
    """Yield each folder that holds images as a class, named by its path: `b/beach/indoor`."""
    level = body.classes
    for _ in range(MAX_DEPTH):
        for folder in level:
            if folder.has_images:
                path = os.path.relpath(folder.path, body.folder.path).replace(os.sep, "/")
                yield ClassFolder(normalize_name(printable(path)), folder.path, recursive=False)
        level = [inner for folder in level for inner in folder.subfolders]


def _parent(folder: Folder) -> Folder:
    return Folder(os.path.dirname(folder.path))
