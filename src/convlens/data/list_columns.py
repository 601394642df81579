"""Find out which columns of a table hold the paths, labels, splits and groups of images.

Columns are recognized by the names that people use, whatever their case, blanks and underscores.
A name that may mean something else, such as `id`, counts only if the cells agree. Two readings
that contradict each other are an error that names the key to choose with (`ListOptions`).
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from convlens.data.class_names import strip_invisible
from convlens.data.layout import (
    SPLIT_WORDS,
    group_by_label,
    list_examples,
    match_split_names,
    parse_split_name,
    split_words,
)
from convlens.data.table_files import Line, Table
from convlens.data.types import is_image_name
from convlens.errors import DataError, UsageError, close_matches, did_you_mean

# Names of columns as `fold_column` returns them, the most specific first.
PATH_COLUMNS = (
    "path",
    "imagepath",
    "imgpath",
    "filepath",
    "filepaths",
    "file",
    "filename",
    "filenames",
    "imagefile",
    "imagefilename",
    "imgfile",
    "imagefilepath",
    "relpath",
    "relativepath",
    "fullpath",
    "paths",
    "files",
)
# These may also mean something else, so they need MIN_SHARE of cells that are files.
MAYBE_PATH_COLUMNS = (
    "image",
    "img",
    "imageid",
    "imgid",
    "imagename",
    "imgname",
    "images",
    "picture",
    "photo",
    "fileid",
    "isicid",
    "idcode",
    "fname",
    "id",
    "ids",
    "uid",
    "uuid",
    "name",
    "key",
    "url",
    "uri",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classname",
    "labelname",
    "classlabel",
    "imagelabel",
    "truelabel",
    "category",
    "categoryname",
    "classes",
    "target",
    "targetname",
    "choice",
    "breed",
    "species",
    "diagnosis",
    "dx",
    "variety",
    "disease",
    "emotion",
    "annotation",
    "groundtruth",
    "gt",
    "classid",
    "labelid",
    "categoryid",
    "targetid",
    "classindex",
    "labelindex",
    "classidx",
    "labelidx",
    "y",
    "ytrue",
)
# These name a class beside a numeric label, or if there is no other label.
MAYBE_LABEL_COLUMNS = ("name", "type", "kind", "tag", "finding")
SPLIT_COLUMNS = (
    "split",
    "splits",
    "datasplit",
    "datasetsplit",
    "subset",
    "set",
    "partition",
    "usage",
    "phase",
    "purpose",
    "dataset",
    "traintest",
    "trainvaltest",
)
FLAG_COLUMNS = {
    "isvalid": "val",
    "isval": "val",
    "isvalidation": "val",
    "istest": "test",
    "istesting": "test",
    "istrain": "train",
    "istraining": "train",
}
FOLD_COLUMNS = ("fold", "folds", "kfold", "cvfold", "foldid", "foldnumber", "foldidx")
MIN_SHARE = 0.95  # of the cells of an ambiguous column that are files
MAX_UNIQUE_LABELS = 10  # lines of a list whose labels may all differ
NONE = "none"  # value of data.split_column: no column is read as the split

_FER2013 = {"publictest": "val", "privatetest": "test"}  # the competition's validation and test
_SHORT = {"tr": "train", "trn": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
_CELEBA = {"0": "train", "1": "val", "2": "test"}
_TRUE = frozenset({"true", "t", "yes", "y", "1", "1.0"})
_FALSE = frozenset({"false", "f", "no", "n", "0", "0.0", ""})
# Words beside that of a split in the name of a column of flags: `used_for_training`.
_FLAG_WORDS = frozenset({"is", "in", "for", "flag", "use", "used", "to", "as", "mask"})
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True)
class ListOptions:
    """How to read a list of images: keys of the section `data` of a recipe.

    Attributes:
        path_column, label_column: names of these columns.
        split_column: name of this column, or `none`.
        group: a column; images with equal values stay in one split.
        images: the folder that the paths are relative to, itself relative to the folder of the
            list or to the current one.
        lists: which lists of a folder are read if there are several for each split: what their
            names have in common, such as `2` for `train2.txt` and `test2.txt`.
        rename: new names of classes.
    """

    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group: str | None = None
    images: str | None = None
    lists: str | None = None
    rename: Mapping[str, str] | None = None


DEFAULT_OPTIONS = ListOptions()


@dataclass(frozen=True)
class ListCells:
    """The cells of a list by their meaning, one entry for each line.

    Attributes:
        lines: line numbers.
        short_lines: numbers of lines that lack cells; they have no entry in the others.
        split_cells: the split as written; empty without a column.
        splits: `train`, `val` or `test`; None if the cell has another value. None instead of the
            list if the table has no splits.
        groups: None without a group column.
    """

    lines: list[int]
    short_lines: list[int]
    paths: list[str]
    labels: list[str]
    split_cells: list[str]
    splits: list[str | None] | None
    groups: list[str] | None
    notes: tuple[str, ...]


@dataclass
class _Columns:
    """A table with a header, and what is known about its columns."""

    names: list[str]
    cells: list[list[str]]  # by column
    where: str
    used: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def find(self, names: Iterable[str]) -> list[int]:
        """Return the unused columns with these folded names, in the order of `names`."""
        folded = [fold_column(name) for name in self.names]
        wanted = [fold_column(name) for name in names]
        return [
            i for name in wanted for i, n in enumerate(folded) if n == name and i not in self.used
        ]

    def requested(self, name: str, key: str) -> int:
        """Return the column that a key of the recipe names.

        Raises:
            UsageError: there is no such column.
        """
        if name in self.names:
            return self.names.index(name)
        if found := [i for i, n in enumerate(self.names) if fold_column(n) == fold_column(name)]:
            return found[0]
        suggestion = did_you_mean(close_matches(name, self.names)[:1])
        raise UsageError(
            f"no column {name!r} for {key}",
            where=self.where,
            fix=suggestion or f"columns: {', '.join(self.names)}",
        )

    def describe(self, column: int) -> str:
        """Return the name of a column with its values, for messages."""
        values = sorted({cell for cell in self.cells[column] if cell})
        count = f"{len(values):,} value{'s' * (len(values) != 1)}"
        return f"{self.names[column]} ({count}: {list_examples(values)})"


def is_path_pattern(group: str) -> bool:
    """Return whether `data.group` can be a regular expression for paths instead of a column."""
    return re.fullmatch(r"[\w ]+", group) is None


def fold_column(name: str) -> str:
    """Return a column's name without case, blanks, underscores and other punctuation."""
    return re.sub(r"[\W_]+", "", name.casefold())


