"""What can be measured at a stage of a network, one class each, and the table of them.

A measure is told of training images first if it `learns`, then of held-out images, batch by batch,
and keeps only sums and a few numbers an image. To add one: a class, and a line in `MEASURES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from convlens.interpret.streaming_stats import (
    Covariances,
    LinearFit,
    Moments,
    ratio_interval,
    reduce_dimensions,
    ridge_regression,
)
from convlens.metrics import wilson_interval

# ---- stagebatch ----------------------------------------
# What a measurement at a stage is given and what it gives: the base of `measures.py`.

POOL_GRID = 2  # maps are averaged to GRID x GRID for what is classified
MAX_FEATURES = 1024  # features of a regression; more are projected at random
PICTURE_SIDE = 16  # of the picture that is rebuilt


@dataclass(frozen=True)
class MetricValue:
    """A number at a stage with its 95% interval; None where there is none to be had."""

    value: float | None
    interval95: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StageBatch:
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
        grid = (min(POOL_GRID, high), min(POOL_GRID, wide)) if high > 1 else (1, 1)
        return reduce_dimensions(
            F.adaptive_avg_pool2d(self.maps, grid).double().flatten(1), MAX_FEATURES
        )

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Channels at each position, and the patch of the picture there: float64 `[B, P, ...]`.

        The picture is averaged to `SIDE` x `SIDE`, the maps to the next lower divisor of it.
        """
        high, wide = self.maps.shape[2:]
        rows, columns = (_divisor(high), _divisor(wide)) if high > 1 else (1, 1)
        maps = F.adaptive_avg_pool2d(self.maps, (rows, columns)).double()
        picture = F.adaptive_avg_pool2d(self.images.to(maps.device).double() / 255, PICTURE_SIDE)
        patches = F.unfold(
            picture, size := (PICTURE_SIDE // rows, PICTURE_SIDE // columns), stride=size
        )
        return reduce_dimensions(maps.flatten(2).transpose(1, 2), MAX_FEATURES), patches.transpose(
            1, 2
        )


def _divisor(side: int) -> int:
    return max(d for d in range(1, PICTURE_SIDE + 1) if PICTURE_SIDE % d == 0 and d <= side)


class Measure(ABC):
    """One measurement at one stage."""

    title: ClassVar[str]
    about: ClassVar[str]  # the definition, one sentence
    scale: ClassVar[str] = "percent"  # or number, log: how it is drawn
    learns: ClassVar[bool] = False

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def learn(self, batch: StageBatch) -> None:
        """Takes in training images, if it learns."""
        raise NotImplementedError

    @abstractmethod
    def see(self, batch: StageBatch) -> None:
        """Takes in held-out images."""

    @abstractmethod
    def value(self) -> MetricValue:
        """The number for all that was seen."""


# ---- learned ----------------------------------------
# Measurements that learn from training images and are scored on others: linear readings.

TUNED = 5  # every n-th training image chooses the penalty


class _ClassMeasure(Measure):
    """Accuracy of what was learned from the pooled training features, with Wilson's interval."""

    learns = True

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.learned = torch.zeros(classes, dtype=torch.int64)  # images of each class
        self.n, self.correct = 0, 0

    def learn(self, batch: StageBatch) -> None:
        self.learned += batch.labels.cpu().bincount(minlength=self.classes)
        goal = F.one_hot(batch.labels, self.classes).double()
        self.take(batch.pooled, goal)

    @abstractmethod
    def take(self, features: Tensor, goal: Tensor) -> None:
        """Takes in pooled training features `[B, D]` and one-hot labels, float64 `[B, K]`."""

    @abstractmethod
    def says(self, features: Tensor) -> Tensor:
        """The class int64 `[B]` of pooled features."""

    def see(self, batch: StageBatch) -> None:
        self.n += len(batch.labels)
        self.correct += int((self.says(batch.pooled) == batch.labels).sum())

    def value(self) -> MetricValue:
        if int((self.learned > 0).sum()) < 2 or not self.n:
            return MetricValue(None)  # one class can't be told from another
        interval = wilson_interval(self.correct, self.n)
        return MetricValue(self.correct / self.n, interval, {"n": self.n, "correct": self.correct})


class Probe(_ClassMeasure):
    title = "linear-probe accuracy"
    about = (
        "held-out accuracy of a ridge classifier on maps averaged to 2 x 2 (above "
        f"{MAX_FEATURES} features: a random projection to {MAX_FEATURES}), its penalty chosen on a fifth of the "
        "training images (after Alain & Bengio 2016); interval: Wilson"
    )

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fit: Moments | None = None
        self.tune: Moments | None = None

    def take(self, features: Tensor, goal: Tensor) -> None:
        self.fit, self.tune = _learn(self.fit, self.tune, features[:, None], goal[:, None])

    @cached_property
    def linear(self) -> LinearFit:
        assert self.fit is not None
        return ridge_regression(self.fit, self.tune)

    def says(self, features: Tensor) -> Tensor:
        return self.linear(features[:, None])[:, 0].argmax(1)


class Separability(_ClassMeasure):
    title = "nearest-class-mean accuracy"
    about = (
        "held-out images whose features (as for the probe) lie nearest to the mean of their own "
        "class in the training images (NC4 of Papyan, Han, Donoho 2020); interval: Wilson"
    )
    sums: Tensor | None = None

    def take(self, features: Tensor, goal: Tensor) -> None:
        added = goal.T @ features
        self.sums = added if self.sums is None else self.sums + added

    @cached_property
    def centres(self) -> Tensor:
        """Class means `[K, D]`; a class without training images is nowhere."""
        assert self.sums is not None
        counts = self.learned.to(self.sums)[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), math.inf)

    def says(self, features: Tensor) -> Tensor:
        return torch.cdist(features, self.centres).nan_to_num(math.inf).argmin(1)


