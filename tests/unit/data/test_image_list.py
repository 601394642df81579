"""Lists of images: their rows, splits and groups, and everything that can be wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from convlens.data.dataset import load_data
from convlens.data.folder_layout import LayoutOptions
from convlens.data.image_list import escape_csv_formula, unescape_csv_formula
from convlens.data.layout import ClassChoice, list_override
from convlens.data.list_columns import ListOptions
from convlens.data.sources import find_source
from convlens.data.types import DataSource
from convlens.errors import ConvlensError, DataError, UsageError
from convlens.recipe import DataConfig
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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images in `img/`: `cat_0.png` to `dog_2.png`."""
    for number, name in enumerate(NAMES):
        write_image(tmp_path / "set" / "img" / name, number)
    return tmp_path / "set"


NAMES = [f"{label}_{i}.png" for label in ("cat", "dog") for i in range(3)]


def read_rows_of(root: Path, header: str, row: str, **options: str) -> DataSource:
    """Read a CSV with a row for each image: a format of `name`, `label` and `i`."""
    rows = [row.format(name=n, label=n[:3], i=i) for i, n in enumerate(NAMES)]
    name = write_csv(root / "a.csv", "\n".join([header, *rows]))
    return find_source(name, lists=ListOptions(**options))  # type: ignore[arg-type]


def test_images_of_another_folder_are_found_or_named(images: Path) -> None:
    source = read_rows_of(images, "file_name,label", "{name},{label}")
    assert source.parts["train"].images[0] == str(images / "img" / "cat_0.png")
    assert list(source.parts["train"].ids) == NAMES
    assert source.notes == ("6 files were found in img",)
    (images / "img" / "dog_2.png").unlink()
    with pytest.raises(DataError) as caught:
        read_rows_of(images, "file_name,label", "{name},{label}")
    assert "img/cat_0.png is there, like 5 of 6: data.images=img" in caught.value.what
    assert caught.value.fix == "data.images=img"
    with pytest.raises(DataError, match=r"files that do not exist: dog_2.png"):
        read_rows_of(images, "file_name,label", "{name},{label}", images="img")


def test_the_folder_of_images_is_relative_to_the_list_or_absolute(images: Path) -> None:
    for folder in ("img", str(images / "img")):
        source = read_rows_of(images, "name,label", "{name},{label}", images=folder)
        assert source.parts["train"].images[5] == str(images / "img" / "dog_2.png")
    with pytest.raises(UsageError, match=r"data.images=imgs: no such folder"):
        read_rows_of(images, "name,label", "{name},{label}", images="imgs")


def test_the_cause_of_missing_files_is_named(images: Path) -> None:
    with pytest.raises(DataError, match="6 of 6 have a backslash") as caught:
        read_rows_of(images, "path,label", "gone\\{name}x,{label}")
    assert "data.images=FOLDER" in caught.value.fix


def test_a_moved_labels_csv_is_read(images: Path) -> None:
    """`convlens labels` writes absolute paths."""
    source = read_rows_of(images, "path,label,split", "/home/me/flowers/img/{name},{label},train")
    assert source.parts["train"].images[0] == str(images / "img" / "cat_0.png")
    assert "paths begin with /home/me/flowers, which is not here" in source.notes[0]


def test_equal_lines_count_once(images: Path) -> None:
    source = read_rows_of(images, "path,label", "img/{name},{label}\n./img/{name},{label}")
    assert list(source.parts["train"].ids) == [f"img/{name}" for name in NAMES]
    assert source.notes == ("6 lines that repeat a file with the same label count once",)


def test_files_with_several_labels_are_refused_as_a_multi_label_set(images: Path) -> None:
    with pytest.raises(DataError, match=r"files with two labels: cat_0.png") as caught:
        read_rows_of(images, "path,label", "img/{name},{label}\nimg/{name},animal")
    assert "convlens trains single-label classifiers" in caught.value.fix


def test_labels_that_look_alike_are_named(images: Path) -> None:
    text = "path,label\nimg/cat_0.png,cat\nimg/cat_1.png,c\u0430t\nimg/cat_2.png,cat\u200b\n"
    source = find_source(write_csv(images / "a.csv", text))
    assert source.classes == ("cat", "c\u0430t")
    assert source.notes == (
        "invisible characters were removed from the labels cat",
        "classes that look like the same one: 'cat' and 'c\u0430t' (with Cyrillic letters) "
        "(2, 1 images); data.rename merges them",
    )
    renamed = ListOptions(rename={"c\u0430t": "dog"})
    assert find_source(str(images / "a.csv"), lists=renamed).classes == ("cat", "dog")


