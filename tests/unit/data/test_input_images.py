"""All forms in which images to classify are given: paths, patterns, streams, objects in memory."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlens.data.input_images import (
    InputBatch,
    InputImage,
    collect_inputs,
    count_images,
    expand_paths,
    inputs_from_stdin,
)
from convlens.errors import ConvlensError, DataError, UsageError
from helpers.commands import picture, pictures
from helpers.hostile import KINDS, valid_image

DARK = (60, 50, 40)


def encoded(kind: str = "PNG", size: int = 12) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 90, np.uint8)).save(stream, kind)
    return stream.getvalue()


def test_files_folders_and_globs_keep_the_given_order() -> None:
    inside = pictures(Path("deep"), {"b": 1, "a": 2})
    (inside / "notes.txt").write_text("no image")
    (inside / ".hidden.png").write_bytes(b"")
    odd = picture(Path("[x].png"), DARK)
    given = ["2.png", "deep", "[x].png", "?.png"]
    two, one = picture(Path("2.png"), DARK), picture(Path("1.png"), DARK)
    listed = ["deep/a/000.png", "deep/a/001.png", "deep/b/000.png"]
    assert expand_paths(given) == [str(two), *listed, str(odd), str(one), str(two)]
    assert expand_paths(["deep/**/*.png"]) == listed


def test_hidden_files_and_junk_folders_are_ignored() -> None:
    root = pictures(Path("deep"), {"a": 1, "a/b": 1})
    pictures(root, {"a/.ipynb_checkpoints": 1, "__MACOSX/a": 1, ".trash": 1, "b/@eaDir": 1})
    assert expand_paths(["deep"]) == ["deep/a/000.png", "deep/a/b/000.png"]
    assert expand_paths(["deep/.trash"]) == ["deep/.trash/000.png"]  # requested explicitly


def test_the_home_folder_and_addresses_of_files_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminals insert `file://` when a file is dropped on them; Python does not expand `~`."""
    path = picture(tmp_path / "a b.png", DARK)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_paths(["~/a b.png", f"file://{tmp_path}/a%20b.png"]) == [str(path)] * 2
    assert expand_paths(["~/*.png", f"file://{tmp_path}"]) == [str(path)] * 2
    picture(Path("~") / "a b.png", DARK)  # a file as it is written has priority
    assert expand_paths(["~/a b.png"]) == ["~/a b.png"]


def test_a_pattern_that_matches_folders_stands_for_the_images_inside() -> None:
    root = pictures(Path("plain"), {"a": 2, "b": 1, "b/c": 1})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    listed = ["plain/a/000.png", "plain/a/001.png", "plain/b/000.png", "plain/b/c/000.png"]
    shell = sorted(map(str, root.iterdir()))  # what a shell makes of plain/*
    assert expand_paths(["plain/*"]) == listed
    assert expand_paths([path for path in shell if "empty" not in path]) == listed
    # Everything below a folder, without duplicates.
    for pattern in ("plain/**", "plain/**/", "plain/**/**", "pla*/**", "plain"):
        assert expand_paths([pattern]) == listed, pattern
    assert sorted(expand_paths(["**"])) == listed
    assert sorted(expand_paths(["plain/**/[ab]*"])) == listed
    assert expand_paths(["plain/[bc]*"]) == listed[2:]


def test_one_error_names_all_patterns_and_folders_without_images() -> None:
    Path("empty").mkdir()
    pictures(Path("junk"), {".hidden": 1})
    picture(Path("a.png"), DARK)
    with pytest.raises(DataError) as error:
        expand_paths(["a.png", "*.jpg", "empty", "junk", "emp*", "nowhere/**"])
    assert error.value.what == (
        "not found: *.jpg, empty (a folder without images), junk (a folder without images), emp* "
        "(folders without images), nowhere/**"
    )


