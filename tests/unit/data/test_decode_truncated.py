"""Truncated and damaged JPEGs are refused and never decoded half grey; intact ones are read."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from conftest import DATA
from convlens.data import decode as data_decode
from convlens.data.decode import TruncatedImagesRefused, UnreadableImage, decode
from convlens.utils.files import MemorySemaphore

END = b"\xff\xd9"
ONE_SCAN: dict[str, dict[str, object]] = {
    "usual": {},
    "own tables": {"optimize": True},
    "colours in full": {"subsampling": 0},
    "colours halved": {"subsampling": 1},
    "coarse": {"quality": 20},
    "restarts": {"restart_marker_rows": 1},
    "many restarts": {"restart_marker_blocks": 3},
    "exif": {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0" + b"\xff\xda\xff\xd9" * 9},
    "comment": {"comment": b"\xff\xd8\xff\xd9\xff\xd0" * 9},
}
SCANS: dict[str, dict[str, object]] = {
    "progressive": {"progressive": True},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
}
MODES = ("RGB", "L", "CMYK")


def photo(mode: str = "RGB", size: tuple[int, int] = (150, 130)) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (12, 14, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)  # type: ignore[arg-type]
    return stream.getvalue()


def pixels(content: bytes, size: int | None = None) -> np.ndarray:
    return decode(content, size=size, channels=3, fit="crop")


def accepted(content: bytes) -> bool:
    try:
        pixels(content)
    except UnreadableImage as error:
        return not error.reason
    return True


def data_of(content: bytes) -> int:
    """Return the offset of the data of the last scan."""
    return content.rindex(b"\xff\xda") + 14


# Intact images


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*ONE_SCAN, *SCANS])
def test_intact_jpegs_decode_as_in_pillow_with_junk_around_them(mode: str, kind: str) -> None:
    content = jpeg(photo(mode), **{**ONE_SCAN, **SCANS}[kind])
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    start = content.rindex(b"\xff\xda")
    variants = {
        "unchanged": content,
        "text behind": content + b"text" * 20,
        "zeros behind": content + bytes(5000),
        "an image behind": content + content,
        "junk before the end": content[:-2] + b"junk" * 20 + END,
        "filled up": content[:start] + b"\xff" * 9 + content[start:-2] + b"\xff" * 9 + END,
    }
    if kind in ONE_SCAN:  # some cameras write no end
        variants["no end, but zeros"] = content[:-2] + bytes(500)
    for what, variant in variants.items():
        np.testing.assert_array_equal(pixels(variant), expected, what)
        assert pixels(variant, size=16).shape == (3, 16, 16)


def test_headers_of_usual_jpegs_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them again would take a quarter of the time of a small image."""

    def walked(_: bytes) -> None:
        raise AssertionError

    monkeypatch.setattr(data_decode, "_walk_segments", walked)
    for kind in ("usual", "own tables", "colours halved", "exif"):
        for mode in MODES:
            assert accepted(jpeg(photo(mode), **ONE_SCAN[kind]))


def test_flat_images_whose_data_are_zeros_are_readable() -> None:
    # With optimized tables a flat image uses the shortest codes only, which are zeros.
    for size in range(300, 340):
        content = jpeg(Image.new("L", (size, 300), 128), optimize=True)
        assert bytes(100) in content
        assert (pixels(content) == 128).all()


def test_multi_picture_files_of_phones_are_readable() -> None:
    stream = io.BytesIO()
    photo().save(stream, "MPO", save_all=True, append_images=[photo().rotate(180)])
    content = stream.getvalue()
    expected = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(content), expected)
    end = content.index(END, content.index(b"\xff\xda"))
    assert not accepted(content[: end - 400] + content[end:])


@pytest.mark.data
def test_every_real_photo_is_readable() -> None:
    paths = sorted((DATA / "flowers").rglob("*.jpg"))[::20]
    assert len(paths) > 100
    for path in paths:
        assert pixels(path.read_bytes(), size=32).shape == (3, 32, 32)


