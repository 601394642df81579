"""Measurements at one stage of a network: one class for each, and the table `MEASURES` of them.

A measure is first fitted to training images if `requires_fit`, then updated with evaluation
images, batch by batch. It keeps only sums and a few numbers per image. To add a measure, write a
class and add a line to `MEASURES`.
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

POOL_GRID = 2  # maps are averaged to 2 x 2 before they are classified
MAX_FEATURES = 1024  # features of a regression; above, a random projection
MAX_RANK_CHANNELS = 512  # channels of the effective rank; above, a random projection
PICTURE_SIDE = 16  # pixels: side of the image that is reconstructed
TUNING_INTERVAL = 5  # every fifth training image selects the ridge penalty
RARE_SHARE = 0.01  # nearly dead: a share of the images, or of the stage's median deviation
DEAD_DEVIATION = 1e-4  # dead: a share of the stage's median deviation


@dataclass(frozen=True)
class MetricValue:
    """A value with its 95% interval; None where the data do not determine it."""

    value: float | None
    interval95: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StageBatch:
    """The outputs of a stage for a batch of images.

    Attributes:
        maps: float32 `[B, C, H, W]`.
        images: uint8 `[B, C, S, S]`.
        labels: int64 `[B]`, on the device of the maps.
    """

    maps: Tensor
    images: Tensor
    labels: Tensor

    @cached_property
    def means(self) -> Tensor:
        """Means of the channels over positions, float64 `[B, C]`."""
        return self.maps.double().mean((2, 3))

    @cached_property
    def pooled(self) -> Tensor:
        """Maps averaged to 2 x 2 (vectors and tokens to 1 x 1), float64 `[B, D]`.

        D is at most `MAX_FEATURES`.
        """
        height, width = self.maps.shape[2:]
        grid = (min(POOL_GRID, height), min(POOL_GRID, width)) if height > 1 else (1, 1)
        pooled = F.adaptive_avg_pool2d(self.maps, grid).double().flatten(1)
        return reduce_dimensions(pooled, MAX_FEATURES)

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Channels at each position and the image patch there, both float64 `[B, P, ...]`.

        The image is averaged to `PICTURE_SIDE` x `PICTURE_SIDE`, the maps to the largest divisor
        of that side that does not exceed theirs.
        """
        height, width = self.maps.shape[2:]
        rows, columns = (
            (_largest_divisor(height), _largest_divisor(width)) if height > 1 else (1, 1)
        )
        maps = F.adaptive_avg_pool2d(self.maps, (rows, columns)).double()
        channels = reduce_dimensions(maps.flatten(2).transpose(1, 2), MAX_FEATURES)
        picture = F.adaptive_avg_pool2d(self.images.to(maps.device).double() / 255, PICTURE_SIDE)
        patch = (PICTURE_SIDE // rows, PICTURE_SIDE // columns)
        return channels, F.unfold(picture, patch, stride=patch).transpose(1, 2)


def _largest_divisor(side: int) -> int:
    """Return the largest divisor of `PICTURE_SIDE` that is at most `side`."""
    return max(d for d in range(1, PICTURE_SIDE + 1) if PICTURE_SIDE % d == 0 and d <= side)


class Measure(ABC):
    """A measurement at one stage.

    Attributes:
        title: a few words, for figures.
        definition: one sentence that includes how the interval is computed.
        scale: how values are drawn: `percent`, `number` or `log`.
        requires_fit: whether the measure is fitted to training images first.
    """

    title: ClassVar[str]
    definition: ClassVar[str]
    scale: ClassVar[str] = "percent"
    requires_fit: ClassVar[bool] = False

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def fit(self, batch: StageBatch) -> None:
        """Add a batch of training images; only if `requires_fit`."""
        raise NotImplementedError

    @abstractmethod
    def update(self, batch: StageBatch) -> None:
        """Add a batch of evaluation images."""

    @abstractmethod
    def compute(self) -> MetricValue:
        """Return the value over all images added so far."""


# Measures that are fitted to training images


class _ClassificationMeasure(Measure):
    """Accuracy of a classifier fitted to pooled training features, with Wilson's interval."""

    requires_fit = True

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.class_counts = torch.zeros(classes, dtype=torch.int64)  # training images
        self.n, self.correct = 0, 0

    def fit(self, batch: StageBatch) -> None:
        self.class_counts += batch.labels.cpu().bincount(minlength=self.classes)
        self.fit_features(batch.pooled, F.one_hot(batch.labels, self.classes).double())

    @abstractmethod
    def fit_features(self, features: Tensor, one_hot: Tensor) -> None:
        """Add pooled training features `[B, D]` and one-hot labels `[B, K]`, both float64."""

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor:
        """Return the predicted classes, int64 `[B]`, of pooled features."""

    def update(self, batch: StageBatch) -> None:
        self.n += len(batch.labels)
        self.correct += int((self.predict(batch.pooled) == batch.labels).sum())

    def compute(self) -> MetricValue:
        if int((self.class_counts > 0).sum()) < 2 or not self.n:
            return MetricValue(None)  # a classifier needs two classes
        interval = wilson_interval(self.correct, self.n)
        return MetricValue(self.correct / self.n, interval, {"n": self.n, "correct": self.correct})


class Probe(_ClassificationMeasure):
    """Linear probe (Alain and Bengio 2016), a ridge classifier on pooled features."""

    title = "linear-probe accuracy"
    definition = (
        "held-out accuracy of a ridge classifier on maps averaged to 2 x 2 (above "
        f"{MAX_FEATURES} features, a random projection to {MAX_FEATURES}), with the penalty "
        "selected on a fifth of the training images (after Alain & Bengio 2016); interval: Wilson"
    )

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fit_moments: Moments | None = None
        self.tune_moments: Moments | None = None

    def fit_features(self, features: Tensor, one_hot: Tensor) -> None:
        self.fit_moments, self.tune_moments = _add_to_moments(
            self.fit_moments, self.tune_moments, features[:, None], one_hot[:, None]
        )

    @cached_property
    def linear(self) -> LinearFit:
        """The classifier, fitted when it is first used."""
        assert self.fit_moments is not None
        return ridge_regression(self.fit_moments, self.tune_moments)

    def predict(self, features: Tensor) -> Tensor:
        return self.linear(features[:, None])[:, 0].argmax(1)


class Separability(_ClassificationMeasure):
    """Nearest-class-mean accuracy, NC4 of neural collapse (Papyan, Han, Donoho 2020)."""

    title = "nearest-class-mean accuracy"
    definition = (
        "share of held-out images whose features (as for the probe) are closest to the mean of "
        "their own class in the training images (NC4 of Papyan, Han, Donoho 2020); interval: Wilson"
    )
    sums: Tensor | None = None

    def fit_features(self, features: Tensor, one_hot: Tensor) -> None:
        sums = one_hot.T @ features
        self.sums = sums if self.sums is None else self.sums + sums

    @cached_property
    def class_means(self) -> Tensor:
        """Class means `[K, D]`; infinite for a class without training images."""
        assert self.sums is not None
        counts = self.class_counts.to(self.sums)[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), math.inf)

    def predict(self, features: Tensor) -> Tensor:
        return torch.cdist(features, self.class_means).nan_to_num(math.inf).argmin(1)


