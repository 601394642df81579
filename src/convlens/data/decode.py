"""The one decoder: training, evaluation, prediction and the reports all read images through it.

Whatever a file holds becomes uint8 `[C, H, W]` in four steps, always in this order: turn it
upright (EXIF), bring it to 8-bit grey or RGB, resize it (antialiased, bilinear), crop or pad it.
Nothing here changes a global setting, so any number of threads may decode at once (large images
wait for each other, so that memory stays bounded).
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

# Part of every cache key: raise it whenever the same file would decode to other pixels.
VERSION = 2

# Only these decoders are ever tried, whatever a file calls itself (Pillow knows 40 more).
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

MAX_PIXELS = 89_478_485  # where Pillow begins to warn
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels are refused"
MAX_BYTES = 1 << 29
# Of all threads together, where images are large: each takes up to 16 bytes a pixel.
_DECODE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)

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


class UnreadableImage(DataError):  # noqa: N818
    """One image that can't be decoded: `path` says which, `reason` why, in plain words."""

    def __init__(self, path: str, reason: str) -> None:
        fix = "replace or remove the file, or set data.on_bad=skip"
        super().__init__(f"unreadable image: {reason}", where=path, fix=fix)
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class ImageFacts:
    """What a header says: size in pixels as seen upright, Pillow's mode, and grey or colour."""

    width: int
    height: int
    mode: str
    grey: bool
    turned: bool  # by EXIF
    alpha: bool  # a channel or a colour of it; transparent parts become white
    frames: bool  # more than the first, which is the one that is used


def read_bytes(path: Path | str) -> bytes:
    """The bytes of one regular, non-empty file; never blocks on a pipe or device.

    Raises:
        UnreadableImage: missing, empty, not a regular file, forbidden, or larger than 512 MiB.
    """
    name = os.fspath(path)
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to would wait for ever.
        # Windows would translate line ends.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(name, flags)
    except IsADirectoryError:
        raise UnreadableImage(name, "it is a folder") from None
    except (OSError, ValueError) as error:
        raise UnreadableImage(name, _why(error)) from error
    try:
        facts = os.fstat(handle)
        if stat.S_ISDIR(facts.st_mode):
            raise UnreadableImage(name, "it is a folder")
        if not stat.S_ISREG(facts.st_mode):
            raise UnreadableImage(name, "it is not a regular file")
        if facts.st_size == 0:
            raise UnreadableImage(name, "the file is empty (0 bytes)")
        if facts.st_size > MAX_BYTES:
            raise UnreadableImage(name, f"the file is larger than {MAX_BYTES >> 20} MiB")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(name, _why(error)) from error
    finally:
        os.close(handle)


def decode(
    source: Path | str | bytes, *, size: int | None, channels: int, fit: str, name: str = ""
) -> Pixels:
    """One image file as uint8 `[C, size, size]`, or `[C, H, W]` as it is where `size` is None.

    Args:
        source: a path, or the bytes of a file.
        size: side of the square in pixels.
        channels: 1 (ITU-R 601 grey) or 3 (RGB); transparent parts become white.
        fit: `crop` (short side to `size`, centre kept), `pad` (long side to `size`, black
            borders) or `stretch`.
        name: what to call `source` in errors where it is bytes.

    Raises:
        UnreadableImage: it is no image, is damaged, or has more than 89 megapixels.
        UsageError: an argument can't be used, or Pillow was told to accept damaged images.
    """
    _check(size, channels, fit)
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
                # JPEG can be decoded at 1/2, 1/4, 1/8; twice the target keeps the resize honest.
                width, height = _scaled(image.size, size, fit)
                image.draft(None, (2 * width, 2 * height))
            with _DECODE_MEMORY.acquire(image.width * image.height):
                image.load()
                plain = _eight_bit(_upright(image), image.format or "", channels)
                return _pixels(_fitted(plain, size, fit))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files.
        raise UnreadableImage(name or "(bytes)", _why(error, source)) from error


