"""Parsing tars strictly, the cached index of their samples, and reading images from shards."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import threading
from pathlib import Path

import pytest

from convlens.data import tar_index
from convlens.data.sources import find_source
from convlens.data.tar_index import TarMembers, read_samples
from convlens.data.types import DataSource
from convlens.errors import DataError, ResourceError
from helpers.commands import here, refused
from helpers.shards import BAD_MEMBERS, Member, damaged, png, samples, shards, tar
from helpers.support import BAD_DISK


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_of_a_tar_are_found(tmp_path: Path, style: int) -> None:
    deep = "a" * 80 + "/" + "b" * 90  # too long for the name field of a ustar header
    long = deep if style == tarfile.USTAR_FORMAT else deep + "/" + "c" * 200 + "ü"
    folder = tarfile.TarInfo("dir")
    folder.type = tarfile.DIRTYPE
    content: list[Member | tarfile.TarInfo] = [
        ("./x/0001.JPG", b"one"),
        ("./x/0001.Cls", b" 3\r\n"),
        folder,
        ("0002.cls", b"7"),
        ("0002.png", b"two!"),  # the label comes first
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
    result = read_samples(path)
    assert not result.problems
    assert result.keys == ["x/0001", "0002", "0003", "0004", "0005", "0006", "0007", long]
    assert result.labels == [3, 7, "Löwenzahn", 12, "rose", "tulip", 1, 0]
    content_bytes = path.read_bytes()
    spans = zip(result.offsets, result.sizes, strict=True)
    assert [content_bytes[start : start + size] for start, size in spans] == [
        b"one",
        b"two!",
        b"three",
        b"",
        b"five",
        b"six",
        b"7",
        b"long",
    ]
    assert result.ignored == 4  # the mask, the array, the README and the macOS file


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_reported(tmp_path: Path, case: str) -> None:
    content, message = BAD_MEMBERS[case]
    good = [] if case == "key twice" else samples([0, 1, 0, 1])
    tar(tmp_path / "set" / "a.tar", [*good, *content])
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path / "set"))
    assert message in caught.value.what


@pytest.mark.parametrize("case", damaged(b""))
def test_files_that_are_not_a_complete_tar_are_reported(tmp_path: Path, case: str) -> None:
    valid = tar(tmp_path / "good.tar", samples([0, 1, 0, 1])).read_bytes()
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "a.tar"
    content, message = damaged(valid)[case]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_source(str(tmp_path / "set"))
    assert message in caught.value.what
    assert caught.value.where == str(path)


def test_a_failing_disk_is_not_reported_as_a_damaged_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tar(tmp_path / "set" / "a.tar", samples([0, 1]))
    bad = tmp_path / "set" / "b.tar"
    bad.symlink_to(BAD_DISK)
    with pytest.raises(ResourceError, match="Input/output error") as caught:
        find_source(str(tmp_path / "set"))
    assert caught.value.where == str(bad)
    bad.unlink()

    def raise_stale(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(tar_index._BoundedFile, "read", raise_stale)
        with pytest.raises(ResourceError, match="Stale") as caught:
            find_source(str(tmp_path / "set"))
    assert caught.value.where == str(good)
    assert find_source(str(tmp_path / "set")).classes == ("0", "1")


def test_a_failing_disk_ends_a_training_with_the_name_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "set", {"train": 20})
    (tmp_path / "cache").mkdir()
    temporary = tmp_path / "cache" / f".{'0' * 40}.index.abcdefgh.part"
    temporary.touch()

    def raise_io_error(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", raise_io_error)
        done = here("train", tmp_path / "set", "train.epochs=1", "model.widths=[2]")
    refused(done, 5, "can't read: Input/output error", "train-0.tar", "check the file")
    assert "not cached" not in done.err
    assert temporary.exists()  # of another index


def test_the_index_is_cached_until_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path / "x", {"train": 20})
    read: list[str] = []

    def recorded(path: Path) -> tar_index.TarSamples:
        read.append(path.name)
        return read_samples(path)

    monkeypatch.setattr(tar_index, "read_samples", recorded)
    first, second = find_source(str(tmp_path / "x")), find_source(str(tmp_path / "x"))
    assert read == ["train-0.tar", "train-1.tar"]
    for source in (first, second):
        part = source.parts["train"]
        assert isinstance(part.images, TarMembers)
        assert [part.images.read(i) for i in (0, 19, 7)] == [png(0), png(19), png(7)]
        assert (part.ids[19], part.labels[19]) == ("train-1.tar/0019", 1)
    assert first.parts["train"].images.stat_digest() == second.parts["train"].images.stat_digest()
    (index,) = (tmp_path / "cache").glob("*.index")
    valid = index.read_bytes()
    for content in (valid[:100], b"", b"x" * 50):
        index.write_bytes(content)
        temporary = index.with_name(f".{index.name}.abcdefgh.part")  # of a killed process
        temporary.touch()
        assert list(find_source(str(tmp_path / "x")).parts["train"].ids) == list(part.ids)
        assert index.read_bytes() == valid
        assert not temporary.exists()
    tar(tmp_path / "x" / "train-1.tar", samples([1, 0], 50))
    changed = find_source(str(tmp_path / "x")).parts["train"]
    assert list(changed.ids)[10:] == ["train-1.tar/0050", "train-1.tar/0051"]
    # A source that was opened before must not read the new shard with the old index.
    with pytest.raises(DataError, match="a shard has changed since the start"):
        close_shards(first).read(15)


def close_shards(source: DataSource) -> TarMembers:
    """Return the training images of a source after closing all shards."""
    images = source.parts["train"].images
    assert isinstance(images, TarMembers)
    images._open.clear()
    return images


def test_an_open_shard_stays_readable_after_its_deletion(tmp_path: Path) -> None:
    source = find_source(str(shards(tmp_path / "x", {"train": 20})))
    images = source.parts["train"].images
    assert isinstance(images, TarMembers)
    images.read(0)
    shutil.rmtree(tmp_path / "x")
    assert images.read(3) == png(3)
    with pytest.raises(DataError, match="a shard can no longer be opened"):
        images.read(12)


def test_a_limited_number_of_shards_is_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_index, "MAX_OPEN_FILES", 2)
    images = find_source(str(shards(tmp_path, {"train": 12}, per=2))).parts["train"].images
    assert isinstance(images, TarMembers)
    for i in (0, 11, 5, 1, 8, 0, 10):
        assert images.read(i) == png(i)
        assert len(images._open) <= 2


def test_shards_are_prefetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = find_source(str(shards(tmp_path / "x", {"train": 30}))).parts["train"].images
    assert isinstance(images, TarMembers)
    read: list[str] = []
    fill = tar_index.Reader.fill

    def recorded(self: tar_index.Reader, into: memoryview, offset: int) -> None:
        fill(self, into, offset)
        read.append(Path(self.path).name)

    monkeypatch.setattr(tar_index.Reader, "fill", recorded)

    def prefetch(*shard_ids: int) -> None:
        before = threading.active_count()
        images.prefetch(shard_ids)
        for thread in threading.enumerate()[before:]:
            thread.join()

    prefetch(0, 2)
    prefetch(2, 0)
    assert read == ["train-0.tar", "train-2.tar"]
    (tmp_path / "x" / "train-1.tar").unlink()
    prefetch(1)  # no error: reading an image of it will report one
    monkeypatch.setattr(tar_index, "available_memory", lambda: 1000)
    images._prefetched.clear()
    prefetch(0)
    assert read == ["train-0.tar", "train-2.tar"]
