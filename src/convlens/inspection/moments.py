"""Linear regression, intervals and ranks from sums over images: nothing here keeps an image.

All sums are float64, so that closed forms can be taken of them however many images there were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Ridge penalties that are tried, in units of the mean variance of a feature times the images.
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
GROUPS = 10  # of the jackknife
T_OF_GROUPS = 2.2622  # 97.5% point of Student's t with 9 degrees of freedom
RESAMPLES = 500
NOTHING = 1e-10  # a variance of this share of the mean square is rounding


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
class Linear:
    """A fitted regression; `penalty` is in the units of `PENALTIES`, None of constant features."""

    weights: Tensor
    x: Tensor
    y: Tensor
    penalty: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions float64 `[N, positions, targets]`."""
        return self.y + (x - self.x) @ self.weights


def ridge(fit: Moments, tune: Moments | None = None, penalty: float | None = None) -> Linear:
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
        return Linear(torch.zeros_like(fit.xy), *means, None)
    penalty = PENALTIES[3] if penalty is None else penalty
    ridged = xx + penalty * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return Linear(torch.linalg.solve(ridged, xy), *means, penalty)


def _scale(fit: Moments, xx: Tensor) -> float | None:
    """The mean over features of the summed squared deviations; None where all are constant."""
    total = float(xx.trace())
    return total / len(xx) if total > NOTHING * float(fit.xx.trace()) else None


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
        shape, kind = (GROUPS, features), {"dtype": torch.float64, "device": device}
        self.n = torch.zeros(GROUPS, **kind)  # type: ignore[call-overload]
        self.x = torch.zeros(shape, **kind)  # type: ignore[call-overload]
        self.xx = torch.zeros((*shape, features), **kind)  # type: ignore[call-overload]
        self._next = 0

    def add(self, x: Tensor) -> None:
        """Takes in float64 `[N, features]`, dealt to the groups in turn."""
        for offset in range(min(GROUPS, len(x))):
            group, some = (self._next + offset) % GROUPS, x[offset::GROUPS]
            self.n[group] += len(some)
            self.x[group] += some.sum(0)
            self.xx[group] += some.T @ some
        self._next = (self._next + len(x)) % GROUPS

    def rank(self) -> tuple[float, tuple[float, float] | None]:
        """Effective rank of all vectors, and its interval where each group has two or more.

        The interval is the delete-a-group jackknife's, by Student's t with 9 degrees of freedom.
        """
        n, x, xx = self.n.sum(), self.x.sum(0), self.xx.sum(0)
        whole = self._rank(n, x, xx)
        if self.n.min() < 2:
            return whole, None
        without = [self._rank(n - self.n[g], x - self.x[g], xx - self.xx[g]) for g in range(GROUPS)]
        error = np.std(without) * np.sqrt(GROUPS - 1)
        low, high = whole - T_OF_GROUPS * error, whole + T_OF_GROUPS * error
        return whole, (max(1.0, float(low)), min(float(len(x)), float(high)))

    @staticmethod
    def _rank(n: Tensor, x: Tensor, xx: Tensor) -> float:
        centred = xx - torch.outer(x, x) / n
        if float(centred.trace()) <= NOTHING * float(xx.trace()):
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
def projection(features: int, to: int) -> Tensor:
    """A Gaussian random projection float32 `[features, to]` that keeps lengths on average.

    Johnson and Lindenstrauss 1984. Always the same one, on every device.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, to, generator=generator).div(to**0.5)


def reduced(x: Tensor, most: int) -> Tensor:
    """The last dimension projected at random to `most` where it is larger."""
    if x.shape[-1] <= most:
        return x
    found: Tensor = x @ projection(x.shape[-1], most).to(x)
    return found