def fit_arrays(images: Pixels, *, size: int | None, channels: int, fit: str) -> Pixels:
    """The same conversions for uint8 images `[N, C, H, W]` that are already in memory.

    Equal, pixel for pixel, to writing each image to a lossless file and decoding that.
    """
    _check(size, channels, fit)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"images must be uint8 [N, 1 or 3, H, W], not {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] == 1 and channels == 3:
        images = np.repeat(images, 3, axis=1)
    elif images.shape[1] == 3 and channels == 1:
        red, green, blue = (images[:, c].astype(np.uint32) for c in range(3))
        # Pillow's own fixed-point ITU-R 601 weights, so that both ways agree to the last bit.
        grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
        images = grey.astype(np.uint8)[:, None]
    if size is None or images.shape[2:] == (size, size):
        return images
    out = np.empty((len(images), channels, size, size), np.uint8)
    for row, image in zip(out, images, strict=True):
        pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        row[...] = _pixels(_fitted(Image.fromarray(pixels), size, fit))
    return out


def probe_image(source: Path | str | bytes, name: str = "") -> ImageFacts:
    """Size and kind of an image from its header alone; the pixels are not decoded.

    Args:
        source: a path, or the bytes of a file.
        name: what to call `source` in errors where it is bytes.

    Raises:
        UnreadableImage: the header is no image's, or promises more than 89 megapixels.
    """
    if not isinstance(source, bytes):
        name = os.fspath(source)
        source = read_bytes(source)
    try:
        with _open(source, name) as image:
            width, height = image.size
            # PNG may keep its EXIF behind the pixels; asking for it would decode them all.
            known = image.format != "PNG" or "exif" in image.info
            turn = _orientation(image) if known else 1
            if image.format != "TIFF" and turn >= 5:
                width, height = height, width
            about = (image.mode, _is_grey(image), turn in _UPRIGHT, _has_alpha(image))
            return ImageFacts(width, height, *about, _has_frames(image))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as in `decode`
        raise UnreadableImage(name or "(bytes)", _why(error, source)) from error


def _check(size: int | None, channels: int, fit: str) -> None:
    if fit not in FITS:
        raise UsageError(f"unknown fit {fit!r}", fix=f"choose from: {', '.join(FITS)}")
    if channels not in (1, 3):
        raise UsageError(f"channels must be 1 or 3, not {channels!r}")
    if size is not None and size < 1:
        raise UsageError(f"image size must be at least 1, not {size!r}")


def _open(content: bytes, name: str) -> ImageFile.ImageFile:
    """Read the header of an image, as `Image.open` does, but with a limit of our own.

    Pillow's limit is a setting of the whole process. Up to twice that limit it only warns, and a
    filter that makes an error of the warning would be another one.
    """
    file = io.BytesIO(content)
    Image.preinit()
    for kind in FORMATS:
        if kind not in Image.OPEN:
            Image.init()  # loads the rarer formats, too, which takes a while
        if kind not in Image.OPEN:  # this build of Pillow doesn't have it
            continue
        factory, accept = Image.OPEN[kind]
        try:
            accepted = accept is None or accept(content[:16])
            # A text says why this build of Pillow can't read the format.
            if not accepted or isinstance(accepted, str):
                continue
            file.seek(0)
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # it is of another format
            continue
        for width, height in (image.size, getattr(image, "_tile_size", image.size)):
            if width * height > MAX_PIXELS:
                raise UnreadableImage(name or "(bytes)", f"{TOO_LARGE} ({width} x {height})")
        return image
    raise UnidentifiedImageError


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged EXIF says nothing about the pixels: the image counts as upright.
        return 1


def _upright(image: Image.Image) -> Image.Image:
    # Only now: Pillow turns TIFF upright while loading, and drops the tag when it has done so.
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # A damaged second frame is none.
        return False


def _is_grey(image: Image.Image) -> bool:
    if image.mode not in ("P", "PA"):
        return image.mode in _GREY
    palette = image.getpalette("RGB") or []
    return palette[0::3] == palette[1::3] == palette[2::3]