def test_a_renamed_class_fits_the_training_classes(images: Path) -> None:
    text = "path,label,split\n" + "".join(
        f"img/{n},{n[:3].title() if i == 2 else n[:3]},{'val' if i % 3 == 2 else 'train'}\n"
        for i, n in enumerate(NAMES)
    )
    name = write_csv(images / "a.csv", text)
    with pytest.raises(
        DataError, match=r"classes in val that train lacks: Cat \(train has cat\)"
    ) as e:
        find_source(name)
    assert e.value.fix == """if it is the same class: 'data.rename={"Cat": "cat"}'"""
    source = find_source(name, lists=ListOptions(rename={"Cat": "cat"}))
    assert source.parts["val"].labels.tolist() == [0, 1]
    with pytest.raises(UsageError, match=r"data.rename: no class 'Dog'"):
        find_source(name, lists=ListOptions(rename={"Dog": "dog"}))


def test_splits_with_numbers_name_the_column_that_means_them(images: Path) -> None:
    with pytest.raises(DataError, match="splits that are not train, val or test: 0, 1") as caught:
        read_rows_of(images, "path,label,split", "img/{name},{label},{i}")
    assert "fix these lines" in caught.value.fix
    text = "path,label,split\n" + "".join(f"img/{n},{n[:3]},{i % 3}\n" for i, n in enumerate(NAMES))
    with pytest.raises(DataError) as caught:
        find_source(write_csv(images / "a.csv", text))
    assert "name this column `partition`" in caught.value.fix
    rows = "".join(f"img/{n},{n[:3]},{i % 2}\n" for i, n in enumerate(NAMES))
    with pytest.raises(DataError) as caught:
        find_source(write_csv(images / "a.csv", f"path,label,split\n{rows}"))
    assert caught.value.fix.startswith("name this column `is_test` if 1 marks test images")
    source = find_source(write_csv(images / "a.csv", f"path,label,is_test\n{rows}"))
    assert {split: len(part.labels) for split, part in source.parts.items()} == {
        "train": 3,
        "test": 3,
    }


def test_paths_may_be_relative_to_a_folder_with_the_name_of_the_list(images: Path) -> None:
    """`test.csv` beside `test/`, although another folder has images of these names."""
    (images / "img").rename(images / "train")
    for number, name in enumerate(NAMES):
        write_image(images / "test" / name, 10 + number)
    text = "path,label\n" + "".join(f"{name},{name[:3]}\n" for name in NAMES)
    for split in ("train", "test"):
        source = find_source(write_csv(images / f"{split}.csv", text), tested=True)
        assert source.parts["train"].images[0] == str(images / split / NAMES[0])
        assert source.notes[0] == f"6 files were found in {split}"


def test_a_file_without_extension_is_judged_by_its_content(images: Path) -> None:
    (images / "img" / "cat_0.png").rename(images / "img" / "cat_0")
    text = "path,label\nimg/cat_0,cat\nimg/dog_0.png,dog\n"
    source = find_source(write_csv(images / "a.csv", text))
    assert list(source.parts["train"].ids) == ["img/cat_0", "img/dog_0.png"]


MISSING = ["", "nan", "NaN", "None", "null", "N/A", "<NA>"]


@pytest.mark.parametrize("word", MISSING)
def test_a_word_for_a_missing_label_is_not_a_class(images: Path, word: str) -> None:
    text = "path,label\n" + "".join(f"img/{n},{n[:3]}\n" for n in NAMES[:5])
    name = write_csv(images / "a.csv", f"{text}img/{NAMES[5]},{word}\n")
    shown = f" ({word})" if word else ""
    with pytest.raises(DataError) as caught:
        find_source(name)
    assert caught.value.what == f"lines without a label: line 7{shown}"
    assert list_override("data.without", [word]) in caught.value.fix
    source = find_source(name, choice=ClassChoice(without=(word,)))
    assert (source.classes, len(source.parts["train"].labels)) == (("cat", "dog"), 5)
    if not word:
        return
    # It is a class if the user, or a model, names it.
    three = tuple(sorted(["cat", "dog", word]))
    assert find_source(name, choice=ClassChoice(only=three)).classes == three
    assert find_source(name, layout=LayoutOptions(known_classes=three)).classes == three
    rename = ListOptions(rename={word: "nothing"})
    assert find_source(name, lists=rename).classes == ("cat", "dog", "nothing")


