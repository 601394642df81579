"""Audit of a data set: its properties and problems, found before training.

Every image is decoded once at its own size, and a few facts of each are kept. Unreadable files,
classes too small to be split and similar problems are listed, not raised: the audit is meant for
sets that training would refuse.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from convlens.data import duplicates
from convlens.data.cache import ArrayRows, map_in_order
from convlens.data.conversion import ConversionChoice, choose_conversion, level_warnings
from convlens.data.decode import (
    ALPHA,
    MAX_PIXELS,
    Conversion,
    Pixels,
    UnreadableImage,
    decode,
    fit_arrays,
    probe_image,
)
from convlens.data.duplicates import Duplicates
from convlens.data.layout import list_examples
from convlens.data.sources import REMARKS, find_configured_source
from convlens.data.splits import (
    LoadedPart,
    apply_duplicates,
    assumed_train_numbers,
    describe_origins,
    describe_splits,
    make_splits,
    parts_of,
)
from convlens.data.summary import DatasetSummary
from convlens.data.types import DataSource, EncodedFiles, IndexArray, Part
from convlens.errors import DataError
from convlens.utils.console import ProgressBar, progress_bar
from convlens.utils.files import MemorySemaphore

if TYPE_CHECKING:
    from convlens.recipe import DataConfig

SPLIT_NAMES = ("train", "val", "test")
MIN_CLASS_IMAGES = 10  # training images; a class with fewer is noted
MAX_CLASS_RATIO = 10  # of the largest class to the smallest; from here on it is noted
_MAX_SHEET_IMAGES = 96
_SHEET_ROW = 8  # images of one class
_CHUNK = 512  # images
# Pixels of images at their own size that all threads hold at once.
_FULL_SIZE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)
# Facts that come from the header of a file.
_HEADER_FACTS = ("mode", "grey", "turned", "alpha", "frames")
_HEADER_NOTES = {
    "turned": "{} are turned upright, as their EXIF says",
    "alpha": "{} have transparency, which becomes {background}",
    "frames": "{} have more than one frame: only the first is used",
}

# Facts of one image. A structured array: a million images need 1.2 GB and no Python objects.
FILE_FACTS = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("mode", "U12"),
        ("grey", np.bool_),
        ("turned", np.bool_),  # this and the next two as in `ImageFacts`
        ("alpha", np.bool_),
        ("frames", np.bool_),
        ("digest", np.uint8, 32),  # SHA-256 of size and pixels as RGB
        ("file", np.uint8, 32),  # SHA-256 of the file; of images that are no files, as `digest`
        ("thumb", np.uint8, (duplicates.HASH_SIDE, duplicates.HASH_SIDE)),
        ("mean", np.float64, 3),  # of each RGB channel, 0..1
        ("square", np.float64, 3),  # mean of the squares
        ("low", np.uint8, 3),  # smallest and largest value of each channel
        ("high", np.uint8, 3),
    ]
)
FileFacts = npt.NDArray[np.void]


@dataclass(frozen=True)
class Unreadable:
    """An image that can't be decoded, and the reason."""

    id: str
    label: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The result of `audit`; `to_dict` is what `--json` prints."""

    name: str
    summary: str  # how the data set was interpreted, in one line
    images: int  # number of readable images; all facts are about these
    counts: dict[str, dict[str, int]]  # class -> split -> number of images
    how: dict[str, str]  # split -> where its images come from, in words
    width: tuple[int, float, int]  # smallest, median, largest, in pixels
    height: tuple[int, float, int]
    sizes: int  # number of different sizes
    modes: dict[str, int]  # Pillow's name -> number of images, most common first
    channels: int  # 1 if every image is grey
    mean: list[float]  # of each channel over the training images, 0..1, all images weigh the same
    std: list[float]
    plain: int  # number of images of a single color
    turned: int  # number of images turned by their EXIF orientation
    alpha: int  # number of images with an alpha channel or a transparent color
    frames: int  # number of images with several frames; the first is used
    unreadable: list[Unreadable]
    duplicates: Duplicates  # groups of equal pixels
    near_duplicates: Duplicates  # pairs that look the same
    problems: list[str]  # reasons why training will refuse the set
    notes: list[str]  # other observations
    _train: Part = field(repr=False)
    _sheet_numbers: list[int] = field(repr=False)  # training images in the contact sheet
    _conversion: Conversion = field(repr=False)  # that of a training, at another size

    def to_dict(self) -> dict[str, Any]:
        """Return the public fields as plain values for JSON."""
        public = [f.name for f in fields(self) if not f.name.startswith("_")]
        return {name: _json(getattr(self, name)) for name in public}

    def sheet(self, side: int = 96) -> tuple[Pixels, list[str]]:
        """Return a contact sheet: training images of every class, and the class of each.

        There are up to eight images of a class, so that a row of eight shows one class. Images
        are uint8 `[n, C, side, side]`; built-in sets of smaller images keep their size.
        """
        names, labels = list(self.counts), self._train.labels
        titles = [names[labels[i]] for i in self._sheet_numbers]
        images, channels = self._train.images, self.channels
        if not isinstance(images, EncodedFiles):
            # Small images are not resized: plots enlarge them pixel by pixel.
            size = min(side, max(images.shape[2:]))
            pixels = images[np.array(self._sheet_numbers, np.int64)]
            return fit_arrays(pixels, size=size, channels=channels, fit="pad"), titles
        shown = replace(self._conversion, size=side, channels=channels, fit="pad")
        out = np.zeros((len(titles), channels, side, side), np.uint8)
        for position, i in enumerate(self._sheet_numbers):
            out[position] = shown.file(images.read(i), images.name(i))
        return out, titles


def audit(config: DataConfig) -> Audit:
    """Inspect every image of a data set, in all splits.

    The pixels of the test split are read as well, but only to find copies of its images in other
    splits: no model is evaluated, and means and the contact sheet use training images only.

    Args:
        config: The data section of a recipe.

    Raises:
        DataError: The source is malformed (no classes, an invalid CSV, ...).
        UsageError: Unknown name.
    """
    source = find_configured_source(config)
    total = sum(len(part.labels) for part in source.parts.values())
    choice = choose_conversion(
        config, source.parts["train"].images, partial(_train_numbers, config, source)
    )
    conversion = choice.conversion
    with progress_bar("inspecting images", total) as bar:
        inspected = {
            name: inspect_images(part, bar, conversion) for name, part in source.parts.items()
        }
    assigned = _assign_splits(config, source, inspected)
    images = _join_parts(source, assigned)
    facts = images.facts
    counts = _count_by_class(images)
    mean, std, channels = _channel_stats(images)
    train = facts[images.splits == "train"]
    warnings = level_warnings(train["low"], train["high"], map(bytes, train["digest"]))
    near, complete = duplicates.near_duplicates(facts["thumb"], facts["digest"])
    columns = (images.ids, images.splits.tolist(), [source.classes[c] for c in images.labels])
    return Audit(
        name=source.name,
        summary=_summarize(choice, source, counts, assigned.origins),
        images=len(facts),
        counts=counts,
        how=assigned.descriptions,
        width=_min_median_max(facts["width"]),
        height=_min_median_max(facts["height"]),
        sizes=len(np.unique(np.stack([facts["width"], facts["height"]]), axis=1).T),
        modes={str(mode): n for mode, n in Counter(facts["mode"].tolist()).most_common()},
        channels=channels,
        mean=mean,
        std=std,
        plain=int(duplicates.is_plain(facts["thumb"]).sum()),
        turned=int(facts["turned"].sum()),
        alpha=int(facts["alpha"].sum()),
        frames=int(facts["frames"].sum()),
        unreadable=[
            Unreadable(each.part.ids[i], source.classes[each.part.labels[i]], reason)
            for each in inspected.values()
            for i, reason in each.bad.items()
        ],
        duplicates=Duplicates.of(duplicates.exact_duplicates(facts["digest"]), *columns),
        near_duplicates=Duplicates.of(near.tolist(), *columns, complete=complete),
        problems=assigned.problems,
        notes=[
            *warnings,
            *source.notes,
            *assigned.notes,
            *choice.notes,
            *REMARKS.get(source.name, ()),
            *_class_notes(source.classes, counts),
            *_file_notes(facts, conversion.background),
        ],
        _train=source.parts["train"],
        _sheet_numbers=_choose_sheet_images(images),
        _conversion=conversion,
    )


def _train_numbers(config: DataConfig, source: DataSource) -> IndexArray:
    """Return the numbers of the training images as far as they are known before decoding."""
    try:
        return assumed_train_numbers(config, source, parts_of(config, source))
    except DataError:  # reported as a problem, once the readable images are known
        return np.arange(len(source.parts["train"].labels), dtype=np.int64)


@dataclass
class InspectedImages:
    """One part of a source with the facts of its images."""

    part: Part
    facts: FileFacts  # [N]; zeros for unreadable images
    bad: dict[int, str] = field(default_factory=dict)  # unreadable image -> reason


def inspect_images(part: Part, bar: ProgressBar, conversion: Conversion) -> InspectedImages:
    """Decode all images of a part at their own size and collect their facts."""
    result = InspectedImages(part, np.zeros(len(part.labels), FILE_FACTS))
    for start in range(0, len(part.labels), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(part.labels)))
        if isinstance(part.images, EncodedFiles):
            inspected = map_in_order(
                partial(_inspect_file, part.images, conversion), index.tolist()
            )
            for i, facts_or_reason in zip(index, inspected, strict=True):
                if isinstance(facts_or_reason, str):
                    result.bad[int(i)] = facts_or_reason
                else:
                    result.facts[i] = facts_or_reason
        else:
            result.facts[index] = facts_of(part.images[index])
        bar.advance(len(index))
    return result


def _inspect_file(files: EncodedFiles, conversion: Conversion, number: int) -> np.void | str:
    """Return the facts of one file, or the reason why it is unreadable."""
    try:
        content, path = files.read(number), files.name(number)
        header = probe_image(content, path, max_pixels=conversion.max_pixels)
        # Acquired before the semaphore of `decode`; the reverse order could deadlock.
        with _FULL_SIZE_MEMORY.acquire(header.width * header.height):
            pixels = decode(
                content,
                size=None,
                channels=3,
                fit="crop",
                value_range=conversion.value_range,
                background=conversion.background,
                max_pixels=conversion.max_pixels,
                name=path,
            )
            facts = facts_of(pixels[None])
    except UnreadableImage as error:
        return error.reason
    for name in _HEADER_FACTS:
        facts[name] = getattr(header, name)
    facts["file"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    facts["width"], facts["height"] = header.width, header.height  # of a reduced JPEG, too
    facts["grey"] |= header.alpha and conversion.background == ALPHA
    record: np.void = facts[0]
    return record


def facts_of(images: Pixels) -> FileFacts:
    """Compute the facts of uint8 images `[N, C, H, W]`, structured array `[N]`.

    Grey images count as RGB images with equal channels.
    """
    n, channels, height, width = images.shape
    facts = np.zeros(n, FILE_FACTS)
    facts["width"], facts["height"] = width, height
    facts["mode"], facts["grey"] = ("L", True) if channels == 1 else ("RGB", False)
    flat = images.reshape(n, channels, -1)
    facts["mean"] = flat.mean(axis=2) / 255
    squares = np.einsum("ncp,ncp->nc", flat, flat, dtype=np.float64, casting="unsafe")
    facts["square"] = squares / (height * width * 255**2)
    low, high = flat.min(axis=2), flat.max(axis=2)
    facts["low"], facts["high"] = low, high  # one channel fills all three
    facts["thumb"] = duplicates.grey_thumbnails(images)
    size = f"{height} x {width}".encode()
    for row, image in zip(facts, images, strict=True):
        content = image if channels == 3 else np.repeat(image, 3, axis=0)
        digest = hashlib.sha256(size)
        digest.update(np.ascontiguousarray(content).data)
        row["digest"] = np.frombuffer(digest.digest(), np.uint8)
    facts["file"] = facts["digest"]
    return facts


@dataclass(frozen=True)
class _JoinedImages:
    """The readable images of all parts, one after the other."""

    classes: tuple[str, ...]
    facts: FileFacts
    ids: list[str]
    labels: IndexArray
    splits: npt.NDArray[np.str_]
    numbers: IndexArray  # number of each image in its part


def _join_parts(source: DataSource, assigned: _AssignedSplits) -> _JoinedImages:
    parts = assigned.images
    return _JoinedImages(
        source.classes,
        np.concatenate([each.inspected.facts[each.numbers] for each in parts]),
        [each.inspected.part.ids[i] for each in parts for i in each.numbers.tolist()],
        np.concatenate([each.inspected.part.labels[each.numbers] for each in parts]),
        np.concatenate([each.splits for each in parts]),
        np.concatenate([each.numbers for each in parts]),
    )


@dataclass(frozen=True)
class _SplitImages:
    """Images of one part of the source: their numbers in the part, and the split of each."""

    inspected: InspectedImages
    numbers: IndexArray
    splits: npt.NDArray[np.str_]


@dataclass(frozen=True)
class _AssignedSplits:
    """The splits that training would use.

    Attributes:
        images: The images that are used, by part.
        descriptions: Split -> where its images come from.
        origins: The same in a few words.
        problems: Reasons why training will refuse the set. If there are any, the source's own
            splits are used.
        notes: On the splits.
    """

    images: Sequence[_SplitImages]
    descriptions: dict[str, str]
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: Sequence[str] = ()


def _assign_splits(
    config: DataConfig, source: DataSource, inspected: dict[str, InspectedImages]
) -> _AssignedSplits:
    """Assign the readable images to splits as training would."""
    no_rows = ArrayRows(torch.empty(0, 1, 1, 1, dtype=torch.uint8))
    parts = {
        name: LoadedPart(each.part, no_rows, "", each.bad, each.facts["file"])
        for name, each in inspected.items()
    }

    unsplit = _AssignedSplits(
        _split_images(inspected, parts, {}),
        dict.fromkeys(parts, "the source's own; nothing could be held out"),
    )
    n_readable = np.bincount(parts["train"].labels, minlength=len(source.classes))
    empty = [source.classes[c] for c in np.flatnonzero(n_readable == 0)]
    if empty:
        problem = f"no readable training image in: {list_examples(empty)}"
        return replace(unsplit, problems=[problem])
    # Images that a recipe leaves out to train on few are a part of the set all the same.
    full_config = config.model_copy(update={"per_class": None, "total_per_class": None})
    try:
        used, copy_notes = apply_duplicates(full_config, source, parts)
        plan = make_splits(full_config, source, used)
    except DataError as error:
        return replace(unsplit, problems=[error.what])
    return _AssignedSplits(
        _split_images(inspected, used, plan.held_out),
        describe_splits(plan, full_config, source, used),
        describe_origins(plan, full_config, used["train"]),
        notes=[*plan.notes, *copy_notes],
    )


def _split_images(
    inspected: dict[str, InspectedImages],
    parts: dict[str, LoadedPart],
    held_out: dict[str, IndexArray],
) -> list[_SplitImages]:
    images = []
    for name, part in parts.items():
        splits = np.full(len(part.good), name, "U5")
        if name == "train":
            for split, index in held_out.items():
                splits[index] = split
        images.append(_SplitImages(inspected[name], part.good, splits))
    return images


def _summarize(
    choice: ConversionChoice,
    source: DataSource,
    counts: dict[str, dict[str, int]],
    origins: dict[str, str],
) -> str:
    """Return how training would interpret the set, in one line."""
    conversion = choice.conversion
    splits = next(iter(counts.values()))
    summary = DatasetSummary(
        classes=source.classes,
        counts=np.array([sum(of.values()) for of in counts.values()], np.int64),
        splits={split: sum(of[split] for of in counts.values()) for split in splits},
        origins=origins,
        channels=conversion.channels,
        image_size=conversion.size,
        fit=conversion.fit,
        kept_area=choice.kept_area
        if isinstance(source.parts["train"].images, EncodedFiles)
        else None,
    )
    return str(summary)


def _count_by_class(images: _JoinedImages) -> dict[str, dict[str, int]]:
    """Count the images of each split (that is not empty) by class."""
    n_classes = len(images.classes)
    counts = {
        split: np.bincount(images.labels[images.splits == split], minlength=n_classes)
        for split in SPLIT_NAMES
    }
    present = [split for split in SPLIT_NAMES if counts[split].any()]
    return {
        name: {split: int(counts[split][c]) for split in present}
        for c, name in enumerate(images.classes)
    }


def _channel_stats(images: _JoinedImages) -> tuple[list[float], list[float], int]:
    """Return mean and deviation of the training images' channels, and the number of channels.

    All images weigh the same, whatever their size.
    """
    channels = 1 if len(images.facts) and images.facts["grey"].all() else 3
    train = images.facts[images.splits == "train"]
    if not len(train):
        return [], [], channels
    mean, square = train["mean"].mean(axis=0), train["square"].mean(axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean[:channels].tolist(), std[:channels].tolist(), channels


def _min_median_max(values: npt.NDArray[np.int32]) -> tuple[int, float, int]:
    if not len(values):
        return (0, 0.0, 0)
    return int(values.min()), float(np.median(values)), int(values.max())


def _class_notes(classes: Sequence[str], counts: dict[str, dict[str, int]]) -> list[str]:
    """Return notes on names and sizes of the classes."""
    notes = []
    by_number = sorted(classes, key=_number_key)
    if list(classes) == sorted(classes) != by_number:
        first = next(i for i, name in enumerate(classes) if name != by_number[i])
        notes.append(
            f"classes are in string order, not by number: {classes[first]!r} comes before "
            f"{by_number[first]!r}; predictions are by name, so this matters only for class indices"
        )
    casefolded = Counter(name.casefold() for name in classes)
    same = [name for name in classes if casefolded[name.casefold()] > 1]
    if same:
        notes.append(f"class names that differ only in case: {list_examples(same)}")
    train = {name: splits.get("train", 0) for name, splits in counts.items()}
    small = [f"{name} ({n})" for name, n in train.items() if n < MIN_CLASS_IMAGES]
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        notes.append(f"fewer than {MIN_CLASS_IMAGES} training images: {', '.join(small[:5])}{more}")
    largest, smallest = max(train, key=lambda c: train[c]), min(train, key=lambda c: train[c])
    if train[smallest] and train[largest] >= MAX_CLASS_RATIO * train[smallest]:
        notes.append(
            f"uneven classes: {largest} has {train[largest]} training images, {smallest} "
            f"{train[smallest]}"
        )
    return notes


def _number_key(name: str) -> list[str | int]:
    # re.split with a group alternates text and digits, so that only equal types are compared.
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _file_notes(facts: FileFacts, background: str) -> list[str]:
    """Return notes on properties of the files that decoding changes."""
    notes = []
    grey = int(facts["grey"].sum())
    if 0 < grey < len(facts):
        notes.append(f"grey and color mixed: {grey} of {len(facts)} images are grey")
    for name, note in _HEADER_NOTES.items():
        if count := int(facts[name].sum()):
            images = f"{count:,} of {len(facts):,} images"
            shown = "a grey image" if background == ALPHA else background
            notes.append(note.format(images, background=shown))
    return notes


def _choose_sheet_images(images: _JoinedImages) -> list[int]:
    """Return numbers of training images for the contact sheet, evenly spaced over each class."""
    per_class = min(_SHEET_ROW, max(1, _MAX_SHEET_IMAGES // len(images.classes)))
    chosen: list[int] = []
    for c in range(min(len(images.classes), _MAX_SHEET_IMAGES)):
        numbers = images.numbers[(images.splits == "train") & (images.labels == c)]
        spaced = np.linspace(0, len(numbers) - 1, min(per_class, len(numbers)))
        chosen += numbers[spaced.round().astype(np.int64)].tolist()
    return chosen


def _json(value: Any) -> Any:
    """Convert nested dataclasses, dicts and tuples to values for JSON."""
    if is_dataclass(value):
        return {f.name: _json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list | tuple) else value