def _eight_bit(image: Image.Image, kind: str, channels: int) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _scale16(np.asarray(image))
    elif image.mode in ("I", "F"):
        image = _scale32(np.asarray(image), sixteen=kind in ("PPM", "PNG") and image.mode == "I")
    if _has_alpha(image):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper.convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def _scale16(values: npt.NDArray[np.generic]) -> Image.Image:
    # 65535 / 255 = 257: scaled and rounded. Pillow's own convert("L") would clip at 255.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _scale32(values: npt.NDArray[np.generic], *, sixteen: bool) -> Image.Image:
    """32-bit grey as 8 bits: 0..1, 0..255 and 0..65535 by their range, the rest stretched."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds values that are not finite (NaN or infinity)")
    if sixteen or (low >= 0 and 255 < high <= 65535 and values.dtype.kind == "i"):
        return _scale16(np.clip(values.astype(np.int64), 0, 65535))
    scaled = values.astype(np.float64)
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        scaled = scaled * 255
    elif low < 0 or high > 255:
        scaled = (scaled - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _scaled(have: tuple[int, int], size: int, fit: str) -> tuple[int, int]:
    """Width and height after the resize, before anything is cropped or padded."""
    if fit == "stretch":
        return size, size
    side = min(have) if fit == "crop" else max(have)
    return max(1, round(have[0] * size / side)), max(1, round(have[1] * size / side))


def _fitted(image: Image.Image, size: int | None, fit: str) -> Image.Image:
    if size is None or image.size == (size, size):
        return image
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    target = _scaled(image.size, size, fit)
    image = image.resize(target, Image.Resampling.BILINEAR)
    if target == (size, size):
        return image
    frame = Image.new(image.mode, (size, size))
    frame.paste(image, ((size - target[0]) // 2, (size - target[1]) // 2))
    return frame


def _pixels(image: Image.Image) -> Pixels:
    array = np.asarray(image, dtype=np.uint8)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.array(array, order="C")


def _why(error: Exception, content: bytes = b"") -> str:
    """An exception of the system or of Pillow in words for people."""
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


# ---- whole ----------------------------------------
# Whether a file holds all of its picture, where its decoder doesn't look.
#
# libjpeg makes grey of what is missing; it warns, but Pillow drops its warnings. It does so only
# where a marker stands behind the data, though. So the marker is taken away: a decoder that needs
# more than there is then asks for it in vain, and says so.

# The second bytes of markers (ITU-T T.81, table B.1).
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2  # frames with Huffman codes
_OTHER = frozenset({0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # nothing belongs to them
_NONE, _RESTART, _END, _SCAN, _INTERVAL = 0x00, 0xD0, 0xD9, 0xDA, 0xDD

_UNUSUAL = (b"\xff\xdd\0\4", b"\xff\xc9\0")  # restarts, arithmetic codes
_MARKER = re.compile(rb"\xff[^\x00\xff]")

_PIECE = 1 << 20  # bytes that are looked through at once: bounds the memory it takes
_SEGMENTS = 1000  # no camera writes that many; who does is not checked
_AHEAD = b"\0" * 16  # a decoder looks ahead by up to 8


def check_pillow() -> None:
    """Refuses to decode where a program has told Pillow to accept what is cut short."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "this program has told Pillow to take half an image for a whole one",
            where="PIL.ImageFile.LOAD_TRUNCATED_IMAGES",
            fix="set it to False",
        )


def check_png(content: bytes) -> None:
    """Pillow looks at neither the sums of pixel data nor the end, once it has all rows.

    Raises:
        EOFError: the file is cut short. ValueError: a sum differs.
    """
    view, at, kind = memoryview(content), 8, b""
    while kind != b"IEND":
        length = int.from_bytes(view[at : at + 4], "big")
        body, sum_ = view[at + 4 : at + 8 + length], view[at + 8 + length : at + 12 + length]
        if len(sum_) < 4:
            raise EOFError
        kind = bytes(body[:4])
        # What is no part of the picture may be damaged: its name begins with a small letter.
        if kind[:1].isupper() and zlib.crc32(body) != int.from_bytes(sum_, "big"):
            raise ValueError("its checksum differs")
        at += 12 + length


