"""What is in a data set, and what is wrong with it, before anything is trained.

Every image is decoded once at its own size. Files that can't be read, classes too small to be
split and the like are listed, never raised: the audit is for sets that training would refuse.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from convlens.data import duplicates
from convlens.data.cache import ArrayRows
from convlens.data.decode import (
    MAX_PIXELS,
    Pixels,
    UnreadableImage,
    decode,
    fit_arrays,
    probe_image,
)
from convlens.data.duplicates import Duplicates
from convlens.data.sources import REMARKS, find_source
from convlens.data.splits import LoadedPart, make_splits
from convlens.data.types import DataSource, EncodedFiles, Part
from convlens.device import usable_cores
from convlens.errors import DataError
from convlens.utils.console import ProgressBar, progress_bar
from convlens.utils.files import MemorySemaphore

if TYPE_CHECKING:
    from convlens.recipe import DataConfig


# ---- looking ----------------------------------------
# Reads every image of a part once and keeps a few facts of each, for the audit.

_CHUNK = 512
# Pixels of images at their own size, for all threads.
_FULL_SIZE_MEMORY = MemorySemaphore(2 * MAX_PIXELS, free=1 << 22)
IndexTensor = npt.NDArray[np.int64]

# What is kept of one image. A structured array: a million images need 1.2 GB, and no objects.
FILE_FACTS = np.dtype(
    [
        ("width", np.int32),
        ("height", np.int32),
        ("mode", "U12"),
        ("grey", np.bool_),
        ("turned", np.bool_),  # these three as in `ImageFacts`
        ("alpha", np.bool_),
        ("frames", np.bool_),
        ("digest", np.uint8, 32),  # SHA-256 of size and pixels as RGB
        ("thumb", np.uint8, (duplicates.HASH_SIDE, duplicates.HASH_SIDE)),
        ("mean", np.float64, 3),  # of each RGB channel, 0..1
        ("square", np.float64, 3),  # mean of squares
    ]
)
FileFacts = npt.NDArray[np.void]


@dataclass
class InspectedImages:
    """One part of the source: facts of all its images, of which `good` could be read."""

    part: Part
    facts: FileFacts
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def good(self) -> IndexTensor:
        return np.delete(np.arange(len(self.facts), dtype=np.int64), list(self.bad))


def inspect_images(part: Part, bar: ProgressBar) -> InspectedImages:
    found = InspectedImages(part, np.zeros(len(part.labels), FILE_FACTS))
    for start in range(0, len(part.labels), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(part.labels)))
        if isinstance(part.images, EncodedFiles):
            for i, seen in zip(index, _of_files(part.images, index.tolist()), strict=True):
                if isinstance(seen, str):
                    found.bad[int(i)] = seen
                else:
                    found.facts[i] = seen
        else:
            found.facts[index] = facts_of(part.images[index])
        bar.advance(len(index))
    return found


def _of_files(files: EncodedFiles, numbers: Sequence[int]) -> Iterator[np.void | str]:
    pool = ThreadPoolExecutor(min(usable_cores(), 32))
    try:
        yield from pool.map(lambda number: _of_file(files, number), numbers)
    finally:
        pool.shutdown(cancel_futures=True)


def _of_file(files: EncodedFiles, number: int) -> np.void | str:
    """Facts of one file, or the reason why there are none."""
    try:
        content, path = files.read(number), files.name(number)
        header = probe_image(content, path)
        # Before the semaphore of `decode`, never after it: the other order could deadlock.
        with _FULL_SIZE_MEMORY.acquire(header.width * header.height):
            pixels = decode(content, size=None, channels=3, fit="crop", name=path)
            facts = facts_of(pixels[None])
    except UnreadableImage as error:
        return error.reason
    for name in ("mode", "grey", "turned", "alpha", "frames"):
        facts[name] = getattr(header, name)
    record: np.void = facts[0]
    return record


def facts_of(images: Pixels) -> FileFacts:
    """Facts of uint8 `[N, C, H, W]`; grey pictures count as RGB pictures with equal channels."""
    n, channels, height, width = images.shape
    facts = np.zeros(n, FILE_FACTS)
    facts["width"], facts["height"] = width, height
    facts["mode"], facts["grey"] = ("L", True) if channels == 1 else ("RGB", False)
    flat = images.reshape(n, channels, -1)
    facts["mean"] = flat.mean(axis=2) / 255
    squares = np.einsum("ncp,ncp->nc", flat, flat, dtype=np.float64, casting="unsafe")
    facts["square"] = squares / (height * width * 255**2)
    facts["thumb"] = fit_arrays(images, size=duplicates.HASH_SIDE, channels=1, fit="stretch")[:, 0]
    size = f"{height} x {width}".encode()
    for row, image in zip(facts, images, strict=True):
        content = image if channels == 3 else np.repeat(image, 3, axis=0)
        digest = hashlib.sha256(size)
        digest.update(np.ascontiguousarray(content).data)
        row["digest"] = np.frombuffer(digest.digest(), np.uint8)
    return facts


FEW_IMAGES = 10  # images of a class: below this it is worth a note
SKEWED_RATIO = 10  # largest class over smallest: from here it is worth a note
SPLIT_NAMES = ("train", "val", "test")
_SHEET = 96  # pictures in a contact sheet
_MAX_LISTED = {
    "turned": "{} are turned upright, as their EXIF says",
    "alpha": "{} have transparency, which becomes white",
    "frames": "{} have more than one frame: only the first is used",
}


@dataclass(frozen=True)
class Unreadable:
    """A file that can't be decoded, and why."""

    id: str
    label: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """The result of `audit`; `to_dict` is what `--json` prints."""

    name: str
    images: int  # readable ones
    counts: dict[str, dict[str, int]]  # class -> split -> readable images
    how: dict[str, str]  # split -> where it comes from
    width: tuple[int, float, int]  # smallest, median, largest, in pixels
    height: tuple[int, float, int]
    sizes: int  # different ones
    modes: dict[str, int]  # Pillow's names, commonest first
    channels: int  # 1 where every image is grey
    mean: list[float]  # of train, each channel in 0..1, every image counting the same
    std: list[float]
    plain: int  # images of a single colour
    turned: int  # by their EXIF, as everywhere
    alpha: int  # with an alpha channel or colour
    frames: int  # of several frames, the first of which is used
    unreadable: list[Unreadable]
    duplicates: Duplicates  # the same pixels
    near_duplicates: Duplicates  # pairs that look the same
    problems: list[str]  # what training will refuse
    notes: list[str]  # what is worth knowing
    _train: Part = field(repr=False)
    _shown: list[int] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        public = [f.name for f in fields(self) if not f.name.startswith("_")]
        return {name: _json(getattr(self, name)) for name in public}

    def sheet(self, side: int = 96) -> tuple[Pixels, list[str]]:
        """Training images of every class, uint8 `[n, C, side, side]`, and their classes.

        Eight of each class where there is room, so that a row of eight shows one class.
        """
        names, labels = list(self.counts), self._train.labels
        titles = [names[labels[i]] for i in self._shown]
        images, channels = self._train.images, self.channels
        if not isinstance(images, EncodedFiles):
            # Small pictures stay as they are: plots enlarge them pixel by pixel.
            size = min(side, max(images.shape[2:]))
            pixels = images[np.array(self._shown, np.int64)]
            return fit_arrays(pixels, size=size, channels=channels, fit="pad"), titles
        out = np.zeros((len(titles), channels, side, side), np.uint8)
        for position, i in enumerate(self._shown):
            content, name = images.read(i), images.name(i)
            out[position] = decode(content, size=side, channels=channels, fit="pad", name=name)
        return out, titles


