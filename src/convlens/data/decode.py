"""Image decoding. Training, evaluation, prediction and reports all read images with `decode`.

Every file becomes uint8 `[C, H, W]` in four steps, always in this order: apply the EXIF
orientation, convert to 8-bit grey or RGB, resize (antialiased, bilinear), crop or pad. No global
setting is changed, so any number of threads may decode at the same time; the pixels of large
images that are decoded at once are limited to bound the memory.

Truncated or damaged files are refused. `check_png` and `check_jpeg` find the damage that Pillow
does not report.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

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
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels are refused"
MAX_BYTES = 1 << 29
# Pixels of the large images that all threads decode at once; a pixel takes up to 16 bytes.
_DECODE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)
_LOAD_LOCK = MemorySemaphore(1, free=0)  # for one PIL image of the caller at a time

_GREY = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
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
    alpha: bool  # has an alpha channel or a transparent color; both become white
    frames: bool  # has several frames; only the first one is used


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
    source: Path | str | bytes, *, size: int | None, channels: int, fit: str, name: str = ""
) -> Pixels:
    """Decode one image file.

    Args:
        source: A path, or the bytes of a file.
        size: Side of the result in pixels; None keeps the size of the image.
        channels: 1 (ITU-R 601 grey) or 3 (RGB). Transparent parts become white.
        fit: `crop` (short side to `size`, center kept), `pad` (long side to `size`, black
            borders) or `stretch`.
        name: Name of `source` in errors if it is bytes.

    Returns:
        uint8 `[C, size, size]`, or `[C, H, W]` if `size` is None.

    Raises:
        UnreadableImage: Not an image, damaged, or more than 89 megapixels.
        UsageError: An argument is invalid, or Pillow is set to accept truncated images.
    """
    _check_arguments(size, channels, fit)
    check_pillow()
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _open(source, name) as image:
            if image.format == "PNG":
                check_png(source)
            elif image.format in ("JPEG", "MPO"):
                check_jpeg(image, source)
            if size is not None:
                # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size. Twice the target size leaves
                # enough detail for an antialiased resize.
                width, height = _resized_size(image.size, size, fit)
                image.draft(None, (2 * width, 2 * height))
            with _DECODE_MEMORY.acquire(image.width * image.height):
                image.load()
                return _convert(_to_upright(image), image.format or "", size, channels, fit)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise UnreadableImage(name or "(bytes)", _reason(error, source)) from error


def decode_pil(
    image: Image.Image, *, size: int | None, channels: int, fit: str, name: str = ""
) -> Pixels:
    """Apply the conversions of `decode` to a PIL image, which stays as it is.

    The result equals, pixel for pixel, saving the image to a lossless file together with its EXIF
    data, and decoding that.

    Args:
        image: An image of any mode.
        size, channels, fit: As for `decode`.
        name: Name of the image in errors.

    Raises:
        UnreadableImage: The image was opened lazily and is damaged, or it is too large.
        UsageError: An argument is invalid.
    """
    _check_arguments(size, channels, fit)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name or "(image)", f"{TOO_LARGE} ({width} x {height})")
    try:
        with _DECODE_MEMORY.acquire(width * height):
            # Pillow loads pixels and EXIF data when they are first used, which is not thread-safe.
            with _LOAD_LOCK.acquire(1):
                image.load()
                upright = _to_upright(image)
            return _convert(upright, image.format or "", size, channels, fit)
    except MemoryError:
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(name or "(image)", _reason(error)) from error


def fit_arrays(images: Pixels, *, size: int | None, channels: int, fit: str) -> Pixels:
    """Apply the conversions of `decode` to images in memory.

    The result equals, pixel for pixel, writing each image to a lossless file and decoding that.

    Args:
        images: uint8 `[N, C, H, W]` with 1 (grey), 3 (RGB) or 4 channels (RGBA).
        size, channels, fit: As for `decode`.

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
            row[...] = _convert(rgba, "", size, channels, fit)
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
    """Map values so that `value_range` becomes 0..255, rounded; values outside are clipped.

    Args:
        values: Finite numbers, of any shape.
        value_range: The values that become 0 and 255.

    Raises:
        UsageError: The range is empty.
    """
    low, high = value_range
    if not low < high:
        raise UsageError(f"the range [{low:g}, {high:g}] is empty", fix="give [low, high]")
    # 64-bit floats hold all 32-bit integers exactly. In place: the images may be large.
    scaled = np.subtract(values, low, dtype=np.float64)
    scaled *= 255 / (high - low)
    np.clip(scaled, 0, 255, out=scaled)
    return np.rint(scaled, out=scaled).astype(np.uint8)


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