@pytest.mark.parametrize("name", ["a\0/b*.png", "a\0*", "*\ud800/x*.png", "\ud800/*.png"])
def test_patterns_that_no_file_name_can_have_match_nothing(name: str) -> None:
    with pytest.raises(DataError, match="not found: ") as error:
        expand_paths([name])
    assert error.value.what.isprintable()
    assert expand_paths(["a\0b"]) == ["a\0b"]  # reading it says why it cannot be opened


def test_long_names_are_shortened_in_messages() -> None:
    with pytest.raises(DataError) as error:
        expand_paths(["*" * 57_000])
    assert len(error.value.what) < 200


ARRAY = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def test_one_image_of_every_form_is_one_input() -> None:
    path = picture(Path("a.png"), DARK)
    content = path.read_bytes()
    with Image.open(path) as pil, path.open("rb") as file:
        forms: dict[str, Any] = {
            "path": "a.png",
            "pathlib": path,
            "bytes": content,
            "bytearray": bytearray(content),
            "memoryview": memoryview(content),
            "BytesIO": io.BytesIO(content),
            "file": file,
            "PIL": pil,
            "array": ARRAY,
            "tensor": torch.from_numpy(ARRAY).movedim(2, 0),
        }
        for name, form in forms.items():
            for given in (form, [form]) if name != "tensor" else ([form],):
                (source,) = collect_inputs(given)
                assert count_images([source]) == 1, name
                expected = "a.png" if name in ("path", "pathlib", "file", "PIL") else "0"
                if isinstance(source, InputImage):
                    assert source.name == expected, name
                if "bytes" in name.lower() or name in ("memoryview", "file"):
                    assert isinstance(source, InputImage)
                    assert source.source == content
        assert not file.closed


def test_a_stream_is_read_from_its_start() -> None:
    stream = io.BytesIO()
    Image.fromarray(ARRAY).save(stream, "PNG")  # it is at its end now
    (source,) = collect_inputs(stream)
    assert isinstance(source, InputImage)
    assert source.source == stream.getvalue()


def test_a_pipe_is_read_where_it_is() -> None:
    reading, writing = os.pipe()
    os.write(writing, encoded())
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        (source,) = collect_inputs(pipe)
    assert isinstance(source, InputImage)
    assert source.source == encoded()


def test_images_in_a_list_are_numbered_among_all_images() -> None:
    pictures(Path("more"), {"x": 2})
    batch = np.zeros((3, 8, 9, 3), np.uint8)
    sources = collect_inputs(each for each in ["more", ARRAY, batch, encoded(), ARRAY[..., 0]])
    names = [each.name if isinstance(each, InputImage) else each.first for each in sources]
    assert names == ["more/x/000.png", "more/x/001.png", "2", 3, "6", "7"]
    assert count_images(sources) == 8


def test_three_axes_are_one_image_in_a_list_and_may_be_a_batch_otherwise() -> None:
    first = np.zeros((3, 8, 9), np.uint8)
    (image,) = collect_inputs([first])
    assert isinstance(image, InputImage)
    assert isinstance(image.source, np.ndarray)
    assert image.source.shape == (3, 8, 9)
    (batch,) = collect_inputs(np.zeros((5, 8, 9), np.uint8))
    assert isinstance(batch, InputBatch)
    assert batch.images.shape == (5, 1, 8, 9)
    with pytest.raises(UsageError, match="does not hold images"):
        collect_inputs([np.zeros((5, 8, 9), np.uint8)])
    (batch,) = collect_inputs([first], channels="none")
    assert count_images([batch]) == 3


def test_arrays_of_names_and_of_images_are_lists() -> None:
    picture(Path("a.png"), DARK)
    images = np.empty(2, object)
    images[:] = [np.zeros((8, 9, 3)), np.zeros((7, 7))]
    assert [each.name for each in collect_inputs(np.array(["a.png"]))] == ["a.png"]  # type: ignore[union-attr]
    assert count_images(collect_inputs(images)) == 2


class Coroutine:
    """As the `UploadFile` of a web framework, whose `read` has to be awaited."""

    async def read(self, size: int = -1) -> bytes:
        return b""


class Broken:
    def read(self, size: int = -1) -> bytes:
        raise OSError(5, "Input/output error")


