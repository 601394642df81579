"""Files and folders on the disk: images by extension or contents, junk, hidden folders, links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convlens.data.scan import (
    MAX_WRAPPERS,
    Folder,
    Scanner,
    enter_wrappers,
    is_image,
    scan_entries,
)
from convlens.errors import DataError
from helpers.datasets import write_class_folders, write_image


def test_images_are_files_with_a_known_extension_or_known_contents(tmp_path: Path) -> None:
    content = write_image(tmp_path / "a.png").read_bytes()
    for name in ("0001", "b.dat", ".hidden", "Thumbs.db", "c.txt"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "damaged.jpg").write_bytes(b"")
    (tmp_path / "README").write_bytes(b"hello")
    os.mkfifo(tmp_path / "pipe")
    images = sorted(entry.name for entry in scan_entries(tmp_path) if is_image(entry))
    assert images == ["0001", "a.png", "b.dat", "damaged.jpg"]


def test_a_scanner_counts_what_it_ignores(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "x", {"": 1, "deeper": 2, "__MACOSX": 1, ".git": 1})
    for name in ("a.HEIC", "b.heic", "deeper/c.txt", "README"):
        (root / name).write_bytes(b"x")
    contents = Scanner(root).find_images(str(root))
    assert [os.path.relpath(path, root) for path in contents.images] == [
        "0.png",
        "deeper/0.png",
        "deeper/1.png",
    ]
    assert contents.ignored == {".heic": 2, ".txt": 1, "": 1}
    contents = Scanner(root).find_images(str(root), recursive=False)
    assert contents.images == [str(root / "0.png")]
    assert contents.ignored == {".heic": 2, "": 1}


def test_a_folder_lists_its_folders_without_junk(tmp_path: Path) -> None:
    counts = {"b": 1, "a/deep": 1, ".net": 1, ".thumbnails": 1, ".ipynb_checkpoints": 0}
    folder = Folder(str(write_class_folders(tmp_path / "x", {**counts, "__MACOSX": 1, ".c": 0})))
    assert [inner.name for inner in folder.subfolders] == ["a", "b"]
    assert [inner.name for inner in folder.hidden_subfolders] == [".c", ".net"]
    a, b = folder.subfolders
    assert (folder.has_images, a.has_images, b.has_images) == (False, False, True)
    assert folder.holds_images
    assert a.holds_images
    assert not Folder(str(tmp_path / "x" / ".ipynb_checkpoints")).holds_images
    assert [file.name for file in b.files()] == ["0.png"]


def test_a_search_for_images_ends_in_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert not Folder(str(tmp_path / "a")).holds_images


def test_a_missing_folder_counts_as_empty_but_can_not_be_scanned(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "no"))
    assert (folder.subfolders, folder.has_images, folder.files()) == ([], False, [])
    with pytest.raises(DataError, match="can't read this folder"):
        scan_entries(tmp_path / "no")


def test_folders_in_each_other_are_entered_up_to_a_limit(tmp_path: Path) -> None:
    inner = tmp_path.joinpath(*map(str, range(20)))
    inner.mkdir(parents=True)

    def only_folder(outer: Folder) -> Folder | None:
        return outer.subfolders[0] if outer.name != "3" else None

    assert enter_wrappers(Folder(str(tmp_path)), only_folder).path == str(tmp_path / "0/1/2/3")
    deepest = enter_wrappers(Folder(str(tmp_path)), lambda outer: outer.subfolders[0])
    assert deepest.name == str(MAX_WRAPPERS - 1)