# Damaged images


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ONE_SCAN)
def test_missing_tail_is_refused(mode: str, kind: str) -> None:
    content = jpeg(photo(mode), **ONE_SCAN[kind])
    start = data_of(content)
    for share in range(0, 98, 3):
        cut = start + (len(content) - start) * share // 100
        head, lost = content[:cut], len(content) - cut
        assert not accepted(head + END), share
        assert not accepted(head + bytes(lost)), share
        assert not accepted(head + bytes(lost - 2) + END), share
        assert not accepted(head + END + bytes(lost)), share
        assert not accepted(head), share
        assert not accepted(head + END + content), share


@pytest.mark.parametrize("kind", ["usual", "restarts", "many restarts"])
def test_marker_inside_the_data_is_refused(kind: str) -> None:
    content = jpeg(photo(), **ONE_SCAN[kind])
    start = data_of(content)
    for marker in (0xD9, 0xD8, 0xD3, 0xE0, 0x01):
        at = (start + len(content)) // 2
        assert not accepted(content[:at] + bytes([0xFF, marker]) + content[at:])


def test_missing_or_swapped_restarts_are_refused() -> None:
    content = jpeg(photo(), restart_marker_rows=1)
    positions = [
        offset
        for offset in range(data_of(content), len(content) - 2)
        if content[offset] == 0xFF and 0xD0 <= content[offset + 1] <= 0xD7
    ]
    assert len(positions) == 8  # 130 pixels are 9 rows of 16
    for first, second in itertools.pairwise(positions):
        assert not accepted(content[:first] + content[second:])
        assert not accepted(content[:first] + content[first + 2 :])
    first, second, third = positions[:3]
    swapped = content[:first] + content[second:third] + content[first:second] + content[third:]
    assert not accepted(swapped)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SCANS)
def test_truncated_progressive_jpegs_lose_only_fine_detail(mode: str, kind: str) -> None:
    content = jpeg(photo(mode), **SCANS[kind])
    expected = pixels(content).astype(int)
    first, refused = content.index(b"\xff\xda"), 0
    for share in range(0, 100, 3):
        cut = first + 20 + (len(content) - first - 22) * share // 100
        half = content[:cut] + END
        if accepted(half):
            assert np.abs(pixels(half) - expected).mean() < 3
        else:
            refused += 1
        assert not accepted(content[:cut] + bytes(len(content) - cut))
    assert refused > 10


def test_endless_segments_are_refused_quickly() -> None:
    start = time.perf_counter()
    for filling in (b"\xff" * (1 << 20), b"\xff\xe1\0\2" * (1 << 18), b"\0\xff\xd0" * (1 << 19)):
        for head in (b"\xff\xd8", jpeg(photo(), progressive=True)[:-2]):
            assert not accepted(head + filling)
    assert time.process_time() - start < 60  # Pillow itself takes most of it


# Settings of the calling program


def test_truncated_images_are_refused_whatever_the_program_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = jpeg(photo())
    expected = pixels(content)
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(stream, "BMP")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert (pixels(content) == expected).all()
    assert (pixels(stream.getvalue()) == 200).all()
    for damaged in (content, stream.getvalue()):
        assert not accepted(damaged[: len(damaged) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_setting_of_pillow_comes_back_after_the_last_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    refused = TruncatedImagesRefused()
    with refused:
        with refused:
            assert not ImageFile.LOAD_TRUNCATED_IMAGES
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


# Memory


def test_large_images_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("L", (2500, 2000)).save(stream, "PNG")
    content, (current, peak) = stream.getvalue(), (0, 0)
    monkeypatch.setattr(
        "convlens.data.decode._DECODE_MEMORY", MemorySemaphore(11_000_000, free=1 << 22)
    )
    load: Callable[[ImageFile.ImageFile], object] = ImageFile.ImageFile.load
    lock = threading.Lock()

    def counted(image: ImageFile.ImageFile) -> object:
        nonlocal current, peak
        with lock:
            current, peak = current + 1, max(peak, current + 1)
        try:
            return load(image)
        finally:
            with lock:
                current -= 1

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: decode(content, size=8, channels=1, fit="crop"), range(16)))
    assert all((image == 0).all() for image in found)
    assert peak == 2  # 5 megapixels each
