"""The one decoder: training, evaluation, prediction and the reports all read images through it.

Whatever a file holds becomes uint8 `[C, H, W]` in four steps, always in this order: turn it
upright (EXIF), bring it to 8-bit grey or RGB, resize it (antialiased, bilinear), crop or pad it.
Nothing here changes a global setting, so any number of threads may decode at once (large images
wait for each other, so that memory stays bounded).
"""

from __future__ import annotations

import io
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from convlens.data.locks import MemorySemaphore
from convlens.data.whole import check_jpeg, check_pillow, check_png
from convlens.errors import DataError, UsageError

Pixels = npt.NDArray[np.uint8]

# Part of every cache key: raise it whenever the same file would decode to other pixels.
VERSION = 2

# Only these decoders are ever tried, whatever a file calls itself (Pillow knows 40 more).
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".gif", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".avif",
})  # fmt: skip
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


def fit_images(images: Pixels, *, size: int | None, channels: int, fit: str) -> Pixels:
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


def probe(source: Path | str | bytes, name: str = "") -> ImageFacts:
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