class Reconstruction(Measure):
    """R² of a linear decoder from the channels at a position to the image patch there."""

    title = "image reconstruction (R²)"
    definition = (
        f"share of the variance of held-out images ({PICTURE_SIDE} x {PICTURE_SIDE} px, about the "
        "mean training image) that ridge regression recovers: the channels at each position "
        "predict the image patch there, with the same weights at all positions; penalty as for "
        "the probe; interval: bootstrap over images"
    )
    requires_fit = True

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fit_moments: Moments | None = None
        self.tune_moments: Moments | None = None
        self.residual_squares: list[Tensor] = []
        self.total_squares: list[Tensor] = []

    def fit(self, batch: StageBatch) -> None:
        self.fit_moments, self.tune_moments = _add_to_moments(
            self.fit_moments, self.tune_moments, *batch.positions
        )

    @cached_property
    def linear(self) -> LinearFit:
        """The decoder, fitted when it is first used."""
        assert self.fit_moments is not None
        return ridge_regression(self.fit_moments, self.tune_moments)

    def update(self, batch: StageBatch) -> None:
        x, y = batch.positions
        self.residual_squares.append((y - self.linear(x)).square().sum((1, 2)).cpu())
        self.total_squares.append((y - self.linear.y_mean).square().sum((1, 2)).cpu())

    def compute(self) -> MetricValue:
        residual = torch.cat(self.residual_squares).numpy()
        total = torch.cat(self.total_squares).numpy()
        if total.sum() <= 0:
            return MetricValue(None)  # every image equals the mean image
        interval = ratio_interval(residual, total, seed=0)
        r2_interval = None if interval is None else (1 - interval[1], 1 - interval[0])
        details = {"penalty": self.linear.penalty, "features": self.linear.weights.shape[0]}
        return MetricValue(1 - float(residual.sum() / total.sum()), r2_interval, details)


