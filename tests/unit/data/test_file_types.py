"""Formats recognized by their first bytes, and the sentences about files that are not used."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, features

from convlens.data.decode import EXTENSIONS
from convlens.data.file_types import (
    describe_ignored,
    holds_image,
    sniff_format,
    unsupported_format,
)

# What iPhones and cameras write: size, box type, major brand.
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"]
)
def test_formats_that_pillow_writes_are_recognized(tmp_path: Path, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow can't write AVIF")
    assert sniff_format(encoded(kind)) == kind
    assert unsupported_format(encoded(kind)) == ""
    for name in ("0001", "photo.unknown"):
        (tmp_path / name).write_bytes(encoded(kind))
        assert holds_image(str(tmp_path / name))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (HEIC, "HEIC"),
        (b"8BPS\0\1", "Photoshop (PSD)"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"BMW 3 series", ""),  # a text
        (b"P1 is a driver", ""),
        (b"", ""),
    ],
)
def test_other_contents_are_not_images(tmp_path: Path, head: bytes, kind: str) -> None:
    assert sniff_format(head) == unsupported_format(head) == kind
    (tmp_path / "file").write_bytes(head)
    assert not holds_image(str(tmp_path / "file"))


def test_a_raw_file_is_not_the_tiff_that_it_looks_like(tmp_path: Path) -> None:
    (tmp_path / "photo.nef").write_bytes(encoded("TIFF"))
    assert not holds_image(str(tmp_path / "photo.nef"))
    (tmp_path / "photo.heic").write_bytes(encoded("JPEG"))  # a wrong extension
    assert holds_image(str(tmp_path / "photo.heic"))


def test_text_files_are_not_opened() -> None:
    assert not holds_image("/no/such/folder/labels.txt")


def test_ignored_files_are_counted_by_extension_and_remedy() -> None:
    counts = {".heic": 8, ".txt": 2, "": 1, ".mov": 1, ".psd": 9}
    assert describe_ignored(counts) == [
        "9 .psd, 8 .heic files are not supported: convert them to JPEG or PNG",
        "1 .mov file is not supported: save frames of the videos as JPEG or PNG",
        "ignored 3 files that are not images: 2 .txt, 1 without extension",
    ]
    assert describe_ignored({}) == []
    assert describe_ignored({f".{i}": i for i in range(1, 8)}) == [
        "ignored 28 files that are not images: 7 .7, 6 .6, 5 .5, 4 .4, 3 .3 and others"
    ]


def test_no_extension_of_an_image_counts_as_unsupported() -> None:
    assert not any("not supported" in describe_ignored({suffix: 1})[0] for suffix in EXTENSIONS)
