"""Where images come from: a built-in set by its name, or somebody's own folder, shards or CSV.

A new built-in set is a function here and a line in `SOURCES`; one with files to download also
gets its lines in `downloads.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from convlens.data import download
from convlens.data.cache import FixedSizeRecords
from convlens.data.decode import Pixels
from convlens.data.image_folder import (
    is_directory,
    printable,
    read_csv,
    read_folder,
    split_from_name,
)
from convlens.data.types import DataSource, ImageSource, NumberedStrings, Part
from convlens.data.webdataset import holds_shards, is_pattern, read_shards
from convlens.errors import DataError, UsageError, close_matches, did_you_mean

__all__ = [
    "SOURCES",
    "DataSource",
    "ImageSource",
    "Part",
    "data_roots",
    "find_source",
    "known_names",
]

Labels = npt.NDArray[np.int64]
_DIGITS = tuple("0123456789")
# What is known of a set and can't be seen by looking at it; for `convlens audit`.
_TWINS = (
    "of the test images have near-duplicates in the training part (Barz & Denzler 2020; ciFAIR)"
)
REMARKS = {"cifar10": (f"3.3% {_TWINS}",), "cifar100": (f"10% {_TWINS}",)}
_CLASSES = {
    "mnist": _DIGITS,
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    "svhn": _DIGITS,
    "stl10": (
        "airplane",
        "bird",
        "car",
        "cat",
        "deer",
        "dog",
        "horse",
        "monkey",
        "ship",
        "truck",
    ),
}


def find_source(
    name: str,
    *,
    count: int | None = None,
    image_size: int | None = None,
    group: str | None = None,
    tested: bool = False,
) -> DataSource:
    """The images called `name`: a built-in set, a path, or a folder under `data/`.

    Args:
        name: built-in names win, then existing paths, then folders under `data/` and
            `$CONVLENS_DATA`.
        count: how many images to draw; only for `shapes`.
        image_size: the size `shapes` are drawn at.
        group: CSV column whose equal values stay in one split.
        tested: a model is only tested on it: a class may be alone, have no images, or none to
            train on, and `train` may be missing.

    Raises:
        DataError: a path that is missing or can't be used, a download that can't be had.
        UsageError: no such name; an argument that does not apply.
    """
    if count is not None and name != "shapes":
        raise UsageError("data.count is only for the drawn set `shapes`", where=f"data.name={name}")
    path = None if name in SOURCES else _existing(name)
    if group is not None and (path is None or path.is_dir()):
        raise UsageError("data.group names a column of a CSV", where=f"data.name={name}")
    if name == "shapes":
        return _shapes(count or 2000, image_size or 32)
    if name in SOURCES:
        return SOURCES[name]()
    if path is None and is_pattern(name):
        return read_shards(_home(name), name, tested=tested)
    if path is None:
        raise _unknown(name)
    if path.is_dir():
        if holds_shards(path):
            return read_shards(path, name, tested=tested)
        return read_folder(path, name, tested=tested)
    if path.suffix.lower() in (".csv", ".tsv"):
        return read_csv(path, name, group, tested=tested)
    if path.suffix.lower() == ".tar":
        return read_shards(path, name, tested=tested)
    fix = "unpack it and name the folder" if path.suffix in (".zip", ".gz", ".tgz", ".xz") else ""
    raise DataError(
        "this file is no CSV", where=str(path), fix=fix or "name a folder of class folders or a CSV"
    )


def data_roots() -> list[Path]:
    """Where sets are looked for: `$CONVLENS_DATA`, then `data/`. Downloads go to the first."""
    asked = os.environ.get("CONVLENS_DATA")
    return ([Path(asked)] if asked else []) + [Path("data")]


def known_names(name: str = "") -> list[str]:
    """Names `find` takes: built-in sets, folders under `data/`, and `name` if it is a path."""
    there = {
        e.name
        for root in data_roots()
        if root.is_dir()
        for e in os.scandir(root)
        if is_directory(e)
    }
    folders = sorted(d for d in there if not d.startswith(".") and d not in SOURCES)
    return [*SOURCES, *folders, *([name] if _is_path(name) and name not in folders else [])]


def _is_path(name: str) -> bool:
    """Whether it is a path, or looks like one: then not finding it is no slip of a name."""
    looks = "/" in name or os.sep in name or name.lower().endswith((".csv", ".tsv", ".tar"))
    return looks or _existing(name) is not None


def _existing(name: str) -> Path | None:
    candidates = [_home(name), *(root / name for root in data_roots())] if name.strip() else []
    # `os.path` says no where a name is too long or has a zero byte in it; `Path` fails.
    return next((p for p in candidates if os.path.isdir(p) or os.path.isfile(p)), None)


def _home(name: str) -> Path:
    try:
        return Path(os.path.expanduser(name))  # leaves `~nobody` as it is, where `Path` fails
    except ValueError:  # zero bytes and half characters: nobody is called that
        return Path(name)


def _unknown(name: str) -> DataError | UsageError:
    if _is_path(name):
        return DataError(
            f"no such file or folder: {name}",
            where=os.path.abspath(_home(name)),
            fix="check the spelling; relative paths start at the current folder or at data/",
        )
    choices = known_names()
    shown = did_you_mean(close_matches(name, choices)) or f"choose from: {', '.join(choices)}"
    return UsageError(f"unknown data {name!r}", fix=f"{shown} (or name a folder or CSV)")


def _numbered(split: str, images: ImageSource, labels: npt.NDArray[np.generic]) -> Part:
    ids = NumberedStrings(split, images.shape[0])
    return Part(images, labels.astype(np.int64).reshape(-1), ids)


def _digits() -> DataSource:
    """scikit-learn's 1,797 scanned digits, 8 x 8, from the package itself."""
    table = _digits_table()
    images = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return DataSource("digits", _DIGITS, {"train": _numbered("digits", images, table[:, -1])})