def is_known_column(name: str) -> bool:
    """Return whether a cell is a usual name of a column."""
    folded = fold_column(name)
    tables = (PATH_COLUMNS, MAYBE_PATH_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS, FLAG_COLUMNS)
    return any(folded in table for table in tables)


def interpret_table(
    table: Table,
    where: str,
    options: ListOptions,
    *,
    share_of_files: Callable[[Sequence[str]], float],
    is_file: Callable[[str], bool],
) -> ListCells:
    """Return the paths, labels, splits and groups of a table.

    Args:
        where: the file, for messages.
        share_of_files: returns which share of some paths are files.
        is_file: returns whether a path is a file as it is written.

    Raises:
        DataError: columns are missing or ambiguous, or images have several labels.
        UsageError: a column that `options` names does not exist.
    """
    header, lines, header_notes = _split_header(table, options, is_file, share_of_files)
    short = [number for number, cells in lines if len(cells) < len(header)]
    lines = [(number, cells) for number, cells in lines if len(cells) >= len(header)]
    columns = _Columns(
        header,
        [[cells[i].strip() for _, cells in lines] for i in range(len(header))],
        where,
        notes=[*table.notes, *header_notes],
    )
    groups = None
    if options.group is not None and not (
        options.group not in columns.names and is_path_pattern(options.group)
    ):
        group_column = columns.requested(options.group, "data.group")
        groups = [cells[group_column] for _, cells in lines]
        columns.used.add(group_column)
    path_column = _find_path_column(columns, options, share_of_files)
    columns.used.add(path_column)
    if options.label_column is not None:
        # A column that is the label is not the split as well (classes may be called `train`).
        columns.used.add(columns.requested(options.label_column, "data.label_column"))
    labels: list[str] = []
    label_column = _find_label_column(columns, options)
    if label_column is not None:
        columns.used.add(label_column)
        labels = columns.cells[label_column]
        if header_notes and len(header) > 2 and _is_numeric(labels):
            names = _names_of_numbers(labels, columns.cells[path_column])
            if names:
                labels = names
                columns.notes.append(
                    f"labels are those in the names of the files, whose classes have the numbers "
                    f"of {header[label_column]}"
                )
        _refuse_several_labels(labels, columns)
    has_labels = label_column is not None or bool(_class_columns(columns))
    split_cells, splits = _find_splits(columns, options, has_labels=has_labels)
    if label_column is None:
        labels = _labels_without_column(columns, columns.cells[path_column])
    _note_folds(columns, splits is not None and "test" in splits)
    return ListCells(
        lines=[number for number, _ in lines],
        short_lines=short,
        paths=columns.cells[path_column],
        labels=labels,
        split_cells=split_cells,
        splits=splits,
        groups=groups,
        notes=tuple(columns.notes),
    )


