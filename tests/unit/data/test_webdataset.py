"""Images from shards: what is found in a tar, by its names, and that it trains as a folder does."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data import dataset, tar_index
from convlens.data.cache import DecodedRows, StoredRows
from convlens.data.loader import Batches, Normalize, ShardOrder, epoch_order
from convlens.data.shard_writer import write_shards
from convlens.data.sources import find_source
from convlens.data.tar_index import TarMembers, read_samples
from convlens.data.types import IndexedStrings, NumberedStrings, PackedStrings
from convlens.data.webdataset import read_shards
from convlens.errors import DataError, ResourceError, UsageError
from convlens.recipe import DataConfig
from helpers.commands import command, here, refused, weights
from helpers.shards import BAD_MEMBERS, Member, damaged, png, samples, shards, tar
from helpers.support import BAD_DISK, PLAN

PLENTY = 1 << 30


# One tar


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_a_tar(tmp_path: Path, style: int) -> None:
    deep = "a" * 80 + "/" + "b" * 90  # too long for a plain header's name field
    long = deep if style == tarfile.USTAR_FORMAT else deep + "/" + "c" * 200 + "ü"
    folder = tarfile.TarInfo("dir")
    folder.type = tarfile.DIRTYPE
    content: list[Member | tarfile.TarInfo] = [
        ("./x/0001.JPG", b"one"),
        ("./x/0001.Cls", b" 3\r\n"),
        folder,
        ("0002.cls", b"7"),
        ("0002.png", b"two!"),  # the label first
        ("0003.webp", b"three"),
        ("0003.txt", "Löwenzahn\n".encode()),
        ("0004.jpeg", b""),
        ("0004.json", b'{"label": 12, "caption": "x"}'),
        ("0005.png", b"five"),
        ("0005.json", b'{"label": " rose "}'),
        ("0006.png", b"six"),
        ("0006.json", b'{"width": 3}'),
        ("0006.txt", b"tulip"),
        ("0007.png", b"7"),
        ("0007.cls", b"1"),
        ("0007.json", b'{"label": 2}'),
        ("0007.txt", b"z"),
        ("0008.seg.png", b"a mask"),
        ("0008.npy", b"?"),
        ("README", b"!"),
        ("._0001.jpg", b"mac"),
        (f"{long}.png", b"long"),
        (f"{long}.cls", b"0"),
    ]
    path = tar(tmp_path / "a.tar", content, style)
    found = read_samples(path)
    assert not found.problems
    assert found.keys == ["x/0001", "0002", "0003", "0004", "0005", "0006", "0007", long]
    assert found.labels == [3, 7, "Löwenzahn", 12, "rose", "tulip", 1, 0]
    whole = path.read_bytes()
    places = zip(found.offsets, found.sizes, strict=True)
    assert [whole[o : o + n] for o, n in places] == [
        b"one",
        b"two!",
        b"three",
        b"",
        b"five",
        b"six",
        b"7",
        b"long",
    ]
    assert found.ignored == 4  # the mask, the array, the text file, the mac's


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_members_that_are_refused(tmp_path: Path, case: str) -> None:
    content, said = BAD_MEMBERS[case]
    good = [] if case == "key twice" else samples([0, 1, 0, 1])
    tar(tmp_path / "set" / "a.tar", [*good, *content])
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path / "set"))
    assert said in caught.value.what


@pytest.mark.parametrize("case", damaged(b""))
def test_files_that_are_no_whole_tar(tmp_path: Path, case: str) -> None:
    whole = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "a.tar"
    content, said = damaged(whole)[case]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path / "set"))
    assert said in caught.value.what
    assert caught.value.where == str(path)


def test_compressed_shards_are_refused_by_their_names(tmp_path: Path) -> None:
    shards(tmp_path, {"train": 10})
    (tmp_path / "train-1.tar.gz").write_bytes(b"?")
    with pytest.raises(DataError, match=r"compressed: train-1.tar.gz"):
        find_source(str(tmp_path))


def test_a_disk_that_fails_is_no_damaged_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tar(tmp_path / "set" / "a.tar", samples([0, 1]))
    bad = tmp_path / "set" / "b.tar"
    bad.symlink_to(BAD_DISK)
    with pytest.raises(ResourceError, match="Input/output error") as caught:
        find_source(str(tmp_path / "set"))
    assert caught.value.where == str(bad)
    bad.unlink()

    def stale(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(tar_index._Bounded, "read", stale)
        with pytest.raises(ResourceError, match="Stale") as caught:
            find_source(str(tmp_path / "set"))
    assert caught.value.where == str(good)
    assert find_source(str(tmp_path / "set")).classes == ("0", "1")


def test_a_disk_that_fails_in_a_shard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "set", {"train": 20})
    (tmp_path / "cache").mkdir()
    left = tmp_path / "cache" / f".{'0' * 40}.index.abcdefgh.part"
    left.touch()

    def bad_sector(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", bad_sector)
        done = here("train", tmp_path / "set", "train.epochs=1", "model.widths=[2]")
    refused(done, 5, "can't read: Input/output error", "train-0.tar", "restore it from a copy")
    assert "no cache" not in done.err
    assert left.exists()  # another's


# Which shards, which classes


def parts_of(name: Path | str) -> dict[str, list[str]]:
    return {split: list(part.ids) for split, part in find_source(str(name)).parts.items()}


def test_splits_go_by_the_names(tmp_path: Path) -> None:
    one, two = samples([0, 1]), samples([1, 0])
    flat = tmp_path / "flat"
    for name in ("train-000001.tar", "train-000000.tar", "validation-000000.TAR"):
        tar(flat / name, one)
    tar(flat / "my-test-set-test_0.tar", two)
    assert parts_of(flat) == {
        "train": [f"train-00000{n}.tar/000{k}" for n in (0, 1) for k in (0, 1)],
        "val": ["validation-000000.TAR/0000", "validation-000000.TAR/0001"],
        "test": ["my-test-set-test_0.tar/0000", "my-test-set-test_0.tar/0001"],
    }
    assert find_source(str(flat)).parts["test"].labels.tolist() == [1, 0]
    deep = tmp_path / "deep"
    tar(deep / "train" / "000000.tar", one)
    tar(deep / "valid" / "000000.tar", two)
    assert parts_of(deep) == {
        "train": ["train/000000.tar/0000", "train/000000.tar/0001"],
        "val": ["valid/000000.tar/0000", "valid/000000.tar/0001"],
    }
    plain = tmp_path / "test"  # the folder's own name says nothing
    tar(plain / "set-000000.tar", one)
    assert list(parts_of(plain)) == ["train"]
    tar(plain / "set-train-000000.tar", one)
    with pytest.raises(DataError, match=r"no split beside those of one: set-000000\.tar"):
        find_source(str(plain))


def test_a_pattern_or_one_file(tmp_path: Path) -> None:
    shards(tmp_path / "x", {"train": 40})
    pattern = str(tmp_path / "x" / "train-{1..3}.tar")
    assert [i.split("/")[0] for i in parts_of(pattern)["train"][::10]] == [
        "train-1.tar",
        "train-2.tar",
        "train-3.tar",
    ]
    assert len(parts_of(tmp_path / "x" / "train-{0,2}.tar")["train"]) == 20
    assert len(parts_of(tmp_path / "x" / "train-2.tar")["train"]) == 10
    tar(tmp_path / "x" / "val-000008.tar", samples([0, 1]))
    assert len(parts_of(tmp_path / "x" / "val-{000008..000008}.tar")["train"]) == 2
    with pytest.raises(DataError, match=r"2 of 5 shards do not exist: train-4.tar, train-5.tar"):
        find_source(str(tmp_path / "x" / "train-{1..5}.tar"))
    with pytest.raises(UsageError, match="from 1 to 100,000 shards"):
        find_source(str(tmp_path / "x" / "train-{5..1}.tar"))
    with pytest.raises(UsageError, match="from 1 to 100,000 shards"):
        find_source(str(tmp_path / "x" / "train-{0..9999999999}.tar"))


def test_a_folder_of_classes_with_a_tar_beside_them_is_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(png(1))
    tar(root / "everything.tar", samples([0, 1]))
    assert find_source(str(root)).classes == ("a", "b")


def test_a_tar_of_class_folders_is_no_shard(tmp_path: Path) -> None:
    tar(tmp_path / "flowers.tar", [("rose/1.png", png(1)), ("tulip/1.png", png(2))])
    with pytest.raises(DataError, match="images without a label"):
        find_source(str(tmp_path / "flowers.tar"))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (None, "", ("1", "2", "10")),  # by number, and only those there are
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
def test_names_of_numbered_classes(
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


def test_named_classes(tmp_path: Path) -> None:
    def named(*names: str) -> list[Member]:
        pairs = [((f"{i}.png", png(i)), (f"{i}.txt", n.encode())) for i, n in enumerate(names)]
        return [member for pair in pairs for member in pair]

    tar(tmp_path / "train-0.tar", named("rose", "tulip", "aster"))
    assert find_source(str(tmp_path)).classes == ("aster", "rose", "tulip")
    (tmp_path / "classes.txt").write_text("tulip\nrose\naster\n")
    assert find_source(str(tmp_path)).classes == ("tulip", "rose", "aster")
    (tmp_path / "classes.txt").write_text("tulip\nrose\n")
    with pytest.raises(DataError, match=r"labels that classes.txt has no name for .*: aster"):
        find_source(str(tmp_path))
    (tmp_path / "classes.txt").unlink()
    tar(tmp_path / "val-0.tar", named("rose", "lily"))
    with pytest.raises(DataError, match="classes in val that train lacks: lily"):
        find_source(str(tmp_path))


def test_one_class_in_shards(tmp_path: Path) -> None:
    tar(tmp_path / "x" / "train-0.tar", samples([1, 1, 1]))
    with pytest.raises(DataError, match="only one class: 1"):
        find_source(str(tmp_path / "x"))
    assert find_source(str(tmp_path / "x"), tested=True).classes == ("1",)
    (tmp_path / "x" / "classes.txt").write_text("cat\ndog\nemu\n")
    found = find_source(str(tmp_path / "x"), tested=True)
    assert (found.classes, found.parts["train"].labels.tolist()) == (("dog",), [0, 0, 0])
    assert found.notes == ("2 classes of classes.txt have no images and are left out",)
    tar(tmp_path / "x" / "test-0.tar", samples([2, 0]))
    found = find_source(str(tmp_path / "x"), tested=True)
    assert found.classes == ("cat", "dog", "emu")
    assert found.parts["test"].labels.tolist() == [2, 0]
    (tmp_path / "x" / "train-0.tar").unlink()
    with pytest.raises(DataError, match="no shards for training"):
        find_source(str(tmp_path / "x"))
    assert find_source(str(tmp_path / "x"), tested=True).classes == ("cat", "emu")


def test_labels_out_of_range_and_bad_names(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", samples([0, 1, 2]))
    (tmp_path / "classes.txt").write_text("x\ny\n")
    with pytest.raises(DataError, match=r"no name for \(its 2 count from 0\): 2"):
        find_source(str(tmp_path))
    for text in ("x\ny\nx\n", "0\tx\n2\ty\n", "\ta\nx\tb\n"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(DataError, match="empty, twice there or not numbered"):
            find_source(str(tmp_path))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="can't read the classes' names"):
        find_source(str(tmp_path))


def test_empty_shards_and_splits(tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", [])
    with pytest.raises(DataError, match="no samples in the shards for training"):
        find_source(str(tmp_path))
    tar(tmp_path / "train-1.tar", samples([0, 1]))
    tar(tmp_path / "test-0.tar", [])
    source = find_source(str(tmp_path))
    assert len(source.parts["train"].labels) == 2
    assert list(source.parts) == ["train"]
    assert "test: no samples" in source.notes[0]


# The index


def test_the_index_is_kept_and_notices_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "x", {"train": 20})
    read: list[str] = []

    def counted(path: Path) -> tar_index.TarSamples:
        read.append(path.name)
        return read_samples(path)

    monkeypatch.setattr(tar_index, "read_samples", counted)
    first, second = find_source(str(tmp_path / "x")), find_source(str(tmp_path / "x"))
    assert read == ["train-0.tar", "train-1.tar"]
    for source in (first, second):
        part = source.parts["train"]
        assert isinstance(part.images, TarMembers)
        assert [part.images.read(i) for i in (0, 19, 7)] == [png(0), png(19), png(7)]
        assert (part.ids[19], part.labels[19]) == ("train-1.tar/0019", 1)
    assert first.parts["train"].images.stamp() == second.parts["train"].images.stamp()
    (index,) = (tmp_path / "cache").glob("*.index")
    whole = index.read_bytes()
    for content in (whole[:100], b"", b"x" * 50):
        index.write_bytes(content)
        left = index.with_name(f".{index.name}.abcdefgh.part")  # of a process that was killed
        left.touch()
        assert list(find_source(str(tmp_path / "x")).parts["train"].ids) == list(part.ids)
        assert index.read_bytes() == whole
        assert not left.exists()
    tar(tmp_path / "x" / "train-1.tar", samples([1, 0], 50))
    changed = find_source(str(tmp_path / "x")).parts["train"]
    assert list(changed.ids)[10:] == ["train-1.tar/0050", "train-1.tar/0051"]
    # What was opened before must not read the new shard as if it were the old one.
    with pytest.raises(DataError, match="a shard has changed since the start"):
        TarMembers.read(find_again(first), 15)


def find_again(source: dataset.sources.Source) -> TarMembers:  # type: ignore[name-defined]
    """The members of a source with none of their shards open yet."""
    images = source.parts["train"].images
    assert isinstance(images, TarMembers)
    images._open.clear()
    return images


def test_a_shard_that_goes_away_is_read_on_while_it_is_open(tmp_path: Path) -> None:
    source = find_source(str(shards(tmp_path / "x", {"train": 20})))
    images = source.parts["train"].images
    assert isinstance(images, TarMembers)
    images.read(0)
    shutil.rmtree(tmp_path / "x")
    assert images.read(3) == png(3)
    with pytest.raises(DataError, match="a shard can't be opened any more"):
        images.read(12)


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "MAX_OPEN_FILES", 2)
    images = find_source(str(shards(tmp_path, {"train": 12}, per=2))).parts["train"].images
    assert isinstance(images, TarMembers)
    for i in (0, 11, 5, 1, 8, 0, 10):
        assert images.read(i) == png(i)
        assert len(images._open) <= 2


def test_names_in_little_memory() -> None:
    names = ["", "Ölgötze", "a/b", "x" * 300]
    keys = PackedStrings.of(names)
    assert list(keys) == names
    assert keys == names != keys[:3]
    assert keys[-1] == names[-1]
    assert keys[1:3] == names[1:3]
    with pytest.raises(IndexError):
        keys[4]
    assert list(PackedStrings.of([])) == []
    taken = IndexedStrings(keys, np.array([2, 0, 2]))
    assert taken == ["a/b", "", "a/b"]
    assert IndexedStrings(NumberedStrings("x", 9), np.array([8, 3])) == ["x/8", "x/3"]


# The order


def test_a_set_of_one_window_is_shuffled_as_any_other() -> None:
    shards = ShardOrder(torch.arange(1000) // 100)
    assert torch.equal(epoch_order(1000, 3, 2, shards), epoch_order(1000, 3, 2))
    generator = torch.Generator().manual_seed(dataset.opening.cache.device.seed_of(3, 2))
    assert torch.equal(epoch_order(1000, 3, 2), torch.randperm(1000, generator=generator))


def test_windows_of_shards() -> None:
    # 100 shards of 500: as many as begin within 16,384 images are shuffled into each other.
    blocks = torch.arange(50_000) // 500
    shards = ShardOrder(blocks)
    order = epoch_order(50_000, 0, 1, shards)
    assert torch.equal(order.sort().values, torch.arange(50_000))
    assert torch.equal(order, epoch_order(50_000, 0, 1, shards))
    assert not torch.equal(order, epoch_order(50_000, 0, 2, shards))
    assert not torch.equal(order, epoch_order(50_000, 1, 1, shards))
    # 33 shards begin before image 16,384, 33 more before 32,768: windows of 16,500 images.
    windows = [set(blocks[part].tolist()) for part in order.split(16_500)]
    assert [len(window) for window in windows] == [33, 33, 33, 1]
    assert not any(a & b for a in windows for b in windows if a is not b)
    assert windows[0] != set(blocks[epoch_order(50_000, 0, 2, shards)[:16_500]].tolist())
    # Within a window the shards are mixed evenly: each fifth of it has a fifth of each shard.
    counts = torch.bincount(blocks[order[:3_300]], minlength=100)
    assert counts[counts > 0].min() > 60
    assert counts.max() < 140


def test_shards_that_are_sorted_by_class_are_not_read_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        tar(tmp_path / "sorted" / f"{n}.tar", samples([n % 3] * 12, 12 * n))
        tar(tmp_path / "mixed" / f"{n}.tar", samples([(n + i) % 3 for i in range(12)], 12 * n))
    monkeypatch.setattr("convlens.data.webdataset.WINDOW_IMAGES", 50)
    sorted_, mixed = find_source(str(tmp_path / "sorted")), find_source(str(tmp_path / "mixed"))
    assert sorted_.parts["train"].images.blocks() is None  # type: ignore[union-attr]
    assert "sorted by class" in sorted_.notes[0]
    assert mixed.parts["train"].images.blocks() is not None  # type: ignore[union-attr]
    assert not mixed.notes


# From shards to weights


def folder_and_shards(root: Path, count: int = 60, per: int = 7) -> tuple[Path, Path]:
    """The same images in the same order, as class folders and as shards of both classes."""
    for i in range(count):
        path = root / "folder" / f"{i // (count // 2)}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    for start in range(0, count, per):
        numbers = range(start, min(start + per, count))
        labels = [i // (count // 2) for i in numbers]
        tar(root / "tars" / f"set-{start // per:06}.tar", samples(labels, start))
    return root / "folder", root / "tars"


NET = (
    "model.widths=[4,8]",
    "train.epochs=2",
    "train.batch_size=16",
    "optim.ema=null",
    "data.image_size=8",
    "train.memory_format=contiguous",
    "train.precision=fp32",
    "augment=[RandomHorizontalFlip]",
)


def test_shards_train_to_the_weights_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tars_ = folder_and_shards(tmp_path)
    results = {}
    for name, where, memory in (
        ("folder", folder, "1GB"),
        ("whole", tars_, "1GB"),
        ("streamed", tars_, "0.001MB"),
    ):
        monkeypatch.setenv("CONVLENS_MEMORY", memory)
        done = here("train", where, *NET, "--name", name, "--json")
        assert done.code == 0, done.err
        results[name] = done.json
    ours = {name: weights(Path("models") / name) for name in results}
    for name in ("whole", "streamed"):
        assert all(torch.equal(ours["folder"][k], ours[name][k]) for k in ours["folder"])
        same = ("correct", "loss", "confusion", "n")
        assert {k: results[name][k] for k in same} == {k: results["folder"][k] for k in same}
    # The same images were held out, by their places.
    held = [Path("models", n, "split.csv").read_text().splitlines() for n in ("folder", "streamed")]
    ends = [
        [(line.split(",")[0][-4:], line[-4:]) for line in lines[1:]]
        for lines in ([line.replace(".png", "") for line in held[0]], held[1])
    ]
    assert ends[0] == ends[1]
    kept = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(k for k in kept if k != ".lock") == [".checked", ".index", ".pixels", ".pixels"]


def test_rows_stream_beyond_the_budget_only(tmp_path: Path) -> None:
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10})
    config = DataConfig(name=str(root), image_size=8)
    whole = dataset.load_data(config, memory_budget=PLENTY)
    streamed = dataset.load_data(config, memory_budget=1000)
    assert whole.train.rows.in_memory_tensor() is not None
    assert isinstance(streamed.train.rows, DecodedRows)
    again = dataset.load_data(config, memory_budget=1000)  # from what was kept
    index = torch.tensor([39, 0, 7, 7, 12])
    for other in (streamed, again):
        assert torch.equal(whole.train.rows.gather(index), other.train.rows.gather(index))
        assert other.fingerprint == whole.fingerprint
        assert other.train.shards is not None
        assert torch.equal(other.train.shards.shard_ids, torch.arange(40) // 10)
    # Decoded for a larger budget already, but the budget is what was asked for.
    assert not isinstance(streamed.train.rows, StoredRows)


def test_batches_go_on_where_they_were_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 16)
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10}, per=5)
    train = dataset.load_data(DataConfig(name=str(root), image_size=8), memory_budget=1000).train

    def batches() -> Batches:
        return Batches(
            train,
            batch_size=6,
            normalize=Normalize([0.5] * 3, [0.5] * 3),
            plan=PLAN,
            seed=1,
            shards=train.shards,
        )

    whole = list(batches().epoch(2))
    assert len(whole) == 7
    for start in (0, 3, 6, 7):
        rest = list(batches().epoch(2, start))
        assert len(rest) == 7 - start
        for (images, labels), (again, its) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, again)
            assert torch.equal(labels, its)
    # The first window: four of the eight shards, 20 images, and no others.
    order = epoch_order(40, 1, 2, train.shards)
    assert len(set((order[:20] // 5).tolist())) == 4
    assert not torch.equal(order, epoch_order(40, 1, 2))


def test_shards_are_told_of_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 16)
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 16)
    root = shards(tmp_path / "x", {"train": 40, "val": 10, "test": 10}, per=5)
    train = dataset.load_data(DataConfig(name=str(root), image_size=8), memory_budget=1000).train
    assert train.shards is not None
    told: list[int] = []
    spy = ShardOrder(train.shards.shard_ids, told.extend)
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    batches = Batches(train, batch_size=4, normalize=normalize, plan=PLAN, seed=1, shards=spy)
    order = epoch_order(40, 1, 1, spy)
    for step, _ in enumerate(batches.epoch(1)):
        # Those of the two batches (half a window) behind this one, too.
        assert set(train.shards.shard_ids[order[: 4 * (step + 3)]].tolist()) <= set(told)
    assert set(told) == set(range(8))


def test_expected_shards_are_read_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = find_source(str(shards(tmp_path / "x", {"train": 30}))).parts["train"].images
    assert isinstance(images, TarMembers)
    read: list[str] = []
    fill = tar_index.Reader.fill

    def counted(self: tar_index.Reader, into: memoryview, offset: int) -> None:
        fill(self, into, offset)
        read.append(Path(self.path).name)

    monkeypatch.setattr(tar_index.Reader, "fill", counted)

    def expect(*blocks: int) -> None:
        before = threading.active_count()
        images.expect(blocks)
        for thread in threading.enumerate()[before:]:
            thread.join()

    expect(0, 2)
    expect(2, 0)
    assert read == ["train-0.tar", "train-2.tar"]
    (tmp_path / "x" / "train-1.tar").unlink()
    expect(1)  # whoever needs it will say so
    monkeypatch.setattr(tar_index.device, "available_memory", lambda: 1000)
    images._expected.clear()
    expect(0)
    assert read == ["train-0.tar", "train-2.tar"]


def test_unreadable_images_in_shards(tmp_path: Path) -> None:
    content = samples([i % 2 for i in range(40)])
    content[8], content[10] = ("0004.png", b"no image"), ("0005.png", b"")
    tar(tmp_path / "x" / "train-0.tar", content)
    for budget in (1000, PLENTY):
        config = DataConfig(name=str(tmp_path / "x"), image_size=8)
        with pytest.raises(DataError, match="2 of 40 images can't be read") as caught:
            dataset.load_data(config, memory_budget=budget)
        assert "train-0.tar/0004: it is text" in str(caught.value.where)
        assert "train-0.tar/0005: it is empty" in str(caught.value.where)
        skipped = dataset.load_data(
            config.model_copy(update={"on_bad": "skip"}), memory_budget=budget
        )
        assert list(skipped.skipped) == ["train-0.tar/0004", "train-0.tar/0005"]


def test_commands_on_shards(tmp_path: Path) -> None:
    root = shards(tmp_path / "x", {"train": 60, "val": 10, "test": 10})
    audit = here("audit", root, "--json")
    assert audit.code == 0, audit.err
    assert audit.json["counts"]["0"] == {"train": 30, "val": 5, "test": 5}
    assert Path(audit.json["contact_sheet"]).exists()
    done = command("train", tmp_path / "x" / "train-{0..5}.tar", *NET, CONVLENS_MEMORY="0.001MB")
    assert done.code == 0, done.err
    (run,) = Path("models").iterdir()
    # Another set's own test shards; then shards of a single split by a pattern.
    elsewhere = here("evaluate", run.name, "--data", root, "--json")
    assert elsewhere.json["n"] == 10, elsewhere.err
    some = here("evaluate", run.name, "--data", root / "val-{0..0}.tar", "--json")
    assert some.json["n"] == 10
    refused(here("train", root / "nothing-{0..2}.tar"), 3, "3 of 3 shards do not exist")
    (root / "train-3.tar").write_bytes((root / "train-3.tar").read_bytes()[:1500])
    refused(here("train", root), 3, "cut short", "train-3.tar")


# Writing shards


def test_written_shards_hold_the_same_images(tmp_path: Path) -> None:
    drawn = find_source("shapes", count=50, image_size=16)
    out = tmp_path / "out"
    paths = write_shards(drawn, out, per_shard=20)
    assert [p.name for p in paths] == [f"train-00000{n}.tar" for n in range(3)]
    read = find_source(str(out))
    assert read.classes == drawn.classes
    part, theirs = read.parts["train"], drawn.parts["train"]
    order = np.random.default_rng(0).permutation(50)
    assert part.labels.tolist() == theirs.labels[order].tolist()
    assert isinstance(part.images, TarMembers)
    for i in (0, 19, 20, 49):
        pixels = np.asarray(Image.open(io.BytesIO(part.images.read(i)))).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, theirs.images[order[[i]]][0])  # type: ignore[index]
    write_shards(drawn, tmp_path / "again", per_shard=20)
    for path in paths:
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(UsageError, match="only written into a new folder"):
        write_shards(drawn, out)


def test_files_are_copied_into_shards_byte_by_byte(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            path = tmp_path / "set" / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(png(i))).save(path, "JPEG")
    out = tmp_path / "shards"
    done = here("shard", tmp_path / "set", out, "--json")
    assert done.json["images"] == {"train": 6, "val": 4}
    assert done.json["shards"] == 2
    source, theirs = find_source(str(out)), find_source(str(tmp_path / "set"))
    assert source.classes == ("a", "b")
    for split in ("train", "val"):
        ours = source.parts[split].images
        assert isinstance(ours, TarMembers)
        files = {Path(p).read_bytes() for p in theirs.parts[split].images}  # type: ignore[union-attr]
        assert {ours.read(i) for i in range(len(ours))} == files
    # Shards themselves can be written anew, and a damaged image is named, leaving nothing.
    write_shards(source, tmp_path / "twice")
    assert read_shards(tmp_path / "twice", "x").parts["val"].labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "set" / "val" / "a" / "0.jpg").write_text("no image")
    refused(here("shard", tmp_path / "set", tmp_path / "bad"), 3, "no image", "0.jpg")
    assert sorted(p.name for p in tmp_path.iterdir() if "bad" in p.name) == []
