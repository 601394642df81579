"""Linear regression, intervals and ranks from sums over images: nothing here keeps an image.

All sums are float64, so that closed forms can be taken of them however many images there were.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Ridge penalties that are tried, in units of the mean variance of a feature times the images.
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
RESAMPLE_GROUPS = 10  # of the jackknife
T_OF_GROUPS = 2.2622  # 97.5% point of Student's t with 9 degrees of freedom
RESAMPLES = 500
NEGLIGIBLE = 1e-10  # a variance of this share of the mean square is rounding


class Moments:
    """Sums over images for the regression of `y` on `x` at several positions.

    Each position has its own means, all share the weights, as a convolution would.

    Args:
        positions, features, targets: sizes of what is added.
    """

    def __init__(self, positions: int, features: int, targets: int, device: str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = 0
        self.x, self.y = zeros(positions, features), zeros(positions, targets)
        self.xx, self.xy, self.yy = zeros(features, features), zeros(features, targets), zeros()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in float64 `[N, positions, features]` and `[N, positions, targets]`."""
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        flat, goal = x.flatten(0, 1), y.flatten(0, 1)
        self.xx += flat.T @ flat
        self.xy += flat.T @ goal
        self.yy += goal.square().sum()

    def plus(self, other: Moments) -> Moments:
        """The sums over the images of both."""
        both = Moments(len(self.x), len(self.xx), self.y.shape[1], str(self.x.device))
        for key in ("n", "x", "y", "xx", "xy", "yy"):
            setattr(both, key, getattr(self, key) + getattr(other, key))
        return both

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of products of the deviations from `x` and `y` (means of each position)."""
        crossed = self.x.T @ x
        xx = self.xx - crossed - crossed.T + self.n * x.T @ x
        xy = self.xy - self.x.T @ y - x.T @ self.y + self.n * x.T @ y
        yy = self.yy - 2 * (self.y * y).sum() + self.n * y.square().sum()
        return xx, xy, yy


@dataclass(frozen=True)
class LinearFit:
    """A fitted regression; `penalty` is in the units of `PENALTIES`, None of constant features."""

    weights: Tensor
    x: Tensor
    y: Tensor
    penalty: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions float64 `[N, positions, targets]`."""
        return self.y + (x - self.x) @ self.weights


def ridge_regression(
    fit: Moments, tune: Moments | None = None, penalty: float | None = None
) -> LinearFit:
    """Ridge regression in closed form, its penalty the one of least squared error on `tune`.

    With the penalty found, the weights are those of `fit` and `tune` together. Features aren't
    scaled: a stage's own scale of its channels is part of what it says. Hoerl and Kennard 1970.
    """
    if tune is not None and tune.n and penalty is None:
        penalty = _best_penalty(fit, tune)
        fit = fit.plus(tune)
    means = fit.x / fit.n, fit.y / fit.n
    xx, xy, _ = fit.about(*means)
    scale = _scale(fit, xx)
    if scale is None:
        return LinearFit(torch.zeros_like(fit.xy), *means, None)
    penalty = PENALTIES[3] if penalty is None else penalty
    ridged = xx + penalty * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return LinearFit(torch.linalg.solve(ridged, xy), *means, penalty)


def _scale(fit: Moments, xx: Tensor) -> float | None:
    """The mean over features of the summed squared deviations; None where all are constant."""
    total = float(xx.trace())
    return total / len(xx) if total > NEGLIGIBLE * float(fit.xx.trace()) else None


def _best_penalty(fit: Moments, tune: Moments) -> float | None:
    """All penalties by one eigendecomposition, judged without seeing `tune`'s images again.

    With xx = Q L Q', weights are Q V with V = (L + penalty)^-1 Q' xy; their error on `tune` is
    yy - 2 <V, Q' xy_t> + <V, Q' xx_t Q V>.
    """
    means = fit.x / fit.n, fit.y / fit.n
    xx, xy, _ = fit.about(*means)
    scale = _scale(fit, xx)
    if scale is None:
        return None
    xx_t, xy_t, yy_t = tune.about(*means)
    values, vectors = torch.linalg.eigh(xx)
    own = vectors.T @ xy
    gain = (own * (vectors.T @ xy_t)).sum(1)
    cost = (own @ own.T) * (vectors.T @ xx_t @ vectors)

    def error(penalty: float) -> float:
        shrunk = 1 / (values.clamp(min=0) + penalty * scale)
        return float(yy_t - 2 * (shrunk @ gain) + shrunk @ cost @ shrunk)

    return min(PENALTIES, key=error)