def _add_to_moments(
    fit: Moments | None, tune: Moments | None, x: Tensor, y: Tensor
) -> tuple[Moments, Moments]:
    """Add four fifths of a batch to `fit` and one fifth to `tune`; create them for the first."""
    sizes = (x.shape[1], x.shape[2], y.shape[2], str(x.device))
    fit, tune = fit or Moments(*sizes), tune or Moments(*sizes)
    number = torch.arange(len(x), device=x.device) + fit.n + tune.n
    is_tuning = number % TUNING_INTERVAL == TUNING_INTERVAL - 1
    fit.add(x[~is_tuning], y[~is_tuning])
    tune.add(x[is_tuning], y[is_tuning])
    return fit, tune


# Measures of the activations alone


class DeadChannels(Measure):
    """Share of channels that are dead or nearly dead."""

    title = "dead or nearly dead channels"
    definition = (
        "dead: constant over the images at every position (deviation below 1e-4 of the stage's "
        "median); nearly dead: above 0 anywhere on the map in fewer than 1% of the images or, "
        "if the stage has values below 0 (GELU, SiLU, no activation), with a deviation below 1% "
        "of the stage's median; a count, so there is no interval"
    )

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.n, self.min_value = 0, math.inf

    def update(self, batch: StageBatch) -> None:
        maps = batch.maps.double()
        if not self.n:
            # Sums are of differences from the maps of the first image, to avoid cancellation.
            self.origin = maps[:1].clone()
            self.sums, self.squares = torch.zeros_like(maps[0]), torch.zeros_like(maps[0])
            self.active = torch.zeros(maps.shape[1], dtype=torch.int64, device=maps.device)
        self.n += len(maps)
        self.min_value = min(self.min_value, float(batch.maps.min()))
        self.active += (batch.maps.amax((2, 3)) > 0).sum(0)
        shifted = maps - self.origin
        self.sums += shifted.sum(0)
        self.squares += shifted.square().sum(0)

    def compute(self) -> MetricValue:
        if self.n < 2:
            return MetricValue(None)
        variance = (self.squares / self.n - (self.sums / self.n).square()).clamp(min=0)
        deviation = variance.mean((1, 2)).sqrt()
        nonzero = deviation[deviation > 0]
        median = float(nonzero.median()) if len(nonzero) else 0.0
        dead = deviation <= DEAD_DEVIATION * median
        rectified = self.min_value >= 0
        rare = self.active < RARE_SHARE * self.n if rectified else deviation < RARE_SHARE * median
        nearly_dead = rare & ~dead
        counts = {
            "dead": int(dead.sum()),
            "nearly_dead": int(nearly_dead.sum()),
            "channels": len(dead),
        }
        share = (counts["dead"] + counts["nearly_dead"]) / len(dead)
        return MetricValue(share, None, {**counts, "rectified": rectified})


