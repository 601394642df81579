"""Folders and patterns of shards: which splits and classes they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlens.data.sources import find_source
from convlens.errors import DataError, UsageError
from helpers.shards import Member, png, samples, shards, tar


def ids_by_split(name: Path | str) -> dict[str, list[str]]:
    return {split: list(part.ids) for split, part in find_source(str(name)).parts.items()}


def test_splits_are_recognized_by_names_of_shards_and_folders(tmp_path: Path) -> None:
    one, two = samples([0, 1]), samples([1, 0])
    flat = tmp_path / "flat"
    for name in ("train-000001.tar", "train-000000.tar", "validation-000000.TAR"):
        tar(flat / name, one)
    tar(flat / "my-test-set-test_0.tar", two)
    assert ids_by_split(flat) == {
        "train": [f"train-00000{n}.tar/000{k}" for n in (0, 1) for k in (0, 1)],
        "val": ["validation-000000.TAR/0000", "validation-000000.TAR/0001"],
        "test": ["my-test-set-test_0.tar/0000", "my-test-set-test_0.tar/0001"],
    }
    assert find_source(str(flat)).parts["test"].labels.tolist() == [1, 0]
    deep = tmp_path / "deep"
    tar(deep / "train" / "000000.tar", one)
    tar(deep / "valid" / "000000.tar", two)
    assert ids_by_split(deep) == {
        "train": ["train/000000.tar/0000", "train/000000.tar/0001"],
        "val": ["valid/000000.tar/0000", "valid/000000.tar/0001"],
    }
    folder = tmp_path / "test"  # the name of the folder itself has no meaning
    tar(folder / "set-000000.tar", one)
    assert list(ids_by_split(folder)) == ["train"]
    tar(folder / "set-train-000000.tar", one)
    with pytest.raises(
        DataError, match=r"without a split in their names, beside shards with one: set-000000\.tar"
    ):
        find_source(str(folder))


def test_shards_are_named_by_a_pattern_or_one_by_one(tmp_path: Path) -> None:
    shards(tmp_path / "x", {"train": 40})
    pattern = str(tmp_path / "x" / "train-{1..3}.tar")
    assert [i.split("/")[0] for i in ids_by_split(pattern)["train"][::10]] == [
        "train-1.tar",
        "train-2.tar",
        "train-3.tar",
    ]
    assert len(ids_by_split(tmp_path / "x" / "train-{0,2}.tar")["train"]) == 20
    assert len(ids_by_split(tmp_path / "x" / "train-2.tar")["train"]) == 10
    tar(tmp_path / "x" / "val-000008.tar", samples([0, 1]))
    assert len(ids_by_split(tmp_path / "x" / "val-{000008..000008}.tar")["train"]) == 2
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: train-4.tar, train-5.tar"):
        find_source(str(tmp_path / "x" / "train-{1..5}.tar"))
    with pytest.raises(UsageError, match="from 1 to 100,000 shards"):
        find_source(str(tmp_path / "x" / "train-{5..1}.tar"))
    with pytest.raises(UsageError, match="from 1 to 100,000 shards"):
        find_source(str(tmp_path / "x" / "train-{0..9999999999}.tar"))


def test_compressed_shards_are_reported(tmp_path: Path) -> None:
    shards(tmp_path, {"train": 10})
    (tmp_path / "train-1.tar.gz").write_bytes(b"?")
    with pytest.raises(DataError, match=r"compressed: train-1.tar.gz"):
        find_source(str(tmp_path))


def test_shards_on_an_unmounted_disk_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train-0.tar").write_bytes(b"")
    (tmp_path / "x" / "train-1.tar").symlink_to("/no/such/disk/train-1.tar")
    with pytest.raises(DataError, match=r"1 shards are broken links.*: train-1.tar"):
        find_source(str(tmp_path / "x"))


def test_class_folders_with_a_tar_beside_them_are_an_image_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(png(1))
    tar(root / "everything.tar", samples([0, 1]))
    assert find_source(str(root)).classes == ("a", "b")


def test_a_tar_of_class_folders_is_not_a_shard(tmp_path: Path) -> None:
    tar(tmp_path / "flowers.tar", [("rose/1.png", png(1)), ("tulip/1.png", png(2))])
    with pytest.raises(DataError, match="images without a label"):
        find_source(str(tmp_path / "flowers.tar"))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (None, "", ("1", "2", "10")),  # in the order of numbers, without unused ones
        ("classes.txt", "\n".join("abcdefghijk"), ("b", "c", "k")),
        (
            "class_names.tsv",
            "n01\tgoldfish\nn02\tshark\nn03\tray\n" + "".join(f"n{i}\tx\n" for i in range(10, 18)),
            ("n02", "n03", "n17"),
        ),
        (
            "class_names.tsv",
            "".join(f"{i}\tc{i}\n" for i in range(10, -1, -1)),
            ("c1", "c2", "c10"),
        ),
    ],
)
def test_numbered_classes_get_the_names_of_a_file(
    tmp_path: Path, file: str | None, text: str, expected: tuple[str, ...]
) -> None:
    tar(tmp_path / "a.tar", samples([10, 1, 2, 10]))
    if file:
        (tmp_path / file).write_text(text)
    source = find_source(str(tmp_path))
    assert source.classes == expected
    assert source.parts["train"].labels.tolist() == [2, 0, 1, 2]
    assert bool(source.notes) == bool(file)
    if file:
        assert "8 classes of" in source.notes[0]


def test_named_classes_are_sorted_or_in_the_order_of_the_file(tmp_path: Path) -> None:
    def named(*names: str) -> list[Member]:
        pairs = [((f"{i}.png", png(i)), (f"{i}.txt", n.encode())) for i, n in enumerate(names)]
        return [member for pair in pairs for member in pair]

    tar(tmp_path / "train-0.tar", named("rose", "tulip", "aster"))
    assert find_source(str(tmp_path)).classes == ("aster", "rose", "tulip")
    (tmp_path / "classes.txt").write_text("tulip\nrose\naster\n")
    assert find_source(str(tmp_path)).classes == ("tulip", "rose", "aster")
    (tmp_path / "classes.txt").write_text("tulip\nrose\n")
    with pytest.raises(DataError, match=r"labels without a name in classes.txt.*: aster"):
        find_source(str(tmp_path))
    (tmp_path / "classes.txt").unlink()
    tar(tmp_path / "val-0.tar", named("rose", "lily"))
    with pytest.raises(DataError, match="classes in val that train lacks: lily"):
        find_source(str(tmp_path))


def test_a_single_class_is_only_accepted_for_evaluation(tmp_path: Path) -> None:
    tar(tmp_path / "x" / "train-0.tar", samples([1, 1, 1]))
    with pytest.raises(DataError, match="only one class: 1"):
        find_source(str(tmp_path / "x"))
    assert find_source(str(tmp_path / "x"), tested=True).classes == ("1",)
    (tmp_path / "x" / "classes.txt").write_text("cat\ndog\nemu\n")
    source = find_source(str(tmp_path / "x"), tested=True)
    assert (source.classes, source.parts["train"].labels.tolist()) == (("dog",), [0, 0, 0])
    assert source.notes == ("2 classes of classes.txt have no images and are left out",)
    tar(tmp_path / "x" / "test-0.tar", samples([2, 0]))
    source = find_source(str(tmp_path / "x"), tested=True)
    assert source.classes == ("cat", "dog", "emu")
    assert source.parts["test"].labels.tolist() == [2, 0]
    (tmp_path / "x" / "train-0.tar").unlink()
    with pytest.raises(DataError, match="no shards for training"):
        find_source(str(tmp_path / "x"))
    assert find_source(str(tmp_path / "x"), tested=True).classes == ("cat", "emu")


def test_labels_without_names_and_bad_names_are_reported(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", samples([0, 1, 2]))
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(DataError, match=r"which has 2 .numbered from 0.: 2"):
        find_source(str(tmp_path))
    for text in ("x\ny\nx\n", "0\tx\n2\ty\n", "\ta\nx\tb\n"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(DataError, match="empty, duplicated or not numbered"):
            find_source(str(tmp_path))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="can't read the class names"):
        find_source(str(tmp_path))


def test_empty_shards_and_splits_are_not_used(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", [])
    with pytest.raises(DataError, match="no samples in the shards for training"):
        find_source(str(tmp_path))
    tar(tmp_path / "train-1.tar", samples([0, 1]))
    tar(tmp_path / "test-0.tar", [])
    source = find_source(str(tmp_path))
    assert len(source.parts["train"].labels) == 2
    assert list(source.parts) == ["train"]
    assert "test: no samples" in source.notes[0]


def test_shards_sorted_by_class_are_not_read_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        tar(tmp_path / "sorted" / f"{n}.tar", samples([n % 3] * 12, 12 * n))
        tar(tmp_path / "mixed" / f"{n}.tar", samples([(n + i) % 3 for i in range(12)], 12 * n))
    monkeypatch.setattr("convlens.data.webdataset.WINDOW_IMAGES", 50)
    sorted_, mixed = find_source(str(tmp_path / "sorted")), find_source(str(tmp_path / "mixed"))
    assert sorted_.parts["train"].images.shard_ids() is None  # type: ignore[union-attr]
    assert "sorted by class" in sorted_.notes[0]
    assert mixed.parts["train"].images.shard_ids() is not None  # type: ignore[union-attr]
    assert not mixed.notes