def _split_header(
    table: Table,
    options: ListOptions,
    is_file: Callable[[str], bool],
    share_of_files: Callable[[Sequence[str]], float],
) -> tuple[list[str], list[Line], list[str]]:
    """Return the column names, the lines with data, and notes."""
    if table.columns is not None:
        return [strip_invisible(name) for name in table.columns], table.lines, []
    if not table.lines:
        return [], [], []
    first = [strip_invisible(cell) for cell in table.lines[0][1]]
    requested = (options.path_column, options.label_column, options.split_column, options.group)
    is_header = any(name in first for name in requested if name is not None)
    paths = [i for i, cell in enumerate(first) if is_file(cell) or is_image_name(_base_name(cell))]
    if not paths and not is_header and not any(map(is_known_column, first)):
        # `Abyssinian_100 1 1 1`: a path without its extension.
        has_number = any(map(str.isdecimal, first[0]))
        paths = [0] if has_number and share_of_files(first[:1]) else []
    if is_header or not paths:
        return first, table.lines[1:], []
    # The first line names an image, so it is data.
    header = [f"column {number}" for number in range(1, len(first) + 1)]
    header[paths[0]] = "path"
    others = [i for i in range(len(first)) if i != paths[0]]
    # Not a column of line numbers or splits, if there is another one.
    cells = {i: [line[i] for _, line in table.lines if len(line) > i] for i in others}
    others.sort(key=lambda i: (not _may_be_classes(cells[i]), _are_splits(cells[i])))
    if others and (_may_be_classes(cells[others[0]]) or len(table.lines) <= MAX_UNIQUE_LABELS):
        header[others[0]] = "label"
    positions = " and ".join(
        f"column {header.index(name) + 1} is the {name}"
        for name in ("path", "label")
        if name in header
    )
    return header, table.lines, [f"the first line is an image, not a header: {positions}"]


def _are_splits(cells: Sequence[str]) -> bool:
    """Return whether all cells are names of splits, and of more than one."""
    values = {cell.strip() for cell in cells}
    split_of = match_split_names(sorted(values))
    return split_of.keys() == values and len(set(split_of.values())) > 1


