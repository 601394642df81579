"""Columns are recognized by the names that people use, or the key that chooses is named."""

from __future__ import annotations

import pytest

from convlens.data.list_columns import ListCells, ListOptions, fold_column, interpret_table
from convlens.data.table_files import Table
from convlens.errors import DataError, UsageError

FILES = {f"{i}.png" for i in range(1, 100)}
THREE = ["train", "val", "test"]


def interpret(header: str | None, lines: list[str], **options: object) -> ListCells:
    """Read lines with commas; the files are `1.png` to `99.png`, extensions may be missing."""

    def share(paths: list[str]) -> float:
        return sum(p in FILES or f"{p}.png" in FILES for p in paths) / max(1, len(paths))

    rows = [line.split(",") for line in ([] if header is None else [header]) + lines]
    return interpret_table(
        Table(None, list(enumerate(rows, 1))),
        "list.csv",
        ListOptions(**options),  # type: ignore[arg-type]
        share_of_files=share,  # type: ignore[arg-type]
        is_file=FILES.__contains__,
    )


def lines(*columns: list[str]) -> list[str]:
    """Return `1.png`, ... followed by the cells of the columns, repeated to 6 lines."""
    return [",".join([f"{i + 1}.png", *(c[i % len(c)] for c in columns)]) for i in range(6)]


@pytest.mark.parametrize(
    "header",
    ["path,label", "File Name,CLASS", "file_name,class-name", "filepath,breed", "image_id,label",
     "id,species", "name,label", "Image Path,ClassId", "img,target", "image,diagnosis",
     "isic_id,target", "Image_Name,Class_Label", "id_code,diagnosis", "fname,label",
     "FILENAME,y", "relative_path,category", "\ufeffpath,choice", "imageID,dx"],
)  # fmt: skip
def test_usual_names_are_recognized(header: str) -> None:
    cells = interpret(header, lines(["cat", "dog"]))
    assert cells.paths == [f"{i}.png" for i in range(1, 7)]
    assert cells.labels == ["cat", "dog"] * 3
    assert (cells.splits, cells.groups, cells.notes) == (None, None, ())
    assert cells.lines == [2, 3, 4, 5, 6, 7]


def test_an_ambiguous_name_needs_values_that_are_files() -> None:
    values = [f"{i},cat,{i}" for i in range(1, 20)]
    assert interpret("id,label,image", values).paths[0] == "1"
    cells = interpret("image,id,choice", [f"{i}.png,{i + 500},cat" for i in range(1, 20)])
    assert (cells.paths[0], cells.labels[0]) == ("1.png", "cat")
    with pytest.raises(DataError, match="no column 'path' among: id, label") as caught:
        interpret("id,label", [f"{i + 80},cat" for i in range(1, 41)])
    assert "48% of the values of id are files (81, 82)" in caught.value.fix
    assert "data.path_column=id" in caught.value.fix
    # 95% are enough.
    assert interpret("id,label", [f"{i + 4},cat" for i in range(1, 101)]).paths[0] == "5"


