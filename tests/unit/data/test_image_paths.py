"""Files are found although their paths were written for another system or another folder."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings, strategies as st

from convlens.data.image_paths import (
    PathFinder,
    Resolution,
    is_file_url,
    is_url,
    path_of_file_url,
)

NAMES = ["cat 1.png", "dog_2.png", "ä.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "img").mkdir(parents=True)
    for name in NAMES:
        (root / "img" / name).touch()
    return root


def resolve(folder: Path, paths: list[str], images: Path | None = None) -> Resolution:
    return PathFinder(str(folder), None if images is None else str(images)).resolve(paths)


def expected(folder: Path) -> list[str]:
    return [str(folder / "img" / name) for name in NAMES]


FORMS = {
    "as it is": lambda folder, name: f"img/{name}",
    "with a dot": lambda folder, name: f"./img/{name}",
    "absolute": lambda folder, name: f"{folder}/img/{name}",
    "backslashes": lambda folder, name: f"img\\{name}",
    "without extension": lambda folder, name: f"img/{name[:-4]}",
    "upper case": lambda folder, name: f"IMG/{name.upper()}",
    "upper case without extension": lambda folder, name: f"Img\\{name[:-4].upper()}",
    "file address": lambda folder, name: "file://" + quote(f"{folder}/img/{name}"),
    "Label Studio": lambda folder, name: "/data/local-files/?d=" + quote(f"img/{name}"),
    "percent signs": lambda folder, name: quote(f"img/{name}"),
    "another machine": lambda folder, name: f"/home/me/set/img/{name}",
    "Windows": lambda folder, name: f"C:\\Users\\me\\set\\img\\{name}",
    "project folder": lambda folder, name: f"data/set/img/{name}",
    "name": lambda folder, name: name,
    "name without extension": lambda folder, name: name[:-4],
    "zero-width space": lambda folder, name: f"img/\u200b{name}",
    "decomposed": lambda folder, name: "img/" + unicodedata.normalize("NFD", name),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_path_is_resolved(folder: Path, form: str) -> None:
    result = resolve(folder, [FORMS[form](str(folder), name) for name in NAMES])
    assert result.files == expected(folder)
    assert bool(result.notes) == (form not in ("as it is", "with a dot", "absolute"))


@pytest.mark.parametrize(
    ("form", "note"),
    [
        ("backslashes", "3 of 3 with / for \\"),
        ("without extension", "3 of 3 with extension"),
        ("upper case", "3 of 3 in another case"),
        ("file address", "3 of 3 from a file:// address"),
        ("percent signs", "2 of 3 with blanks and other characters for %20"),
        ("another machine", "3 of 3 paths begin with /home/me/set, which is not here"),
        ("Windows", "3 of 3 paths begin with C:/Users/me/set, which"),
        ("name", "3 files were found in img"),
    ],
)
def test_a_note_says_what_was_repaired_and_how_often(folder: Path, form: str, note: str) -> None:
    result = resolve(folder, [FORMS[form](str(folder), name) for name in NAMES])
    assert note in result.notes[0]


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(folder, ["~/set/img/dog_2.png"]).files == expected(folder)[1:2]


def test_a_file_as_it_is_written_has_priority(folder: Path) -> None:
    (folder / "img" / "CAT 1.png").touch()
    (folder / "img" / "dog_2").touch()
    result = resolve(folder, ["img/CAT 1.png", "img/dog_2"])
    assert result.files == [str(folder / "img" / "CAT 1.png"), str(folder / "img" / "dog_2")]
    assert not result.notes


def test_two_files_that_may_be_meant_are_named(folder: Path) -> None:
    (folder / "img" / "dog_2.jpg").touch()
    result = resolve(folder, ["img/cat 1.png", "img/dog_2"])
    assert result.files[1] is None
    assert "several files may be meant by img/dog_2: dog_2.jpg, dog_2.png" in result.hints


def test_a_missing_file_is_not_replaced_by_one_of_the_same_name(tmp_path: Path) -> None:
    for path in ("cat/1.png", "dog/1.png", "dog/2.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    result = resolve(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png"])
    assert result.files == [str(tmp_path / "cat/1.png"), None, str(tmp_path / "dog/1.png")]


def test_files_in_two_folders_with_the_same_names_are_ambiguous(folder: Path) -> None:
    (folder / "copy").mkdir()
    for name in NAMES:
        (folder / "copy" / name).touch()
    result = resolve(folder, NAMES)
    assert result.files == [None] * 3
    assert "they are in each of the folders copy, img" in result.hints
    assert result.fix == "data.images=copy or data.images=img"
    assert resolve(folder, NAMES, folder / "img").files == expected(folder)


def test_files_may_lie_in_several_folders_if_their_names_are_unique(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "cow.png").touch()
    result = resolve(folder, [*NAMES, "cow"])
    assert result.files == [*expected(folder), str(folder / "more" / "cow.png")]
    assert result.notes == ["4 files were found by name in 2 folders: img, more"]


def test_the_hint_names_the_folder_that_has_some_of_the_files(folder: Path) -> None:
    result = resolve(folder, [*NAMES, "gone.png"])
    assert result.files == [None] * 4
    assert result.hints[0] == "img/cat 1.png is there, like 3 of 4: data.images=img"
    assert result.fix == "data.images=img"


def test_a_folder_of_lists_may_lie_beside_that_of_the_images(folder: Path) -> None:
    (folder / "splits").mkdir()
    assert resolve(folder / "splits", NAMES).files == expected(folder)


def test_the_reasons_for_missing_files_are_counted(folder: Path) -> None:
    result = resolve(folder, ["x\\1.png", "x\\2.png", "/y/3.png", "img/dog_2.gif"])
    hints = "; ".join(result.hints)
    assert "2 of 4 have a backslash; 1 of 4 are absolute" in hints
    assert "dog_2.png is there instead of img/dog_2.gif" in hints


def test_a_folder_that_cannot_be_listed_can_still_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "scandir", refuse)
    assert resolve(folder, [f"img/{name}" for name in NAMES]).files == expected(folder)


def test_each_folder_is_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    finder = PathFinder(str(folder))
    assert finder.share([f"img/{name[:-4]}" for name in NAMES] * 50) == 1
    finder.resolve([f"img/{name}" for name in NAMES] * 50)
    assert sorted(listed) == sorted(set(listed))


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    images=st.lists(
        st.from_regex(r"[a-z0-9][a-z0-9 _-]{0,6}[a-z0-9]", fullmatch=True),
        min_size=1,
        max_size=5,
        unique=True,
    ),
)
def test_any_names_are_found_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, form: str, images: list[str]
) -> None:
    root = tmp_path_factory.mktemp("names")
    (root / "img").mkdir()
    files = [root / "img" / f"{name}.png" for name in images]
    for file in files:
        file.touch()
    result = resolve(root, [FORMS[form](str(root), file.name) for file in files])
    assert result.files == [str(file) for file in files]


def test_uploads_to_label_studio_have_their_original_names(folder: Path) -> None:
    paths = [f"/data/upload/7/0a1b2c3{i}-{name}" for i, name in enumerate(NAMES)]
    result = resolve(folder, paths)
    assert result.files == expected(folder)
    assert result.notes == [
        "3 of 3 paths are uploads to Label Studio, which were found under their original names"
    ]
    assert resolve(folder, [paths[1].lstrip("/")]).files == expected(folder)[1:2]
    # The exported file itself has priority, and two uploads of one name are not guessed.
    upload = folder / "img" / Path(paths[1]).name
    upload.touch()
    assert resolve(folder, paths[1:2]).files == [str(upload)]
    twice = resolve(
        folder, ["/data/upload/7/00000000-dog_2.png", "/data/upload/8/11111111-dog_2.png"]
    )
    assert twice.files == [None, None]


def test_masks_with_the_names_of_the_images_are_not_taken(tmp_path: Path) -> None:
    for path in ("images/a.jpg", "annotations/trimaps/a.png", "masks/a.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    for folder in (tmp_path / "annotations", tmp_path):
        assert resolve(folder, ["a"]).files == [str(tmp_path / "images" / "a.jpg")]
    # Without another folder, they are the images.
    (tmp_path / "images" / "a.jpg").unlink()
    assert resolve(tmp_path / "annotations", ["a"]).files == [
        str(tmp_path / "annotations" / "trimaps" / "a.png")
    ]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:///a/b%20c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("FILE:/a", "/a"),
        ("file:///C:/a", "C:/a"),
    ],
)
def test_addresses_of_files_are_paths(text: str, path: str) -> None:
    assert is_file_url(text)
    assert not is_url(text)
    assert path_of_file_url(text) == path
    assert all(map(is_url, ("https://x/y.zip", "s3://bucket", "gs://b/x", "hf://datasets/x")))
    assert not any(map(is_url, ("C:\\x", "a/b", "c://x", "x.csv")))