class Reconstruction(Measure):
    title = "picture rebuilt (R²)"
    about = (
        f"share of the held-out pictures' variance ({PICTURE_SIDE} x {PICTURE_SIDE} px, about the mean training "
        "picture) that ridge regression finds again: each position's channels give the patch of "
        "the picture there, with the same weights at all positions; penalty as for the probe; "
        "interval: bootstrap over images"
    )
    learns = True

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fit: Moments | None = None
        self.tune: Moments | None = None
        self.missed: list[Tensor] = []
        self.whole: list[Tensor] = []

    def learn(self, batch: StageBatch) -> None:
        self.fit, self.tune = _learn(self.fit, self.tune, *batch.cells)

    @cached_property
    def linear(self) -> LinearFit:
        assert self.fit is not None
        return ridge_regression(self.fit, self.tune)

    def see(self, batch: StageBatch) -> None:
        x, y = batch.cells
        self.missed.append((y - self.linear(x)).square().sum((1, 2)).cpu())
        self.whole.append((y - self.linear.y).square().sum((1, 2)).cpu())

    def value(self) -> MetricValue:
        missed, whole = torch.cat(self.missed).numpy(), torch.cat(self.whole).numpy()
        if whole.sum() <= 0:
            return MetricValue(None)  # every picture is the mean picture
        interval = ratio_interval(missed, whole, seed=0)
        ends = None if interval is None else (1 - interval[1], 1 - interval[0])
        details = {"penalty": self.linear.penalty, "features": self.linear.weights.shape[0]}
        return MetricValue(1 - float(missed.sum() / whole.sum()), ends, details)


def _learn(
    fit: Moments | None, tune: Moments | None, x: Tensor, y: Tensor
) -> tuple[Moments, Moments]:
    """Adds four fifths of a batch to `fit` and one to `tune`, which are made where missing."""
    sizes = (x.shape[1], x.shape[2], y.shape[2], str(x.device))
    fit, tune = fit or Moments(*sizes), tune or Moments(*sizes)
    number = torch.arange(len(x), device=x.device) + fit.n + tune.n
    tuned = number % TUNED == TUNED - 1
    fit.add(x[~tuned], y[~tuned])
    tune.add(x[tuned], y[tuned])
    return fit, tune


MOST_RANK = 512  # channels; more are projected at random
RARE = 0.01  # share of images, or of the stage's median deviation
CONSTANT = 1e-4  # deviations in units of the stage's median deviation


class DeadChannels(Measure):
    title = "dead or nearly dead channels"
    about = (
        "dead: constant over the images at every position (deviation below 1e-4 of the stage's "
        "median); nearly dead: above 0 anywhere on the map in fewer than 1% of the images or, "
        "where a stage has values below 0 (GELU, SiLU, no activation), with a deviation below 1% "
        "of the stage's median; a count, so without interval"
    )

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.n, self.least = 0, math.inf

    def see(self, batch: StageBatch) -> None:
        maps = batch.maps.double()
        if not self.n:  # sums are of differences from one image's maps, lest squares cancel
            self.origin = maps[:1].clone()
            self.sum, self.squares = (torch.zeros_like(maps[0]) for _ in range(2))
            self.active = torch.zeros(maps.shape[1], dtype=torch.int64, device=maps.device)
        self.n += len(maps)
        self.least = min(self.least, float(batch.maps.min()))
        self.active += (batch.maps.amax((2, 3)) > 0).sum(0)
        shifted = maps - self.origin
        self.sum += shifted.sum(0)
        self.squares += shifted.square().sum(0)

    def value(self) -> MetricValue:
        if self.n < 2:
            return MetricValue(None)
        variance = (self.squares / self.n - (self.sum / self.n).square()).clamp(min=0)
        deviation = variance.mean((1, 2)).sqrt()
        moving = deviation[deviation > 0]
        typical = float(moving.median()) if len(moving) else 0.0
        dead = deviation <= CONSTANT * typical
        rectified = self.least >= 0
        rare = self.active < RARE * self.n if rectified else deviation < RARE * typical
        nearly = rare & ~dead
        counts = {"dead": int(dead.sum()), "nearly_dead": int(nearly.sum()), "channels": len(dead)}
        share = (counts["dead"] + counts["nearly_dead"]) / len(dead)
        return MetricValue(share, None, {**counts, "rectified": rectified})