def audit(config: DataConfig) -> Audit:
    """Looks at every image that `config` names, in all splits.

    The test split's pixels are read as well, but only to find its copies in the other splits:
    no model is there to be judged, and means and the contact sheet are of train alone.

    Raises:
        DataError: the source itself can't be made out (no classes, a malformed CSV, ...).
        UsageError: no such name.
    """
    asked = None if config.image_size == "auto" else int(config.image_size)
    source = find_source(config.name, count=config.count, image_size=asked, group=config.group)
    total = sum(len(part.labels) for part in source.parts.values())
    with progress_bar("looking at images", total) as bar:
        looks = {split: inspect_images(part, bar) for split, part in source.parts.items()}
    split_of, how, problems = _splits(config, source, looks)
    every = _joined(source, looks, split_of)
    facts = every.facts
    counts = _counts(every)
    mean, std, channels = _channels(every)
    near, complete = duplicates.near_duplicates(facts["thumb"], facts["digest"])
    columns = (every.ids, every.splits.tolist(), [source.classes[c] for c in every.labels])
    return Audit(
        name=source.name,
        images=len(facts),
        counts=counts,
        how=how,
        width=_spread(facts["width"]),
        height=_spread(facts["height"]),
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
            Unreadable(found.part.ids[i], source.classes[found.part.labels[i]], reason)
            for found in looks.values()
            for i, reason in found.bad.items()
        ],
        duplicates=Duplicates.of(duplicates.exact_duplicates(facts["digest"]), *columns),
        near_duplicates=Duplicates.of(near.tolist(), *columns, complete=complete),
        problems=problems,
        notes=[
            *source.notes,
            *REMARKS.get(source.name, ()),
            *_notes(source.classes, counts, facts),
        ],
        _train=source.parts["train"],
        _shown=_samples(every),
    )


# Splits


@dataclass(frozen=True)
class _All:
    """Every readable image of every part, in one row."""

    classes: tuple[str, ...]
    facts: FileFacts
    ids: list[str]
    labels: IndexTensor
    splits: npt.NDArray[np.str_]
    position: IndexTensor  # where it is in its part


