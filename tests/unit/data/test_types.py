"""Encoded files, their errors and digests, and sequences of names in little memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from convlens.data.decode import UnreadableImage
from convlens.data.types import (
    DataSource,
    FilePaths,
    IndexedStrings,
    NumberedStrings,
    PackedStrings,
    Part,
    is_image_name,
    modification_times,
    raise_if_transient,
)
from convlens.errors import ResourceError


def write_files(folder: Path, count: int) -> FilePaths:
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return FilePaths([str(path) for path in paths])


def test_file_paths_read_and_concatenate(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    both = files.concat(FilePaths([files[0]]))
    assert [both.read(i) for i in range(len(both))] == [b"\0", b"\1", b"\0"]
    assert both.name(2) == files[0]
    assert both.shard_ids() is None


def test_a_subset_of_file_paths_has_these_files(tmp_path: Path) -> None:
    files = write_files(tmp_path, 3)
    some = files.subset(np.array([2, 0]))
    assert [some.read(i) for i in range(len(some))] == [b"\2", b"\0"]


def make_source() -> DataSource:
    """Six images, whose pixels are their numbers, of three classes and two patients."""
    pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    labels = np.array([2, 0, 1, 2, 1, 0])
    train = Part(pixels, labels, [f"x/{i}" for i in range(6)], ["p", "q", "p", "q", "p", "q"])
    test = Part(pixels[:2], labels[:2], NumberedStrings("test", 2))
    return DataSource("x", ("ant", "bee", "cow"), {"train": train, "test": test}, ("old",))


def test_classes_are_left_out_with_their_images_in_every_part() -> None:
    source = make_source().with_classes(["cow", "ant"])  # in any order
    assert source.classes == ("ant", "cow")
    train, test = source.parts["train"], source.parts["test"]
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert train.ids == ["x/0", "x/1", "x/3", "x/5"]
    assert train.groups == ["p", "q", "q", "q"]
    assert train.images.shape == (4, 1, 1, 1)  # type: ignore[union-attr]
    pixels = train.images[np.array([3, 0])]  # type: ignore[index]
    assert pixels[:, 0, 0, 0].tolist() == [5, 0]
    assert (test.labels.tolist(), test.ids, test.groups) == ([1, 0], ["test/0", "test/1"], None)
    assert source.notes == ("old",)


def test_a_part_without_images_of_the_chosen_classes_is_dropped() -> None:
    source = make_source().with_classes(["bee"])
    assert list(source.parts) == ["train"]
    assert source.parts["train"].ids == ["x/2", "x/4"]
    assert source.notes == ("old", "test: no images of the chosen classes, so it is not used")
    same = make_source()
    assert same.with_classes(same.classes) is same


def test_the_digest_of_file_paths_changes_with_a_file(tmp_path: Path) -> None:
    files = write_files(tmp_path, 2)
    digest = files.stat_digest()
    assert FilePaths(list(files)).stat_digest() == digest
    assert FilePaths(files[::-1]).stat_digest() != digest
    stat = os.stat(files[1])
    Path(files[1]).write_bytes(b"2")  # the same size, and the same mtime
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.stat_digest() != digest
    os.unlink(files[0])
    assert modification_times(files)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("number", "is_transient"), [(errno.EIO, True), (errno.EMFILE, True), (errno.ENOENT, False)]
)
def test_only_transient_system_errors_are_raised(number: int, is_transient: bool) -> None:
    error = UnreadableImage("a.png", "unreadable")
    raise_if_transient(error)  # no system error
    error.__cause__ = OSError(number, os.strerror(number))
    if not is_transient:
        raise_if_transient(error)
        return
    with pytest.raises(ResourceError, match=os.strerror(number)):
        raise_if_transient(error)


def test_images_are_recognized_by_extension() -> None:
    assert is_image_name("a.JPG")
    assert is_image_name("a.b.png")
    for name in (".a.png", "png", "a.txt", "a.png.part"):
        assert not is_image_name(name)


def test_packed_strings_equal_the_list_they_were_made_of() -> None:
    names = ["", "Ölgötze", "a/b", "x" * 300]
    packed = PackedStrings.of(names)
    assert list(packed) == names
    assert packed == names != packed[:3]
    assert packed[-1] == names[-1]
    assert packed[1:3] == names[1:3]
    with pytest.raises(IndexError):
        packed[4]
    assert list(PackedStrings.of([])) == []


def test_indexed_strings_select_by_position() -> None:
    packed = PackedStrings.of(["", "b", "a/b"])
    assert IndexedStrings(packed, np.array([2, 0, 2])) == ["a/b", "", "a/b"]
    assert IndexedStrings(NumberedStrings("x", 9), np.array([8, 3])) == ["x/8", "x/3"]
