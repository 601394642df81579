"""Tables in the formats and dialects that spreadsheets and scripts write."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from convlens.data.list_columns import is_known_column
from convlens.data.table_files import Table, read_table
from convlens.errors import DataError

ROWS = [["img/a.png", "cat"], ["img/b c.png", "dog"]]


def read(path: Path, content: bytes | str, encoding: str = "utf-8") -> Table:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return read_table(path, is_known_column)


def cells(table: Table) -> list[list[str]]:
    return [[cell.strip() for cell in row] for _, row in table.lines]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_encodings_are_recognized(tmp_path: Path, encoding: str) -> None:
    table = read(tmp_path / "a.csv", "path,label\nimg/ä.png,Kätzchen\n", encoding)
    assert cells(table) == [["path", "label"], ["img/ä.png", "Kätzchen"]]


def test_another_encoding_is_an_error_that_shows_the_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"not UTF-8 text \(line 2, in Windows-1252: 'a.png,café"
    ) as e:
        read(tmp_path / "a.csv", "path,label\na.png,café\n", "cp1252")
    assert "UTF-8" in e.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\npath;label\nimg/a.png;cat\nimg/b c.png;dog\n",
        '"sep=|"\r\n"path"|"label"\r\n"img/a.png"|"cat"\r\n"img/b c.png"|"dog"\r\n',
        "# by a script\n\n# path,label next\npath,label\nimg/a.png,cat\nimg/b c.png,dog",
        "# path,label\nimg/a.png,cat\nimg/b c.png,dog\n",
        "path|label\nimg/a.png|cat\n# half time\nimg/b c.png|dog\n",
        "path\tlabel\rimg/a.png\tcat\rimg/b c.png\tdog\r",
        '"path", "label"\n"img/a.png", "cat"\n"img/b c.png", "dog"\n',
        "'path','label'\n'img/a.png','cat'\n'img/b c.png','dog'\n",
        "// by a tool\npath|label\nimg/a.png|cat\nimg/b c.png|dog\n",
    ],
)
def test_dialects_give_the_same_cells(tmp_path: Path, text: str) -> None:
    assert cells(read(tmp_path / "a.csv", text)) == [["path", "label"], *ROWS]


def test_lines_have_their_numbers_in_the_file(tmp_path: Path) -> None:
    table = read(tmp_path / "a.csv", "sep=,\n# comment\npath,label\n\na.png,cat\n")
    assert [number for number, _ in table.lines] == [3, 5]


def test_an_image_whose_name_begins_with_a_hash_is_not_a_comment(tmp_path: Path) -> None:
    assert cells(read(tmp_path / "a.csv", "#1.png,cat\n#2.png,dog\n")) == [
        ["#1.png", "cat"],
        ["#2.png", "dog"],
    ]


def test_a_list_has_a_path_with_blanks_and_a_label(tmp_path: Path) -> None:
    table = read(tmp_path / "list.txt", "img/a.png 0\nC:\\my pics\\b c.png 1\n")
    assert cells(table) == [["img/a.png", "0"], ["C:\\my pics\\b c.png", "1"]]


def test_words_are_cells_if_all_but_the_first_are_numbers(tmp_path: Path) -> None:
    text = "# Image CLASS SPECIES\nAbyssinian_1 1 1\n# dogs\nbeagle_7 2 1\n"
    table = read(tmp_path / "list.txt", text)
    assert table.lines == [(2, ["Abyssinian_1", "1", "1"]), (4, ["beagle_7", "2", "1"])]
    header = read(tmp_path / "list.txt", "path label width\na.png 1 20.5\nb.png 2 30\n")
    assert cells(header)[1:] == [["a.png", "1", "20.5"], ["b.png", "2", "30"]]
    # An id and a label with blanks, or a path with a colon behind it.
    text = "0034309 Boeing 707-320\n0034958 DR-400\n"
    ids = [["0034309", "Boeing 707-320"], ["0034958", "DR-400"]]
    assert cells(read(tmp_path / "list.txt", text)) == ids
    colons = read(tmp_path / "list.txt", "img/a 1.png: cat\nimg/b.png : dog\n")
    assert cells(colons) == [["img/a 1.png", "cat"], ["img/b.png", "dog"]]
    # Otherwise a path may have blanks.
    for text in ("my cat 1.png 0\nmy dog 2.png 1\n", "IMG 1 0\nIMG 2 1\n", "a b 0\n"):
        rows = [line.rsplit(" ", 1) for line in text.splitlines()]
        assert cells(read(tmp_path / "list.txt", text)) == rows


RECORDS = [{"file": "a.png", "label": 0}, {"file": "b.png", "label": 1, "extra": None}]
COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {"image_id": image, "category_id": category}
        for image, category in ((7, 1), (7, 1), (8, 1), (8, 2))
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}

LABEL_STUDIO = [
    {
        "id": 1,
        "data": {"image": "/data/upload/1/x-a.png"},
        "annotations": [{"result": [{"value": {"choices": ["cat"]}}]}],
    },
    {"id": 2, "data": {"image": "b.png"}, "annotations": []},
]


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        (RECORDS, ["file", "label", "extra"], [["a.png", "0", ""], ["b.png", "1", ""]]),
        ({"rows": RECORDS[:1], "version": 1}, ["file", "label"], [["a.png", "0"]]),
        ({"a.png": "cat", "b.png": 1.0}, ["path", "label"], [["a.png", "cat"], ["b.png", "1"]]),
        ({"path": ["a.png"], "y": [True]}, ["path", "y"], [["a.png", "True"]]),
        (COCO, ["file_name", "label"], [["a.png", "cat"], ["b.png", '["cat", "dog"]']]),
        (
            {"cat": ["a.png", "b.png"], "dog": ["c.png"]},
            ["path", "label"],
            [["a.png", "cat"], ["b.png", "cat"], ["c.png", "dog"]],
        ),
        ({"p": ["p/1"], "q": ["q/1"]}, ["path", "label"], [["p/1", "p"], ["q/1", "q"]]),
        (
            {"a": ["x.png", "y.png"], "b": ["cat", "cat"]},
            ["a", "b"],
            [["x.png", "cat"], ["y.png", "cat"]],
        ),
        ({"a.png": ["cat"], "b.png": []}, ["path", "label"], [["a.png", "cat"], ["b.png", ""]]),
        ({"a.png": {"class": "cat"}}, ["path", "class"], [["a.png", "cat"]]),
        (
            {"train": {"cat": ["a.png"], "dog": ["b.png"]}, "test": {"c.png": "cat"}},
            ["path", "label", "split"],
            [["a.png", "cat", "train"], ["b.png", "dog", "train"], ["c.png", "cat", "test"]],
        ),
        (
            {"train": ["cat/1.png"], "val": ["dog/2.png"]},
            ["path", "split"],
            [["cat/1.png", "train"], ["dog/2.png", "val"]],
        ),
        (
            [{"data": {"image": "a.png"}, "annotations": [{"result": [{"value": {"x": 1}}]}]}],
            ["image", "choice"],
            [["a.png", ""]],
        ),
        (LABEL_STUDIO, ["image", "choice"], [["/data/upload/1/x-a.png", "cat"], ["b.png", ""]]),
    ],
    ids=[
        "records",
        "records in a key",
        "label of each path",
        "columns",
        "COCO",
        "paths by class",
        "equally many paths by class",
        "columns without known names",
        "labels of each path",
        "record of each path",
        "documents by split",
        "paths by split",
        "boxes of Label Studio",
        "Label Studio",
    ],
)
def test_json_becomes_a_table(
    tmp_path: Path, content: object, columns: list[str], expected: list[list[str]]
) -> None:
    table = read(tmp_path / "a.json", json.dumps(content))
    assert (table.columns, cells(table)) == (columns, expected)


def test_labels_of_vgg_image_annotator_are_attributes_of_the_file(tmp_path: Path) -> None:
    content = {
        f"{name}123": {"filename": name, "size": 123, "file_attributes": {"kind": kind}}
        for name, kind in (("a.png", "cat"), ("b.png", "dog"))
    }
    table = read(tmp_path / "via.json", json.dumps(content))
    assert (table.columns, cells(table)) == (
        ["filename", "kind"],
        [["a.png", "cat"], ["b.png", "dog"]],
    )


def test_json_lines_become_a_table(tmp_path: Path) -> None:
    text = '\n{"file_name": "a.png", "label": ["cat"]}\n\n{"file_name": "b.png"}\n'
    table = read(tmp_path / "metadata.jsonl", text)
    assert table.columns == ["file_name", "label"]
    assert table.lines == [(2, ["a.png", "cat"]), (4, ["b.png", ""])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", '{"version": {"a": 1}}', "it has keys version"),
        ("a.json", "[1, 2]", "it has no records"),
        ("a.jsonl", '{"a": 1}\nx\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a record"),
    ],
)
def test_other_json_is_an_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs pyarrow") as caught:
        read(tmp_path / "a.parquet", b"")
    assert caught.value.fix == "pip install pyarrow"


@pytest.mark.parametrize("image", [{"bytes": b"\x89PNG", "path": None}, b"\x89PNG"])
def test_parquet_with_paths_is_read_and_with_pixels_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: object
) -> None:
    """The records are those that pyarrow returns, which the tests do not need."""
    records: list[dict[str, object]] = [{"image": {"bytes": None, "path": "a.png"}, "label": 3}]
    module = SimpleNamespace(read_table=lambda path: SimpleNamespace(to_pylist=lambda: records))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    table = read(tmp_path / "a.parquet", b"")
    assert (table.columns, cells(table)) == (["image", "label"], [["a.png", "3"]])
    records.append({"image": image, "label": 4})
    with pytest.raises(DataError, match="'image' holds the images themselves"):
        read(tmp_path / "a.parquet", b"")


def test_parquet_of_pyarrow_is_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"path": ["a.png"], "label": [3]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", is_known_column)
    assert (table.columns, cells(table)) == (["path", "label"], [["a.png", "3"]])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="can't read this parquet file"):
        read_table(tmp_path / "b.parquet", is_known_column)


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(names, names), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    header=st.sampled_from(
        ["path,label", "Image Path,Class Name", "FILE_NAME,class-id", "id,Breed"]
    ),
    separator_line=st.booleans(),
)
def test_every_dialect_of_csv_gives_the_cells_that_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    quoting: int,
    line_end: str,
    encoding: str,
    header: str,
    separator_line: bool,
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=line_end)  # type: ignore[arg-type]
    expected = [header.split(","), *([f"{path}.png", label] for path, label in rows)]
    writer.writerows(expected)
    content = (f"sep={delimiter}{line_end}" if separator_line else "") + text.getvalue()
    path = tmp_path_factory.getbasetemp() / "dialect.csv"
    assert cells(read(path, content, encoding)) == expected