@pytest.mark.parametrize(
    ("header", "message", "fix"),
    [
        ("file_nam,label", "no column 'path' among: file_nam, label", "data.path_column=file_nam?"),
        ("a b,label", "no column 'path'", "did you mean data.path_column='a b'?"),
        ("path,lable", "no column 'label' among: path, lable", "data.label_column=lable?"),
        ("path,sort", "no column 'label'", "did you mean data.label_column=sort?"),
    ],
)
def test_near_misses_are_named(header: str, message: str, fix: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        interpret(header, lines(["cat", "dog"]))
    assert fix in caught.value.fix


def test_columns_can_be_chosen() -> None:
    cells = interpret(
        "a,b,my split,g",
        lines(["cat", "dog"], THREE, ["p", "q", "r"]),
        path_column="A",
        label_column="b",
        split_column="my_split",
        group="g",
    )
    assert cells.labels == ["cat", "dog"] * 3
    assert cells.splits == THREE * 2
    assert cells.groups == ["p", "q", "r"] * 2
    with pytest.raises(UsageError, match="no column 'patj' for") as caught:
        interpret("path,label", lines(["cat"]), path_column="patj")
    assert caught.value.fix == "did you mean path?"


@pytest.mark.parametrize(
    ("header", "numbers_first"),
    [
        ("path,label,name", True),
        ("path,class_name,class_id", False),
        ("path,target,category", True),
    ],
)
def test_names_of_classes_have_priority_over_their_numbers(
    header: str, numbers_first: bool
) -> None:
    columns = (["0", "1"], ["cat", "dog"]) if numbers_first else (["cat", "dog"], ["0", "1"])
    cells = interpret(header, lines(*columns))
    assert cells.labels == ["cat", "dog"] * 3
    number, name = header.split(",")[1:][:: 1 if numbers_first else -1]
    assert cells.notes == (
        f"labels are those of {name}, whose classes have the numbers of {number}",
    )


def test_columns_that_disagree_stop_with_both_readings() -> None:
    with pytest.raises(DataError) as caught:
        interpret("path,label,name", lines(["0", "1"], ["cat", "dog", "cow"]))
    assert "name (3 values: cat, cow, dog) and label (2 values: 0, 1)" in caught.value.what
    assert caught.value.fix == "data.label_column=name or data.label_column=label"
    # An identifier is not another label.
    names = [f"tom{i}" for i in range(6)]
    assert interpret("path,label,name", lines(["0", "1"], names)).labels == ["0", "1"] * 3
    # Neither is a finer one beside a column called label.
    cells = interpret("path,label,breed", lines(["cat", "dog"], ["a", "b", "c"]))
    assert cells.labels == ["cat", "dog"] * 3
    assert "data.label_column=breed uses the latter" in cells.notes[0]


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("split", THREE, None),
        ("subset", ["Training", "validation", "TESTING"], "Training is train"),
        ("Usage", ["Training", "PublicTest", "PrivateTest"], "PublicTest is val"),
        ("partition", THREE, "splits are those of partition"),
        ("partition", ["0", "1", "2"], "0 is train, 1 is val, 2 is test, as in CelebA"),
        ("something", THREE, "splits are those of something"),
        ("part", ["fold_train", "fold_val", "fold_test"], "fold_val is val"),
        ("train_or_test", ["tr", "va", "te"], "te is test, tr is train, va is val"),
        ("TrainValTest", THREE, "splits are those of TrainValTest"),
    ],
)
def test_splits_are_read(name: str, values: list[str], note: str | None) -> None:
    cells = interpret(f"path,label,{name}", lines(["cat", "dog"], values))
    assert cells.splits == THREE * 2
    assert cells.split_cells == values * 2
    assert (note is None) == (cells.notes == ())
    assert note is None or note in cells.notes[0]


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("is_valid", (["True", "False"],), ["val", "train"] * 3),
        ("isTest", (["0", "1", ""],), ["train", "test", "train"] * 2),
        ("is_val,is_test", (["1", "0", "0"], ["0", "0", "1"]), ["val", "train", "test"] * 2),
        ("is_train", (["yes", "no"],), ["train", "test"] * 3),
        ("is_train,is_test", (["1", "0", "0"], ["0", "1", "0"]), ["train", "test", "val"] * 2),
        ("is_valid,is_test", (["1", "0"], ["1", "0"]), [None, "train"] * 3),
        ("is_training_image", (["1", "0"],), ["train", "test"] * 3),
        ("train", (["1", "0"],), ["train", "test"] * 3),
        ("train,val,test", (["1", "0", "0"], ["0", "1", "0"], ["0", "0", "1"]), THREE * 2),
        ("valid", (["1", "0", "0"],), ["val", "train", "train"] * 2),
        ("Valid,test", (["True", "False", ""], ["", "True", ""]), ["val", "test", "train"] * 2),
        (
            "test,valid,train",
            (["1", "0", "0"], ["0", "1", "0"], ["0", "0", "1"]),
            ["test", "val", "train"] * 2,
        ),
        ("used_for_training", (["1", "0"],), ["train", "test"] * 3),
        ("in_test,is_holdout", (["1", "0", "0"], ["0", "1", "0"]), ["test", "val", "train"] * 2),
        # An image that is in order, and a number, are no flags.
        ("valid,is_test", (["1"], ["1", "0"]), ["test", "train"] * 3),
        ("valid,test", (["1", "0"], ["7", "9"]), None),
        ("is_valid_image", (["1", "0"],), None),
    ],
)
def test_flags_are_read(
    header: str, columns: tuple[list[str], ...], expected: list[str | None] | None
) -> None:
    assert interpret(f"path,label,{header}", lines(["cat", "dog"], *columns)).splits == expected


