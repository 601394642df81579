"""Read tables from files: CSV in the dialects of spreadsheets, plain lists, JSON and parquet.

Every format becomes a `Table` of text. What its columns mean is the topic of `list_columns`.
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlens.data.layout import match_split_names
from convlens.data.types import is_image_name
from convlens.errors import DataError

DELIMITERS = ",;\t|"
MAX_SAMPLED_LINES = 20  # lines that the delimiter is chosen by
# UTF-32 first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
_LINE_END = r"(?:\r\n|\r|\n)"
_SEPARATOR_LINE = re.compile(rf'"?sep=(.)"?[,;\t]*{_LINE_END}', re.IGNORECASE)
_COMMENT_LINE = re.compile(rf"[ \t]*(?:#|//)([^\r\n]*){_LINE_END}|[ \t]*{_LINE_END}")
_SINGLE_QUOTED = re.compile(r"\s*'[^']*'\s*")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")

Line = tuple[int, list[str]]
Record = Mapping[str, Any]
IsKnownColumn = Callable[[str], bool]


@dataclass(frozen=True)
class Table:
    """The cells of a file, as text.

    Attributes:
        columns: names of the columns; None if the first line may be a header or data.
        lines: number and cells of each line that is not blank.
        notes: how the file was read, if that is not obvious.
    """

    columns: list[str] | None
    lines: list[Line]
    notes: tuple[str, ...] = ()


def read_table(path: Path, is_known_column: IsKnownColumn) -> Table:
    """Read a table from a file, in the format of its suffix (`TABLE_READERS`).

    Args:
        is_known_column: whether a cell is the usual name of a column; helps to find the delimiter.

    Raises:
        DataError: the file is not readable or not in this format.
    """
    return TABLE_READERS[path.suffix.lower()](path, is_known_column)


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read this file: {error.strerror}", where=str(path)) from error
    marks = (name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark))
    encoding = next(marks, "utf-8")
    if encoding == "utf-8" and b"\0" in content[:1000]:
        # UTF-16 without a mark: the upper bytes of most characters are zero.
        encoding = "utf-16-le" if content[1:1000:2].count(0) > content[:1000:2].count(0) else ""
        encoding = encoding or "utf-16-be"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"this file is not {encoding.removesuffix('-sig').upper()} text"
            + _describe_undecodable_line(content, error.start),
            where=str(path),
            fix="save it as UTF-8 (in Excel: save as type CSV UTF-8)",
        ) from error


def _describe_undecodable_line(content: bytes, position: int) -> str:
    """Return number and text of a line, as Windows would read it, for an error message."""
    number = content.count(b"\n", 0, position) + 1
    start = content.rfind(b"\n", 0, position) + 1
    line = content[start : position + 40].splitlines()[0]
    return f" (line {number}, in Windows-1252: {line.decode('cp1252', 'replace')!r})"


def _read_delimited(path: Path, is_known_column: IsKnownColumn) -> Table:
    """Read a CSV with any usual delimiter, or a list with a path and a label in each line."""
    text = _read_text(path)
    skipped = 0  # lines before the table
    delimiter = None
    if separator := _SEPARATOR_LINE.match(text):
        delimiter, text, skipped = separator[1], text[separator.end() :], 1
    text, num_comments = _skip_comments(text, is_known_column)
    skipped += num_comments
    is_csv = path.suffix.lower() in (".csv", ".tsv")
    delimiter = delimiter or _guess_delimiter(text, is_known_column, is_csv)
    if delimiter is None:
        lines = _split_at_blanks(text, is_known_column)
    else:
        try:
            # In a StringIO with newline="", csv recognizes each kind of line end.
            reader = csv.reader(
                io.StringIO(text, newline=""),
                delimiter=delimiter,
                quotechar=_find_quote(text, delimiter),
                skipinitialspace=True,
            )
            lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
        except csv.Error as error:
            raise DataError(f"can't read this CSV: {error}", where=str(path)) from error
    width = len(lines[0][1]) if lines else 0
    # A comment between data has too few cells, or else it is an image whose name begins with #.
    lines = [
        (number + skipped, cells)
        for number, cells in lines
        if not (cells[0].lstrip().startswith("#") and len(cells) < width)
    ]
    return Table(None, lines)


def _find_quote(text: str, delimiter: str) -> str:
    """Return the character that cells are quoted with: single quotes if all of the header are."""
    header = re.split(_LINE_END, text, maxsplit=1)[0].split(delimiter)
    return "'" if len(header) > 1 and all(map(_SINGLE_QUOTED.fullmatch, header)) else '"'


def _skip_comments(text: str, is_known_column: IsKnownColumn) -> tuple[str, int]:
    """Return the text after the comments at its beginning, and the number of their lines.

    A header may be a comment, too (`# path,label`); it is returned as an ordinary one.
    """
    start, count, header = 0, 0, ""
    while match := _COMMENT_LINE.match(text, start):
        comment = (match[1] or "").strip("# \t")
        cells = re.split(r"[,;\t|]", comment)
        if any(is_image_name(cell.strip()) for cell in cells):
            break  # an image whose name begins with #
        if comment:
            header = comment if len(cells) > 1 and all(map(is_known_column, cells)) else ""
        start, count = match.end(), count + 1
    if header:
        first_line = re.split(_LINE_END, text[start:], maxsplit=1)[0]
        if not any(map(is_known_column, re.split(r"[,;\t|]", first_line))):
            return f"{header}\n{text[start:]}", count - 1
    return text[start:], count


def _guess_delimiter(text: str, is_known_column: IsKnownColumn, is_csv: bool) -> str | None:
    """Return the delimiter of a table; None if its lines are a path, a blank and a label.

    The best one gives the most column names that are known, then lines of equal length, then the
    most cells.

    Args:
        is_csv: lines may have unequal lengths (which is an error to be reported).
    """

    def score(delimiter: str) -> tuple[int, bool, int]:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        try:
            lines = list(itertools.islice(filter(None, reader), MAX_SAMPLED_LINES))
        except csv.Error:
            lines = []
        if not lines or len(lines[0]) < 2:
            return 0, False, 1
        known = sum(map(is_known_column, lines[0]))
        return known, all(len(line) == len(lines[0]) for line in lines), len(lines[0])

    scores = {delimiter: score(delimiter) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=scores.__getitem__)
    known, is_regular, num_cells = scores[best]
    return best if num_cells > 1 and (known or is_regular or is_csv) else None


def _split_at_blanks(text: str, is_known_column: IsKnownColumn) -> list[Line]:
    """Return the cells of lines without a delimiter.

    They are a path, which may contain blanks, and a label; or each word is a cell, if all lines
    have equally many and all but the first are numbers: `Abyssinian_100 1 1 1`.
    """
    lines = [(n, line) for n, line in enumerate(re.split(_LINE_END, text), 1) if line.strip()]
    # Comments between data become lines of a single cell, which the caller leaves out.
    words = [line.split() for _, line in lines if not line.lstrip().startswith("#")]
    data = words[1:] if words and any(map(is_known_column, words[0])) else words
    firsts = {cells[0] for cells in data}
    is_regular = len(set(map(len, words))) == 1 and len(words[0]) > 2
    are_numbers = all(_NUMBER.fullmatch(word) for cells in data for word in cells[1:])
    if _are_ids_and_labels(data):
        return [
            (n, [line] if line.lstrip()[0] == "#" else line.split(None, 1)) for n, line in lines
        ]
    if is_regular and are_numbers and len(firsts) == len(data) > 1:
        return [(n, [line] if line.lstrip()[0] == "#" else line.split()) for n, line in lines]
    cells = [(number, line.rsplit(None, 1)) for number, line in lines]
    if all(len(each) == 2 and each[0].endswith(":") for _, each in cells):  # `img/a.png: cat`
        return [(number, [path.rstrip(" :"), label]) for number, (path, label) in cells]
    return cells


def _are_ids_and_labels(data: Sequence[Sequence[str]]) -> bool:
    """Return whether the first word of each line is an id, and the rest a label with blanks.

    `0034309 Boeing 707-320`: the ids are different and have digits, some labels have several words,
    and no file name is behind a blank.
    """
    ids = {cells[0] for cells in data}
    last_but_one = [cells[-2] for cells in data if len(cells) > 2]
    have_numbers = all(any(map(str.isdecimal, cells[0])) for cells in data)
    are_words = not all(_NUMBER.fullmatch(word) for cells in data for word in cells[1:])
    return (
        bool(last_but_one)
        and not any(map(is_image_name, last_but_one))
        and len(ids) == len(data)
        and all(len(cells) > 1 for cells in data)
        and have_numbers
        and are_words
    )


def _read_json(path: Path, is_known_column: IsKnownColumn) -> Table:
    text = _read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"this file is not JSON: {error}", where=str(path)) from error
    records = _records_from_json(content, is_known_column)
    if records is None:
        kind = f"keys {', '.join(list(content)[:5])}" if isinstance(content, dict) else "no records"
        raise DataError(
            f"this JSON file is not a list of images: it has {kind}",
            where=str(path),
            fix='write a list of records: [{"path": "img/a.png", "label": "cat"}, ...]',
        )
    return _table_from_records(records)


def _records_from_json(content: Any, is_known_column: IsKnownColumn) -> list[Record] | None:
    """Return the records in a JSON document, one for each image; None if there are none."""
    if isinstance(content, list):
        if not all(map(_is_record, content)):
            return None
        return _records_from_label_studio(content) or content
    if not isinstance(content, dict) or not content:
        return None
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        return _records_from_coco(content)
    if set(match_split_names(content)) == set(content):
        return _records_of_splits(content, is_known_column)
    values = list(content.values())
    if all(_is_record(value) and "file_attributes" in value for value in values):
        # An export of VGG Image Annotator; its regions are about parts of the images.
        return [{"filename": v.get("filename"), **v["file_attributes"]} for v in values]
    if all(map(_is_record, values)) and all(map(is_image_name, content)):
        return [{"path": path, **record} for path, record in content.items()]
    if all(isinstance(value, str | int | float) for value in values) or (
        all(map(is_image_name, content)) and all(isinstance(value, list) for value in values)
    ):
        return [{"path": path, "label": label} for path, label in content.items()]
    if all(isinstance(value, list) for value in values):
        cells = [cell for value in values for cell in value]
        lengths = {len(value) for value in values}
        has_known_column = any(map(is_known_column, content))
        are_paths = all(isinstance(cell, str) for cell in cells) and len(set(cells)) == len(cells)
        if cells and are_paths and not has_known_column and len(values) > 1:
            return [{"path": p, "label": label} for label, paths in content.items() for p in paths]
        if len(lengths) == 1 and not any(isinstance(cell, dict | list) for cell in cells):
            rows = zip(*values, strict=True)
            return [dict(zip(content, row, strict=True)) for row in rows]  # {column: cells}
    tables = [v for v in values if isinstance(v, list) and v and all(map(_is_record, v))]
    return tables[0] if len(tables) == 1 else None


def _is_record(value: Any) -> bool:
    return isinstance(value, dict)


def _records_of_splits(
    content: Mapping[str, Any], is_known_column: IsKnownColumn
) -> list[Record] | None:
    """Return the records of a document with a value for each split: `{"train": ..., "test": ...}`.

    Each value is a list of paths, or any other document.
    """
    joined = list[Record]()
    for split, value in content.items():
        records: list[Record] | None
        if isinstance(value, list) and all(isinstance(path, str) for path in value):
            records = [{"path": path} for path in value]
        else:
            records = _records_from_json(value, is_known_column)
        if records is None:
            return None
        joined += [{**record, "split": split} for record in records]
    return joined


def _records_from_label_studio(records: Sequence[Record]) -> list[Record] | None:
    """Return the images and choices of an export of Label Studio (JSON); None for other records."""
    try:
        return [
            {
                **record["data"],
                "choice": sorted(
                    {
                        choice
                        for annotation in record["annotations"]
                        for result in annotation["result"]
                        for choice in result["value"].get("choices", ())
                    }
                ),
            }
            for record in records
        ]
    except (AttributeError, KeyError, TypeError):
        return None


def _table_from_records(records: Sequence[Record]) -> Table:
    columns = list(dict.fromkeys(key for record in records for key in record))
    lines = [
        (number, [_cell_text(record.get(column)) for column in columns])
        for number, record in enumerate(records, 1)
    ]
    return Table(columns, lines)


def _records_from_coco(content: Mapping[str, Any]) -> list[Record] | None:
    """Return the classes of the images of a COCO file (cocodataset.org/#format-data)."""
    try:
        names = {entry["id"]: str(entry["name"]) for entry in content.get("categories", ())}
        labels: dict[Any, set[str]] = {entry["id"]: set() for entry in content["images"]}
        for entry in content["annotations"]:
            labels[entry["image_id"]].add(
                names.get(entry["category_id"], str(entry["category_id"]))
            )
        return [
            {"file_name": entry["file_name"], "label": sorted(labels[entry["id"]])}
            for entry in content["images"]
        ]
    except (KeyError, TypeError):
        return None


def _cell_text(value: Any) -> str:
    """Return a value of JSON or parquet as text; lists of several values as JSON."""
    if isinstance(value, list | tuple) and len(value) <= 1:
        value = value[0] if value else None
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:  # an image of `datasets`
        value = value["path"]
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps
        return str(int(value))
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)