def _digits_table() -> npt.NDArray[np.float64]:
    """64 pixels of 0..16 and the label, a row an image."""
    # Its file is read directly where it lies as usual: importing sklearn.datasets takes seconds.
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    return np.column_stack(load_digits(return_X_y=True))


def _shapes(count: int = 2000, size: int = 32) -> DataSource:
    if count < 2 * len(SHAPES):
        raise UsageError(f"data.count={count}: at least {2 * len(SHAPES)} shapes are needed")
    drawn = DrawnShapes(count, size)
    return DataSource("shapes", SHAPES, {"train": _numbered("shapes", drawn, drawn.labels)})


class BinaryFormat:
    """Images in files of fixed-size records, `skip` label bytes before each; read on demand."""

    def __init__(
        self,
        files: Sequence[FixedSizeRecords],
        image: tuple[int, int, int],
        *,
        skip: int = 0,
        by_column: bool = False,
    ) -> None:
        self._files, self._skip, self._by_column = files, skip, by_column
        self._starts = np.cumsum([0, *(file.count for file in files)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *image)

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        of_file = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(of_file):
            mine = of_file == number
            records = self._files[number].read((index[mine] - self._starts[number]).tolist())
            out[mine] = records[:, self._skip :].reshape(-1, *self.shape[1:])
        return np.ascontiguousarray(out.swapaxes(2, 3)) if self._by_column else out


def _records(path: Path, size: int, header: int = 0) -> FixedSizeRecords:
    content = path.stat().st_size - header
    if content <= 0 or content % size:
        raise _damaged(path, f"{content} bytes are no whole number of records of {size} bytes")
    return FixedSizeRecords(path, size, content // size, header)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"a damaged file: {why}", where=str(path), fix="delete it; it is then downloaded again"
    )


def _idx(name: str) -> DataSource:
    """MNIST's file format: two big-endian headers, then bytes (yann.lecun.com/exdb/mnist)."""
    raw = download.ensure_downloaded(name, data_roots())
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        image_file, label_file = (
            raw / f"{stem}-images-idx3-ubyte",
            raw / f"{stem}-labels-idx1-ubyte",
        )
        with image_file.open("rb") as file:
            magic, count, height, width = np.frombuffer(file.read(16).ljust(16), ">u4").tolist()
        if magic != 2051 or image_file.stat().st_size != 16 + count * height * width:
            raise _damaged(image_file, "it does not hold what its header says")
        labels = np.fromfile(label_file, np.uint8)[8:]
        if len(labels) != count or labels.max(initial=0) > 9:
            raise _damaged(label_file, f"{len(labels)} labels for {count} images, or not digits")
        images = BinaryFormat([_records(image_file, height * width, 16)], (1, height, width))
        parts[split] = _numbered(split, images, labels)
    return DataSource(name, _CLASSES[name], parts)


def _cifar(name: str) -> DataSource:
    """CIFAR's binary version: label bytes, then 3,072 bytes by channel (never the pickles)."""
    folder = download.ensure_downloaded(name, data_roots())
    if name == "cifar10":
        names, skip = _CLASSES[name], 1
        files = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    else:
        # Two labels an image, coarse and fine; the fine names are in the archive.
        names = tuple((folder / "fine_label_names.txt").read_text().split())
        files, skip = {"train": ["train.bin"], "test": ["test.bin"]}, 2
    parts = {}
    for split, its_files in files.items():
        records = [_records(folder / file, skip + 3072) for file in its_files]
        labels = [np.memmap(r.path, np.uint8).reshape(-1, r.size)[:, skip - 1] for r in records]
        parts[split] = _numbered(
            split, BinaryFormat(records, (3, 32, 32), skip=skip), np.concatenate(labels)
        )
        if parts[split].labels.max() >= len(names):
            raise _damaged(folder / its_files[0], "a label is out of range")
    return DataSource(name, names, parts)


def _svhn() -> DataSource:
    from scipy.io import loadmat

    folder = download.ensure_downloaded("svhn", data_roots())
    parts = {}
    for split in ("train", "test"):
        path = folder / f"{split}_32x32.mat"
        try:
            content = loadmat(path, variable_names=["X", "y"])
            images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1), dtype=np.uint8)
            labels = content["y"].astype(np.int64).reshape(-1) % 10  # the file calls zero 10
        except Exception as error:  # scipy raises many kinds on damaged files
            raise _damaged(path, str(error) or type(error).__name__) from error
        parts[split] = _numbered(split, images, labels)
    return DataSource("svhn", _CLASSES["svhn"], parts)


