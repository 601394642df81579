"""Image decoding. Training, evaluation, prediction and reports all read images with `decode`.

Every file becomes uint8 `[C, H, W]` in four steps, always in this order: apply the EXIF
orientation, convert to 8-bit grey or RGB, resize (antialiased, bilinear), crop or pad. No global
setting is changed, so any number of threads may decode at the same time; the pixels of large
images that are decoded at once are limited to bound the memory.

Deep images (more than 8 bits per value: 16-bit and 32-bit integers, floats) are converted with the
value range of their set, which `data.conversion` finds. Without a range each is converted by its
type and its own values, as earlier versions did.

Truncated or damaged files are refused. `check_png` and `check_jpeg` find the damage that Pillow
does not report.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageFile, UnidentifiedImageError

from convlens.data.file_types import unsupported_format
from convlens.errors import DataError, UsageError
from convlens.utils.files import MemorySemaphore

Pixels = npt.NDArray[np.uint8]

# Part of every cache key. Increase it when the same file decodes to other pixels.
VERSION = 2

# The only decoders that are tried, whatever the file extension (Pillow has 40 more).
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".bmp",
        ".dib",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
        ".jp2",
        ".avif",
    }
)
FITS = ("crop", "pad", "stretch")

MAX_PIXELS = 89_478_485  # Pillow's default limit
MAX_BYTES = 1 << 29
# Part of the reason why earlier versions did not read an image with NaN. Caches hold it.
NAN_REFUSED = "it holds values that are not finite"
ALPHA = "alpha"  # a background: the alpha channel itself is the (grey) image
# Pixels of the large images that all threads decode at once; a pixel takes up to 16 bytes.
_DECODE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)
_LOAD_LOCK = MemorySemaphore(1, free=0)  # for one PIL image of the caller at a time
_MAX_DRAFT = 8  # JPEG can be decoded at 1/2, 1/4 and 1/8 of its size
# A JPEG in several scans keeps its coefficients, up to 6 bytes per pixel, whatever its scale.
_COEFFICIENT_SHARE = 6 / 16

_GREY = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_BACKGROUND = re.compile("alpha|white|black|grey|#[0-9a-fA-F]{6}")
_DEEP_COLOR = re.compile("(RGBA?;16)([LBN])")  # Pillow's name of the encoding, with the byte order
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

# Second bytes of JPEG markers (ITU-T T.81, table B.1).
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2  # frames with Huffman coding
_OTHER_FRAMES = frozenset({0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
_WITHOUT_SEGMENT = frozenset({0x01, *range(0xD0, 0xD9)})  # no length and no data follow
_STUFFED_BYTE, _RESTART, _END, _SCAN, _RESTART_INTERVAL = 0x00, 0xD0, 0xD9, 0xDA, 0xDD
_MARKER = re.compile(rb"\xff[^\x00\xff]")
# Headers that define a restart interval or arithmetic coding.
_UNUSUAL_HEADERS = (b"\xff\xdd\0\4", b"\xff\xc9\0")
# The first bytes of the usual formats.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|P[1-6]\s|"
    rb"II\*\0|MM\0\*|\0\0\0\x0cjP  |\0\0\0.ftypavi[fs]",
    re.DOTALL,
)
_PROBED_BYTES = 1 << 20  # enough for the header of an image
_SCAN_CHUNK = 1 << 20  # bytes that are searched for markers at once; bounds the memory
_MAX_SEGMENTS = 1000  # no camera writes as many; files with more are not checked
_LOOKAHEAD = b"\0" * 16  # the decoder reads up to 8 bytes ahead


class UnreadableImage(DataError):  # noqa: N818
    """An image that can't be decoded.

    Args:
        path: path or name of the image.
        reason: why it can't be decoded, in plain words.
    """

    def __init__(self, path: str, reason: str) -> None:
        fix = "replace or remove the file, or set data.on_bad=skip"
        super().__init__(f"unreadable image: {reason}", where=path, fix=fix)
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class ImageFacts:
    """Properties of an image that its header gives."""

    width: int  # pixels, after the EXIF orientation is applied
    height: int
    mode: str  # Pillow's name
    grey: bool
    turned: bool  # its EXIF orientation is not upright
    alpha: bool  # has an alpha channel or a transparent color
    frames: bool  # has several frames; only the first one is used
    deep: bool  # has more than 8 bits per value


class DeepFacts(NamedTuple):
    """What the conversion of a deep image did that people should know of.

    Attributes:
        by_itself: It was scaled by its type and its own values, because no value range was given.
        not_finite: Share of its values that are NaN or infinite.
    """

    by_itself: bool
    not_finite: float


# Called for each deep image that is decoded.
DeepReport = Callable[[DeepFacts], object]


class _NoFiniteValueError(ValueError):
    """An image consists of NaN and infinities."""

    def __init__(self) -> None:
        super().__init__("none of its values is finite (all are NaN or infinity)")


@dataclass(frozen=True, repr=False)
class Conversion:
    """How every image of a set is converted to uint8 `[channels, size, size]`.

    Args:
        size: Height and width in pixels.
        channels: 1 or 3.
        fit: `crop`, `pad` or `stretch`, as for `decode`.
        value_range, background, max_pixels: As for `decode`.
    """

    size: int
    channels: int
    fit: str
    value_range: tuple[float, float] | None = None
    background: str = "white"
    max_pixels: int = MAX_PIXELS

    def __repr__(self) -> str:
        # Part of cache keys and fingerprints. Later fields are left out where they have their
        # default, so that those of earlier versions stay valid.
        text = f"size={self.size!r}, channels={self.channels!r}, fit={self.fit!r}"
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            text += f", {field.name}={value!r}" if value != field.default else ""
        return f"Conversion({text})"

    @property
    def is_valid(self) -> bool:
        """Whether images can be converted with these values, which may come from a file."""
        low, high = self.value_range or (0, 1)
        is_number = isinstance(self.max_pixels, int) and -math.inf < low < high < math.inf
        is_color = isinstance(self.background, str) and _BACKGROUND.fullmatch(self.background)
        return self.fit in FITS and is_number and bool(is_color)

    @property
    def image_bytes(self) -> int:
        """Size of one converted image in bytes."""
        return self.channels * self.size * self.size

    def file(
        self, source: Path | str | bytes, name: str = "", report: DeepReport | None = None
    ) -> Pixels:
        """Decode and convert one image file, given its path or its bytes and a name."""
        return decode(source, name=name, report=report, **vars(self))

    def array(self, images: Pixels) -> Pixels:
        """Convert images, uint8 `[N, C, H, W]` with 1, 3 or 4 channels."""
        return fit_arrays(
            images,
            size=self.size,
            channels=self.channels,
            fit=self.fit,
            background=self.background,
        )

    def pil(self, image: Image.Image, name: str = "", report: DeepReport | None = None) -> Pixels:
        """Convert a PIL image."""
        return decode_pil(image, name=name, report=report, **vars(self))


def read_bytes(path: Path | str) -> bytes:
    """Return the bytes of a regular, non-empty file. Never blocks on a pipe or device.

    Raises:
        UnreadableImage: The file is missing, empty, not a regular file, not readable, or larger
            than 512 MiB.
    """
    name = os.fspath(path)
    try:
        # Without O_NONBLOCK, opening a FIFO without a writer blocks forever. Without O_BINARY,
        # Windows translates line ends.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(name, flags)
    except IsADirectoryError:
        raise UnreadableImage(name, "it is a folder") from None
    except OSError as error:
        raise UnreadableImage(name, _reason(error)) from error
    except ValueError as error:  # including UnicodeEncodeError
        what = "a null byte" if "\0" in name else "characters that this system can't represent"
        raise UnreadableImage(name, f"its name contains {what}") from error
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage(name, "it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(name, "it is not a regular file")
        if status.st_size == 0:
            raise UnreadableImage(name, "the file is empty (0 bytes)")
        if status.st_size > MAX_BYTES:
            raise UnreadableImage(name, f"the file is larger than {MAX_BYTES >> 20} MiB")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(name, _reason(error)) from error
    finally:
        os.close(handle)


def decode(
    source: Path | str | bytes,
    *,
    size: int | None,
    channels: int,
    fit: str,
    value_range: tuple[float, float] | None = None,
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    report: DeepReport | None = None,
) -> Pixels:
    """Decode one image file.

    Args:
        source: A path, or the bytes of a file.
        size: Side of the result in pixels; None keeps the size of the image.
        channels: 1 (ITU-R 601 grey) or 3 (RGB).
        fit: `crop` (short side to `size`, center kept), `pad` (long side to `size`, black
            borders) or `stretch`.
        value_range: Values of deep images that become 0 and 255; values outside are clipped, and
            NaN becomes 0. None: 65,535 becomes 255 in 16-bit images, and 32-bit images are scaled
            by their own values.
        background: The color behind transparent parts (`white`, `black`, `grey` or `#rrggbb`); or
            `alpha`: images with an alpha channel become that channel, as grey.
        max_pixels: Larger images are refused. JPEG files are decoded at a reduced scale instead,
            where the result is small enough.
        name: Name of `source` in errors if it is bytes.
        report: Called if the image is deep.

    Returns:
        uint8 `[C, size, size]`, or `[C, H, W]` if `size` is None.

    Raises:
        UnreadableImage: Not an image, damaged, or too large.
        UsageError: An argument is invalid.
    """
    _check_arguments(size, channels, fit)
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _TRUNCATED_IMAGES_REFUSED, _open(source, name, max_pixels) as image:
            pixels = _prepare(image, source, name, size, fit, max_pixels)
            with _DECODE_MEMORY.acquire(pixels):
                is_deep = report is not None and _is_deep(image)  # known before loading only
                values = None if value_range is None else _read_deep(image, source, max_pixels)
                image.load()
                # After loading: Pillow turns TIFF upright when it loads, and drops the tag.
                orientation = _orientation(image)
                if report is not None and is_deep:
                    report(_deep_facts(image, values))
                if value_range is not None and values is not None:
                    upright = _to_upright(_scale_deep(values, value_range), orientation)
                else:
                    upright = _to_upright(image, orientation)
                return _convert(upright, image.format or "", size, channels, fit, background)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise UnreadableImage(name or "(bytes)", _reason(error, source)) from error


def decode_pil(
    image: Image.Image,
    *,
    size: int | None,
    channels: int,
    fit: str,
    value_range: tuple[float, float] | None = None,
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    report: DeepReport | None = None,
) -> Pixels:
    """Apply the conversions of `decode` to a PIL image, which stays as it is.

    The result equals, pixel for pixel, saving the image to a lossless file together with its EXIF
    data, and decoding that.

    Args:
        image: An image of any mode.
        size, channels, fit, value_range, background, max_pixels, report: As for `decode`.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: The image was opened lazily and is damaged, or it is too large, or Pillow
            drops a part of its values.
        UsageError: An argument is invalid.
    """
    _check_arguments(size, channels, fit)
    name = name or "(image)"
    if image.width * image.height > max_pixels:
        raise _too_large(name, image.size, max_pixels)
    if value_range is not None and _deep_color_encoding(image):
        raise UnreadableImage(
            name, "Pillow keeps 8 of its 16 bits per color; use the path or the bytes of the file"
        )
    try:
        with _DECODE_MEMORY.acquire(image.width * image.height):
            # Pillow loads pixels and EXIF data when they are first used, which is not thread-safe.
            with _LOAD_LOCK.acquire(1):
                values = None
                is_deep = _is_deep(image)
                if value_range is not None and is_deep:
                    values = _read_deep_grey(image)
                image.load()
                orientation = _orientation(image)
            if report is not None and is_deep:
                report(_deep_facts(image, values))
            if value_range is not None and values is not None:
                upright = _to_upright(_scale_deep(values, value_range), orientation)
            else:
                upright = _to_upright(image, orientation)
            return _convert(upright, image.format or "", size, channels, fit, background)
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(name, _reason(error)) from error


def read_values(
    source: Path | str | bytes, *, max_pixels: int = MAX_PIXELS, name: str = ""
) -> npt.NDArray[np.generic]:
    """Return the values of an image as they are stored, before they are converted to 8 bits.

    Args:
        source, max_pixels, name: As for `decode`.

    Returns:
        `[H, W]`, or `[H, W, 3 or 4]` for color; not turned upright. Deep images have their own
        data type, others are uint8. Floats may be NaN or infinite.

    Raises:
        UnreadableImage: As `decode`.
    """
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _TRUNCATED_IMAGES_REFUSED, _open(source, name, max_pixels) as image:
            pixels = _prepare(image, source, name, None, "crop", max_pixels)
            with _DECODE_MEMORY.acquire(pixels):
                values = _read_deep(image, source, max_pixels)
                if values is not None:
                    return values
                has_alpha = _has_alpha(image)
                return np.array(image.convert("RGBA" if has_alpha else "RGB"))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(name or "(bytes)", _reason(error, source)) from error


def fit_arrays(
    images: Pixels, *, size: int | None, channels: int, fit: str, background: str = "white"
) -> Pixels:
    """Apply the conversions of `decode` to images in memory.

    The result equals, pixel for pixel, writing each image to a lossless file and decoding that.

    Args:
        images: uint8 `[N, C, H, W]` with 1 (grey), 3 (RGB) or 4 channels (RGBA).
        size, channels, fit, background: As for `decode`.

    Returns:
        uint8 `[N, channels, size, size]`, or `[N, channels, H, W]` if `size` is None.

    Raises:
        DataError: `images` has another data type or shape.
        UsageError: Another argument is invalid.
    """
    _check_arguments(size, channels, fit)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        raise DataError(
            f"images must be uint8 [N, 1, 3 or 4, H, W], not {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] == 4:
        height, width = (size, size) if size is not None else images.shape[2:]
        opaque = np.empty((len(images), channels, height, width), np.uint8)
        for row, image in zip(opaque, images, strict=True):
            rgba = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            row[...] = _convert(rgba, "", size, channels, fit, background)
        return opaque
    if images.shape[1] == 1 and channels == 3:
        images = np.repeat(images, 3, axis=1)
    elif images.shape[1] == 3 and channels == 1:
        red, green, blue = (images[:, c].astype(np.uint32) for c in range(3))
        # Pillow's fixed-point ITU-R 601 weights, so that the result is equal to that of `decode`.
        grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
        images = grey.astype(np.uint8)[:, None]
    if size is None or images.shape[2:] == (size, size):
        return images
    out = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(out, images, strict=True):
        pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        row[...] = _to_array(_resize(Image.fromarray(pixels), size, fit))
    return out


def scale_to_uint8(values: npt.NDArray[np.generic], value_range: tuple[float, float]) -> Pixels:
    """Map values linearly so that `value_range` becomes 0..255; round them to whole levels.

    Args:
        values: Numbers, of any shape. Values outside the range are clipped; NaN becomes 0.
        value_range: The values that become 0 and 255.

    Raises:
        UsageError: The range is empty.
    """
    low, high = value_range
    if not low < high:
        raise UsageError(f"the range [{low:g}, {high:g}] is empty", fix="give [low, high]")
    # 64-bit floats hold all 32-bit integers exactly. In place: the images may be large.
    scaled = np.subtract(values, low, dtype=np.float64)
    scaled *= 255
    scaled /= high - low
    return _to_levels(scaled)


def _to_levels(scaled: npt.NDArray[np.float64]) -> Pixels:
    """Clip and round values to 0..255; NaN becomes 0. Changes `scaled`."""
    np.clip(scaled, 0, 255, out=scaled)
    np.nan_to_num(scaled, copy=False)
    levels: Pixels = np.rint(scaled, out=scaled).astype(np.uint8)
    return levels


def has_second_image(content: bytes) -> bool:
    """Return whether another image follows the first one, as in concatenated files.

    A second image inside a file is not one: the thumbnail of a camera, or an image that the first
    one refers to (multi-picture JPEG). Without it, the first image would be incomplete, or its
    header has such a reference.
    """
    for match in _SIGNATURE.finditer(content, 1):
        start = match.start()
        try:
            probe_image(content[start : start + _PROBED_BYTES])
            decode(content[:start], size=1, channels=1, fit="stretch")
        except UnreadableImage:
            continue
        return b"MPF\0" not in content[:start]
    return False


def probe_image(
    source: Path | str | bytes, name: str = "", *, max_pixels: int = MAX_PIXELS
) -> ImageFacts:
    """Read the header of an image; the pixels are not decoded.

    Args:
        source: A path, or the bytes of a file.
        name: Name of `source` in errors if it is bytes.
        max_pixels: As for `decode`.

    Raises:
        UnreadableImage: The header is not that of an image, or declares too many pixels.
    """
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _TRUNCATED_IMAGES_REFUSED, _open(source, name, max_pixels) as image:
            width, height = image.size
            # The EXIF of a PNG may follow the pixels; reading it would decode all of them.
            has_exif = image.format != "PNG" or "exif" in image.info
            orientation = _orientation(image) if has_exif else 1
            if image.format != "TIFF" and orientation >= 5:
                width, height = height, width
            return ImageFacts(
                width,
                height,
                mode=image.mode,
                grey=_is_grey(image),
                turned=orientation in _UPRIGHT,
                alpha=_has_alpha(image),
                frames=_has_frames(image),
                deep=_is_deep(image),
            )
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(name or "(bytes)", _reason(error, source)) from error


def _check_arguments(size: int | None, channels: int, fit: str) -> None:
    if fit not in FITS:
        raise UsageError(f"unknown fit {fit!r}", fix=f"choose from: {', '.join(FITS)}")
    if channels not in (1, 3):
        raise UsageError(f"channels must be 1 or 3, not {channels!r}")
    if size is not None and size < 1:
        raise UsageError(f"image size must be at least 1, not {size!r}")


def _open(content: bytes, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header of an image as `Image.open` does, with a limit of its pixels.

    Pillow's own limit is a setting of the whole process, and up to twice that limit Pillow only
    warns. Turning this warning into an error would need another setting of the whole process.

    The pixels of a JPEG are limited at the smallest scale that it can be decoded at.
    """
    file = io.BytesIO(content)
    Image.preinit()
    for kind in FORMATS:
        if kind not in Image.OPEN:
            Image.init()  # loads the rare formats as well, which takes a while
        if kind not in Image.OPEN:  # not supported by this build of Pillow
            continue
        factory, accept = Image.OPEN[kind]
        try:
            accepted = accept is None or accept(content[:16])
            # A string is the reason why this build of Pillow can't read the format.
            if not accepted or isinstance(accepted, str):
                continue
            file.seek(0)
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format
            continue
        scale = _MAX_DRAFT if kind == "JPEG" else 1
        for width, height in (image.size, getattr(image, "_tile_size", image.size)):
            if width * height > max_pixels * scale**2:
                raise _too_large(name, image.size, max_pixels)
        return image
    raise UnidentifiedImageError