class _MeanShare(Measure):
    """Mean over images of a share that is computed for each image."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.shares: list[Tensor] = []

    @abstractmethod
    def image_shares(self, maps: Tensor) -> Tensor:
        """Return the share of each image, float64 `[B]`."""

    def update(self, batch: StageBatch) -> None:
        self.shares.append(self.image_shares(batch.maps).cpu())

    def compute(self) -> MetricValue:
        shares = torch.cat(self.shares)
        mean = float(shares.mean())
        if len(shares) < 2:
            return MetricValue(mean)
        error = 1.96 * float(shares.std()) / len(shares) ** 0.5
        return MetricValue(mean, (max(0.0, mean - error), min(1.0, mean + error)))


class SilentChannels(_MeanShare):
    """Sparsity, the share of activations at or below 0."""

    title = "sparsity"
    definition = (
        "share of activations at or below 0; interval: mean over images ± 1.96 standard errors"
    )

    def image_shares(self, maps: Tensor) -> Tensor:
        return (maps <= 0).double().mean((1, 2, 3))


class BlankMaps(_MeanShare):
    """Share of channels without any positive value on an image."""

    title = "blank channels per image"
    definition = (
        "share of channels without a value above 0 on an image, mean over images; interval: "
        "± 1.96 standard errors"
    )

    def image_shares(self, maps: Tensor) -> Tensor:
        return (maps.amax((2, 3)) <= 0).double().mean(1)


class EffectiveRank(Measure):
    """Effective rank (Roy and Vetterli 2007) of the channel means over images."""

    title = "effective rank"
    definition = (
        "exp of the entropy of the normalized singular values (Roy & Vetterli 2007) of the "
        f"centered channel means over the map; above {MAX_RANK_CHANNELS} channels, of a random "
        f"projection to {MAX_RANK_CHANNELS}; interval: jackknife over 10 groups of images; at most "
        "images - 1"
    )
    scale = "log"

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.covariances: Covariances | None = None
        self.channels = 0

    def update(self, batch: StageBatch) -> None:
        self.channels = batch.maps.shape[1]
        vectors = reduce_dimensions(batch.means, MAX_RANK_CHANNELS)
        if self.covariances is None:
            self.covariances = Covariances(vectors.shape[1], str(vectors.device))
        self.covariances.add(vectors)

    def compute(self) -> MetricValue:
        if self.covariances is None or float(self.covariances.n.sum()) < 2:
            return MetricValue(None)
        rank, interval = self.covariances.rank()
        return MetricValue(rank, interval, {"channels": self.channels})


class SpatialDetail(Measure):
    """Von Neumann's ratio of the maps over neighboring positions."""

    title = "fineness of the maps"
    definition = (
        "mean squared difference of neighboring positions over twice the variance within the "
        "map (von Neumann's ratio): 0 for smooth maps, 1 for white noise; undefined for maps below "
        "3 x 3; interval: bootstrap over images"
    )
    scale = "number"

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.differences: list[Tensor] = []
        self.variances: list[Tensor] = []

    def update(self, batch: StageBatch) -> None:
        if min(batch.maps.shape[2:]) < 3:
            return
        maps = batch.maps.double()
        horizontal = maps.diff(dim=3).square().mean((2, 3))
        vertical = maps.diff(dim=2).square().mean((2, 3))
        self.differences.append(((horizontal + vertical) / 2).sum(1).cpu())
        self.variances.append(2 * maps.flatten(2).var(2).sum(1).cpu())

    def compute(self) -> MetricValue:
        if not self.differences:
            return MetricValue(None)
        differences = torch.cat(self.differences).numpy()
        variances = torch.cat(self.variances).numpy()
        if variances.sum() <= 0:
            return MetricValue(None)
        interval = ratio_interval(differences, variances, seed=0)
        return MetricValue(float(differences.sum() / variances.sum()), interval)


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