def _joined(
    source: DataSource, looks: dict[str, InspectedImages], split_of: dict[str, npt.NDArray[np.str_]]
) -> _All:
    good = {name: found.good for name, found in looks.items()}
    return _All(
        source.classes,
        np.concatenate([found.facts[good[name]] for name, found in looks.items()]),
        [found.part.ids[i] for name, found in looks.items() for i in good[name].tolist()],
        np.concatenate([found.part.labels[good[name]] for name, found in looks.items()]),
        np.concatenate([split_of[name] for name in looks]),
        np.concatenate([good[name] for name in looks]),
    )


def _splits(
    config: DataConfig, source: DataSource, looks: dict[str, InspectedImages]
) -> tuple[dict[str, npt.NDArray[np.str_]], dict[str, str], list[str]]:
    """The split of each readable image as training would make it, how, and what stops that."""
    own = {name: np.full(len(found.good), name, "U5") for name, found in looks.items()}
    as_it_is = dict.fromkeys(own, "the source's own; nothing could be held out")
    train = looks["train"]
    have = np.bincount(train.part.labels[train.good], minlength=len(source.classes))
    lost = [source.classes[c] for c in np.flatnonzero(have == 0)]
    if lost:
        return own, as_it_is, [f"no readable training image in: {', '.join(lost)}"]
    try:
        nothing = ArrayRows(torch.empty(0, 1, 1, 1, dtype=torch.uint8))
        opened = {n: LoadedPart(f.part, nothing, "", f.bad) for n, f in looks.items()}
        # What a tiny recipe leaves aside is part of the set all the same.
        whole = config.model_copy(update={"per_class": None, "total_per_class": None})
        _, held, how = make_splits(whole, source, opened)
    except DataError as error:
        return own, as_it_is, [error.what]
    for split, index in held.items():
        own["train"][index] = split
    return own, how, []


# Summing up


def _counts(every: _All) -> dict[str, dict[str, int]]:
    k = len(every.classes)
    of = {s: np.bincount(every.labels[every.splits == s], minlength=k) for s in SPLIT_NAMES}
    present = [s for s in SPLIT_NAMES if of[s].any()]
    return {name: {s: int(of[s][c]) for s in present} for c, name in enumerate(every.classes)}


def _channels(every: _All) -> tuple[list[float], list[float], int]:
    """Mean and deviation of the training images' channels; every image counts the same."""
    channels = 1 if len(every.facts) and every.facts["grey"].all() else 3
    train = every.facts[every.splits == "train"]
    if not len(train):
        return [], [], channels
    mean, square = train["mean"].mean(axis=0), train["square"].mean(axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean[:channels].tolist(), std[:channels].tolist(), channels


def _spread(values: npt.NDArray[np.int32]) -> tuple[int, float, int]:
    if not len(values):
        return (0, 0.0, 0)
    return int(values.min()), float(np.median(values)), int(values.max())


def _notes(
    classes: Sequence[str], counts: dict[str, dict[str, int]], facts: FileFacts
) -> list[str]:
    """What is not wrong, but has surprised people."""
    notes = []
    counted = sorted(classes, key=_by_number)
    if list(classes) == sorted(classes) != counted:
        at = next(i for i, name in enumerate(classes) if name != counted[i])
        notes.append(
            f"classes are in string order, not by number: {classes[at]!r} comes before "
            f"{counted[at]!r}; predictions go by name, so this matters only to who counts classes"
        )
    folded = Counter(name.casefold() for name in classes)
    same = [name for name in classes if folded[name.casefold()] > 1]
    if same:
        notes.append(f"class names that differ only in case: {', '.join(same)}")
    train = {name: of.get("train", 0) for name, of in counts.items()}
    few = [f"{name} ({n})" for name, n in train.items() if n < FEW_IMAGES]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        notes.append(f"fewer than {FEW_IMAGES} training images: {', '.join(few[:5])}{more}")
    most, least = max(train, key=lambda c: train[c]), min(train, key=lambda c: train[c])
    if train[least] and train[most] >= SKEWED_RATIO * train[least]:
        notes.append(
            f"uneven classes: {most} has {train[most]} training images, {least} {train[least]}"
        )
    grey = int(facts["grey"].sum())
    if 0 < grey < len(facts):
        notes.append(f"grey and colour mixed: {grey} of {len(facts)} images are grey")
    for name, told in _MAX_LISTED.items():
        if count := int(facts[name].sum()):
            notes.append(told.format(f"{count:,} of {len(facts):,} images"))
    return notes


def _by_number(name: str) -> list[str | int]:
    # re.split with a group alternates text and digits, so that like meets like in comparisons.
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _samples(every: _All) -> list[int]:
    """Places in the train part of the images to show: evenly spread over each class."""
    each = min(8, max(1, _SHEET // len(every.classes)))
    shown: list[int] = []
    for c in range(min(len(every.classes), _SHEET)):
        mine = every.position[(every.splits == "train") & (every.labels == c)]
        at = np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(np.int64)
        shown += mine[at].tolist()
    return shown


def _json(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list | tuple) else value