def _stl10() -> DataSource:
    folder = download.ensure_downloaded("stl10", data_roots())
    parts = {}
    for split in ("train", "test"):
        records = _records(folder / f"{split}_X.bin", 3 * 96 * 96)
        labels = np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
        if len(labels) != records.count or labels.min() < 0 or labels.max() > 9:
            raise _damaged(folder / f"{split}_y.bin", f"no labels for {records.count} images")
        # Stored column by column (cs.stanford.edu/~acoates/stl10).
        parts[split] = _numbered(
            split, BinaryFormat([records], (3, 96, 96), by_column=True), labels
        )
    return DataSource("stl10", _CLASSES["stl10"], parts)


def _is_train(entry: os.DirEntry[str]) -> bool:
    return split_from_name(entry.name) == "train" and is_directory(entry)


def _or_folder(name: str, read: Callable[[], DataSource]) -> Callable[[], DataSource]:
    """The set from an image folder of its name under a data folder, else from its own format."""

    def find_it() -> DataSource:
        for root in data_roots():
            # Only with a train folder: where names have no case, `mnist` is also `MNIST/raw`.
            if (root / name).is_dir() and any(map(_is_train, os.scandir(root / name))):
                found = read_folder(root / name, name, _CLASSES.get(name))
                note = f"read as an image folder: {printable(str(root / name))}"
                return DataSource(name, found.classes, found.parts, (*found.notes, note))
        return read()

    return find_it


SOURCES: dict[str, Callable[..., DataSource]] = {
    "digits": _digits,
    "shapes": _shapes,
    "mnist": _or_folder("mnist", lambda: _idx("mnist")),
    "fashion-mnist": _or_folder("fashion-mnist", lambda: _idx("fashion-mnist")),
    "kmnist": _or_folder("kmnist", lambda: _idx("kmnist")),
    "cifar10": _or_folder("cifar10", lambda: _cifar("cifar10")),
    "cifar100": _or_folder("cifar100", lambda: _cifar("cifar100")),
    "svhn": _or_folder("svhn", _svhn),
    "stl10": _or_folder("stl10", _stl10),
}


# ---- drawn ----------------------------------------
# The built-in set `shapes`: ten kinds of shapes in random colours, drawn from their formulas.
#
# Image `i` depends on `i` and the size alone, so any part of a set of any length can be drawn at
# any time, always the same.

SHAPES = (
    "arrow",
    "bar",
    "circle",
    "crescent",
    "cross",
    "heart",
    "ring",
    "square",
    "star",
    "triangle",
)

Plane = npt.NDArray[np.float32]
_BLOCK = 256  # images drawn together
_SEED = 20240


class DrawnShapes:
    """`count` images uint8 `[3, size, size]`, drawn when asked for; `i` has class `i % 10`."""

    def __init__(self, count: int, size: int) -> None:
        self.shape: tuple[int, ...] = (count, 3, size, size)
        self.labels: npt.NDArray[np.int64] = np.arange(count, dtype=np.int64) % len(SHAPES)

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels:
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        for start in range(0, len(index), _BLOCK):
            out[start : start + _BLOCK] = _draw_shape(index[start : start + _BLOCK], self.shape[2])
        return out