def _base_name(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _find_path_column(
    columns: _Columns, options: ListOptions, share_of_files: Callable[[Sequence[str]], float]
) -> int:
    if options.path_column is not None:
        return columns.requested(options.path_column, "data.path_column")
    certain, possible = columns.find(PATH_COLUMNS), columns.find(MAYBE_PATH_COLUMNS)
    if len(certain) == 1 and not possible:
        return certain[0]
    shares = dict[int, float]()
    for column in [*certain, *possible]:
        shares[column] = share_of_files(columns.cells[column])
        if shares[column] >= MIN_SHARE:
            return column
    if certain:
        return certain[0]
    fix = "the first line names the columns: path,label[,split][,a group column]"
    if possible:
        best = max(possible, key=shares.__getitem__)
        name, cells = columns.names[best], columns.cells[best]
        fix = (
            f"{shares[best]:.0%} of the values of {name} are files ({list_examples(cells[:2])}): "
            f"if it is the path, data.path_column={_quote(name)}, and data.images=FOLDER"
        )
    elif similar := _similar_column(columns, PATH_COLUMNS + MAYBE_PATH_COLUMNS):
        fix = f"did you mean data.path_column={_quote(similar)}?"
    else:
        files = [i for i in range(len(columns.names)) if share_of_files(columns.cells[i]) > 0]
        if files:
            fix = f"did you mean data.path_column={_quote(columns.names[files[0]])}?"
    raise _missing_column("path", columns, fix)


def _missing_column(name: str, columns: _Columns, fix: str) -> DataError:
    pixels = next((i for i, cells in enumerate(columns.cells) if _holds_pixels(cells)), None)
    more = f" ({columns.names[pixels]} holds pixels, not a file)" if pixels is not None else ""
    return DataError(
        f"no column {name!r} among: {', '.join(columns.names)}{more}", where=columns.where, fix=fix
    )


def _holds_pixels(cells: Sequence[str]) -> bool:
    return bool(cells) and cells[0].count(" ") > 60 and not re.search(r"[^\d\s.]", cells[0])


def _similar_column(columns: _Columns, known: Sequence[str]) -> str:
    """Return the name of an unused column that is spelled like a known one, or empty."""
    for column, name in enumerate(columns.names):
        is_similar = difflib.get_close_matches(fold_column(name), known, n=1, cutoff=0.7)
        if column not in columns.used and is_similar:
            return name
    return ""


def _quote(name: str) -> str:
    return f"'{name}'" if re.search(r"[^\w.-]", name) else name


def _find_label_column(columns: _Columns, options: ListOptions) -> int | None:
    """Return the column of the labels; None if there is none."""
    if options.label_column is not None:
        return columns.requested(options.label_column, "data.label_column")
    candidates = columns.find(LABEL_COLUMNS)
    numbers = [column for column in candidates if _is_numeric(columns.cells[column])]
    names = [column for column in candidates if column not in numbers]
    if not names:
        possible = columns.find(MAYBE_LABEL_COLUMNS)
        names = [c for c in possible if not _is_numeric(columns.cells[c])]
        names = [c for c in names if not numbers or _may_be_classes(columns.cells[c])]
    if not names and not numbers:
        return None
    chosen, *others = [*names, *numbers]
    for other in others:
        if not _may_be_classes(columns.cells[other]):
            continue
        if _is_one_to_one(columns.cells[chosen], columns.cells[other]):
            if other in numbers and chosen in names:
                columns.notes.append(
                    f"labels are those of {columns.names[chosen]}, whose classes have the numbers "
                    f"of {columns.names[other]}"
                )
            continue
        if fold_column(columns.names[chosen]) == "label" and other not in numbers:
            columns.notes.append(
                f"labels are those of {columns.names[chosen]}, not of {columns.describe(other)}: "
                f"data.label_column={_quote(columns.names[other])} uses the latter"
            )
            continue
        raise DataError(
            "two columns may be the label and disagree: "
            f"{columns.describe(chosen)} and {columns.describe(other)}",
            where=columns.where,
            fix="give the two columns different names"
            if columns.names[chosen] == columns.names[other]
            else " or ".join(
                f"data.label_column={_quote(columns.names[column])}" for column in (chosen, other)
            ),
        )
    return chosen


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(_INTEGER.fullmatch(cell) for cell in cells if cell)


def _may_be_classes(cells: Sequence[str]) -> bool:
    """Return whether values occur repeatedly, unlike those of an identifier."""
    return len(set(cells)) <= max(2, len(cells) // 2)


def _is_one_to_one(cells: Sequence[str], others: Sequence[str]) -> bool:
    pairs = {(a, b) for a, b in zip(cells, others, strict=True) if a and b}
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def _names_of_numbers(labels: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the labels in the names of the files if these name the classes that are numbered.

    `Abyssinian_100 1 1 1` and `beagle_3 5 2 1`: 1 is `Abyssinian`, 5 is `beagle`. Empty if the
    names don't fit the numbers one to one.
    """
    names = list[str]()
    for path in paths:
        names += group_by_label([_base_name(path)]) or ()
    are_words = len(names) == len(labels) and not any(map(str.isdecimal, names))
    return names if are_words and _is_one_to_one(labels, names) else []


def _refuse_several_labels(labels: Sequence[str], columns: _Columns) -> None:
    """Raise an error if images have several labels, such as `cat|dog` or `["cat", "dog"]`."""
    distinct = set(labels)
    several = {label for label in distinct if len(_json_list(label)) > 1}
    for separator in "|;,":
        joined = {label for label in distinct if separator in label.strip(separator)}
        parts = {part.strip() for label in joined for part in label.split(separator)}
        uses = Counter(part.strip() for label in distinct for part in label.split(separator))
        # A name with a comma is not a list of labels, unless its parts occur in other labels.
        if joined and sum(uses[part] > 1 for part in parts) > len(parts) / 2:
            several |= joined
    if several:
        count = sum(label in several for label in labels)
        raise _multi_label(f"{count:,} of {len(labels):,} lines", sorted(several)[:3], columns)


def _json_list(text: str) -> list[object]:
    """Return the labels in `["cat", "dog"]` and in Label Studio's `{"choices": ["cat", "dog"]}`."""
    if not text.startswith(("[", "{")):
        return []
    try:
        value = json.loads(text)
    except ValueError:
        return []
    value = value.get("choices") if isinstance(value, dict) else value
    return value if isinstance(value, list) else []


def _multi_label(lines: str, examples: Sequence[str], columns: _Columns) -> DataError:
    return DataError(
        f"this is a multi-label set: {lines} have several labels ({'; '.join(examples)}); "
        "convlens trains single-label classifiers",
        where=columns.where,
        fix="leave out the images with several labels, or give each one label",
    )


def _labels_without_column(columns: _Columns, paths: Sequence[str]) -> list[str]:
    """Return the labels of a table without a label column.

    They are in columns of zeros and ones, one for each class, or if there are no other columns but
    identifiers, they are the folders of the images.
    """
    ignored = {*columns.used, *columns.find(FOLD_COLUMNS)}
    rest = [i for i in range(len(columns.names)) if i not in ignored]
    binary = _class_columns(columns) or _binary_columns(columns)
    if len(binary) > 1:
        return _one_hot_labels(columns, binary, paths)
    folders = [re.split(r"[/\\]", path)[-2:-1] for path in paths]
    are_identifiers = not any(_may_be_classes(columns.cells[i]) for i in rest)
    if are_identifiers and all(folders) and len({folder for (folder,) in folders}) > 1:
        columns.notes.append("there is no column of labels: they are the folders of the images")
        return [folder for (folder,) in folders]
    fix = "the first line names the columns: path,label[,split][,a group column]"
    similar = _similar_column(columns, LABEL_COLUMNS)
    possible = [i for i in rest if _may_be_classes(columns.cells[i])]
    similar = similar or (columns.names[possible[0]] if len(possible) == 1 else "")
    if similar:
        fix = f"did you mean data.label_column={_quote(similar)}?"
    elif possible:
        names = ", ".join(columns.names[i] for i in possible[:5])
        fix = f"say which column is the label: data.label_column=NAME ({names})"
    raise _missing_column("label", columns, fix)


def _class_columns(columns: _Columns) -> list[int]:
    """Return the unused columns of zeros and ones of which exactly one is one in each line.

    Columns named like splits are not among them. Empty if there are no such columns.
    """
    binary = [i for i in _binary_columns(columns) if parse_split_name(columns.names[i]) is None]
    num_ones = {
        sum(cell.casefold() in _TRUE for cell in cells)
        for cells in zip(*(columns.cells[i] for i in binary), strict=True)
    }
    return binary if len(binary) > 1 and num_ones == {1} else []


def _binary_columns(columns: _Columns) -> list[int]:
    ignored = {*columns.used, *columns.find(FOLD_COLUMNS)}
    unused = [i for i in range(len(columns.names)) if i not in ignored]
    return [i for i in unused if _is_binary(columns.cells[i])]


def _is_binary(cells: Sequence[str]) -> bool:
    values = {cell.casefold() for cell in cells}
    return values <= {"0", "1", "0.0", "1.0", "-1", "true", "false"}


def _one_hot_labels(columns: _Columns, binary: Sequence[int], paths: Sequence[str]) -> list[str]:
    """Return the class whose column has a one in each line; empty if there is none."""
    labels, several = [], list[str]()
    for line, path in enumerate(paths):
        ones = [i for i in binary if columns.cells[i][line].casefold() in _TRUE]
        labels.append(columns.names[ones[0]] if len(ones) == 1 else "")
        if len(ones) > 1:
            several.append(f"{path}: {', '.join(columns.names[i] for i in ones[:4])}")
    if several:
        raise _multi_label(f"{len(several):,} of {len(paths):,} lines", several[:2], columns)
    columns.notes.append(
        f"labels are the columns of zeros and ones: "
        f"{list_examples([columns.names[i] for i in binary])}"
    )
    return labels


@dataclass(frozen=True)
class _SplitReading:
    """One way to read the splits of a table."""

    columns: Sequence[int]
    name: str
    cells: list[str]
    splits: list[str | None]
    note: str = ""


def _find_splits(
    columns: _Columns, options: ListOptions, *, has_labels: bool
) -> tuple[list[str], list[str | None] | None]:
    """Return the split of each line as written and as read; `[""]` and None without splits."""
    nothing = [""] * len(columns.cells[0]), None
    if options.split_column is not None:
        is_none = options.split_column == NONE and NONE not in columns.names
        if is_none:
            return nothing
        column = columns.requested(options.split_column, "data.split_column")
        is_flag = _marked_split(columns.names[column]) is not None
        reading = _read_flags(columns, [column]) if is_flag else None
        reading = reading or _read_split_column(columns, column)
        return _use_splits([reading], columns)
    readings = _split_readings(columns, has_labels)
    if not readings:
        return nothing
    first = readings[0]
    for other in readings[1:]:
        if other.splits != first.splits:
            raise DataError(
                f"two readings of the splits: {_describe_splits(first)}; {_describe_splits(other)}",
                where=columns.where,
                fix=" or ".join(
                    f"data.split_column={_quote(reading.name)}" for reading in (first, other)
                )
                + f", or data.split_column={NONE}",
            )
    return _use_splits(readings, columns)


def _use_splits(
    readings: Sequence[_SplitReading], columns: _Columns
) -> tuple[list[str], list[str | None]]:
    """Return the splits of the first of equal readings; the columns of all are used up."""
    columns.used.update(column for reading in readings for column in reading.columns)
    columns.notes += [readings[0].note] if readings[0].note else []
    return readings[0].cells, readings[0].splits


def _split_readings(columns: _Columns, has_labels: bool) -> list[_SplitReading]:
    """Return the readings of all columns that hold splits."""
    readings = []
    named_after_several = [
        column
        for column in columns.find(columns.names)
        if len({SPLIT_WORDS.get(word) for word in split_words(columns.names[column])} - {None}) > 1
    ]
    for column in dict.fromkeys([*columns.find(SPLIT_COLUMNS), *named_after_several]):
        reading = _read_split_column(columns, column)
        if any(cell and split for cell, split in zip(reading.cells, reading.splits, strict=True)):
            readings.append(reading)
        elif fold_column(columns.names[column]).endswith(("split", "splits")):
            readings.append(reading)  # the values are an error, which the check of rows reports
        elif any(reading.cells):
            columns.notes.append(
                f"not read as a split: {columns.describe(column)} (data.split_column="
                f"{_quote(columns.names[column])} reads it)"
            )
    named = {
        *named_after_several,
        *columns.find((*SPLIT_COLUMNS, *FLAG_COLUMNS, *FOLD_COLUMNS)),
        *columns.used,
    }
    by_content = []
    for column in range(len(columns.names)):
        if column in named:
            continue
        reading = _read_split_column(columns, column)
        splits = {s for s, c in zip(reading.splits, reading.cells, strict=True) if c.strip()}
        if None not in splits and len(splits) > 1:
            by_content.append(reading)
    has_splits = bool(readings or by_content)
    flags = _flag_columns(columns, has_labels=has_labels, has_splits=has_splits)
    if reading_of_flags := _read_flags(columns, flags):
        readings.append(reading_of_flags)
    return readings + by_content


def _read_split_column(columns: _Columns, column: int) -> _SplitReading:
    """Read a column of names of splits; empty cells mean training."""
    name, cells = columns.names[column], columns.cells[column]
    values = {cell for cell in cells if cell}
    if fold_column(name) == "partition" and values == set(_CELEBA):
        note = f"splits are those of {name}: 0 is train, 1 is val, 2 is test, as in CelebA"
        return _SplitReading(
            [column], name, cells, [_CELEBA.get(cell, "train") for cell in cells], note
        )
    split_of = match_split_names(sorted(values))
    short = {cell: _SHORT[fold] for cell in values if (fold := fold_column(cell)) in _SHORT}
    if len(set(short.values())) > 1:
        split_of |= short
    read = {cell: _FER2013.get(fold_column(cell)) or split_of.get(cell) for cell in values}
    read[""] = "train"
    pairs = [f"{c} is {s}" for c, s in sorted(read.items()) if c and s and c.casefold() != s]
    note = f"splits are those of {name}" + (f": {list_examples(pairs)}" if pairs else "")
    note = note if pairs or fold_column(name) != "split" else ""
    return _SplitReading([column], name, cells, [read[cell] for cell in cells], note)


def _flag_split(name: str) -> str | None:
    """Return the split that a column of flags marks: `is_valid`, `is_training_image`, `test`.

    Other names with `valid` are no flags: they often say that an image is in order.
    """
    if (split := FLAG_COLUMNS.get(fold_column(name))) is not None:
        return split
    parsed = parse_split_name(name)
    is_flag = parsed and _FLAG_WORDS.issuperset(parsed.rest) and "valid" not in split_words(name)
    return parsed.split if parsed and is_flag else None


def _marked_split(name: str) -> str | None:
    """Return the split that a column marks if it is one of flags, as `data.split_column` says."""
    parsed = parse_split_name(name)
    return _flag_split(name) or (parsed.split if parsed else None)


def _flag_columns(columns: _Columns, *, has_labels: bool, has_splits: bool) -> list[int]:
    """Return the columns of flags for splits, and note those that are not used.

    Args:
        has_labels: otherwise `train` may be a class with a column of zeros and ones.
        has_splits: another column holds the splits.
    """
    flags = columns.find(FLAG_COLUMNS)
    if not has_labels:
        return flags
    named = [c for c in range(len(columns.names)) if c not in (*flags, *columns.used)]
    flags += [column for column in named if _flag_split(columns.names[column])]
    flags = [column for column in flags if _are_flags(columns.cells[column])]
    for column in named:
        name, cells = columns.names[column], columns.cells[column]
        is_possible = parse_split_name(name) is not None and any(cells) and _are_flags(cells)
        if column in flags or not is_possible:
            continue
        # An image is valid if it is in order, too, but then most images are.
        marked = [cell.casefold() in _TRUE for cell in cells]
        is_minority = not flags and not has_splits and 0 < sum(marked) < len(marked) / 2
        is_complement = bool(flags) and not any(
            is_marked and any(columns.cells[flag][line].casefold() in _TRUE for flag in flags)
            for line, is_marked in enumerate(marked)
        )
        if fold_column(name) == "valid" and (is_minority or is_complement):
            flags.append(column)
        else:
            columns.notes.append(
                f"not read as a split: {columns.describe(column)} (data.split_column="
                f"{_quote(name)} reads it)"
            )
    return flags


def _are_flags(cells: Sequence[str]) -> bool:
    return {cell.casefold() for cell in cells} <= _TRUE | _FALSE


def _read_flags(columns: _Columns, flags: Sequence[int]) -> _SplitReading | None:
    """Read columns such as `is_valid` and `is_test`, together; None if there is none.

    Lines without a flag are training images, or else (with `is_train`) test images.
    """
    flags = [column for column in flags if _are_flags(columns.cells[column])]
    if not flags:
        return None
    split_of = {column: _marked_split(columns.names[column]) for column in flags}
    unused = [split for split in ("train", "test", "val") if split not in split_of.values()]
    rest = unused[0] if unused else None
    cells, splits = list[str](), list[str | None]()
    for line in range(len(columns.cells[0])):
        marked = [c for c in flags if columns.cells[c][line].casefold() in _TRUE]
        names = {split_of[c] for c in marked}
        cells.append(" and ".join(columns.names[c] for c in marked))
        splits.append((names.pop() if names else rest) if len(names) < 2 else None)
    pairs = ", ".join(f"{columns.names[c]} is {split_of[c]}" for c in flags)
    note = f"splits are those of columns: {pairs}, other lines are {rest}"
    return _SplitReading(flags, columns.names[flags[0]], cells, splits, note)


def _describe_splits(reading: _SplitReading) -> str:
    counts = {split: reading.splits.count(split) for split in ("train", "val", "test")}
    parts = ", ".join(f"{split} {count:,}" for split, count in counts.items() if count)
    return f"{reading.name} ({parts})"


def _note_folds(columns: _Columns, has_test: bool) -> None:
    """Offer a column of folds to `--folds`, as groups."""
    for column in columns.find(FOLD_COLUMNS):
        name = columns.names[column]
        count = len({cell for cell in columns.cells[column] if cell})
        note = f"{name} has {count:,} values and is not read as a split"
        folds = count if has_test else count - 1
        if folds > 1:
            held_out = "" if has_test else ", one of which is held out for testing"
            note += f": --folds {folds} data.group={_quote(name)} trains on these folds{held_out}"
        columns.notes.append(note)
