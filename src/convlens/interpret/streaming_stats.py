"""Statistics from sums over a stream of batches: no image or activation is kept.

Ridge regression, covariances with the effective rank, linear CKA, the bootstrap of a ratio, and
random projections that bound the number of features. Sums are float64, so that the closed forms
stay accurate however many images are added.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Candidate ridge penalties, in units of the mean variance of a feature times the number of images.
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
DEFAULT_PENALTY = 1e-3  # used when there are no tuning images
JACKKNIFE_GROUPS = 10
JACKKNIFE_T = 2.2622  # 97.5% point of Student's t with 9 degrees of freedom
BOOTSTRAP_RESAMPLES = 500
MIN_BOOTSTRAP_IMAGES = 10
MIN_RELATIVE_VARIANCE = 1e-10  # a variance below this share of the mean square is rounding error
MIN_CKA_BATCH = 4  # images: the unbiased HSIC estimator does not exist for fewer
MIN_RELATIVE_NORM = 1e-6  # below, the centered activations are rounding error of a constant


# Ridge regression


class Moments:
    """Sums over images for the linear regression of `y` on `x` at several positions.

    Each position has its own means; all positions share the weights, as in a convolution.

    Args:
        positions: number of positions in an image.
        features: number of features at each position.
        targets: number of regression targets at each position.
        device: where the sums are kept.
    """

    def __init__(self, positions: int, features: int, targets: int, device: str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = 0
        self.x, self.y = zeros(positions, features), zeros(positions, targets)
        self.xx, self.xy, self.yy = zeros(features, features), zeros(features, targets), zeros()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add float64 batches `x [N, positions, features]` and `y [N, positions, targets]`."""
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        flat_x, flat_y = x.flatten(0, 1), y.flatten(0, 1)
        self.xx += flat_x.T @ flat_x
        self.xy += flat_x.T @ flat_y
        self.yy += flat_y.square().sum()

    def merged(self, other: Moments) -> Moments:
        """Return the sums over the images of both."""
        total = Moments(len(self.x), len(self.xx), self.y.shape[1], str(self.x.device))
        for key in ("n", "x", "y", "xx", "xy", "yy"):
            setattr(total, key, getattr(self, key) + getattr(other, key))
        return total

    def centered(self, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums `xx`, `xy`, `yy` of products of deviations from the given means.

        Args:
            x_mean: `[positions, features]`.
            y_mean: `[positions, targets]`.
        """
        cross = self.x.T @ x_mean
        xx = self.xx - cross - cross.T + self.n * x_mean.T @ x_mean
        xy = self.xy - self.x.T @ y_mean - x_mean.T @ self.y + self.n * x_mean.T @ y_mean
        yy = self.yy - 2 * (self.y * y_mean).sum() + self.n * y_mean.square().sum()
        return xx, xy, yy


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear regression.

    Attributes:
        weights: `[features, targets]`.
        x_mean: means of the features at each position, `[positions, features]`.
        y_mean: means of the targets at each position, `[positions, targets]`.
        penalty: in the units of `PENALTIES`; None if all features are constant.
    """

    weights: Tensor
    x_mean: Tensor
    y_mean: Tensor
    penalty: float | None

    def __call__(self, x: Tensor) -> Tensor:
        """Return predictions, float64 `[N, positions, targets]`."""
        return self.y_mean + (x - self.x_mean) @ self.weights


def ridge_regression(
    fit: Moments, tune: Moments | None = None, penalty: float | None = None
) -> LinearFit:
    """Fit a ridge regression in closed form (Hoerl and Kennard 1970).

    Features are not standardized: the relative scale of a stage's channels is part of its
    representation.

    Args:
        fit: sums over the images to fit.
        tune: sums over the images that select the penalty with the least squared error on them.
            The weights are then fitted to `fit` and `tune` together.
        penalty: a fixed penalty, in the units of `PENALTIES`; it takes precedence over `tune`.
    """
    if tune is not None and tune.n and penalty is None:
        penalty = _select_penalty(fit, tune)
        fit = fit.merged(tune)
    x_mean, y_mean = fit.x / fit.n, fit.y / fit.n
    xx, xy, _ = fit.centered(x_mean, y_mean)
    scale = _penalty_scale(fit, xx)
    if scale is None:
        return LinearFit(torch.zeros_like(fit.xy), x_mean, y_mean, None)
    penalty = DEFAULT_PENALTY if penalty is None else penalty
    regularized = xx + penalty * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return LinearFit(torch.linalg.solve(regularized, xy), x_mean, y_mean, penalty)


def _penalty_scale(fit: Moments, xx: Tensor) -> float | None:
    """Return the mean over features of the summed squared deviations; None if all are constant."""
    total = float(xx.trace())
    return total / len(xx) if total > MIN_RELATIVE_VARIANCE * float(fit.xx.trace()) else None


def _select_penalty(fit: Moments, tune: Moments) -> float | None:
    """Return the penalty with the least squared error on `tune`, from one eigendecomposition.

    With xx = Q L Q', the weights are Q V with V = (L + penalty)^-1 Q' xy; their error on `tune` is
    yy - 2 <V, Q' xy_t> + <V, Q' xx_t Q V>.
    """
    x_mean, y_mean = fit.x / fit.n, fit.y / fit.n
    xx, xy, _ = fit.centered(x_mean, y_mean)
    scale = _penalty_scale(fit, xx)
    if scale is None:
        return None
    xx_tune, xy_tune, yy_tune = tune.centered(x_mean, y_mean)
    eigenvalues, eigenvectors = torch.linalg.eigh(xx)
    rotated = eigenvectors.T @ xy
    linear = (rotated * (eigenvectors.T @ xy_tune)).sum(1)
    quadratic = (rotated @ rotated.T) * (eigenvectors.T @ xx_tune @ eigenvectors)

    def squared_error(penalty: float) -> float:
        inverse = 1 / (eigenvalues.clamp(min=0) + penalty * scale)
        return float(yy_tune - 2 * (inverse @ linear) + inverse @ quadratic @ inverse)

    return min(PENALTIES, key=squared_error)


# Effective rank


class Covariances:
    """Sums for the covariance of vectors, in `JACKKNIFE_GROUPS` separate groups of images."""

    def __init__(self, features: int, device: str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = zeros(JACKKNIFE_GROUPS)
        self.x = zeros(JACKKNIFE_GROUPS, features)
        self.xx = zeros(JACKKNIFE_GROUPS, features, features)
        self._next_group = 0

    def add(self, x: Tensor) -> None:
        """Add vectors, float64 `[N, features]`, to the groups in turn."""
        for offset in range(min(JACKKNIFE_GROUPS, len(x))):
            group = (self._next_group + offset) % JACKKNIFE_GROUPS
            rows = x[offset::JACKKNIFE_GROUPS]
            self.n[group] += len(rows)
            self.x[group] += rows.sum(0)
            self.xx[group] += rows.T @ rows
        self._next_group = (self._next_group + len(x)) % JACKKNIFE_GROUPS

    def rank(self) -> tuple[float, tuple[float, float] | None]:
        """Return the effective rank of all vectors and its 95% interval.

        The interval is that of the delete-a-group jackknife, by Student's t with 9 degrees of
        freedom; None if a group has fewer than two vectors.
        """
        n, x, xx = self.n.sum(), self.x.sum(0), self.xx.sum(0)
        rank = self._rank(n, x, xx)
        if self.n.min() < 2:
            return rank, None
        leave_one_out = [
            self._rank(n - self.n[g], x - self.x[g], xx - self.xx[g])
            for g in range(JACKKNIFE_GROUPS)
        ]
        error = np.std(leave_one_out) * np.sqrt(JACKKNIFE_GROUPS - 1)
        low, high = rank - JACKKNIFE_T * error, rank + JACKKNIFE_T * error
        return rank, (max(1.0, float(low)), min(float(len(x)), float(high)))

    @staticmethod
    def _rank(n: Tensor, x: Tensor, xx: Tensor) -> float:
        centered = xx - torch.outer(x, x) / n
        if float(centered.trace()) <= MIN_RELATIVE_VARIANCE * float(xx.trace()):
            return 1.0  # constant vectors: exp of an entropy of 0
        return effective_rank(torch.linalg.eigvalsh(centered).clamp(min=0).sqrt())


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the normalized singular values, from 1 to their number.

    Roy and Vetterli 2007, The effective rank, EUSIPCO.
    """
    shares = singular_values / singular_values.sum()
    # For an exact rank k the remaining values are square roots of rounding errors, about 1e-8;
    # in large numbers they would count.
    shares = shares[shares > 1e-6]
    return float((-(shares * shares.log()).sum()).exp())


# Intervals and projections


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, seed: int
) -> tuple[float, float] | None:
    """Return the 95% bootstrap interval of sum(numerator) / sum(denominator) over images.

    Args:
        numerator: one value for each image, `[N]`.
        denominator: one value for each image, `[N]`.
        seed: of the `BOOTSTRAP_RESAMPLES` resamples.

    Returns:
        The 2.5% and 97.5% percentiles; None for fewer than ten images.
    """
    n = len(numerator)
    if n < MIN_BOOTSTRAP_IMAGES:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        index = generator.integers(0, n, n)
        total = denominator[index].sum()
        ratios.append(numerator[index].sum() / total if total > 0 else 0.0)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


@cache
def random_projection(features: int, dimensions: int) -> Tensor:
    """Return a Gaussian random projection, float32 `[features, dimensions]`.

    It preserves lengths on average (Johnson and Lindenstrauss 1984) and is the same on every
    call and every device.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(features, dimensions, generator=generator).div(dimensions**0.5)


def reduce_dimensions(x: Tensor, max_dimensions: int) -> Tensor:
    """Project the last dimension at random to `max_dimensions` if it is larger."""
    if x.shape[-1] <= max_dimensions:
        return x
    projected: Tensor = x @ random_projection(x.shape[-1], max_dimensions).to(x)
    return projected


# Linear CKA


def gram_matrix(maps: Tensor) -> Tensor:
    """Return the inner products, float64 `[B, B]`, of activations `[B, ...]` minus their mean.

    HSIC does not depend on the mean over the batch, but float32 rounding does. Exactly 0 for a
    constant, at any scale.
    """
    flat = maps.flatten(1)
    centered = flat - flat.mean(0)
    if float(centered.norm()) <= MIN_RELATIVE_NORM * float(flat.norm()):
        return centered.new_zeros(len(flat), len(flat), dtype=torch.float64)
    return (centered @ centered.T).double() / centered.shape[1]


def hsic(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC `[M, M]` of all pairs of Gram matrices `[M, B, B]`.

    Song et al. 2012, Feature selection via dependence maximization, equation 5.
    """
    n = grams.shape[1]
    off_diagonal = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    flat, row_sums = off_diagonal.flatten(1), off_diagonal.sum(2)
    totals = row_sums.sum(1)
    traces = flat @ flat.T
    products = torch.outer(totals, totals) / ((n - 1) * (n - 2))
    result: Tensor = (traces + products - 2 / (n - 2) * row_sums @ row_sums.T) / (n * (n - 3))
    return result


class CKA:
    """Linear CKA between all pairs of representations of the same images, batch by batch.

    The unbiased HSICs of the batches are averaged before the ratio is taken, which makes the
    result independent of the batch size except for noise: Nguyen, Raghu, Kornblith 2021, Do wide
    and deep networks learn the same things?, equation 3. Linear CKA: Kornblith et al. 2019.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Hashable, Hashable], float] = {}

    def add(self, grams: Mapping[Hashable, Tensor]) -> None:
        """Add a batch, given as the `gram_matrix` of each representation.

        Batches of fewer than four images are skipped.
        """
        names = list(grams)
        stacked = torch.stack([grams[name].cpu() for name in names])
        n = stacked.shape[1]
        if n < MIN_CKA_BATCH:
            return
        for name, row in zip(names, (n * hsic(stacked)).tolist(), strict=True):
            for other, value in zip(names, row, strict=True):
                self._sums[name, other] = self._sums.get((name, other), 0.0) + value

    def matrix(self, names: Sequence[Hashable]) -> list[list[float | None]]:
        """Return the CKA `[M, M]` in the order of `names`.

        Noise may move values slightly outside 0 to 1. None for a representation that is constant,
        or before the first batch.
        """
        norms = {name: self._sums.get((name, name), 0.0) for name in names}
        return [
            [
                self._sums[one, other] / math.sqrt(norms[one] * norms[other])
                if min(norms[one], norms[other]) > 0
                else None
                for other in names
            ]
            for one in names
        ]
