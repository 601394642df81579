"""CSV files that list images: columns, splits, groups, and everything that can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlens.data.image_list import escape_csv_formula, unescape_csv_formula
from convlens.data.sources import find_source
from convlens.errors import DataError, UsageError
from helpers.datasets import write_image


def write_csv(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_splits_and_groups_are_read(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / "img" / f"{i}.png", i)
    text = (
        "\ufeffPath;label;split;patient\nimg/0.png;b;train;p1\nimg/1.png;a;;p1\n"
        "img/2.png;a;training;p2\n\nimg/3.png;b;valid;p3\nimg/4.png;a;Test;p4\n"
    )
    source = find_source(write_csv(tmp_path / "all.csv", text), group="patient")
    assert source.classes == ("a", "b")
    train = source.parts["train"]
    assert train.labels.tolist() == [1, 0, 0]
    assert list(train.ids) == ["img/0.png", "img/1.png", "img/2.png"]
    assert train.groups == ["p1", "p1", "p2"]
    assert train.images[2] == str(tmp_path / "img" / "2.png")
    assert {s: len(p.labels) for s, p in source.parts.items()} == {"train": 3, "val": 1, "test": 1}
    with pytest.raises(UsageError, match="no column 'pacient'") as caught:
        find_source(str(tmp_path / "all.csv"), group="pacient")
    assert "patient" in caught.value.fix


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png")
    write_image(tmp_path / "1.png")
    (tmp_path / "x.txt").write_text("x")
    text = (
        "path,label,split,g\n0.png,a,train,p\n1.png,b,train,q\ngone.png,a,train,r\n0.png,b,test,p\n"
        "1.png,,train,q\n1.png,b,tset,q\nx.txt,a,train,s\n1.png,c,test,q\nshort.png,a\n"
    )
    with pytest.raises(DataError) as caught:
        find_source(write_csv(tmp_path / "a.csv", text), group="g")
    for part in (
        "files that do not exist: gone.png",
        "lines without a label: line 6",
        "not train, val or test: tset",
        "without the extension of an image: x.txt",
        "missing cells: line 10",
        "files with two labels: 0.png, 1.png",
        "files in two splits: 0.png, 1.png",
        "groups in two splits: p, q",
        "classes in test that train lacks: c",
    ):
        assert part in caught.value.what


@pytest.mark.parametrize(
    ("text", "message", "classes"),
    [
        ("0.png,a,\n1.png,a,\n", "only one class: a", ("a",)),
        (
            "0.png,a,\n1.png,b,test\n",
            "only one class: a; classes in test that train lacks: b",
            ("a", "b"),
        ),
        ("0.png,a,test\n1.png,b,test\n", "no training images", ("a", "b")),
    ],
)
def test_a_single_class_is_only_accepted_for_evaluation(
    tmp_path: Path, text: str, message: str, classes: tuple[str, ...]
) -> None:
    write_image(tmp_path / "0.png")
    write_image(tmp_path / "1.png")
    name = write_csv(tmp_path / "a.csv", f"path,label,split\n{text}")
    with pytest.raises(DataError, match=message):
        find_source(name)
    assert find_source(name, tested=True).classes == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no images"),
        (b"path,label\n", "lists no images"),
        (b"a,b\n1,2\n", "no column 'path'"),
        (b"path,x\n1,2\n", "no column 'label'"),
        (b"path,label\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_files_that_are_not_a_list_of_images_are_reported(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_source(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("cell", "escaped"), [("=1+1", "'=1+1"), ("'-x", "''-x"), ("cat", "cat"), ("'cat", "'cat")]
)
def test_formulas_are_escaped_and_unescaped(cell: str, escaped: str) -> None:
    assert escape_csv_formula(cell) == escaped
    assert unescape_csv_formula(escaped) == cell
