"""What is in a data set, and what is wrong with it, before anything is trained.

Every image is decoded once at its own size. Files that can't be read, classes too small to be
split and the like are listed, never raised: the audit is for sets that training would refuse.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from convlens.data import similar
from convlens.data.decode import Pixels, decode, fit_images
from convlens.data.encoded import Files
from convlens.data.looking import Facts, Index, Look, look
from convlens.data.opening import Opened, draw
from convlens.data.parts import Part, Source
from convlens.data.rows import ArrayRows
from convlens.data.similar import Repeats
from convlens.data.sources import REMARKS, find
from convlens.errors import DataError
from convlens.system.console import progress

if TYPE_CHECKING:
    from convlens.schema import DataConfig

FEW = 10  # images of a class: below this it is worth a note
SKEWED = 10  # largest class over smallest: from here it is worth a note
SPLITS = ("train", "val", "test")
_SHEET = 96  # pictures in a contact sheet
_TOLD = {
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
    duplicates: Repeats  # the same pixels
    near_duplicates: Repeats  # pairs that look the same
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
        if not isinstance(images, Files):
            # Small pictures stay as they are: plots enlarge them pixel by pixel.
            size = min(side, max(images.shape[2:]))
            pixels = images[np.array(self._shown, np.int64)]
            return fit_images(pixels, size=size, channels=channels, fit="pad"), titles
        out = np.zeros((len(titles), channels, side, side), np.uint8)
        for place, i in enumerate(self._shown):
            content, name = images.read(i), images.name(i)
            out[place] = decode(content, size=side, channels=channels, fit="pad", name=name)
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
    source = find(config.name, count=config.count, image_size=asked, group=config.group)
    total = sum(len(part.labels) for part in source.parts.values())
    with progress("looking at images", total) as bar:
        looks = {split: look(part, bar) for split, part in source.parts.items()}
    split_of, how, problems = _splits(config, source, looks)
    every = _joined(source, looks, split_of)
    facts = every.facts
    counts = _counts(every)
    mean, std, channels = _channels(every)
    near, complete = similar.near_duplicates(facts["thumb"], facts["digest"])
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
        plain=int(similar.is_plain(facts["thumb"]).sum()),
        turned=int(facts["turned"].sum()),
        alpha=int(facts["alpha"].sum()),
        frames=int(facts["frames"].sum()),
        unreadable=[
            Unreadable(found.part.ids[i], source.classes[found.part.labels[i]], reason)
            for found in looks.values()
            for i, reason in found.bad.items()
        ],
        duplicates=Repeats.of(similar.repeated(facts["digest"]), *columns),
        near_duplicates=Repeats.of(near.tolist(), *columns, complete=complete),
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
    facts: Facts
    ids: list[str]
    labels: Index
    splits: npt.NDArray[np.str_]
    place: Index  # where it is in its part


def _joined(
    source: Source, looks: dict[str, Look], split_of: dict[str, npt.NDArray[np.str_]]
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
    config: DataConfig, source: Source, looks: dict[str, Look]
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
        opened = {n: Opened(f.part, nothing, "", f.bad) for n, f in looks.items()}
        # What a tiny recipe leaves aside is part of the set all the same.
        whole = config.model_copy(update={"per_class": None, "total_per_class": None})
        _, held, how = draw(whole, source, opened)
    except DataError as error:
        return own, as_it_is, [error.what]
    for split, index in held.items():
        own["train"][index] = split
    return own, how, []


# Summing up


def _counts(every: _All) -> dict[str, dict[str, int]]:
    k = len(every.classes)
    of = {s: np.bincount(every.labels[every.splits == s], minlength=k) for s in SPLITS}
    present = [s for s in SPLITS if of[s].any()]
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


def _notes(classes: Sequence[str], counts: dict[str, dict[str, int]], facts: Facts) -> list[str]:
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
    few = [f"{name} ({n})" for name, n in train.items() if n < FEW]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        notes.append(f"fewer than {FEW} training images: {', '.join(few[:5])}{more}")
    most, least = max(train, key=lambda c: train[c]), min(train, key=lambda c: train[c])
    if train[least] and train[most] >= SKEWED * train[least]:
        notes.append(
            f"uneven classes: {most} has {train[most]} training images, {least} {train[least]}"
        )
    grey = int(facts["grey"].sum())
    if 0 < grey < len(facts):
        notes.append(f"grey and colour mixed: {grey} of {len(facts)} images are grey")
    for name, told in _TOLD.items():
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
        mine = every.place[(every.splits == "train") & (every.labels == c)]
        at = np.linspace(0, len(mine) - 1, min(each, len(mine))).round().astype(np.int64)
        shown += mine[at].tolist()
    return shown


def _json(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list | tuple) else value
