"""Data sets that users write: functions and classes that return a `torch.utils.data.Dataset`.

The part is called once for each split if its signature names `split` (`train`, `val` or `test`) or
`train` (true or false, as in torchvision); it may return None for a split that it does not have.
Otherwise it is called once without arguments, and splits are drawn. A `Dataset` has `__len__` and
returns an image and its label, and may have a list `classes`. Images are PIL images, uint8 arrays
or floats in 0..1.

Images are handled as files are: each one is encoded without loss (PPM), so conversion, cache,
fingerprint and streaming need no other code.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from convlens import user_code
from convlens.data.arrays import ONE_IMAGE, as_array, to_nchw, to_uint8
from convlens.data.decode import UnreadableImage
from convlens.data.types import DataSource, EncodedFiles, IndexArray, NumberedStrings, Part
from convlens.errors import DataError, UsageError
from convlens.utils.console import progress_bar

SPLITS = ("train", "val", "test")


class DatasetImages(EncodedFiles):
    """The images of datasets as encoded files.

    Args:
        name: of the part, for messages.
        datasets: those that the images are from.
        positions: the dataset and the index in it of each image, `[N, 2]`.
        digests: SHA-256 of each encoded image.
    """

    def __init__(
        self, name: str, datasets: Sequence[Any], positions: IndexArray, digests: Sequence[bytes]
    ) -> None:
        self._name, self._datasets = name, tuple(datasets)
        self._positions, self._digests = positions, digests
        self._lock = threading.Lock()  # datasets are usually not safe to use in several threads

    def __len__(self) -> int:
        return len(self._positions)

    def name(self, number: int) -> str:
        return f"{self._name}, index {self._positions[number, 1]}"

    def read(self, number: int) -> bytes:
        dataset, index = self._positions[number].tolist()
        try:
            with self._lock:
                image, _ = self._datasets[dataset][index]
            return encode(image)
        except Exception as error:
            raise UnreadableImage(self.name(number), user_code.describe_error(error)) from error

    def stat_digest(self) -> str:
        return hashlib.sha256(b"".join(self._digests)).hexdigest()

    def subset(self, index: IndexArray) -> EncodedFiles:
        digests = [self._digests[i] for i in index.tolist()]
        return DatasetImages(self._name, self._datasets, self._positions[index], digests)

    def concat(self, other: EncodedFiles) -> EncodedFiles:
        assert isinstance(other, DatasetImages)
        moved = other._positions + np.array([len(self._datasets), 0])
        return DatasetImages(
            self._name,
            (*self._datasets, *other._datasets),
            np.concatenate([self._positions, moved]),
            [*self._digests, *other._digests],
        )


def encode(image: Any) -> bytes:
    """Return an image as the bytes of a PPM or PGM file, which have the same pixels everywhere.

    Raises:
        UsageError: it is not an image, or its values have an unknown range.
    """
    if isinstance(image, Image.Image):
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    else:
        pixels = to_uint8(to_nchw(as_array(image), layouts=ONE_IMAGE), accepts_range=False)[0]
        if len(pixels) == 4:
            raise UsageError("an image with 4 channels", fix="return RGB images, 3 channels")
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
    content = io.BytesIO()
    image.save(content, "PPM")
    return content.getvalue()


def read_user_dataset(name: str) -> DataSource:
    """Call the part that a name means, read all its labels, and return the data set.

    Raises:
        DataError: no training images, an item that is not an image with a label, or images that
            differ from one reading to the next.
        ConvlensError: as by `user_code.load_object`.
    """
    datasets = _datasets(name)
    if "train" not in datasets or not len(datasets["train"]):
        raise DataError(f"{name} has no training images", fix="return a dataset for split='train'")
    total = sum(map(len, datasets.values()))
    read: dict[str, tuple[list[bytes], list[Any]]] = {}
    with progress_bar(f"reading {name}", total) as bar:
        for split, dataset in datasets.items():
            digests, labels = list[bytes](), list[Any]()
            for index in range(len(dataset)):
                content, label = _item(name, dataset, index)
                digests.append(hashlib.sha256(content).digest())
                labels.append(label)
                bar.advance(1)
            read[split] = digests, labels
        for split, dataset in datasets.items():
            if hashlib.sha256(_item(name, dataset, 0)[0]).digest() != read[split][0][0]:
                raise DataError(
                    f"{name} returns another image each time",
                    where=f"{split}, index 0",
                    fix="leave random transforms out of it, and name them in augment",
                )
    classes, number_of = _classes(
        name, datasets, [label for _, of in read.values() for label in of]
    )
    parts = {}
    for split, (digests, labels) in read.items():
        positions = np.stack([np.zeros(len(labels), np.int64), np.arange(len(labels))], 1)
        images = DatasetImages(f"{name} {split}", [datasets[split]], positions, digests)
        numbers = np.array([number_of[label] for label in labels], np.int64)
        parts[split] = Part(images, numbers, NumberedStrings(split, len(labels)))
    return DataSource(name, classes, parts)


def _datasets(name: str) -> dict[str, Any]:
    """Call the part for each split; a split that it does not have is left out."""
    make = user_code.load_object("datasets", name)
    keywords, _ = user_code.accepted_keywords(make)
    calls: dict[str, dict[str, Any]] = {"train": {}}
    if "split" in keywords:
        calls = {split: {"split": split} for split in SPLITS}
    elif "train" in keywords:
        calls = {"train": {"train": True}, "test": {"train": False}}
    found = {}
    for split, arguments in calls.items():
        try:
            dataset = make(**arguments)
        except Exception as error:
            raise _error(name, error, f"split {split}") from error
        if dataset is None:
            continue
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(
                f"{name}: returned an object of type {type(dataset).__name__!r}",
                fix="return a torch.utils.data.Dataset with __len__ and __getitem__",
            )
        if len(dataset):
            found[split] = dataset
    return found


def _item(name: str, dataset: Any, index: int) -> tuple[bytes, Any]:
    """Return an image as bytes, and its label: an int or a text."""
    try:
        image, label = dataset[index]
        content = encode(image)
        label = label.item() if hasattr(label, "item") else label
    except Exception as error:
        raise _error(name, error, f"index {index}") from error
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(
            f"{name}: the label {label!r} is neither a whole number nor a text",
            where=f"index {index}",
            fix="return pairs of an image and its label",
        )
    return content, label


def _classes(
    name: str, datasets: dict[str, Any], labels: list[Any]
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Return the names of the classes, and the number of each label."""
    present = set(labels)
    names = getattr(datasets["train"], "classes", None)
    if names is not None and all(isinstance(label, int) for label in present):
        names = tuple(map(str, names))
        outside = [label for label in present if not 0 <= label < len(names)]
        if outside or len(set(names)) != len(names):
            raise DataError(
                f"{name}: labels from {min(present)} to {max(present)} for {len(names)} classes",
                fix="the attribute `classes` has a name for each label, from 0 on",
            )
        return names, {number: number for number in range(len(names))}
    order = sorted(present, key=lambda label: (isinstance(label, str), label))
    return tuple(map(str, order)), {label: number for number, label in enumerate(order)}


def _error(name: str, error: Exception, where: str) -> DataError:
    source = user_code.locate_source("datasets", name)
    line = user_code.error_location(error, str(source.path))
    return DataError(f"{name}: {user_code.describe_error(error)}", where=f"{where}; {line}")