class _ChannelShare(Measure):
    """A share that each image has, and its mean."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.shares: list[Tensor] = []

    @abstractmethod
    def of(self, maps: Tensor) -> Tensor:
        """The share of each image, float64 `[B]`."""

    def see(self, batch: StageBatch) -> None:
        self.shares.append(self.of(batch.maps).cpu())

    def value(self) -> MetricValue:
        shares = torch.cat(self.shares)
        mean = float(shares.mean())
        if len(shares) < 2:
            return MetricValue(mean)
        error = 1.96 * float(shares.std()) / len(shares) ** 0.5
        return MetricValue(mean, (max(0.0, mean - error), min(1.0, mean + error)))


class SilentChannels(_ChannelShare):
    title = "sparsity"
    about = "share of activations at or below 0; interval: mean over images ± 1.96 standard errors"

    def of(self, maps: Tensor) -> Tensor:
        return (maps <= 0).double().mean((1, 2, 3))


class BlankMaps(_ChannelShare):
    title = "channels blank on an image"
    about = (
        "share of channels that are nowhere above 0 on an image, mean over images; interval: "
        "± 1.96 standard errors"
    )

    def of(self, maps: Tensor) -> Tensor:
        return (maps.amax((2, 3)) <= 0).double().mean(1)


class EffectiveRank(Measure):
    title = "effective rank"
    about = (
        "exp of the entropy of the normalised singular values (Roy & Vetterli 2007) of the "
        f"channels' means over the map, centred; above {MOST_RANK} channels of a random projection "
        f"to {MOST_RANK}; interval: jackknife over 10 groups of images; at most images - 1"
    )
    scale = "log"

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.sums: Covariances | None = None
        self.channels = 0

    def see(self, batch: StageBatch) -> None:
        self.channels = batch.maps.shape[1]
        vectors = reduce_dimensions(batch.means, MOST_RANK)
        if self.sums is None:
            self.sums = Covariances(vectors.shape[1], str(vectors.device))
        self.sums.add(vectors)

    def value(self) -> MetricValue:
        if self.sums is None or float(self.sums.n.sum()) < 2:
            return MetricValue(None)
        rank, interval = self.sums.rank()
        return MetricValue(rank, interval, {"channels": self.channels})


class SpatialDetail(Measure):
    title = "fineness of the maps"
    about = (
        "mean squared difference of neighbouring positions over twice the variance within the "
        "map (von Neumann's ratio): 0 smooth, 1 as white noise; none for maps below 3 x 3; "
        "interval: bootstrap over images"
    )
    scale = "number"

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.steps: list[Tensor] = []
        self.spread: list[Tensor] = []

    def see(self, batch: StageBatch) -> None:
        high, wide = batch.maps.shape[2:]
        if min(high, wide) < 3:
            return
        maps = batch.maps.double()
        across = maps.diff(dim=3).square().mean((2, 3))
        down = maps.diff(dim=2).square().mean((2, 3))
        self.steps.append(((across + down) / 2).sum(1).cpu())
        self.spread.append(2 * maps.flatten(2).var(2).sum(1).cpu())

    def value(self) -> MetricValue:
        if not self.steps:
            return MetricValue(None)
        steps, spread = torch.cat(self.steps).numpy(), torch.cat(self.spread).numpy()
        if spread.sum() <= 0:
            return MetricValue(None)
        interval = ratio_interval(steps, spread, seed=0)
        return MetricValue(float(steps.sum() / spread.sum()), interval)


MEASURES: dict[str, type[Measure]] = {
    "probe": Probe,
    "separability": Separability,
    "picture": Reconstruction,
    "rank": EffectiveRank,
    "sparsity": SilentChannels,
    "blank": BlankMaps,
    "dead": DeadChannels,
    "fineness": SpatialDetail,
}
