"""What can be measured at a stage of a network, one class each, and the table of them.

A measure is told of training images first if it `learns`, then of held-out images, batch by batch,
and keeps only sums and a few numbers an image. To add one: a class, and a line in `MEASURES`.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from convlens.inspection.learned import Picture, Probe, Separability
from convlens.inspection.moments import Covariances, ratio_interval, reduced
from convlens.inspection.stagebatch import Batch, Measure, Value

MOST_RANK = 512  # channels; more are projected at random
RARE = 0.01  # share of images, or of the stage's median deviation
CONSTANT = 1e-4  # deviations in units of the stage's median deviation


class Dead(Measure):
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

    def see(self, batch: Batch) -> None:
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

    def value(self) -> Value:
        if self.n < 2:
            return Value(None)
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
        return Value(share, None, {**counts, "rectified": rectified})


class _Share(Measure):
    """A share that each image has, and its mean."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.shares: list[Tensor] = []

    @abstractmethod
    def of(self, maps: Tensor) -> Tensor:
        """The share of each image, float64 `[B]`."""

    def see(self, batch: Batch) -> None:
        self.shares.append(self.of(batch.maps).cpu())

    def value(self) -> Value:
        shares = torch.cat(self.shares)
        mean = float(shares.mean())
        if len(shares) < 2:
            return Value(mean)
        error = 1.96 * float(shares.std()) / len(shares) ** 0.5
        return Value(mean, (max(0.0, mean - error), min(1.0, mean + error)))


class Silence(_Share):
    title = "sparsity"
    about = "share of activations at or below 0; interval: mean over images ± 1.96 standard errors"

    def of(self, maps: Tensor) -> Tensor:
        return (maps <= 0).double().mean((1, 2, 3))


class Blank(_Share):
    title = "channels blank on an image"
    about = (
        "share of channels that are nowhere above 0 on an image, mean over images; interval: "
        "± 1.96 standard errors"
    )

    def of(self, maps: Tensor) -> Tensor:
        return (maps.amax((2, 3)) <= 0).double().mean(1)


class Rank(Measure):
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

    def see(self, batch: Batch) -> None:
        self.channels = batch.maps.shape[1]
        vectors = reduced(batch.means, MOST_RANK)
        if self.sums is None:
            self.sums = Covariances(vectors.shape[1], str(vectors.device))
        self.sums.add(vectors)

    def value(self) -> Value:
        if self.sums is None or float(self.sums.n.sum()) < 2:
            return Value(None)
        rank, interval = self.sums.rank()
        return Value(rank, interval, {"channels": self.channels})


class Fineness(Measure):
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

    def see(self, batch: Batch) -> None:
        high, wide = batch.maps.shape[2:]
        if min(high, wide) < 3:
            return
        maps = batch.maps.double()
        across = maps.diff(dim=3).square().mean((2, 3))
        down = maps.diff(dim=2).square().mean((2, 3))
        self.steps.append(((across + down) / 2).sum(1).cpu())
        self.spread.append(2 * maps.flatten(2).var(2).sum(1).cpu())

    def value(self) -> Value:
        if not self.steps:
            return Value(None)
        steps, spread = torch.cat(self.steps).numpy(), torch.cat(self.spread).numpy()
        if spread.sum() <= 0:
            return Value(None)
        interval = ratio_interval(steps, spread, seed=0)
        return Value(float(steps.sum() / spread.sum()), interval)


MEASURES: dict[str, type[Measure]] = {
    "probe": Probe,
    "separability": Separability,
    "picture": Picture,
    "rank": Rank,
    "sparsity": Silence,
    "blank": Blank,
    "dead": Dead,
    "fineness": Fineness,
}
