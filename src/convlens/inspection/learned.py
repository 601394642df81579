"""Measurements that learn from training images and are scored on others: linear readings."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from convlens.inspection.moments import Linear, Moments, ratio_interval, ridge
from convlens.inspection.stagebatch import MOST, SIDE, Batch, Measure, Value
from convlens.metrics import wilson_interval

TUNED = 5  # every n-th training image chooses the penalty


class _Classified(Measure):
    """Accuracy of what was learned from the pooled training features, with Wilson's interval."""

    learns = True

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.learned = torch.zeros(classes, dtype=torch.int64)  # images of each class
        self.n, self.correct = 0, 0

    def learn(self, batch: Batch) -> None:
        self.learned += batch.labels.cpu().bincount(minlength=self.classes)
        goal = F.one_hot(batch.labels, self.classes).double()
        self.take(batch.pooled, goal)

    @abstractmethod
    def take(self, features: Tensor, goal: Tensor) -> None:
        """Takes in pooled training features `[B, D]` and one-hot labels, float64 `[B, K]`."""

    @abstractmethod
    def says(self, features: Tensor) -> Tensor:
        """The class int64 `[B]` of pooled features."""

    def see(self, batch: Batch) -> None:
        self.n += len(batch.labels)
        self.correct += int((self.says(batch.pooled) == batch.labels).sum())

    def value(self) -> Value:
        if int((self.learned > 0).sum()) < 2 or not self.n:
            return Value(None)  # one class can't be told from another
        interval = wilson_interval(self.correct, self.n)
        return Value(self.correct / self.n, interval, {"n": self.n, "correct": self.correct})


class Probe(_Classified):
    title = "linear-probe accuracy"
    about = (
        "held-out accuracy of a ridge classifier on maps averaged to 2 x 2 (above "
        f"{MOST} features: a random projection to {MOST}), its penalty chosen on a fifth of the "
        "training images (after Alain & Bengio 2016); interval: Wilson"
    )

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.fit: Moments | None = None
        self.tune: Moments | None = None

    def take(self, features: Tensor, goal: Tensor) -> None:
        self.fit, self.tune = _learn(self.fit, self.tune, features[:, None], goal[:, None])

    @cached_property
    def linear(self) -> Linear:
        assert self.fit is not None
        return ridge(self.fit, self.tune)

    def says(self, features: Tensor) -> Tensor:
        return self.linear(features[:, None])[:, 0].argmax(1)


class Separability(_Classified):
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


class Picture(Measure):
    title = "picture rebuilt (R²)"
    about = (
        f"share of the held-out pictures' variance ({SIDE} x {SIDE} px, about the mean training "
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

    def learn(self, batch: Batch) -> None:
        self.fit, self.tune = _learn(self.fit, self.tune, *batch.cells)

    @cached_property
    def linear(self) -> Linear:
        assert self.fit is not None
        return ridge(self.fit, self.tune)

    def see(self, batch: Batch) -> None:
        x, y = batch.cells
        self.missed.append((y - self.linear(x)).square().sum((1, 2)).cpu())
        self.whole.append((y - self.linear.y).square().sum((1, 2)).cpu())

    def value(self) -> Value:
        missed, whole = torch.cat(self.missed).numpy(), torch.cat(self.whole).numpy()
        if whole.sum() <= 0:
            return Value(None)  # every picture is the mean picture
        interval = ratio_interval(missed, whole, seed=0)
        ends = None if interval is None else (1 - interval[1], 1 - interval[0])
        details = {"penalty": self.linear.penalty, "features": self.linear.weights.shape[0]}
        return Value(1 - float(missed.sum() / whole.sum()), ends, details)


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
