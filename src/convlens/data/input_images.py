"""Images to classify, in every form in which they are given: paths, streams, objects in memory.

`collect_inputs` turns all forms into `InputImage` and `InputBatch`. Nothing is decoded here.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from rich.markup import escape
from torch import Tensor

from convlens.data.arrays import LAYOUTS, as_array, is_array, to_nchw
from convlens.data.decode import MAX_BYTES, UnreadableImage, has_second_image, probe_image
from convlens.data.file_types import unsupported_format
from convlens.data.image_paths import is_file_url, path_of_file_url
from convlens.data.layout import printable
from convlens.data.scan import Scanner
from convlens.data.types import is_image_name
from convlens.errors import DataError, UsageError
from convlens.utils.console import print_status

MAX_NAME_CHARS = 100  # of a name in an error message
ACCEPTED = "give paths, bytes, open binary files, PIL images, arrays or tensors, or a list of these"

# One image, or an array or tensor of several. Other libraries' arrays are converted.
ImageLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | npt.NDArray[Any]
    | Tensor
)


@dataclass(frozen=True)
class InputImage:
    """One image to classify: the path or the content of a file, a PIL image, or an array.

    Arrays are `[C, H, W]`, of any type that `to_uint8` takes.
    """

    name: str
    source: str | bytes | Image.Image | npt.NDArray[Any]


@dataclass(frozen=True)
class InputBatch:
    """Images of equal size to classify, `[N, C, H, W]`; `first` is the number of the first one."""

    first: int
    images: npt.NDArray[Any]


# What `collect_inputs` returns and the functions below take.
Inputs = Sequence[InputImage | InputBatch]


def collect_inputs(
    inputs: ImageLike | InputImage | InputBatch | Iterable[ImageLike | InputImage | InputBatch],
    *,
    channels: str | None = None,
) -> list[InputImage | InputBatch]:
    """Return everything that `predict` takes in one form. Nothing is decoded yet.

    Args:
        inputs: as for `predict`; what is collected already stays as it is.
        channels: as for `predict`.

    Raises:
        UsageError, DataError: as by `predict`.
    """
    images: Iterable[Any]
    if _is_one_image(inputs):
        images = [inputs]
    elif is_array(inputs):
        array = as_array(inputs)
        if array.ndim != 1 or array.dtype.kind not in "OUS":
            return [InputBatch(0, to_nchw(array, channels=channels))]
        images = list(array)  # paths, or images of different sizes
    elif isinstance(inputs, Iterable) and not isinstance(inputs, Mapping):
        images = inputs
    else:
        raise UsageError(
            f"an object of type {type(inputs).__name__!r} is not an image", fix=ACCEPTED
        )
    collected: list[InputImage | InputBatch] = []
    missing: list[str] = []
    count = 0
    for each in images:
        if isinstance(each, str | os.PathLike):
            name = str(os.fsdecode(each))  # also of NumPy's text and of paths in bytes
            found: list[InputImage | InputBatch] = [
                InputImage(path, path) for path in _expand_path(name, missing)
            ]
        else:
            found = [_from_memory(each, count, channels)]
        collected += found
        count += count_images(found)
    _raise_missing(missing)
    return collected


def count_images(inputs: Inputs) -> int:
    """Return the number of images in collected inputs."""
    return sum(len(each.images) if isinstance(each, InputBatch) else 1 for each in inputs)


def _is_one_image(value: object) -> bool:
    kinds = (
        str,
        InputImage,
        InputBatch,
        bytes,
        bytearray,
        memoryview,
        Image.Image,
        os.PathLike,  # last: an abstract class takes longest
    )
    return isinstance(value, kinds) or hasattr(value, "read")


def _from_memory(value: Any, number: int, channels: str | None) -> InputImage | InputBatch:
    """Return an image in memory, or a batch of them, as an input.

    Args:
        number: of images before it.
    """
    name = str(number)
    if isinstance(value, InputImage | InputBatch):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return InputImage(name, bytes(value))
        except ValueError as error:  # a memoryview that was released
            raise UsageError(
                f"a {type(value).__name__} can't be read: {error}",
                where=f"image {name}",
                fix=ACCEPTED,
            ) from error
    if isinstance(value, Image.Image):
        if 0 in value.size:
            width, height = value.size
            raise UsageError(
                f"an image without pixels: {width} x {height}",
                where=f"image {name}",
                fix="leave it out",
            )
        return InputImage(str(getattr(value, "filename", "") or name), value)
    if hasattr(value, "read"):
        filename = getattr(value, "name", None)
        name = filename if isinstance(filename, str) and filename else name
        return InputImage(name, _read_stream(value, name))
    if not is_array(value):
        raise UsageError(
            f"an object of type {type(value).__name__!r} is not an image",
            where=f"image {name}",
            fix=ACCEPTED,
        )
    # Three axes are one image here: otherwise a batch of three grey images could not be told from
    # a color image with the channels first.
    layouts = [layout for layout in LAYOUTS if layout != "NHW" or channels == "none"]
    images = to_nchw(as_array(value), channels=channels, layouts=layouts, where=f"image {name}")
    return InputImage(name, images[0]) if len(images) == 1 else InputBatch(number, images)


def _read_stream(stream: Any, name: str) -> bytes:
    """Return the content of an open file from its start, as `Image.open` does.

    Raises:
        UsageError: it is closed, or not opened for reading bytes.
        DataError: it cannot be read, or is too large.
    """
    try:
        if hasattr(stream, "seekable") and stream.seekable():
            stream.seek(0)  # a buffer that was just written is at its end
        content = stream.read(MAX_BYTES + 1)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"a {type(stream).__name__} can't be read: {error}", where=name, fix=ACCEPTED
        ) from error
    except OSError as error:
        raise DataError(
            f"can't be read: {error.strerror or error}", where=name, fix="open it again"
        ) from error
    if not isinstance(content, bytes | bytearray | memoryview):
        if hasattr(content, "close"):  # a coroutine that would never be awaited
            content.close()
        raise UsageError(
            f"reading a {type(stream).__name__} gives {type(content).__name__!r}, not bytes",
            where=name,
            fix='open files in binary mode: open(path, "rb")',
        )
    if len(content) > MAX_BYTES:
        raise DataError(
            f"larger than {MAX_BYTES >> 20} MiB", where=name, fix="give a smaller image"
        )
    return bytes(content)


def expand_paths(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return files for files, folders (all images inside, sorted) and glob patterns, in order.

    A pattern that matches folders stands for the images inside them. Files that do not exist and
    folders that cannot be opened are returned as well: reading them gives a `Prediction` with the
    reason.

    Raises:
        DataError: names all patterns without a match and all folders without images.
    """
    missing: list[str] = []
    expanded = [each for path in paths for each in _expand_path(os.fspath(path), missing)]
    _raise_missing(missing)
    return expanded


