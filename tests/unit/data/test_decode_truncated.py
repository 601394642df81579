"""Images that are cut short or have holes: none comes out half grey. Sound ones all come out."""

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
from convlens.data.decode import UnreadableImage, decode
from convlens.errors import UsageError
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
    """Where the data of the last scan begin."""
    return content.rindex(b"\xff\xda") + 14


# Sound ones


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*ONE_SCAN, *SCANS])
def test_sound_jpegs_have_pillows_pixels_whatever_lies_around_them(mode: str, kind: str) -> None:
    content = jpeg(photo(mode), **{**ONE_SCAN, **SCANS}[kind])
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    start = content.rindex(b"\xff\xda")
    variants = {
        "as it is": content,
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


def test_headers_are_not_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a quarter of the time of a small image."""

    def walked(_: bytes) -> None:
        raise AssertionError

    monkeypatch.setattr(data_decode, "_walk_segments", walked)
    for kind in ("usual", "own tables", "colours halved", "exif"):
        for mode in MODES:
            assert accepted(jpeg(photo(mode), **ONE_SCAN[kind]))


def test_flat_pictures_whose_data_are_zeros() -> None:
    # With tables of its own a flat picture has the shortest codes only, which are zeros.
    for size in range(300, 340):
        content = jpeg(Image.new("L", (size, 300), 128), optimize=True)
        assert bytes(100) in content
        assert (pixels(content) == 128).all()


def test_pictures_of_a_phone_with_a_second_image_behind_them() -> None:
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


# Damaged ones


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ONE_SCAN)
def test_a_lost_tail_is_noticed(mode: str, kind: str) -> None:
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
def test_a_marker_in_the_midst_of_the_data_is_noticed(kind: str) -> None:
    content = jpeg(photo(), **ONE_SCAN[kind])
    start = data_of(content)
    for marker in (0xD9, 0xD8, 0xD3, 0xE0, 0x01):
        at = (start + len(content)) // 2
        assert not accepted(content[:at] + bytes([0xFF, marker]) + content[at:])


def test_restarts_that_are_missing_or_changed_places_are_noticed() -> None:
    content = jpeg(photo(), restart_marker_rows=1)
    places = [
        at
        for at in range(data_of(content), len(content) - 2)
        if content[at] == 0xFF and 0xD0 <= content[at + 1] <= 0xD7
    ]
    assert len(places) == 8  # 130 pixels are 9 rows of 16
    for first, second in itertools.pairwise(places):
        assert not accepted(content[:first] + content[second:])
        assert not accepted(content[:first] + content[first + 2 :])
    first, second, third = places[:3]
    swapped = content[:first] + content[second:third] + content[first:second] + content[third:]
    assert not accepted(swapped)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SCANS)
def test_of_several_scans_only_fine_detail_can_be_lost(mode: str, kind: str) -> None:
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


def test_segments_without_end_are_gone_through_quickly() -> None:
    start = time.process_time()
    for filling in (b"\xff" * (1 << 20), b"\xff\xe1\0\2" * (1 << 18), b"\0\xff\xd0" * (1 << 19)):
        for head in (b"\xff\xd8", jpeg(photo(), progressive=True)[:-2]):
            assert not accepted(head + filling)
    assert time.process_time() - start < 60  # Pillow itself takes most of it


# Whatever the program around us has set


def test_a_program_that_accepts_half_images_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(photo())
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for damaged in (content, content[: len(content) // 2]):
        with pytest.raises(UsageError, match="half an image") as caught:
            pixels(damaged)
        assert caught.value.where == "PIL.ImageFile.LOAD_TRUNCATED_IMAGES"


# MemorySemaphore


def held(room: MemorySemaphore, sizes: list[int], threads: int) -> int:
    """The most that was held at once by `threads` threads."""
    now, most, lock = 0, 0, threading.Lock()

    def hold(size: int) -> None:
        nonlocal now, most
        with room.acquire(size):
            with lock:
                now, most = now + size, max(most, now + size)
            time.sleep(0.002)
            with lock:
                now -= size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hold, sizes))
    assert now == 0
    return most


def test_room_is_never_exceeded() -> None:
    assert held(MemorySemaphore(100, free=10), [60, 40, 30, 90, 100, 20] * 8, 8) <= 100
    assert held(MemorySemaphore(100, free=100), [60] * 16, 8) > 100  # small ones don't wait
    assert held(MemorySemaphore(100, free=10), [300] * 3, 3) == 300  # too large for it: alone


def test_large_images_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("L", (2500, 2000)).save(stream, "PNG")
    content, (now, most) = stream.getvalue(), (0, 0)
    monkeypatch.setattr(
        "convlens.data.decode._DECODE_MEMORY", MemorySemaphore(11_000_000, free=1 << 22)
    )
    load: Callable[[ImageFile.ImageFile], object] = ImageFile.ImageFile.load
    lock = threading.Lock()

    def counted(image: ImageFile.ImageFile) -> object:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        try:
            return load(image)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: decode(content, size=8, channels=1, fit="crop"), range(16)))
    assert all((image == 0).all() for image in found)
    assert most == 2  # 5 megapixels each