def _read_json_lines(path: Path, _: IsKnownColumn) -> Table:
    records, numbers = [], []
    for number, line in enumerate(re.split(_LINE_END, _read_text(path)), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} is not JSON: {error}", where=str(path)) from error
        if not isinstance(record, dict):
            raise DataError(f"line {number} is not a record: {line[:60]}", where=str(path))
        records.append(record)
        numbers.append(number)
    table = _table_from_records(records)
    cells = (cells for _, cells in table.lines)
    return Table(table.columns, list(zip(numbers, cells, strict=True)))


def _read_parquet(path: Path, _: IsKnownColumn) -> Table:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            "reading a parquet file needs pyarrow", where=str(path), fix="pip install pyarrow"
        ) from error
    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise DataError(f"can't read this parquet file: {error}", where=str(path)) from error
    _refuse_embedded_images(records, path)
    return _table_from_records(records)


def _refuse_embedded_images(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    for record in records:
        for column, value in record.items():
            content = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(content, bytes):
                raise DataError(
                    f"column {column!r} holds the images themselves, not their paths",
                    where=str(path),
                    fix="write the images to files, one folder for each class, and name the folder",
                )


# How a file is read, by its suffix.
TABLE_READERS: dict[str, Callable[[Path, IsKnownColumn], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".txt": _read_delimited,
    ".lst": _read_delimited,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