def probe_image(source: Path | str | bytes, name: str = "") -> ImageFacts:
    """Read the header of an image; the pixels are not decoded.

    Args:
        source: A path, or the bytes of a file.
        name: Name of `source` in errors if it is bytes.

    Raises:
        UnreadableImage: The header is not that of an image, or declares more than 89 megapixels.
    """
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _open(source, name) as image:
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


def _open(content: bytes, name: str) -> ImageFile.ImageFile:
    """Read the header of an image as `Image.open` does, with a fixed limit of its pixels.

    Pillow's own limit is a setting of the whole process, and up to twice that limit Pillow only
    warns. Turning this warning into an error would need another setting of the whole process.
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
        for width, height in (image.size, getattr(image, "_tile_size", image.size)):
            if width * height > MAX_PIXELS:
                raise UnreadableImage(name or "(bytes)", f"{TOO_LARGE} ({width} x {height})")
        return image
    raise UnidentifiedImageError


def _convert(
    image: Image.Image, file_format: str, size: int | None, channels: int, fit: str
) -> Pixels:
    """Return the pixels of a loaded, upright image."""
    return _to_array(_resize(_to_eight_bit(image, file_format, channels), size, fit))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged EXIF does not affect the pixels; the image counts as upright.
        return 1


def _to_upright(image: Image.Image) -> Image.Image:
    # After loading: Pillow turns TIFF upright when it loads the pixels, and drops the tag.
    transpose = _UPRIGHT.get(_orientation(image))
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


def _to_eight_bit(image: Image.Image, file_format: str, channels: int) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale_16_bit(np.asarray(image))
    elif image.mode in ("I", "F"):
        holds_16_bit = file_format in ("PPM", "PNG") and image.mode == "I"
        image = _scale_32_bit(np.asarray(image), holds_16_bit=holds_16_bit)
    if _has_alpha(image):
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image)
        image = background.convert("RGB")
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
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds values that are not finite (NaN or infinity)")
    if holds_16_bit or (low >= 0 and 255 < high <= 65535 and values.dtype.kind == "i"):
        return _scale_16_bit(np.clip(values.astype(np.int64), 0, 65535))
    scaled = values.astype(np.float64)
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        scaled = scaled * 255
    elif low < 0 or high > 255:
        scaled = (scaled - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


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
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, UnidentifiedImageError):
        head = content[:256]
        if head.lstrip()[:1] == b"<":
            return "it is a web page or XML, not an image"
        readable = head and all(byte in b"\t\r\n\f" or byte >= 32 for byte in head)
        return "it is text, not an image" if readable else "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return TOO_LARGE
    if isinstance(error, EOFError) or "truncat" in text.lower():
        return "the file is cut short"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged ({text or type(error).__name__})"


def check_pillow() -> None:
    """Refuse to decode if the calling program has set Pillow to accept truncated images.

    Raises:
        UsageError: `LOAD_TRUNCATED_IMAGES` is set.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "this program has set Pillow to accept truncated images",
            where="PIL.ImageFile.LOAD_TRUNCATED_IMAGES",
            fix="set it to False",
        )


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


def check_jpeg(image: ImageFile.ImageFile, content: bytes) -> None:
    """Prepare an opened JPEG so that decoding it fails if a part of it is missing.

    libjpeg fills missing data with grey and only warns; Pillow drops its warnings. It does so only
    if a marker follows the data. Without the end marker, a decoder that needs more data asks for
    more input, and Pillow reports a truncated file. So the file is cut at the end of its data.

    Args:
        image: The opened image.
        content: The bytes of its file.

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