def _draw_shape(index: npt.NDArray[np.int64], size: int) -> Pixels:
    n = len(index)
    numbers = np.empty((n, 16), np.float32)
    noise = np.empty((n, 3, size, size), np.float32)
    for row, i in enumerate(index.tolist()):
        random = np.random.default_rng([_SEED, i])
        numbers[row] = random.random(16, np.float32)
        noise[row] = random.standard_normal((3, size, size), np.float32)
    u = numbers.T[:, :, None, None]
    scale = 0.45 + 0.4 * u[0]  # half the image's side is 1
    angle = 2 * np.pi * u[1]
    room = 1 - 0.8 * scale
    middle_x, middle_y = (2 * u[2] - 1) * room, (2 * u[3] - 1) * room
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    dx, dy = grid[None, None, :] - middle_x, grid[None, :, None] - middle_y
    x = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    y = (np.cos(angle) * dy - np.sin(angle) * dx) / scale
    inside = np.empty((n, size, size), np.float32)
    for kind in range(len(SHAPES)):
        mine = index % len(SHAPES) == kind
        inside[mine] = _FORMULAS[SHAPES[kind]](x[mine], y[mine])
    # From distance (about, in units of the shape) to cover: one pixel wide soft edges.
    cover = np.clip(inside * scale * (size / 2) + 0.5, 0, 1)[:, None]
    paper = numbers[:, 4:7, None, None]
    ink = numbers[:, 7:10, None, None]
    # Too alike to tell apart: the ink goes to the far side of each channel.
    alike = np.abs(ink - paper).max(axis=1, keepdims=True) < 0.35
    ink = np.where(alike, np.where(paper < 0.5, paper + 0.5, paper - 0.5), ink)
    slope = (u[10] - 0.5) * grid[None, None, :] + (u[11] - 0.5) * grid[None, :, None]
    image = paper + 0.5 * slope[:, None] + cover * (ink - paper)
    image += (0.02 + 0.1 * u[12])[:, None] * noise
    pixels: Pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return pixels


def _box(x: Plane, y: Plane, half_x: float, half_y: float) -> Plane:
    inside: Plane = np.minimum(half_x - np.abs(x), half_y - np.abs(y))
    return inside


def _disc(x: Plane, y: Plane, radius: float) -> Plane:
    distance: Plane = np.subtract(np.float32(radius), np.hypot(x, y))
    return distance


def _triangle(x: Plane, y: Plane) -> Plane:
    # Three half planes at 120 degrees; 0.5 is the inner radius of a triangle in the unit circle.
    low = 0.5 - y
    inside: Plane = np.minimum(low, 0.5 + 0.5 * y - np.float32(0.8660254) * np.abs(x))
    return inside


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: the radius falls linearly from tip to notch in each tenth of the circle."""
    tenth = np.pi / 5
    fold = np.abs((np.arctan2(x, y) % (2 * tenth)) - tenth)
    radius = np.hypot(x, y)
    # The edge from the tip (1, at fold = tenth) to the notch (0.42, at fold = 0) is a line.
    px, py = radius * np.cos(fold), radius * np.sin(fold)
    tip_x, tip_y = np.cos(tenth), np.sin(tenth)
    normal_x, normal_y = tip_y, 0.42 - tip_x
    length = np.hypot(normal_x, normal_y)
    edge: Plane = -((px - 0.42) * normal_x + py * normal_y) / length
    return edge


def _heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner with two half discs."""
    half = 0.5
    a, b = (x + y) * np.float32(0.70710678), (x - y) * np.float32(0.70710678)
    square = _box(a, b, half, half)
    left, right = _disc(a + half, b, half), _disc(a, b - half, half)
    return np.maximum(square, np.maximum(left, right))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = np.minimum(y + 0.1, (0.9 - y) * 0.75 - np.abs(x) * 0.8)
    inside: Plane = np.maximum(head, _box(x, y + 0.45, 0.2, 0.45))
    return inside


_FORMULAS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "arrow": _arrow,
    "bar": lambda x, y: _box(x, y, 0.95, 0.28),
    "circle": lambda x, y: _disc(x, y, 0.8),
    "crescent": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x - 0.45, y, 0.75)),
    "cross": lambda x, y: np.maximum(_box(x, y, 0.9, 0.25), _box(x, y, 0.25, 0.9)),
    "heart": _heart,
    "ring": lambda x, y: np.minimum(_disc(x, y, 0.9), -_disc(x, y, 0.55)),
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "star": _star,
    "triangle": _triangle,
}
