"""Folders of class folders: layouts, names of splits, links, and everything that can be wrong."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from convlens.data import scan
from convlens.data.folder_layout import LayoutOptions
from convlens.data.layout import ClassChoice
from convlens.data.list_columns import ListOptions
from convlens.data.sources import find_source
from convlens.errors import DataError, UsageError
from helpers.datasets import write_class_folders, write_image


def test_classes_are_the_folders_below_the_root(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"dog": 3, "cat": 2, "10": 1, "2": 1})
    write_image(root / "cat" / "deeper" / "x.JPG")
    for junk in ("dog/.hidden.png", "dog/Thumbs.db", "dog/notes.txt", ".DS_Store", "dog/a.mp4"):
        (root / junk).write_bytes(b"x")
    write_class_folders(
        root, {"__MACOSX/dog": 1, ".ipynb_checkpoints": 1, "dog/.ipynb_checkpoints": 1}
    )
    write_image(root / "loose.png")
    source = find_source(str(root))
    assert source.classes == ("10", "2", "cat", "dog")
    part = source.parts["train"]
    assert part.labels.tolist() == [0, 1, 2, 2, 2, 3, 3, 3]
    assert list(part.ids[2:5]) == ["cat/0.png", "cat/1.png", f"cat/deeper{os.sep}x.JPG"]
    assert part.images[0] == str(root / "10" / "0.png")
    assert "1 .mp4 file is not supported: save frames of the videos as JPEG or PNG" in source.notes
    assert "ignored 1 file that is not an image: 1 .txt" in source.notes
    assert "ignored 1 image outside the class folders" in source.notes


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "evaluation", "dev", "VAL"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_splits_are_recognized_in_all_spellings(
    tmp_path: Path, train: str, val: str, test: str
) -> None:
    root = tmp_path / "x"
    counts = {f"{train}/a": 2, f"{train}/b": 1, f"{val}/a": 1, f"{test}/b": 3, "extra/a": 1}
    source = find_source(str(write_class_folders(root, counts)))
    assert {s: len(p.labels) for s, p in source.parts.items()} == {"train": 3, "val": 1, "test": 3}
    assert source.parts["test"].labels.tolist() == [1, 1, 1]
    assert source.parts["val"].ids[0] == f"{val}/a/0.png"
    assert any("extra" in note for note in source.notes)


def test_a_class_may_be_called_train_if_the_recipe_says_so(tmp_path: Path) -> None:
    root = str(write_class_folders(tmp_path / "x", {"train": 2, "bus": 2}))
    with pytest.raises(DataError, match="could be splits or classes: train"):
        find_source(root)
    source = find_source(root, layout=LayoutOptions("classes"))
    assert source.classes == ("bus", "train")
    assert source.notes == ("classes named like splits: train",)


def test_classes_match_by_name_in_any_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = tmp_path / "x"
    source = find_source(
        str(
            write_class_folders(
                root, {f"train/{composed}": 1, "train/tea": 1, f"test/{decomposed}": 1}
            )
        )
    )
    assert source.classes == (composed, "tea")
    assert source.parts["test"].labels.tolist() == [0]
    with pytest.raises(DataError, match="differ only in their Unicode form"):
        find_source(
            str(write_class_folders(tmp_path / "y", {composed: 1, decomposed: 1, "tea": 1}))
        )
    # Otherwise the images of one folder would replace those of the other.
    both = {f"train/{composed}": 1, "train/tea": 1, f"test/{composed}": 1, f"test/{decomposed}": 1}
    with pytest.raises(DataError, match="differ only in their Unicode form"):
        find_source(str(write_class_folders(tmp_path / "z", both)))


@pytest.mark.parametrize(
    ("counts", "messages"),
    [
        ({}, ["no class folders"]),
        ({"a": 0, "b": 0}, ["no images"]),
        ({"a": 1, "b": 0, "c": 0}, ["without images: b, c"]),
        ({"a": 3}, ["only one class folder: a"]),
        (
            {"train/a": 1, "train/b": 1, "train/c": 0, "val/c": 3, "test/c": 2},
            [r"class folders in train without images: c \(val has 3, test has 2\)"],
        ),
        (
            {"train/cat": 1, "train/dog": 1, "val/0": 1, "val/1": 1},
            [r"in val that train lacks: 0, 1 \(numbers; train has names: cat, dog\)"],
        ),
        (
            {"train/Cat": 1, "train/dog": 1, "train/none": 0, "test/cat": 1, "val/cow": 1},
            [
                "in train without images: none",
                r"in test .* 'cat' \(train has 'Cat'\)",
                "in val .* 'cow'",
            ],
        ),
        (
            {"train/a": 0, "train/b": 0, "val/a": 2},
            [r"any class folder of train \(val has 2\): a, b"],
        ),
        ({"train/a": 1, "train/b": 1, "training/a": 1}, ["two train folders: train, training"]),
        ({"test/a": 1, "val/a": 1}, ["no train folder"]),
        ({"train": 2, "test": 2}, ["splits without class folders"]),
    ],
)
def test_problems_of_a_folder_are_reported(
    tmp_path: Path, counts: dict[str, int], messages: list[str]
) -> None:
    root = tmp_path / "x"
    root.mkdir()
    with pytest.raises(DataError) as caught:
        find_source(str(write_class_folders(root, counts)))
    assert str(root) in caught.value.where
    for message in messages:
        assert re.search(message, caught.value.what), caught.value.what
    assert caught.value.fix


def test_a_set_for_evaluation_may_have_one_class_and_empty_ones(tmp_path: Path) -> None:
    one = find_source(str(write_class_folders(tmp_path / "one", {"a": 3})), tested=True)
    assert (one.classes, one.parts["train"].labels.tolist()) == (("a",), [0, 0, 0])
    empty = find_source(str(write_class_folders(tmp_path / "two", {"a": 0, "b": 2})), tested=True)
    assert (empty.classes, empty.parts["train"].labels.tolist()) == (("a", "b"), [1, 1])


def test_splits_of_a_set_for_evaluation_may_differ_in_their_classes(tmp_path: Path) -> None:
    counts = {"train/a": 2, "val/b": 1, "test/c": 1, "test/a": 0}
    source = find_source(str(write_class_folders(tmp_path / "three", counts)), tested=True)
    assert source.classes == ("a", "b", "c")
    labels = {split: part.labels.tolist() for split, part in source.parts.items()}
    assert labels == {"train": [0, 0], "val": [1], "test": [2]}
    source = find_source(str(write_class_folders(tmp_path / "one", {"test/c": 2})), tested=True)
    assert (source.classes, list(source.parts)) == (("c",), ["test"])


@pytest.mark.parametrize("counts", [{"d": 0}, {}, {"test/c": 0, "val/c": 0}])
def test_a_set_for_evaluation_must_have_images(tmp_path: Path, counts: dict[str, int]) -> None:
    root = tmp_path / "x"
    root.mkdir()
    with pytest.raises(DataError, match=r"no class folders|no images in any class"):
        find_source(str(write_class_folders(root, counts)), tested=True)


def test_files_are_images_by_their_contents_and_others_are_named(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "x", {"a": 2, "b": 1})
    content = (root / "a" / "0.png").read_bytes()
    (root / "a" / "000").write_bytes(content)
    (root / "c").mkdir()
    (root / "c" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"class folders without images: c \(1 .heic\)"):
        find_source(str(root))
    shutil.rmtree(root / "c")
    (root / "b" / "renamed.heic").write_bytes(content)
    for name in ("1.heic", "2.HEIC", "3.heic", "notes.txt"):
        (root / "b" / name).write_bytes(b"x")
    source = find_source(str(root))
    ids = ["a/0.png", "a/000", "a/1.png", "b/0.png", "b/renamed.heic"]
    assert list(source.parts["train"].ids) == ids
    assert source.notes == (
        "3 .heic files are not supported: convert them to JPEG or PNG",
        "ignored 1 file that is not an image: 1 .txt",
        "classes that lose most of their files: b (3 of 5)",
    )


def test_a_set_of_other_formats_names_them(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "x", {"a": 0, "b": 0})
    for name in ("a/1.HEIC", "b/1.heic", "b/2.heic"):
        (root / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"no images in any .*3 \.heic files .*: a, b") as caught:
        find_source(str(root))
    assert "convert" in caught.value.fix


def test_classes_that_are_left_out_are_not_checked(tmp_path: Path) -> None:
    counts = {"train/a": 1, "train/b": 1, "train/empty": 0, "val/a": 1, "val/odd": 1}
    root = write_class_folders(tmp_path / "x", counts)
    with pytest.raises(
        DataError, match=r"in train without images: empty; classes in val .* 'odd'"
    ) as caught:
        find_source(str(root))
    assert "data.without=[odd]" in caught.value.fix
    with pytest.raises(UsageError, match="without names classes that do not exist: empti"):
        find_source(str(root), choice=ClassChoice(without=("empti", "odd")))
    source = find_source(str(root), choice=ClassChoice(without=("empty", "odd")))
    assert source.classes == ("a", "b")
    source = find_source(str(root), choice=ClassChoice(only=("b", "a")))
    assert source.parts["val"].labels.tolist() == [0]
    with pytest.raises(DataError, match="only one class folder: a") as caught:
        find_source(str(root), choice=ClassChoice(only=("a",)))
    assert caught.value.fix == "choose more classes"


def test_classes_are_renamed_before_the_splits_are_compared(tmp_path: Path) -> None:
    counts = {"train/cat": 2, "train/dog": 1, "val/Cat": 1, "val/dog": 1, "train/new": 0}
    root = str(write_class_folders(tmp_path / "x", counts))
    with pytest.raises(DataError, match=r"'Cat' \(train has 'cat'\)") as caught:
        find_source(root, choice=ClassChoice(without=("new",)))
    offered = """if it is the same class: 'data.rename={"Cat": "cat"}'; or give each class"""
    assert caught.value.fix.startswith(offered)
    lists = ListOptions(rename={"Cat": "cat"})
    # A class that is left out is not checked, and is named as it is called afterwards.
    source = find_source(root, choice=ClassChoice(without=("new",)), lists=lists)
    assert source.classes == ("cat", "dog")
    assert source.parts["val"].labels.tolist() == [0, 1]
    both = ListOptions(rename={"Cat": "pet", "cat": "pet"})
    source = find_source(root, choice=ClassChoice(only=("dog", "pet")), lists=both)
    assert source.classes == ("dog", "pet")
    assert source.parts["train"].labels.tolist() == [1, 1, 0]
    assert source.parts["val"].labels.tolist() == [1, 0]
    with pytest.raises(DataError, match="classes in val that train lacks: 'tiger'"):
        find_source(
            root, choice=ClassChoice(without=("new",)), lists=ListOptions(rename={"Cat": "tiger"})
        )
    with pytest.raises(UsageError, match=r"data.rename: no class 'cow'"):
        find_source(root, lists=ListOptions(rename={"cow": "cat"}))


def test_empty_class_folders_of_other_splits_are_noted(tmp_path: Path) -> None:
    counts = {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 0}
    source = find_source(str(write_class_folders(tmp_path / "x", counts)))
    assert source.notes == ("val: class folders without images: b",)


def test_link_cycles_are_skipped_and_special_files_counted(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "x", {"a": 2, "b": 1})
    elsewhere = write_class_folders(tmp_path / "elsewhere", {"inner": 1})
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "more").symlink_to(elsewhere)
    (elsewhere / "inner" / "back").symlink_to(elsewhere)
    (root / "b" / "one.png").symlink_to(root / "a" / "0.png")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "ring.png").symlink_to("ring.png")
    (root / "b" / "unmounted").symlink_to("/no/such/disk")
    (root / "notes.txt").symlink_to("/no/such/disk/notes.txt")
    (root / "c").symlink_to("/no/such/disk/c")
    source = find_source(str(root))
    assert list(source.parts["train"].ids) == [
        "a/0.png",
        "a/1.png",
        "b/0.png",
        "b/more/inner/0.png",
        "b/one.png",
    ]
    assert source.notes == (
        "6 broken links, pipes or devices were left out: a/pipe.png, a/ring.png, b/gone.png, "
        "b/unmounted, c and 1 more",
    )


def test_classes_on_an_unmounted_disk_are_reported(tmp_path: Path) -> None:
    disk = write_class_folders(tmp_path / "disk", {"a": 2, "b": 2})
    root = tmp_path / "x"
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").symlink_to(disk / name / f"{i}.png")
    assert len(find_source(str(root)).parts["train"].labels) == 4
    (disk / "a").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"without images: a; broken links.*: a/0.png, a/1.png"):
        find_source(str(root))
    write_class_folders(root, {"train/a": 1, "train/b": 1})
    (root / "val").symlink_to("/no/such/disk/val")
    assert any("left out: " in note and "val" in note for note in find_source(str(root)).notes)


def test_a_long_scan_reports_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_class_folders(tmp_path / "x", {"a": 2, "b": 2})
    find_source(str(root))
    assert not capsys.readouterr().err
    monkeypatch.setattr(scan, "NOTICE_AFTER_S", 0.0)
    find_source(str(root))
    notices = capsys.readouterr().err.splitlines()
    assert notices == [f"{root}: looking for images, {n} files so far" for n in (2, 4)]


@pytest.mark.slow
def test_a_hundred_thousand_files_are_found_in_a_minute_of_cpu_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = write_image(tmp_path / "one.png").read_bytes()
    root = tmp_path / "x"
    for name in map(str, range(10)):
        (root / name).mkdir(parents=True)
        for i in range(10_000):
            (root / name / f"{i}.png").write_bytes(content)
    start = time.process_time()
    part = find_source(str(root)).parts["train"]
    seconds = time.process_time() - start
    assert len(part.labels) == 100_000
    assert seconds < 60
    with capsys.disabled():
        print(f"\n100,000 files found in {seconds:.2f} s of CPU time")


def test_file_names_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "x", {"a": 1, "b": 1})
    write_image(root / "c.png").rename(os.fsdecode(os.fsencode(root / "a") + b"/\xff.png"))
    part = find_source(str(root)).parts["train"]
    assert "a/\\udcff.png" in part.ids
    for image_id in part.ids:
        image_id.encode()
    assert all(os.path.exists(path) for path in part.images)  # type: ignore[union-attr]