def _expand_path(path: str, missing: list[str]) -> list[str]:
    """Return the files that a path stands for; add it to `missing` if there are none."""
    if os.path.isfile(path):
        return [path]
    if path.startswith("~") or is_file_url(path):
        path = os.path.expanduser(path_of_file_url(path) if is_file_url(path) else path)
    if os.path.isdir(path):
        return _images_in_folders([path], missing)
    if os.path.exists(path) or not glob.has_magic(path):  # a pipe, or a file that is missing
        return [path]
    # Everything below a folder, `photos/**`, is the folder.
    base = re.sub(r"([/\\]\*\*)+[/\\]?$", "", path)
    base = "." if base == "**" else base
    if base != path and not glob.has_magic(base):
        matches = [base] if os.path.isdir(base) else []
    else:
        try:
            matches = sorted(glob.glob(base, recursive=True))
        except ValueError:  # a null byte, or text that is not valid in file names
            matches = []
        if base != path:
            matches = [match for match in matches if os.path.isdir(match)]
    if not matches:
        missing.append(_shown(path))
        return []
    folders = [match for match in matches if os.path.isdir(match)]
    if not folders:
        return matches
    inside = {folder: _images_in_folder(folder) for folder in folders}
    # Without duplicates: a recursive pattern matches folders and the files inside them.
    found = dict.fromkeys(
        os.path.normpath(file) for match in matches for file in inside.get(match, [match])
    )
    if not found:
        missing.append(f"{_shown(path)} (folders without images)")
    return list(found)


def _images_in_folders(folders: Sequence[str], missing: list[str]) -> list[str]:
    found = []
    for folder in folders:
        inside = _images_in_folder(folder)
        if not inside:
            missing.append(f"{_shown(folder)} (a folder without images)")
        found += inside
    return found


def _raise_missing(missing: Sequence[str]) -> None:
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"not found: {', '.join(missing[:5])}{more}", fix="give image files, folders or globs"
        )


def _shown(name: str) -> str:
    """Return a name for a message: not too long, and without control characters."""
    name = printable(name)
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
    return text if len(text) <= MAX_NAME_CHARS else text[:MAX_NAME_CHARS] + "..."


def _images_in_folder(folder: str) -> list[str]:
    below = Scanner(folder).find_images(folder)
    odd = [path for path in below.special_files if is_image_name(os.path.basename(path))]
    links = len(below.special_files) - len(odd)
    if links:
        print_status(escape(f"{printable(folder)}: skipped {links} broken links"))
    return sorted([*below.images, *odd, *below.unreadable_folders])


def inputs_from_stdin(content: bytes) -> list[InputImage] | list[str]:
    """Return the image, or the names of files, that standard input holds.

    Names are separated by line ends or null bytes, in UTF-8 or UTF-16, with or without a byte
    order mark.

    Raises:
        DataError: several images, or neither an image nor names.
    """
    fix = "pipe one image, or names of files, one per line"
    where = "standard input"
    if len(content) > MAX_BYTES:
        raise DataError(f"more than {MAX_BYTES >> 20} MiB", where=where, fix=fix)
    try:
        probe_image(content)
        if has_second_image(content):
            raise DataError("several images in one stream", where=where, fix=fix)
        return [InputImage("-", content)]
    except UnreadableImage as error:
        names = _parse_names(content)
        if names is not None:
            return names
        if isinstance(error.__cause__, UnidentifiedImageError):
            is_known = unsupported_format(content[:256])
            what = error.reason if is_known else "neither an image nor a list of file names"
            raise DataError(what, where=where, fix=fix) from error
        return [InputImage("-", content)]  # an image that is damaged or too large


def _parse_names(content: bytes) -> list[str] | None:
    """Return the names in a text; None if it is not text."""
    is_valid = True
    try:
        is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:  # names of files need not be valid text
        text, is_valid = os.fsdecode(content), False
    parts = text.split("\0") if "\0" in text else re.split(r"[\r\n]+", text)
    names = [name for name in map(str.strip, parts) if name]
    if any(char < " " and char not in "\t\r\n" for char in text.replace("\0", "")):
        return None
    if not is_valid and not any(map(os.path.lexists, names)):
        return None
    is_markup = bool(names) and names[0].startswith("<") and not os.path.lexists(names[0])
    return None if is_markup else names