@pytest.mark.parametrize("name", ["valid", "is_valid_image", "test_passed", "bullet train"])
def test_columns_that_may_be_flags_are_named_with_the_key_that_reads_them(name: str) -> None:
    rows = lines(["cat", "dog"], ["1", "1", "0"])
    cells = interpret(f"path,label,{name}", rows)
    quoted = f"'{name}'" if " " in name else name
    assert cells.splits is None
    assert cells.notes == (
        f"not read as a split: {name} (2 values: 0, 1) (data.split_column={quoted} reads it)",
    )
    marked = {"v": "val", "i": "val", "t": "test", "b": "train"}[name[0]]
    rest = "test" if marked == "train" else "train"
    assert (
        interpret(f"path,label,{name}", rows, split_column=name).splits
        == [marked, marked, rest] * 2
    )
    # Beside a column of splits, it is another fact about the image.
    cells = interpret(f"path,label,split,{name}", lines(["cat", "dog"], THREE, ["1", "0", "0"]))
    assert cells.splits == THREE * 2
    assert f"data.split_column={quoted} reads it" in cells.notes[0]


def test_flags_beside_columns_of_zeros_and_ones_are_no_classes() -> None:
    columns = (["1", "0"], ["0", "1"], ["0", "0", "1"])
    cells = interpret("path,cat,dog,valid", lines(*columns))
    assert cells.labels == ["cat", "dog"] * 3
    assert cells.splits == ["train", "train", "val"] * 2
    cells = interpret("path,cat,dog,valid", lines(*columns[:2], ["1"]))
    assert (cells.labels, cells.splits) == (["cat", "dog"] * 3, None)


def test_a_class_may_be_called_train_in_columns_of_zeros_and_ones() -> None:
    cells = interpret("path,car,train", lines(["1", "0"], ["0", "1"]))
    assert (cells.labels, cells.splits) == (["car", "train"] * 3, None)


def test_other_values_are_not_splits() -> None:
    cells = interpret("path,label,set,partition", lines(["cat", "dog"], ["A", "B"], ["0", "1"]))
    assert cells.splits is None
    assert "not read as a split: set (2 values: A, B)" in cells.notes[0]
    assert "not read as a split: partition (2 values: 0, 1)" in cells.notes[1]
    # In a column called split they are errors, which the check of rows lists.
    assert interpret("path,label,split", lines(["a", "b"], ["0", "1"])).splits == [None] * 6
    cells = interpret("path,label,subset", lines(["a", "b"], ["train", "tset"]))
    assert cells.splits == ["train", None] * 3


def test_a_column_named_after_several_splits_is_never_ignored() -> None:
    cells = interpret("path,label,train/test", lines(["cat", "dog"], ["A", "B", "B"]))
    assert cells.splits is None
    assert cells.notes[0].startswith("not read as a split: train/test (2 values: A, B)")


def test_columns_of_the_same_name_that_disagree_need_new_names() -> None:
    with pytest.raises(DataError, match="two columns may be the label and disagree") as caught:
        interpret("path,label,label", lines(["cat", "dog"], ["0", "1", "2"]))
    assert caught.value.fix == "give the two columns different names"


def test_two_readings_of_the_splits_stop() -> None:
    header, rows = "path,label,split,is_valid", lines(["a", "b"], ["train", "test"], ["0", "1"])
    with pytest.raises(DataError) as caught:
        interpret(header, rows)
    assert "split (train 3, test 3); is_valid (train 3, val 3)" in caught.value.what
    assert "data.split_column=split or data.split_column=is_valid" in caught.value.fix
    assert interpret(header, rows, split_column="is_valid").splits == ["train", "val"] * 3
    assert interpret(header, rows, split_column="none").splits is None
    # Two columns that agree are one reading.
    cells = interpret("path,label,split,is_valid", lines(["a"], ["train", "val"], ["0", "1"]))
    assert cells.splits == ["train", "val"] * 3


def test_classes_may_have_the_names_of_splits() -> None:
    cells = interpret("path,label", lines(["train", "test"]))
    assert (cells.labels, cells.splits) == (["train", "test"] * 3, None)


def test_a_column_of_folds_is_not_a_split() -> None:
    cells = interpret("path,label,kfold", lines(["a", "b"], ["0", "1", "2"]))
    assert cells.splits is None
    assert cells.notes == (
        "kfold has 3 values and is not read as a split: --folds 2 data.group=kfold trains on these "
        "folds, one of which is held out for testing",
    )
    cells = interpret("path,label,split,fold", lines(["a", "b"], ["train", "test"], ["0", "1"]))
    assert cells.notes[0].endswith("--folds 2 data.group=fold trains on these folds")


