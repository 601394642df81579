"""Summary of a data set in one line: how its classes, splits and images were interpreted.

`train` and `audit` print it first, so that a folder that was read in an unexpected way is noticed
before hours of training.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convlens.data.types import IndexArray

MAX_CLASSES_LISTED = 10
_MAX_NAME_CHARS = 40
_EXTREMES_LISTED = 3  # largest and smallest of many classes
_MIN_LOST_AREA = 0.005  # below this the images count as square


@dataclass(frozen=True)
class DatasetSummary:
    """What a data set was understood to be.

    Attributes:
        classes: Class names.
        counts: Number of images of each class in all splits, `[K]`.
        splits: Split -> number of images.
        origins: Split -> how it came about, in a few words.
        channels: Of the converted images.
        image_size: Of the converted images, in pixels.
        fit: `crop`, `pad` or `stretch`.
        kept_area: Share of the area of the images that the fit keeps; None if all images have one
            size and are square, as in built-in sets.
    """

    classes: Sequence[str]
    counts: IndexArray
    splits: Mapping[str, int]
    origins: Mapping[str, str]
    channels: int
    image_size: int
    fit: str
    kept_area: float | None = None

    def __str__(self) -> str:
        channels = f"{self.channels} channel{'s' * (self.channels > 1)}"
        parts = (
            describe_classes(self.classes, self.counts),
            describe_split_sizes(self.splits, self.origins),
            channels,
            f"{self.image_size} px{describe_fit(self.fit, self.kept_area)}",
        )
        return " · ".join(filter(None, parts))


def describe_classes(classes: Sequence[str], counts: IndexArray) -> str:
    """Return the number of classes and their images; of many classes only the extremes."""
    names = [
        name if len(name) <= _MAX_NAME_CHARS else f"{name[:_MAX_NAME_CHARS]}..." for name in classes
    ]
    listed = [f"{name} {count:,}" for name, count in zip(names, counts.tolist(), strict=True)]
    number = f"{len(classes):,} class{'es' * (len(classes) != 1)}"
    if len(classes) <= MAX_CLASSES_LISTED:
        return f"{number}: {', '.join(listed)}"
    if counts.min() == counts.max():
        return f"{number} of {counts[0]:,} images: {', '.join(names[:_EXTREMES_LISTED])}, ..."
    order = np.argsort(-counts, kind="stable").tolist()
    largest = ", ".join(listed[i] for i in order[:_EXTREMES_LISTED])
    smallest = ", ".join(listed[i] for i in order[-_EXTREMES_LISTED:])
    hidden = len(classes) - 2 * _EXTREMES_LISTED
    return f"{number}: largest {largest}; smallest {smallest}; and {hidden:,} more"


def describe_split_sizes(splits: Mapping[str, int], origins: Mapping[str, str]) -> str:
    """Return the size of each split; neighbors of the same origin share its description."""
    described = []
    for origin, names in itertools.groupby(splits, key=lambda split: origins.get(split, "")):
        sizes = " · ".join(f"{name} {splits[name]:,}" for name in names)
        described.append(sizes + (f" ({origin})" if origin else ""))
    return " · ".join(described)


def describe_fit(fit: str, kept_area: float | None) -> str:
    """Return how images are made square; empty if they are square and are not padded."""
    if kept_area is None or (fit == "crop" and kept_area > 1 - _MIN_LOST_AREA):
        return ""
    texts = {
        "crop": f", crop keeps {kept_area:.0%} of the area",
        "pad": ", padded to squares",
        "stretch": ", stretched to squares",
    }
    return texts[fit]
