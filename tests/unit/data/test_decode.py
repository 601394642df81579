"""Decoding: modes and formats, the three fits, and files that are not images."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convlens.data.decode import (
    MAX_PIXELS,
    DeepFacts,
    UnreadableImage,
    decode,
    decode_pil,
    fit_arrays,
    has_second_image,
    probe_image,
    read_values,
    scale_to_uint8,
)
from convlens.errors import UsageError
from helpers.hostile import KINDS, valid_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def plain(content: bytes | Path, channels: int = 3) -> np.ndarray:
    return decode(content, size=None, channels=channels, fit="crop")


def rgb(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_rgb_is_kept_and_grey_is_itu_601() -> None:
    pixels = rgb()
    content = encoded(Image.fromarray(pixels), "PNG")
    np.testing.assert_array_equal(plain(content), pixels.transpose(2, 0, 1))
    exact = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(plain(content, 1)[0] - exact).max() <= 0.51
    assert plain(content, 1).flags.c_contiguous
    assert plain(content, 1).flags.writeable


def test_grey_becomes_three_equal_channels() -> None:
    content = encoded(Image.fromarray(RAMP), "PNG")
    np.testing.assert_array_equal(plain(content), np.repeat(RAMP[None], 3, 0))
    np.testing.assert_array_equal(plain(content, 1), RAMP[None])


def test_transparency_becomes_white() -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    got = plain(encoded(Image.fromarray(pixels, "RGBA"), "PNG"))
    np.testing.assert_array_equal(got[:, 0].T, [[10, 20, 30], [255, 255, 255], [204, 204, 204]])
    grey = np.array([[[0, 255], [0, 0]]], np.uint8)
    content = encoded(Image.fromarray(grey, "LA"), "PNG")
    np.testing.assert_array_equal(plain(content, 1), [[[0, 255]]])


def test_palette_with_and_without_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(plain(encoded(image, "PNG"))[:, 0].T, np.eye(3) * 255)
    seen = plain(encoded(image, "PNG", transparency=1))[:, 0].T
    np.testing.assert_array_equal(seen, [[255, 0, 0], [255, 255, 255], [0, 0, 255]])


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535, 128, 129]], np.uint16)
    for kind in ("PNG", "TIFF"):
        content = encoded(Image.fromarray(values), kind)
        np.testing.assert_array_equal(plain(content, 1)[0], [[0, 1, 128, 255, 0, 1]])
    pgm = b"P5 2 1 65535\n" + struct.pack(">HH", 200, 65535)
    np.testing.assert_array_equal(plain(pgm, 1), [[[1, 255]]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.4]], np.float32), [0, 100]),
        (np.array([[-5.0, 5.0]], np.float32), [0, 255]),
    ],
)
def test_32_bit_images_by_their_range(values: np.ndarray, expected: list[int]) -> None:
    content = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(plain(content, 1)[0, 0], expected)


def png_16_bit(values: np.ndarray) -> bytes:
    """Return a PNG of 16-bit color, uint16 `[H, W, 3 or 4]`, which Pillow can't write."""
    height, width, channels = values.shape
    color_type = {3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff(values: np.ndarray, byte_order: str) -> bytes:
    """Return an uncompressed TIFF of unsigned integers, `[H, W]` or `[H, W, 3]`."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    bits = 8 * values.dtype.itemsize
    data = values.astype(values.dtype.newbyteorder(byte_order)).tobytes()
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits) if channels == 1 else (258, 3, 3, 8 + len(data)),
        (259, 3, 1, 1),  # not compressed
        (262, 3, 1, 1 if channels == 1 else 2),  # black is zero, or RGB
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]
    data += struct.pack(f"{byte_order}4H", bits, bits, bits, 0)
    directory = struct.pack(f"{byte_order}H", len(tags))
    for tag, kind, count, value in tags:
        is_short = kind == 3 and count == 1
        directory += struct.pack(f"{byte_order}HHI", tag, kind, count)
        directory += struct.pack(
            f"{byte_order}HH" if is_short else f"{byte_order}I", value, *[0] * is_short
        )
    mark = b"II*\0" if byte_order == "<" else b"MM\0*"
    return mark + struct.pack(f"{byte_order}I", 8 + len(data)) + data + directory + b"\0" * 4


def deep_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    random = np.random.default_rng(0)
    color = random.integers(0, 65_536, (5, 7, 4)).astype(np.uint16)
    grey, signed = color[..., 0], color[..., 0].astype(np.int32) - 40_000
    large = color[..., 0].astype(np.uint32) * 60_000
    real = random.normal(size=(5, 7)).astype(np.float32)
    pgm = b"P5 7 5 4095\n" + (grey % 4096).astype(">u2").tobytes()
    return {
        "PNG grey": (encoded(Image.fromarray(grey), "PNG"), grey),
        "PNG RGB": (png_16_bit(color[..., :3]), color[..., :3]),
        "PNG RGBA": (png_16_bit(color), color),
        "TIFF RGB": (tiff(color[..., :3], "<"), color[..., :3]),
        "TIFF RGB, big endian": (tiff(color[..., :3], ">"), color[..., :3]),
        "TIFF grey, big endian": (tiff(grey, ">"), grey),
        "TIFF LZW": (encoded(Image.fromarray(grey), "TIFF", compression="tiff_lzw"), grey),
        "TIFF uint32": (tiff(large, "<"), large),
        "TIFF int32": (encoded(Image.fromarray(signed), "TIFF"), signed),
        "TIFF float": (encoded(Image.fromarray(real), "TIFF"), real),
        "PFM": (encoded(Image.fromarray(real), "PPM"), real),
        "PGM": (encoded(Image.fromarray(grey.astype(np.int32)), "PPM"), grey),
        "PGM of 12 bits": (pgm, grey % 4096),
    }


@pytest.mark.parametrize("case", deep_cases())
def test_all_bits_of_deep_images_are_read_and_scaled(case: str) -> None:
    content, values = deep_cases()[case]
    np.testing.assert_array_equal(read_values(content), values)
    assert probe_image(content).deep
    low, high = float(values[..., :3].min()), float(values.max()) * 0.9  # the largest are clipped
    got = decode(content, size=None, channels=3, fit="crop", value_range=(low, high))
    colors = values[..., :3] if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    scaled = np.clip((colors.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    expected = np.rint(scaled)
    if values.ndim == 3 and values.shape[2] == 4:  # on white
        opacity = values[..., 3:] // 256 / 255
        np.testing.assert_allclose(
            got.transpose(1, 2, 0), expected * opacity + 255 * (1 - opacity), atol=1
        )
    else:
        np.testing.assert_array_equal(got.transpose(1, 2, 0), expected)


def test_eight_bit_images_ignore_the_value_range() -> None:
    for image, kind in ((Image.fromarray(rgb()), "PNG"), (Image.fromarray(RAMP), "TIFF")):
        content = encoded(image, kind)
        assert not probe_image(content).deep
        ranged = decode(content, size=None, channels=3, fit="crop", value_range=(10, 20))
        np.testing.assert_array_equal(ranged, plain(content))
        assert read_values(content).dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_images_are_turned_upright(kind: str) -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    content = encoded(image, kind, exif=exif)
    got = decode(content, size=None, channels=1, fit="crop", value_range=(0, 5000))[0]
    np.testing.assert_array_equal(got, np.rot90(values // 1000 * 51, -1))


def test_scaling_by_hand() -> None:
    values = np.array([-1, 0, 1, 2, 3, 4, 5], np.int32)
    assert scale_to_uint8(values, (0, 4)).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert scale_to_uint8(np.array([29_500, 29_740], np.uint16), (29_490, 29_745)).tolist() == [
        10,
        250,
    ]
    assert scale_to_uint8(np.array([0.1, 0.2], np.float32), (-0.4, 0.6)).tolist() == [128, 153]
    with pytest.raises(UsageError, match="empty"):
        scale_to_uint8(values, (3, 3))


def test_not_a_number_becomes_black() -> None:
    values = np.array([[-1, 0, 3], [np.nan, np.inf, -np.inf]], np.float32)
    content = encoded(Image.fromarray(values), "TIFF")
    facts = list[DeepFacts]()
    for value_range, expected in (
        (None, [[0, 64, 255], [0, 255, 0]]),  # -1 to 3: the finite values
        ((0, 6), [[0, 0, 128], [0, 255, 0]]),
    ):
        got = decode(
            content,
            size=None,
            channels=1,
            fit="crop",
            value_range=value_range,
            report=facts.append,
        )
        assert got[0].tolist() == expected
        image = Image.open(io.BytesIO(content))
        by_pil = decode_pil(image, size=None, channels=1, fit="crop", value_range=value_range)
        np.testing.assert_array_equal(by_pil, got)
    assert facts == [DeepFacts(True, 0.5), DeepFacts(False, 0.5)]


def test_images_without_a_finite_value_are_unreadable() -> None:
    content = encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    for value_range in (None, (0, 1)):
        with pytest.raises(UnreadableImage) as error:
            decode(content, size=None, channels=1, fit="crop", value_range=value_range)
        assert error.value.reason == "none of its values is finite (all are NaN or infinity)"


def test_only_deep_images_are_reported() -> None:
    facts = list[DeepFacts]()
    images = {
        "PNG": np.zeros((4, 4), np.uint8),
        "JPEG": np.zeros((4, 4, 3), np.uint8),
    }
    for kind, pixels in images.items():
        decode(
            encoded(Image.fromarray(pixels), kind),
            size=2,
            channels=1,
            fit="crop",
            report=facts.append,
        )
    assert facts == []
    deep = Image.fromarray(np.full((4, 4), 500, np.uint16))
    decode(encoded(deep, "PNG"), size=2, channels=1, fit="crop", report=facts.append)
    decode_pil(deep, size=2, channels=1, fit="crop", report=facts.append)
    assert facts == [DeepFacts(True, 0.0)] * 2


def test_cmyk_and_one_bit() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    np.testing.assert_allclose(plain(encoded(cyan, "TIFF"))[:, 4, 4], [0, 255, 255], atol=1)
    np.testing.assert_allclose(plain(encoded(cyan, "JPEG"))[:, 4, 4], [0, 255, 255], atol=2)
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(plain(encoded(bits, "PNG"), 1), [[[255, 0]]])


def test_first_frame_of_animations_is_used() -> None:
    red, blue = Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "blue")
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = encoded(red, kind, save_all=True, append_images=[blue], **options)
        np.testing.assert_array_equal(plain(content)[:, 3, 3], [255, 0, 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = Image.fromarray(rgb(16, 24))
    # A camera stores the inverse of the transformation that a viewer applies.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(stored, kind, exif=exif, **options))
    want = np.asarray(upright).transpose(2, 0, 1).astype(int)
    assert np.abs(plain(path) - want).max() <= (6 if kind == "JPEG" else 0)
    assert (probe_image(path).width, probe_image(path).height) == (24, 16)


def test_damaged_exif_does_not_hide_the_pixels() -> None:
    content = encoded(Image.fromarray(rgb()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert plain(content).shape == (3, 12, 20)


def test_crop_keeps_the_center() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    content = encoded(Image.fromarray(wide), "PNG")
    assert (decode(content, size=10, channels=3, fit="crop") == 255).all()
    assert (decode(content, size=10, channels=3, fit="stretch").mean() - 85) < 1


def test_pad_adds_black_on_both_sides() -> None:
    white = Image.new("L", (20, 10), 255)
    got = decode(encoded(white, "PNG"), size=20, channels=1, fit="pad")[0]
    np.testing.assert_array_equal(got[:, 0], [0] * 5 + [255] * 10 + [0] * 5)
    thin = decode(encoded(Image.new("L", (400, 1), 255), "PNG"), size=8, channels=1, fit="pad")
    assert thin.shape == (1, 8, 8)
    assert (thin == 255).sum() == 8


def test_resize_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = decode(encoded(Image.fromarray(board), "PNG"), size=8, channels=1, fit="crop")
    assert np.abs(small.astype(int) - 128)[:, 1:-1, 1:-1].max() <= 2


def test_jpegs_decoded_at_reduced_size_equal_full_ones() -> None:
    x = np.linspace(0, 255, 1024)
    smooth = np.stack([np.tile(x, (768, 1))] * 3, -1).astype(np.uint8)
    jpeg = decode(
        encoded(Image.fromarray(smooth), "JPEG", quality=95), size=32, channels=3, fit="crop"
    )
    png = decode(encoded(Image.fromarray(smooth), "PNG"), size=32, channels=3, fit="crop")
    assert np.abs(jpeg.astype(int) - png).max() <= 3


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 8, 17, 40])
def test_arrays_and_files_give_the_same_pixels(fit: str, channels: int, size: int | None) -> None:
    pixels = rgb(12, 20)
    grey = pixels[:, :, 0]
    for array, image in ((pixels.transpose(2, 0, 1)[None], pixels), (grey[None, None], grey)):
        one = fit_arrays(array, size=size, channels=channels, fit=fit)[0]
        content = encoded(Image.fromarray(image), "PNG")
        np.testing.assert_array_equal(one, decode(content, size=size, channels=channels, fit=fit))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 8, 17])
def test_rgba_arrays_and_files_give_the_same_pixels(
    fit: str, channels: int, size: int | None
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 4), np.uint8)
    for background in ("white", "#102030", "alpha"):
        options: dict[str, Any] = {"channels": channels, "fit": fit, "background": background}
        arrays = fit_arrays(pixels.transpose(0, 3, 1, 2), size=size, **options)
        for one, image in zip(arrays, pixels, strict=True):
            content = encoded(Image.fromarray(image), "PNG")
            np.testing.assert_array_equal(one, decode(content, size=size, **options))
    none = fit_arrays(np.zeros((0, 4, 12, 20), np.uint8), size=size, channels=channels, fit=fit)
    assert none.shape == (0, channels, size or 12, size or 20)


def pil_images() -> list[tuple[Image.Image, str]]:
    """Return images of every mode, with a lossless format that keeps the mode."""
    color = Image.fromarray(rgb())
    grey = color.convert("L")
    palette = color.quantize(16)
    clear = Image.fromarray(np.dstack([rgb(), rgb(seed=1)[..., 0]]))
    clear_palette = color.quantize(16)
    clear_palette.info["transparency"] = 3
    return [
        (color, "PNG"),
        (grey, "PNG"),
        (grey.convert("1"), "PNG"),
        (palette, "PNG"),
        (clear, "PNG"),
        (clear.convert("LA"), "PNG"),
        (clear_palette, "PNG"),
        (color.convert("CMYK"), "TIFF"),
        (color.convert("YCbCr"), "TIFF"),
        (Image.fromarray(rgb()[..., 0].astype(np.uint16) * 200), "PNG"),
        (Image.fromarray(rgb()[..., 0].astype(np.int32) - 100), "TIFF"),
        (Image.fromarray(rgb()[..., 0].astype(np.float32) / 255), "TIFF"),
    ]


@pytest.mark.parametrize(
    ("image", "kind"), pil_images(), ids=lambda value: getattr(value, "mode", value)
)
@pytest.mark.parametrize(
    "options",
    [{}, {"value_range": (-50.0, 30_000.0)}, {"value_range": (0.1, 0.9), "background": "#102030"}],
    ids=["defaults", "range", "color"],
)
def test_pil_images_give_the_pixels_of_a_lossless_file(
    image: Image.Image, kind: str, options: dict[str, Any]
) -> None:
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.getexif()[0x0112] = orientation
        content = encoded(image, kind, exif=exif)
        before = image.mode, image.size, image.tobytes()
        for size, channels, fit in ((None, 3, "crop"), (9, 3, "crop"), (8, 1, "pad")):
            expected = decode(content, size=size, channels=channels, fit=fit, **options)
            seen = decode_pil(image, size=size, channels=channels, fit=fit, **options)
            np.testing.assert_array_equal(seen, expected)
            with Image.open(io.BytesIO(content)) as opened:
                again = decode_pil(opened, size=size, channels=channels, fit=fit, **options)
            np.testing.assert_array_equal(again, expected)
        assert (image.mode, image.size, image.tobytes()) == before


def test_pil_images_that_cannot_be_loaded_are_unreadable() -> None:
    content = encoded(Image.fromarray(rgb(100, 100)), "PNG")
    torn = Image.open(io.BytesIO(content[: len(content) // 2]))
    with pytest.raises(UnreadableImage, match="cut short"):
        decode_pil(torn, size=8, channels=3, fit="crop", name="torn")
    with pytest.raises(UnreadableImage, match="million pixels"):
        decode_pil(Image.new("1", (11_000, 11_000)), size=8, channels=3, fit="crop")


def test_pil_images_of_16_bit_color_are_refused_if_their_range_matters() -> None:
    values = rgb().astype(np.uint16) * 16
    opened = Image.open(io.BytesIO(png_16_bit(values)))
    with pytest.raises(UnreadableImage, match="8 of its 16 bits"):
        decode_pil(opened, size=8, channels=3, fit="crop", value_range=(0, 4095))
    upper = decode_pil(opened, size=None, channels=3, fit="crop")  # as `decode` without a range
    np.testing.assert_array_equal(upper, plain(png_16_bit(values)))


@pytest.mark.parametrize("kind", KINDS)
def test_concatenated_images_are_found(kind: str) -> None:
    content = valid_image(kind)
    if not content or kind == "avif":
        pytest.skip("not written by this Pillow, or not checked")
    assert not has_second_image(content)
    for other in ("png", "jpg", "bmp", "webp", "gif", "ppm"):
        assert has_second_image(content + valid_image(other)), other


def test_an_image_inside_a_file_is_not_a_second_image() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = valid_image("jpg")  # as a thumbnail in the header
    with_thumbnail = encoded(Image.fromarray(rgb()), "JPEG", exif=exif)
    assert with_thumbnail.count(b"\xff\xd8\xff") == 2
    assert not has_second_image(with_thumbnail)
    frames = [Image.fromarray(rgb(seed=seed)) for seed in range(2)]
    several = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert several.count(b"\xff\xd8\xff") == 2
    assert not has_second_image(several)


def test_path_string_and_bytes_give_the_same_pixels_in_threads(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb(100, 80)).save(path)

    def one(source: Path | str | bytes) -> bytes:
        return decode(source, size=16, channels=3, fit="crop").tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, [path, str(path), path.read_bytes()] * 20))) == 1


def reason(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(path, size=8, channels=3, fit="crop")
    assert caught.value.path == str(path)
    assert caught.value.exit_code == 3
    return caught.value.reason


def test_unreadable_files_have_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert "no such file" in reason(path)
    path.write_bytes(b"")
    assert "empty (0 bytes)" in reason(path)
    path.write_text("hello, I am no picture\n")
    assert "text" in reason(path)
    path.write_text("<!DOCTYPE html><html>log in</html>")
    assert "web page" in reason(path)
    path.write_bytes(bytes(range(256)))
    assert "known format" in reason(path)
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert reason(path) == "it is HEIC, which is not supported: convert it to JPEG or PNG"
    path.write_bytes(b"BM" + bytes(30))  # the first bytes of a format that is supported
    assert "not supported" not in reason(path)
    intact = encoded(Image.fromarray(rgb(64, 64)), "PNG")
    path.write_bytes(intact[: len(intact) // 2])
    assert "cut short" in reason(path)
    jpeg = tmp_path / "a.jpg"
    jpeg.write_bytes(encoded(Image.fromarray(rgb(64, 64)), "JPEG")[:-400])
    assert "cut short" in reason(jpeg)
    assert "folder" in reason(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "regular" in reason(tmp_path / "pipe.png")


def test_flipped_bits_raise_unreadable_image_only() -> None:
    good = encoded(Image.fromarray(rgb(8, 8)), "PNG")
    random = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        with contextlib.suppress(UnreadableImage):
            decode(bytes(bad), size=8, channels=3, fit="crop")


def test_png_with_wrong_checksum_or_missing_end_is_refused() -> None:
    """Pillow accepts both: it checks nothing after the last row."""
    intact = encoded(Image.fromarray(rgb(64, 64)), "PNG")
    data = intact.index(b"IDAT")
    length = int.from_bytes(intact[data - 4 : data], "big")
    for at in (data + 4 + length, data + 4 + length - 1):  # the sum itself, zlib's own
        bad = intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :]
        with pytest.raises(UnreadableImage, match="damaged"):
            decode(bad, size=8, channels=3, fit="crop")
    for cut in (1, 12, 13, 16):
        with pytest.raises(UnreadableImage, match="cut short"):
            decode(intact[:-cut], size=8, channels=3, fit="crop")
    assert decode(intact + b"more", size=8, channels=3, fit="crop").shape == (3, 8, 8)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_460, 12_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    assert side * side > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    assert "million" in reason(path)
    with pytest.raises(UnreadableImage, match="million"):
        probe_image(path)


def limited(content: bytes, max_pixels: int, size: int | None = 8) -> np.ndarray:
    return decode(content, size=size, channels=3, fit="crop", max_pixels=max_pixels)


def test_the_limit_of_pixels_can_be_changed() -> None:
    content = encoded(Image.fromarray(rgb(30, 40)), "PNG")
    with pytest.raises(UnreadableImage, match=r"1,199 pixels .*\(40 x 30\); .*data.max_pixels"):
        limited(content, 1199)
    with pytest.raises(UnreadableImage, match=r"set data\.max_pixels"):
        probe_image(content, max_pixels=1199)
    assert limited(content, 1200, size=None).shape == (3, 30, 40)
    assert probe_image(content, max_pixels=1200).width == 40
    large = bomb(9_460, 9_460)  # above the limit of Pillow itself, which is not changed
    with pytest.raises(UnreadableImage, match=r"cut short|damaged"):
        limited(large, 9_460**2)


def test_large_jpeg_files_are_decoded_at_a_reduced_scale() -> None:
    smooth = Image.fromarray(rgb(10, 15)).resize((240, 160), Image.Resampling.BICUBIC)
    content = encoded(smooth, "JPEG", quality=95)
    exact = decode(content, size=16, channels=3, fit="crop")
    for max_pixels in (240 * 160, 120 * 80, 60 * 40):
        reduced = limited(content, max_pixels, size=16)
        assert np.abs(reduced.astype(int) - exact).mean() < 4
    assert limited(content, 60 * 40, size=None).shape == (3, 40, 60)
    assert probe_image(content, max_pixels=60 * 40).width == 240
    with pytest.raises(UnreadableImage, match="240 x 160"):
        limited(content, 29 * 20)  # 1/8 is the smallest scale
    # Long images keep more pixels than two sides of the result.
    long = encoded(smooth.resize((800, 32)), "JPEG")
    assert limited(long, 80 * 32, size=16).shape == (3, 16, 16)
    # All coefficients of several scans are kept in memory: 6 bytes for each pixel of the file.
    progressive = encoded(smooth, "JPEG", quality=95, progressive=True)
    with pytest.raises(UnreadableImage, match="240 x 160"):
        limited(progressive, 60 * 40)
    assert limited(progressive, 240 * 160 * 6 // 16).shape == (3, 8, 8)
    # The kind of the frame decides, also if its scan looks like a single one.
    with pytest.raises(UnreadableImage, match="240 x 160"):
        limited(content.replace(b"\xff\xc0", b"\xff\xc2"), 60 * 40)


def test_a_phone_photograph_of_90_megapixels_is_accepted() -> None:
    content = encoded(Image.new("L", (10_000, 9_000), 77), "JPEG")
    assert MAX_PIXELS < 10_000 * 9_000
    assert (decode(content, size=64, channels=1, fit="crop") == 77).all()


def test_other_formats_are_refused() -> None:
    with pytest.raises(UnreadableImage):
        plain(encoded(Image.fromarray(rgb()), "TGA"))
    with pytest.raises(UnreadableImage):
        plain(encoded(Image.fromarray(rgb()), "EPS"))


def test_probe_image_reads_headers_only(tmp_path: Path) -> None:
    intact = encoded(Image.fromarray(rgb(50, 70)), "JPEG")
    (tmp_path / "half.jpg").write_bytes(intact[: len(intact) - 200])
    facts = probe_image(tmp_path / "half.jpg")
    assert (facts.width, facts.height, facts.mode, facts.grey) == (70, 50, "RGB", False)
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    assert probe_image(tmp_path / "grey.png").grey
    Image.fromarray(RAMP).convert("P").save(tmp_path / "grey.gif")
    assert probe_image(tmp_path / "grey.gif").grey
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="0 bytes"):
        probe_image(tmp_path / "empty.png")


def test_invalid_arguments_are_usage_errors() -> None:
    for wrong in ({"fit": "squash"}, {"channels": 2}, {"size": 0}):
        with pytest.raises(UsageError):
            decode(b"", **{"size": 8, "channels": 3, "fit": "crop", **wrong})  # type: ignore[arg-type]


def test_images_of_the_caller_in_rare_states() -> None:
    grey_alpha = np.dstack([RAMP, np.full_like(RAMP, 255)])
    image = Image.fromarray(grey_alpha, "LA")
    expected = decode_pil(image, size=None, channels=1, fit="crop")
    got = decode_pil(image.convert("La"), size=None, channels=1, fit="crop")
    np.testing.assert_array_equal(got, expected)
    opened = Image.open(io.BytesIO(encoded(image, "PNG")))
    opened.close()
    with pytest.raises(UnreadableImage, match="it was closed before its pixels were read"):
        decode_pil(opened, size=None, channels=1, fit="crop")