def closed() -> io.BytesIO:
    stream = io.BytesIO(b"x")
    stream.close()
    return stream


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        0.5,
        {"a.png": 1},
        [None],
        [3],
        [[1, 2]],
        (1, 0, 30, 3),
        [(ARRAY, 3)],
        object(),
        [{"a"}],
        io.StringIO("text"),
        Coroutine(),
        Broken(),
        closed(),
        Image.new("RGB", (0, 4)),
        [Image.new("L", (4, 0))],
        np.zeros((0, 8, 3)),
        [ARRAY, np.zeros((0, 8, 3))],
        np.array(3),
        np.array(["a.png"]).reshape(1, 1, 1, 1, 1),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_everything_else_is_an_error_with_what_to_do(wrong: Any) -> None:
    with pytest.raises(ConvlensError) as error:
        collect_inputs(wrong)
    assert error.value.fix
    named = wrong[-1] if isinstance(wrong, list | tuple) else wrong
    kinds = (type(named).__name__, "pixels", "images", "Input/output", "closed file")
    assert any(kind in str(error.value) for kind in kinds)


def test_no_images_are_no_inputs() -> None:
    assert collect_inputs([]) == []
    assert count_images(collect_inputs(np.zeros((0, 8, 9, 3)))) == 0


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", []),
        (b" \n\n", []),
        (b"a.png\n\n  b.png  \n", ["a.png", "b.png"]),
        (b"a.png\r\nb.png\r\n", ["a.png", "b.png"]),
        (b"\xef\xbb\xbfa.png\n", ["a.png"]),
        ("\ufeffa.png\r\nü.png\r\n".encode("utf-16-le"), ["a.png", "ü.png"]),
        ("\ufeffa.png\n".encode("utf-16-be"), ["a.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"a\0/b*.png\n", ["a", "/b*.png"]),
        ("猫/é.png\n".encode(), ["猫/é.png"]),
        (b"P6.png\nBM\nGIF89a.png\n", ["P6.png", "BM", "GIF89a.png"]),
    ],
)
def test_names_on_stdin(content: bytes, names: list[str]) -> None:
    assert inputs_from_stdin(content) == names


def test_names_that_are_not_valid_text_are_accepted_if_the_files_exist() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    picture(Path(name), DARK)
    assert inputs_from_stdin(b"caf\xe9.png\n") == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_on_stdin_is_an_image(kind: str) -> None:
    content = valid_image(kind)
    if not content:
        pytest.skip("this Pillow cannot write it")
    assert inputs_from_stdin(content) == [InputImage("-", content)]


def test_a_damaged_image_on_stdin_is_left_to_the_decoder() -> None:
    content = encoded()[:-20]
    assert inputs_from_stdin(content) == [InputImage("-", content)]


@pytest.mark.parametrize(
    "content", [bytes(range(256)), b"\xff\xfe\xfd", b"caf\xe9.png\n", b"<html>\n", b"\x1b[31m"]
)
def test_other_bytes_on_stdin_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="neither an image nor a list of file names") as error:
        inputs_from_stdin(content)
    assert str(error.value).replace("\n", "").isprintable()


def test_other_formats_on_stdin_are_named() -> None:
    heic = b"\0\0\0\x18ftypheic" + bytes(8) + b"mif1heic"
    with pytest.raises(DataError, match="it is HEIC, which is not supported: convert it to JPEG"):
        inputs_from_stdin(heic)


def test_paths_of_every_type_have_names_of_text() -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return b"a.png"

    for given in (np.array(["a.png"]), [np.str_("a.png")], [BytesPath()], [Path("a.png")]):
        (image,) = collect_inputs(given)  # type: ignore[arg-type]
        assert isinstance(image, InputImage)
        assert (image.name, image.source, type(image.source)) == ("a.png", "a.png", str)


def test_released_memory_is_a_usage_error() -> None:
    view = memoryview(b"x")
    view.release()
    with pytest.raises(UsageError, match="memoryview can't be read"):
        collect_inputs([view])