def _convert(
    image: Image.Image,
    file_format: str,
    size: int | None,
    channels: int,
    fit: str,
    background: str,
) -> Pixels:
    """Return the pixels of a loaded, upright image."""
    eight_bit = _to_eight_bit(image, file_format, channels, background)
    return _to_array(_resize(eight_bit, size, fit))


def _too_large(name: str, image_size: tuple[int, int], max_pixels: int) -> UnreadableImage:
    width, height = image_size
    limit = f"{max_pixels // 10**6} million" if max_pixels >= 10**6 else f"{max_pixels:,}"
    return UnreadableImage(
        name or "(bytes)",
        f"more than {limit} pixels are refused ({width} x {height}); to raise the limit, set "
        "data.max_pixels, or --max-pixels of predict, look and serve",
    )


def _prepare(
    image: ImageFile.ImageFile,
    content: bytes,
    name: str,
    size: int | None,
    fit: str,
    max_pixels: int,
) -> int:
    """Check that an opened image is complete, and reduce the scale of a JPEG.

    Returns:
        The number of pixels that decoding keeps in memory.

    Raises:
        UnreadableImage: They are more than `max_pixels`.
    """
    full_size = image.size
    one_scan = True
    if image.format == "PNG":
        check_png(content)
    elif image.format in ("JPEG", "MPO"):
        one_scan = check_jpeg(image, content) and not image.info.get("progressive")
    width, height = image.size
    if size is not None:
        # Twice the target size leaves enough detail for an antialiased resize.
        width, height = (2 * side for side in _resized_size(image.size, size, fit))
    scale = 1
    while image.width * image.height > max_pixels * scale**2:
        scale *= 2
    if scale > 1:
        width, height = min(width, image.width // scale), min(height, image.height // scale)
    image.draft(None, (width, height))  # chooses the scale of a JPEG; other formats keep their size
    pixels = image.width * image.height
    if not one_scan:
        pixels = max(pixels, round(full_size[0] * full_size[1] * _COEFFICIENT_SHARE))
    if pixels > max_pixels:
        raise _too_large(name, full_size, max_pixels)
    return pixels


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged EXIF does not affect the pixels; the image counts as upright.
        return 1


def _to_upright(image: Image.Image, orientation: int) -> Image.Image:
    transpose = _UPRIGHT.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # A damaged second frame does not count.
        return False


def _is_grey(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA"):
        return image.mode in _GREY
    palette = image.getpalette("RGB") or []
    return palette[0::3] == palette[1::3] == palette[2::3]


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I") or _deep_color_encoding(image) != ""


def _deep_color_encoding(image: Image.Image) -> str:
    """Return Pillow's name of the encoding of 16-bit color; empty for other images.

    It is known only before the pixels are loaded.
    """
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    encoding = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    found = isinstance(encoding, str) and _DEEP_COLOR.fullmatch(encoding)
    return str(encoding) if found else ""


def _read_deep(
    image: ImageFile.ImageFile, content: bytes, max_pixels: int
) -> npt.NDArray[np.generic] | None:
    """Return the values of a deep image, `[H, W]` or `[H, W, 3 or 4]`; None for 8-bit images.

    Raises:
        ValueError: No value is finite.
    """
    if not _is_deep(image):
        return None
    encoding = _deep_color_encoding(image)
    if encoding:
        return _read_deep_color(image, encoding, content, max_pixels)
    return _read_deep_grey(image)


def _read_deep_grey(image: Image.Image) -> npt.NDArray[np.generic]:
    """Return the values of a deep grey image, `[H, W]`.

    Raises:
        ValueError: No value is finite.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    maximum = _pgm_maximum(image)
    image.load()
    values = np.asarray(image)
    if maximum is not None:  # Pillow has scaled the values to 0..65535
        values = np.rint(values * (maximum / 65535)).astype(np.uint16)
    if not np.isfinite(values).any():
        raise _NoFiniteValueError
    is_unsigned = tags.get(258) == (32,) and tags.get(339, (1,)) == (1,)
    # Pillow reads unsigned integers of 32 bits as signed ones.
    return values.view(np.uint32) if image.mode == "I" and is_unsigned else values


def _deep_facts(image: Image.Image, values: npt.NDArray[np.generic] | None) -> DeepFacts:
    """Return what to report about a deep image, which is loaded.

    Args:
        image: The image.
        values: Its values; None if it is converted without a value range.
    """
    shown = np.asarray(image) if values is None else values
    not_finite = 1 - float(np.isfinite(shown).mean()) if shown.dtype.kind == "f" else 0.0
    return DeepFacts(values is None, not_finite)


def _pgm_maximum(image: Image.Image) -> int | None:
    """Return the maximum that the header of a deep PGM gives; None where it is 65,535.

    It is known only before the pixels are loaded.
    """
    tiles = getattr(image, "tile", None)
    if image.format != "PPM" or image.mode != "I" or not tiles:
        return None
    arguments = tiles[0].args
    return int(arguments[1]) if isinstance(arguments, tuple) else None


def _read_deep_color(
    image: ImageFile.ImageFile, encoding: str, content: bytes, max_pixels: int
) -> npt.NDArray[np.uint16]:
    """Return 16-bit color. Pillow keeps the upper byte of each value and drops the lower one.

    So the file is decoded twice: read in the other byte order, the lower byte is the upper one.
    """
    kind, order = encoding.split(";16")
    order = sys.byteorder[0].upper() if order == "N" else order
    swapped = f"{kind};16{'B' if order == 'L' else 'L'}"
    with _open(content, "", max_pixels) as again:
        again.tile = [_with_encoding(tile, swapped) for tile in again.tile]
        lower = np.asarray(again.convert(kind), dtype=np.uint16)
    image.load()
    upper: npt.NDArray[np.uint16] = np.asarray(image, dtype=np.uint16) << np.uint16(8)
    return upper | lower


def _with_encoding(tile: Any, encoding: str) -> Any:
    arguments = tile.args
    changed = (encoding, *arguments[1:]) if isinstance(arguments, tuple) else encoding
    return tile._replace(args=changed)


def _scale_deep(values: npt.NDArray[np.generic], value_range: tuple[float, float]) -> Image.Image:
    """Convert the values of a deep image to 8 bits. A fourth channel, alpha, keeps its range."""
    if values.ndim == 2:
        return Image.fromarray(scale_to_uint8(values, value_range))
    # One channel at a time, as floats need much memory.
    channels = [scale_to_uint8(values[..., c], value_range) for c in range(3)]
    if values.shape[2] == 4:
        channels.append((values[..., 3].astype(np.uint16) >> np.uint16(8)).astype(np.uint8))
    return Image.fromarray(np.stack(channels, axis=2))


def _to_eight_bit(
    image: Image.Image, file_format: str, channels: int, background: str
) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale_16_bit(np.asarray(image))
    elif image.mode in ("I", "F"):
        holds_16_bit = file_format in ("PPM", "PNG") and image.mode == "I"
        image = _scale_32_bit(np.asarray(image), holds_16_bit=holds_16_bit)
    if _has_alpha(image):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        if background == ALPHA:
            image = image.getchannel("A")
        else:
            opaque = Image.new("RGBA", image.size, ImageColor.getrgb(background))
            opaque.alpha_composite(image)
            image = opaque.convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _scale_16_bit(values: npt.NDArray[np.generic]) -> Image.Image:
    # 65535 / 255 = 257: scaled and rounded. Pillow's convert("L") would clip at 255.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _scale_32_bit(values: npt.NDArray[np.generic], *, holds_16_bit: bool) -> Image.Image:
    """Scale 32-bit grey to 8 bits.

    The range 0..1, 0..255 or 0..65535 is chosen by the values; other values are stretched.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise _NoFiniteValueError
    low, high = float(finite.min()), float(finite.max())
    if holds_16_bit or (low >= 0 and 255 < high <= 65535 and values.dtype.kind == "i"):
        return _scale_16_bit(np.clip(values.astype(np.int64), 0, 65535))
    scaled = values.astype(np.float64)
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        scaled = scaled * 255
    elif low < 0 or high > 255:
        scaled = (scaled - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(_to_levels(scaled))


def _resized_size(image_size: tuple[int, int], size: int, fit: str) -> tuple[int, int]:
    """Return width and height after the resize, before cropping or padding."""
    if fit == "stretch":
        return size, size
    width, height = image_size
    side = min(image_size) if fit == "crop" else max(image_size)
    return max(1, round(width * size / side)), max(1, round(height * size / side))


def _resize(image: Image.Image, size: int | None, fit: str) -> Image.Image:
    if size is None or image.size == (size, size):
        return image
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    target = _resized_size(image.size, size, fit)
    image = image.resize(target, Image.Resampling.BILINEAR)
    if target == (size, size):
        return image
    padded = Image.new(image.mode, (size, size))
    padded.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
    return padded


def _to_array(image: Image.Image) -> Pixels:
    array = np.asarray(image, dtype=np.uint8)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.array(array, order="C")


def _reason(error: Exception, content: bytes = b"") -> str:
    """Describe an exception of the system or of Pillow in plain words."""
    text = str(error)
    if isinstance(error, _NoFiniteValueError):
        return text
    if "closed image" in text:  # of the caller
        return "it was closed before its pixels were read"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        head = content[:256]
        kind = unsupported_format(head)
        if kind:
            return f"it is {kind}, which is not supported: convert it to JPEG or PNG"
        if head.lstrip()[:1] == b"<":
            return "it is a web page or XML, not an image"
        readable = head and all(byte in b"\t\r\n\f" or byte >= 32 for byte in head)
        return "it is text, not an image" if readable else "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "it has too many pixels"
    if isinstance(error, EOFError) or "truncat" in text.lower():
        return "the file is cut short"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged ({text or type(error).__name__})"


class TruncatedImagesRefused:
    """A context in which Pillow refuses truncated images, whatever the calling program has set.

    Notebooks often set `ImageFile.LOAD_TRUNCATED_IMAGES`, with which a file that is cut short would
    be a gray image. The setting is a global variable of Pillow and comes back when the last thread
    leaves the context.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._setting = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._setting = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._setting


_TRUNCATED_IMAGES_REFUSED = TruncatedImagesRefused()


def check_png(content: bytes) -> None:
    """Check that a PNG is complete and its checksums match.

    Pillow checks neither once it has decoded all rows.

    Raises:
        EOFError: The file is cut short.
        ValueError: A checksum differs.
    """
    view, start, kind = memoryview(content), 8, b""
    while kind != b"IEND":
        length = int.from_bytes(view[start : start + 4], "big")
        body = view[start + 4 : start + 8 + length]
        checksum = view[start + 8 + length : start + 12 + length]
        if len(checksum) < 4:
            raise EOFError
        kind = bytes(body[:4])
        # Chunks that are not needed to show the image have names that begin with a lowercase
        # letter; they may be damaged.
        if kind[:1].isupper() and zlib.crc32(body) != int.from_bytes(checksum, "big"):
            raise ValueError("its checksum differs")
        start += 12 + length


def check_jpeg(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Prepare an opened JPEG so that decoding it fails if a part of it is missing.

    libjpeg fills missing data with grey and only warns; Pillow drops its warnings. It does so only
    if a marker follows the data. Without the end marker, a decoder that needs more data asks for
    more input, and Pillow reports a truncated file. So the file is cut at the end of its data.

    Args:
        image: The opened image.
        content: The bytes of its file.

    Returns:
        Whether all data are in one scan, so that they can be decoded row by row.

    Raises:
        EOFError: Scans are missing.
        ValueError: Data between restart markers are missing.
    """
    stream = image.fp
    assert stream is not None
    start, components = stream.tell(), getattr(image, "layers", 0)
    # Pillow has read the headers up to the data of the first scan. Nearly always these are all the
    # headers; reading them again would take a quarter of the time of a small image.
    header = content[max(0, start - 8 - 2 * components) : start]
    one_scan = header[:2] == b"\xff\xda" and header[4] == components and header[-3:] == b"\0\x3f\0"
    if one_scan and not any(content.find(mark, 0, start) >= 0 for mark in _UNUSUAL_HEADERS):
        end: int | None = _without_trailing_zeros(content, _find_data_end(content, start, 0)[0])
    else:
        end = _walk_segments(content)
    if end is not None:
        stream.seek(end)
        stream.truncate()
        stream.write(_LOOKAHEAD)
    return end is not None


def _walk_segments(content: bytes) -> int | None:
    """Return where the coded data end, from all headers; None if the decoder needs the end marker.

    It does if the data come in several scans. Then the last scan of each component must have
    started, so that only fine detail can be missing. Arithmetic coding is not checked.
    """
    start, interval = 2, 0
    frame, sequential, complete = b"", False, set[tuple[int, bool]]()
    for _ in range(_MAX_SEGMENTS):
        is_marker = content[start : start + 1] == b"\xff"
        if not is_marker or content[start + 1 : start + 2] in (b"", b"\0", b"\xff"):
            start, _ = _find_data_end(content, start, interval)  # data of a scan, or junk
        kind = int.from_bytes(content[start + 1 : start + 2], "big")
        if kind in (_STUFFED_BYTE, _END):
            break
        if kind in _WITHOUT_SEGMENT:
            start += 2
            continue
        length = int.from_bytes(content[start + 2 : start + 4], "big")
        body = content[start + 4 : start + 2 + length]
        start += 2 + max(2, length)
        if kind in _SEQUENTIAL or kind == _PROGRESSIVE:
            frame, sequential = body, kind in _SEQUENTIAL
        elif kind in _OTHER_FRAMES:
            return None
        elif kind == _RESTART_INTERVAL:
            interval = int.from_bytes(body[:2], "big")
        elif kind == _SCAN and frame:
            if sequential and body[0] == frame[5]:
                return _end_of_single_scan(content, start, interval, frame)
            complete |= _completed_by_scan(body)
    else:
        return None
    if frame and len(complete) < 2 * frame[5]:
        raise EOFError
    return None


def _end_of_single_scan(content: bytes, start: int, interval: int, frame: bytes) -> int:
    """Return where the data of a scan of all components end.

    Raises:
        ValueError: There are fewer restart markers than the size of the image requires.
    """
    end, restarts = _find_data_end(content, start, interval)
    if end < len(content) and interval and restarts < (_count_units(frame) - 1) // interval:
        raise ValueError("data between its restart markers are missing")
    return _without_trailing_zeros(content, end)


def _completed_by_scan(body: bytes) -> set[tuple[int, bool]]:
    """Return the `(component, is_lowest_frequency)` pairs that a scan completes to the last bit."""
    count = body[0]
    first, last, bits = body[1 + 2 * count : 4 + 2 * count]
    complete = set[tuple[int, bool]]()
    for component in body[1 : 1 + 2 * count : 2]:
        complete |= {(component, True)} if first == 0 and not bits & 15 else set()
        complete |= {(component, False)} if last == 63 and not bits & 15 else set()
    return complete


def _without_trailing_zeros(content: bytes, end: int) -> int:
    # Without any marker, zeros at the end are not data but the gap that a failed disk or download
    # has left.
    return end if end < len(content) else len(content.rstrip(b"\0"))


def _find_data_end(content: bytes, start: int, interval: int) -> tuple[int, int]:
    """Return where the coded data that begin at `start` end, and their number of restart markers.

    They end at the first marker that is not the next restart marker, or with the file.
    """
    if not interval:
        marker = _MARKER.search(content, start)
        return marker.start() if marker else len(content), 0
    view, restarts = np.frombuffer(content, np.uint8), 0
    for low in range(start, len(view), _SCAN_CHUNK):
        chunk = view[low : low + _SCAN_CHUNK + 1]  # a marker may begin with its last byte
        positions = np.flatnonzero(chunk[:-1] == 0xFF)
        kinds = chunk[positions + 1]
        is_marker = (kinds != 0) & (kinds != 0xFF)
        positions, kinds = positions[is_marker], kinds[is_marker]
        ends = np.flatnonzero(kinds != _RESTART + (restarts + np.arange(len(kinds))) % 8)
        if len(ends):
            return low + int(positions[ends[0]]), restarts + int(ends[0])
        restarts += len(kinds)
    return len(view), restarts


def _count_units(frame: bytes) -> int:
    """Return the number of MCUs; a restart interval is given in MCUs."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = frame[7 : 7 + 3 * frame[5] : 3]
    # With a single component an MCU is one block, whatever its sampling factors.
    across = max(f >> 4 for f in factors) if len(factors) > 1 else 1
    down = max(f & 15 for f in factors) if len(factors) > 1 else 1
    return -(-width // (8 * across)) * -(-height // (8 * down))
