"""Evidence of a run and the findings from it, for `convlens diagnose`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from convlens.recipe import Recipe

Floats = npt.NDArray[np.float64]

LAST = 3  # epochs whose mean is "at the end": single ones are noisy


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what, the numbers, the threshold they crossed, what to do.

    `overrides` can be given to `convlens train` as they stand.
    """

    rule: str
    what: str
    evidence: Mapping[str, Any]
    threshold: str
    do: str
    overrides: Sequence[str]


class CannotTell(Exception):  # noqa: N818 - nothing is wrong
    """A rule lacks the evidence it needs; the text says which."""


@dataclass(frozen=True)
class Shares:
    """`right` of `n` images."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n


@dataclass(frozen=True)
class Case:
    """All that is known of a run. What is None or empty wasn't measured; `unmeasured` says why.

    Attributes:
        rows: of `metrics.csv`.
        diverged: epoch, step and rate at which the loss became NaN or infinite.
        counts: training images by class.
        recalls: validation images by class, and how many of them are right.
        trained, validated: some hundred training and validation images in eval mode, without
            augmentation.
        dead: by stage, channels that give one and the same number everywhere, and all channels.
        looks: of training and validation images, `[N, features]`: mean and deviation of each
            channel of each image, in 0..1, by the names in `features`.
    """

    recipe: Recipe | None = None
    classes: int = 0
    rows: Sequence[Mapping[str, float]] = ()
    finished: bool = True
    diverged: Mapping[str, float] | None = None
    counts: Mapping[str, int] | None = None
    recalls: Mapping[str, Shares] | None = None
    trained: Shares | None = None
    validated: Shares | None = None
    dead: Mapping[str, tuple[int, int]] | None = None
    looks: tuple[Floats, Floats] | None = None
    features: Sequence[str] = ()
    unmeasured: str = field(default="it was not measured")

    def column(self, name: str, least: int = 1) -> Floats:
        """One number an epoch.

        Raises:
            CannotTell: fewer than `least` epochs, or nothing but NaN.
        """
        if len(self.rows) < least:
            raise CannotTell(
                f"{len(self.rows)} epochs are too few: at least {least} are needed"
                if self.rows
                else "there is no metrics.csv with an epoch in it"
            )
        values = np.array([row.get(name, math.nan) for row in self.rows])
        if np.isnan(values).all():
            lacks = "it has no validation split" if name.startswith("val_") else ""
            raise CannotTell(lacks or f"its metrics.csv has no {name}")
        return values

    def need(self) -> Recipe:
        if self.recipe is None:
            raise CannotTell("its recipe isn't known")
        return self.recipe


def ending(values: Floats) -> float:
    """The mean of the last epochs."""
    return float(np.mean(values[-LAST:]))
