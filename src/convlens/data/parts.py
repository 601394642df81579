"""What every source of images hands over: parts (train, val, test) of images with labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from convlens.data.decode import EXTENSIONS, Pixels
from convlens.data.encoded import Files


class Images(Protocol):
    """uint8 images `[N, C, H, W]` that are read piece by piece: an array, a memory map, drawn."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: npt.NDArray[np.int64], /) -> Pixels: ...


@dataclass(frozen=True)
class Part:
    """One split as its source gives it: `images` are pixels, or files that hold them."""

    images: Images | Files
    labels: npt.NDArray[np.int64]
    ids: Sequence[str]
    groups: list[str] | None = None


@dataclass(frozen=True)
class Source:
    """A named set: `parts` always has `train`, and `val` and `test` where the source has them."""

    name: str
    classes: tuple[str, ...]
    parts: dict[str, Part]
    notes: tuple[str, ...] = field(default=())


def is_image_name(name: str) -> bool:
    """Whether a file counts as an image: a known extension, not hidden."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