class Covariances:
    """Sums for the covariance of vectors, kept apart in `GROUPS` groups of images."""

    def __init__(self, features: int, device: str = "cpu") -> None:
        shape, kind = (RESAMPLE_GROUPS, features), {"dtype": torch.float64, "device": device}
        self.n = torch.zeros(RESAMPLE_GROUPS, **kind)  # type: ignore[call-overload]
        self.x = torch.zeros(shape, **kind)  # type: ignore[call-overload]
        self.xx = torch.zeros((*shape, features), **kind)  # type: ignore[call-overload]
        self._next = 0

    def add(self, x: Tensor) -> None:
        """Takes in float64 `[N, features]`, dealt to the groups in turn."""
        for offset in range(min(RESAMPLE_GROUPS, len(x))):
            group, some = (self._next + offset) % RESAMPLE_GROUPS, x[offset::RESAMPLE_GROUPS]
            self.n[group] += len(some)
            self.x[group] += some.sum(0)
            self.xx[group] += some.T @ some
        self._next = (self._next + len(x)) % RESAMPLE_GROUPS

    def rank(self) -> tuple[float, tuple[float, float] | None]:
        """Effective rank of all vectors, and its interval where each group has two or more.

        The interval is the delete-a-group jackknife's, by Student's t with 9 degrees of freedom.
        """
        n, x, xx = self.n.sum(), self.x.sum(0), self.xx.sum(0)
        whole = self._rank(n, x, xx)
        if self.n.min() < 2:
            return whole, None
        without = [
            self._rank(n - self.n[g], x - self.x[g], xx - self.xx[g])
            for g in range(RESAMPLE_GROUPS)
        ]
        error = np.std(without) * np.sqrt(RESAMPLE_GROUPS - 1)
        low, high = whole - T_OF_GROUPS * error, whole + T_OF_GROUPS * error
        return whole, (max(1.0, float(low)), min(float(len(x)), float(high)))

    @staticmethod
    def _rank(n: Tensor, x: Tensor, xx: Tensor) -> float:
        centred = xx - torch.outer(x, x) / n
        if float(centred.trace()) <= NEGLIGIBLE * float(xx.trace()):
            return 1.0  # constant: exp of no entropy
        return effective_rank(torch.linalg.eigvalsh(centred).clamp(min=0).sqrt())


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of the singular values over their sum: from 1 to how many there are.

    Roy and Vetterli 2007, The effective rank, EUSIPCO.
    """
    shares = singular / singular.sum()
    # Of exact rank k the others are square roots of rounding, 1e-8, that many of them would count.
    shares = shares[shares > 1e-6]
    return float((-(shares * shares.log()).sum()).exp())


def ratio_interval(part: np.ndarray, whole: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95% interval of sum(part) / sum(whole), both float `[N]`, by the bootstrap over images.

    Percentiles of `RESAMPLES` resamples; None for fewer than ten images.
    """
    if len(part) < 10:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(part), len(part))
        total = whole[drawn].sum()
        ratios.append(part[drawn].sum() / total if total > 0 else 0.0)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


@cache
def random_projection(features: int, to: int) -> Tensor:
    """A Gaussian random projection float32 `[features, to]` that keeps lengths on average.

    Johnson and Lindenstrauss 1984. Always the same one, on every device.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, to, generator=generator).div(to**0.5)


def reduce_dimensions(x: Tensor, most: int) -> Tensor:
    """The last dimension projected at random to `most` where it is larger."""
    if x.shape[-1] <= most:
        return x
    found: Tensor = x @ random_projection(x.shape[-1], most).to(x)
    return found


# ---- similarity ----------------------------------------
# How alike two stages are, of one network or of two: linear CKA over a stream of batches.

MIN_IMAGES = 4  # images in a batch: below, the unbiased estimator doesn't exist
MIN_NORM = 1e-6  # of the length: what is left of a constant after rounding in float32


def gram_matrix(maps: Tensor) -> Tensor:
    """Inner products float64 `[B, B]` of activations `[B, ...]`, less their mean over the batch.

    The estimator doesn't mind the mean, but float32 does. Exactly 0 for a constant, at any scale.
    """
    whole = maps.flatten(1)
    flat = whole - whole.mean(0)
    if float(flat.norm()) <= MIN_NORM * float(whole.norm()):
        return flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    return (flat @ flat.T).double() / flat.shape[1]


def hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC `[M, M]` between all pairs of inner products `[M, B, B]`.

    Song et al. 2012, Feature selection via dependence maximization, equation 5.
    """
    n = grams.shape[1]
    inner = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    flat, rows = inner.flatten(1), inner.sum(2)
    totals = rows.sum(1)
    traces = flat @ flat.T
    both = torch.outer(totals, totals) / ((n - 1) * (n - 2))
    found: Tensor = (traces + both - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))
    return found


class CKA:
    """Linear CKA between all of some representations of the same images, batch by batch.

    The unbiased HSICs of the batches are averaged before the ratio is taken, which makes the
    result independent of the batch size, but for noise: Nguyen, Raghu, Kornblith 2021, Do wide
    and deep networks learn the same things?, equation 3. Linear CKA: Kornblith et al. 2019.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Hashable, Hashable], float] = {}

    def add(self, grams: Mapping[Hashable, Tensor]) -> None:
        """Takes in a batch: `gram` of each representation; fewer than four images are skipped."""
        names = list(grams)
        stacked = torch.stack([grams[name].cpu() for name in names])
        n = stacked.shape[1]
        if n < MIN_IMAGES:
            return
        for name, row in zip(names, (n * hsic(stacked)).tolist(), strict=True):
            for other, value in zip(names, row, strict=True):
                self._sums[name, other] = self._sums.get((name, other), 0.0) + value

    def matrix(self, names: Sequence[Hashable]) -> list[list[float | None]]:
        """CKA `[M, M]` in the order of `names`; noise may bring it a little outside 0 to 1.

        None for a representation that is constant, or before any image.
        """
        own = {name: self._sums.get((name, name), 0.0) for name in names}
        return [
            [
                self._sums[one, other] / math.sqrt(own[one] * own[other])
                if min(own[one], own[other]) > 0
                else None
                for other in names
            ]
            for one in names
        ]
