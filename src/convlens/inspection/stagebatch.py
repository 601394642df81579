"""What a measurement at a stage is given and what it gives: the base of `measures.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from convlens.inspection.moments import reduced

GRID = 2  # maps are averaged to GRID x GRID for what is classified
MOST = 1024  # features of a regression; more are projected at random
SIDE = 16  # of the picture that is rebuilt


@dataclass(frozen=True)
class Value:
    """A number at a stage with its 95% interval; None where there is none to be had."""

    value: float | None
    interval95: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """What a stage gives for a batch: maps float32 `[B, C, H, W]`, images uint8, labels `[B]`."""

    maps: Tensor
    images: Tensor
    labels: Tensor

    @cached_property
    def means(self) -> Tensor:
        """The channels' means over positions, float64 `[B, C]`."""
        return self.maps.double().mean((2, 3))

    @cached_property
    def pooled(self) -> Tensor:
        """Maps averaged to 2 x 2 (vectors and tokens: to one), float64 `[B, at most MOST]`."""
        high, wide = self.maps.shape[2:]
        grid = (min(GRID, high), min(GRID, wide)) if high > 1 else (1, 1)
        return reduced(F.adaptive_avg_pool2d(self.maps, grid).double().flatten(1), MOST)

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Channels at each position, and the patch of the picture there: float64 `[B, P, ...]`.

        The picture is averaged to `SIDE` x `SIDE`, the maps to the next lower divisor of it.
        """
        high, wide = self.maps.shape[2:]
        rows, columns = (_divisor(high), _divisor(wide)) if high > 1 else (1, 1)
        maps = F.adaptive_avg_pool2d(self.maps, (rows, columns)).double()
        picture = F.adaptive_avg_pool2d(self.images.to(maps.device).double() / 255, SIDE)
        patches = F.unfold(picture, size := (SIDE // rows, SIDE // columns), stride=size)
        return reduced(maps.flatten(2).transpose(1, 2), MOST), patches.transpose(1, 2)


def _divisor(side: int) -> int:
    return max(d for d in range(1, SIDE + 1) if SIDE % d == 0 and d <= side)


class Measure(ABC):
    """One measurement at one stage."""

    title: ClassVar[str]
    about: ClassVar[str]  # the definition, one sentence
    scale: ClassVar[str] = "percent"  # or number, log: how it is drawn
    learns: ClassVar[bool] = False

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def learn(self, batch: Batch) -> None:
        """Takes in training images, if it learns."""
        raise NotImplementedError

    @abstractmethod
    def see(self, batch: Batch) -> None:
        """Takes in held-out images."""

    @abstractmethod
    def value(self) -> Value:
        """The number for all that was seen."""