def test_a_class_that_may_stand_for_a_missing_label_is_noted(images: Path) -> None:
    source = read_rows_of(images, "path,label", "img/{name},{label}\nimg/../img/{name},{label}")
    assert not any("missing label" in note for note in source.notes)
    text = "path,label\n" + "".join(
        f"img/{n},{'none' if i else 'cat'}\n" for i, n in enumerate(NAMES)
    )
    name = write_csv(images / "a.csv", text)
    assert find_source(name).notes == (
        "the class none (5 images) may stand for a missing label: "
        "data.without=[none] leaves it out",
    )
    assert not find_source(name, choice=ClassChoice(only=("cat", "none"))).notes


def test_classes_that_are_numbers_are_in_their_order(images: Path) -> None:
    """ImageNet's list of its validation images."""
    text = "".join(f"{n} {(7, 10, 2, 100, 65, 9)[i]}\n" for i, n in enumerate(NAMES))
    (images / "val.txt").write_text(text)
    source = find_source(str(images / "val.txt"))
    assert source.classes == ("2", "7", "9", "10", "65", "100")
    assert source.parts["train"].labels.tolist() == [1, 3, 0, 5, 4, 2]
    # A run of an earlier version keeps its order, which was that of the names.
    by_name = tuple(sorted(source.classes))
    layout = LayoutOptions(known_classes=by_name)
    source = find_source(str(images / "val.txt"), layout=layout)
    assert source.classes == by_name
    assert [by_name[label] for label in source.parts["train"].labels] == [
        *("7", "10", "2", "100", "65", "9")
    ]
    (images / "val.txt").write_text(text.replace(" 7", " n7"))
    assert find_source(str(images / "val.txt")).classes == ("10", "100", "2", "65", "9", "n7")


def test_choices_of_label_studio_are_read_or_refused(images: Path) -> None:
    uploads = [f"/data/upload/1/{i:08x}-{n}" for i, n in enumerate(NAMES)]
    rows = [f"{path},{i + 500},{NAMES[i][:3]}" for i, path in enumerate(uploads)]
    name = write_csv(images / "a.csv", "image,id,choice\n" + "\n".join(rows))
    source = find_source(name)
    assert source.parts["train"].images[5] == str(images / "img" / "dog_2.png")
    assert "6 of 6 paths are uploads to Label Studio" in source.notes[0]
    rows[0] = f'{uploads[0]},500,"{{""choices"": [""cat"", ""dog""]}}"'
    name = write_csv(images / "a.csv", "image,id,choice\n" + "\n".join(rows))
    with pytest.raises(DataError, match="multi-label set: 1 of 6 lines"):
        find_source(name)


WORDS = [
    "path",
    "label",
    "id",
    "split",
    "is_valid",
    "fold",
    "cat_0",
    "img/cat_0.png",
    "..",
    "~",
    "0",
]
WORDS += [
    "1",
    "train",
    "test",
    "cat|dog",
    "C:\\x",
    "file:///x",
    "\0",
    "\ufeff",
    "#",
    "",
    "sep=;",
    "[1, 2]",
]


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS) | st.text(max_size=4), min_size=1, max_size=30),
    separators=st.lists(st.sampled_from([",", ";", "\n", " ", "\t", '"', "{", ":"]), min_size=3),
    suffix=st.sampled_from([".csv", ".txt", ".json", ".jsonl"]),
)
def test_any_file_is_read_or_refused_with_a_reason(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], separators: list[str], suffix: str
) -> None:
    root = tmp_path_factory.getbasetemp() / "any"
    if not root.is_dir():
        write_image(root / "img" / "cat_0.png")
    text = "".join(w + separators[i % len(separators)] for i, w in enumerate(words))
    path = root / f"a{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for name in (path, root):
        with suppress(ConvlensError):  # any other exception is a fault
            assert find_source(str(name), tested=True).classes
    path.unlink()


PATH_FORMS = (
    "img/{0}.png",
    "img\\{0}.png",
    "IMG/{0}.PNG",
    "./img/{0}",
    "{0}",
    "data/img/{0}.png",
    "/old/set/img/{0}.png",
    "C:\\old set\\img\\{0}.png",
)
HEADERS = (
    ("path", "label", "split"),
    ("Image Path", "Class Name", "Subset"),
    ("ID", "breed", "x"),
    ("file_name", "class_id", "Partition"),
    ("IMG", "Species", "usage"),
)