@pytest.mark.parametrize(
    ("rows", "paths", "labels"),
    [
        (["1.png,cat", "2.png,dog"], ["1.png", "2.png"], ["cat", "dog"]),
        (["gone.png,cat", "2.png,dog"], ["gone.png", "2.png"], ["cat", "dog"]),
        (["cat,1.png", "dog,2.png"], ["1.png", "2.png"], ["cat", "dog"]),
        (
            [f"{i},{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(1, 5)],
            [f"{i}.png" for i in range(1, 5)],
            ["cat", "dog"] * 2,
        ),
    ],
)
def test_a_file_without_header_is_read_by_position(
    rows: list[str], paths: list[str], labels: list[str]
) -> None:
    cells = interpret(None, rows)
    assert (cells.paths, cells.labels) == (paths, labels)
    assert cells.lines[0] == 1
    assert cells.notes[0].startswith("the first line is an image, not a header: column ")


def test_splits_in_a_file_without_header_are_not_the_labels() -> None:
    names = ["TRAIN", "VALIDATION", "TEST"]
    rows = [f"{names[i % 3]},{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(1, 7)]
    cells = interpret(None, rows)
    assert (cells.labels, cells.splits) == (["cat", "dog"] * 3, ["val", "test", "train"] * 2)
    # Without another column they are the labels.
    cells = interpret(None, [f"{i}.png,{names[i % 2]}" for i in range(1, 7)])
    assert (cells.labels, cells.splits) == (["VALIDATION", "TRAIN"] * 3, None)


def test_columns_of_zeros_and_ones_are_classes() -> None:
    header = "filename, cat, dog, split"
    cells = interpret(header, lines([" 1", " 0"], [" 0", " 1"], ["train", "test"]))
    assert cells.labels == ["cat", "dog"] * 3
    assert cells.splits == ["train", "test"] * 3
    assert "labels are the columns of zeros and ones: cat, dog" in cells.notes
    # A line without a class has no label, which the check of rows reports.
    assert interpret(header, lines(["1", "0"], ["0"], ["train"])).labels == ["cat", ""] * 3


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("filename,cat,dog", (["1", "0", "1"], ["0", "1", "1"])),
        ("path,label", (["cat|dog", "cat", "dog|cat"],)),
        ("path,labels", (["cat;dog", "cow", "cow;cat", "dog"],)),
    ],
)
def test_a_multi_label_set_is_refused(header: str, columns: tuple[list[str], ...]) -> None:
    with pytest.raises(DataError, match=r"multi-label set: \d of 6 lines") as caught:
        interpret(header, lines(*columns))
    assert "convlens trains single-label classifiers" in caught.value.what


def test_a_class_with_a_separator_in_its_name_is_one_class() -> None:
    labels = ["shirt; blouse", "coat", "dress; gown"]
    assert interpret("path,label", lines(labels)).labels == labels * 2


def test_a_list_of_paths_has_its_labels_in_the_folders() -> None:
    cells = interpret("path,split", ["cat/1.png,train", "dog/2.png,test"])
    assert cells.labels == ["cat", "dog"]
    assert "they are the folders of the images" in cells.notes[0]


def test_a_list_of_numbered_paths_has_its_labels_in_the_folders() -> None:
    """`images.txt` of CUB-200-2011."""
    cells = interpret(None, [f"{i},{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(1, 21)])
    assert cells.labels == ["cat", "dog"] * 10
    assert cells.paths[0] == "cat/1.png"


def test_a_csv_of_pixels_is_named() -> None:
    with pytest.raises(DataError, match="pixels holds pixels, not a file"):
        interpret("emotion,pixels", [f"{i},{' '.join(['70'] * 100)}" for i in range(3)])


def test_lines_with_missing_cells_are_left_to_the_check() -> None:
    cells = interpret("path,label", ["1.png,a", "2.png", "3.png,b,extra"])
    assert (cells.lines, cells.short_lines, cells.labels) == ([2, 4], [3], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "folded"), [("Image Path", "imagepath"), ("CLASS_ID-", "classid")]
)
def test_names_are_folded(name: str, folded: str) -> None:
    assert fold_column(name) == folded