def check_jpeg(image: ImageFile.ImageFile, content: bytes) -> None:
    """Takes the end from an opened JPEG, whose `content` this is, so that decoding needs all of it.

    Raises:
        EOFError: scans are missing. ValueError: what belongs between restart markers is.
    """
    stream = image.fp
    assert stream is not None
    start, parts = stream.tell(), getattr(image, "layers", 0)
    # Pillow has read the headers, up to the data. Where these are all there is, as nearly always,
    # there is no need to do it again: it would take a quarter of the time of a small image.
    scan = content[max(0, start - 8 - 2 * parts) : start]
    usual = scan[:2] == b"\xff\xda" and scan[4] == parts and scan[-3:] == b"\0\x3f\0"
    if usual and not any(content.find(mark, 0, start) >= 0 for mark in _UNUSUAL):
        end: int | None = _without_zeros(content, _coded_bytes(content, start, 0)[0])
    else:
        end = _walk_segments(content)
    if end is not None:
        stream.seek(end)
        stream.truncate()
        stream.write(_AHEAD)


def _walk_segments(content: bytes) -> int | None:
    """Where the data end, by all headers; None where the decoder needs the end.

    It does where the data come in several scans: there the last scan of each part of the picture
    must have begun, so that only fine detail can be missing. Arithmetic codes are not looked at.
    """
    at, interval = 2, 0
    frame, sequential, scanned = b"", False, set[tuple[int, bool]]()
    for _ in range(_SEGMENTS):
        if content[at : at + 1] != b"\xff" or content[at + 1 : at + 2] in (b"", b"\0", b"\xff"):
            at, _ = _coded_bytes(content, at, interval)  # the data of a scan, or junk
        kind = int.from_bytes(content[at + 1 : at + 2], "big")
        if kind in (_NONE, _END):
            break
        if kind in _BARE:
            at += 2
            continue
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        body = content[at + 4 : at + 2 + size]
        at += 2 + max(2, size)
        if kind in _SEQUENTIAL or kind == _PROGRESSIVE:
            frame, sequential = body, kind in _SEQUENTIAL
        elif kind in _OTHER:
            return None
        elif kind == _INTERVAL:
            interval = int.from_bytes(body[:2], "big")
        elif kind == _SCAN and frame:
            count = body[0]
            if sequential and count == frame[5]:
                end, restarts = _coded_bytes(content, at, interval)
                if (
                    end < len(content)
                    and interval
                    and restarts < (_count_units(frame) - 1) // interval
                ):
                    raise ValueError("what belongs between its restart markers is missing")
                return _without_zeros(content, end)
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            for component in body[1 : 1 + 2 * count : 2]:
                # The lowest frequency and all others, each down to the last bit.
                scanned |= {(component, True)} if first == 0 and not bits & 15 else set()
                scanned |= {(component, False)} if last == 63 and not bits & 15 else set()
    else:
        return None
    if frame and len(scanned) < 2 * frame[5]:
        raise EOFError
    return None


def _without_zeros(content: bytes, end: int) -> int:
    # No marker at all: zeros are not data, but a disk's or a download's that lost the rest.
    return end if end < len(content) else len(content.rstrip(b"\0"))


def _coded_bytes(content: bytes, at: int, interval: int) -> tuple[int, int]:
    """Where coded data that begin at `at` end, and how many restart markers are in them.

    They end at the first marker but restart markers in their turn, or with the file.
    """
    if not interval:
        found = _MARKER.search(content, at)
        return found.start() if found else len(content), 0
    view, restarts = np.frombuffer(content, np.uint8), 0
    for low in range(at, len(view), _PIECE):
        piece = view[low : low + _PIECE + 1]  # a marker may begin with its last byte
        positions = np.flatnonzero(piece[:-1] == 0xFF)
        kinds = piece[positions + 1]
        real = (kinds != 0) & (kinds != 0xFF)
        positions, kinds = positions[real], kinds[real]
        ends = np.flatnonzero(kinds != _RESTART + (restarts + np.arange(len(kinds))) % 8)
        if len(ends):
            return low + int(positions[ends[0]]), restarts + int(ends[0])
        restarts += len(kinds)
    return len(view), restarts


def _count_units(frame: bytes) -> int:
    """The number of MCUs, which restart markers count."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = frame[7 : 7 + 3 * frame[5] : 3]
    # A single component has one block in each, whatever its factors.
    across = max(f >> 4 for f in factors) if len(factors) > 1 else 1
    down = max(f & 15 for f in factors) if len(factors) > 1 else 1
    return -(-width // (8 * across)) * -(-height // (8 * down))