def test_a_column_of_folds_can_be_the_folds_of_a_training(images: Path) -> None:
    """As the note says: the groups of `data.group` are the folds, and one is the test split."""
    for number in range(20):
        write_image(images / f"{number}.png", number)
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{i // 2 % 5}\n" for i in range(20))
    name = write_csv(images / "folds.csv", f"path,label,fold\n{rows}")
    assert "--folds 4 data.group=fold" in find_source(name).notes[0]
    source = find_source(name, group="fold")
    assert not source.notes
    config = DataConfig(name=name, group="fold", folds=4, image_size=8)
    folds = [load_data(replace_fold(config, fold), memory_budget=1 << 30) for fold in range(4)]
    held_out = [{int(image[:-4]) // 2 % 5 for image in data.val.ids} for data in folds]
    assert [len(fold) for fold in held_out] == [1, 1, 1, 1]
    assert len(set.union(*held_out)) == 4


def replace_fold(config: DataConfig, fold: int) -> DataConfig:
    return config.model_copy(update={"fold": fold})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_spelling_of_a_list_gives_the_same_images(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Delimiter x quotes x encoding x line ends x header x form of the paths, with splits."""
    root = tmp_path_factory.mktemp("lists")
    for number, name in enumerate(NAMES):
        write_image(root / "img" / name, number)
    path_form = data.draw(st.sampled_from([*PATH_FORMS, f"file://{root}/img/{{0}}.png"]))
    header = data.draw(st.sampled_from(HEADERS))
    delimiter = data.draw(st.sampled_from([",", ";", "\t", "|"]))
    quote = data.draw(st.sampled_from(["", '"']))
    line_end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    prefix = data.draw(
        st.sampled_from(["", f"sep={delimiter}{line_end}", f"# a comment{line_end}"])
    )
    splits = data.draw(
        st.sampled_from(
            [("train", "val", "test"), ("Training", "Valid", "TEST"), ("", "dev", "testing")]
        )
    )
    rows = [(path_form.format(name[:-4]), name[:3], splits[i % 3]) for i, name in enumerate(NAMES)]
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in (header, *rows)]
    (root / "a.csv").write_bytes((prefix + line_end.join(lines) + line_end).encode(encoding))
    source = find_source(str(root / "a.csv"))
    assert source.classes == ("cat", "dog")
    for number, split in enumerate(("train", "val", "test")):
        part = source.parts[split]
        assert list(part.images) == [str(root / "img" / name) for name in NAMES[number::3]]  # type: ignore[call-overload]
        assert part.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cell", "escaped"), [("=1+1", "'=1+1"), ("'-x", "''-x"), ("cat", "cat"), ("'cat", "'cat")]
)
def test_formulas_are_escaped_and_unescaped(cell: str, escaped: str) -> None:
    assert escape_csv_formula(cell) == escaped
    assert unescape_csv_formula(escaped) == cell


def test_whole_numbers_with_decimals_are_the_numbers(images: Path) -> None:
    """A column of floats: pandas writes it if a cell is empty."""
    labels = ["0.0", "10.0", "2.0", "0.0", "10.0", "2.0"]
    rows = list(zip(NAMES, labels, strict=False))
    text = "path,label\n" + "".join(f"img/{name},{label}\n" for name, label in rows)
    name = write_csv(images / "a.csv", text)
    source = find_source(name)
    assert source.classes == ("0", "2", "10")
    assert source.parts["train"].labels.tolist() == [0, 2, 1, 0, 2, 1]
    note = "labels are whole numbers with decimals: 0.0 is 0, 10.0 is 10, 2.0 is 2"
    assert source.notes == (note,)
    # Classes of an earlier version, and those that keys name, stay as they are.
    known = LayoutOptions(known_classes=("0.0", "10.0", "2.0"))
    assert find_source(name, layout=known).classes == known.known_classes
    renamed = find_source(name, lists=ListOptions(rename={"0.0": "none"}))
    assert renamed.classes == ("10.0", "2.0", "none")
    assert find_source(name, choice=ClassChoice(only=("0", "2"))).classes == ("0", "2")
    # One other value, and they are names.
    write_csv(images / "a.csv", text + f"img/{NAMES[0]},0.5\n".replace(NAMES[0], "extra.png"))
    write_image(images / "img" / "extra.png", 9)
    assert find_source(name).classes == ("0.0", "0.5", "10.0", "2.0")


def test_an_empty_label_beside_floats_is_missing(images: Path) -> None:
    text = f"path,label\nimg/{NAMES[0]},1.0\nimg/{NAMES[1]},0.0\nimg/{NAMES[2]},\n"
    name = write_csv(images / "a.csv", text)
    with pytest.raises(DataError, match="lines without a label: line 4"):
        find_source(name)
    assert find_source(name, choice=ClassChoice(without=("",))).classes == ("0", "1")
