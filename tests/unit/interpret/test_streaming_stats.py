"""Ridge regression, effective ranks, intervals and projections, against direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from convlens.interpret.streaming_stats import (
    PENALTIES,
    Covariances,
    Moments,
    effective_rank,
    random_projection,
    ratio_interval,
    reduce_dimensions,
    ridge_regression,
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sums(x: Tensor, y: Tensor, size: int = 1000) -> Moments:
    found = Moments(x.shape[1], x.shape[2], y.shape[2])
    for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
        found.add(x_part, y_part)
    return found


def test_ridge_regression_equals_scikit_learn_for_any_batches() -> None:
    x, y = numbers(60, 1, 7) + 5, numbers(60, 1, 3, seed=1)
    fitted = ridge_regression(sums(x, y, 13), penalty=0.1)
    flat = x[:, 0].numpy()
    alpha = 0.1 * ((flat - flat.mean(0)) ** 2).sum() / 7
    theirs = Ridge(alpha=alpha).fit(flat, y[:, 0].numpy())
    np.testing.assert_allclose(fitted.weights.numpy(), theirs.coef_.T, atol=1e-10)
    np.testing.assert_allclose(fitted(x)[:, 0].numpy(), theirs.predict(flat), atol=1e-10)


def test_positions_share_weights_but_not_means() -> None:
    weights, shift = numbers(4, 2), numbers(1, 9, 2, seed=1) * 10
    x = numbers(50, 9, 4, seed=2) + numbers(1, 9, 4, seed=3) * 10
    y = x @ weights + shift
    fitted = ridge_regression(sums(x, y, 7), penalty=1e-12)
    torch.testing.assert_close(fitted.weights, weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(fitted(x), y, rtol=0, atol=1e-7)


def test_selected_penalty_is_that_of_a_direct_search() -> None:
    # More features than images and mostly noise, so that neither end of the table is best.
    x, other = numbers(30, 1, 40), numbers(25, 1, 40, seed=1)
    weights = numbers(40, 2, seed=2)
    noise = 8 * numbers(55, 1, 2, seed=3)
    y, goal = x @ weights + noise[:30], other @ weights + noise[30:]
    errors = {
        p: float((ridge_regression(sums(x, y), penalty=p)(other) - goal).square().sum())
        for p in PENALTIES
    }
    best = min(errors, key=lambda p: errors[p])
    assert best not in (PENALTIES[0], PENALTIES[-1])
    chosen = ridge_regression(sums(x, y), sums(other, goal))
    assert chosen.penalty == best
    both = ridge_regression(sums(torch.cat([x, other]), torch.cat([y, goal])), penalty=best)
    torch.testing.assert_close(chosen.weights, both.weights)


def test_constant_features_predict_the_mean() -> None:
    x, y = torch.full((20, 1, 3), 0.1, dtype=torch.float64), numbers(20, 1, 2)
    fitted = ridge_regression(sums(x, y), sums(x, y))
    assert fitted.penalty is None
    torch.testing.assert_close(fitted(x), y.mean(0, keepdim=True).expand(20, 1, 2))


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_effective_rank_of_an_isotropic_cloud_is_its_dimension(k: int) -> None:
    basis = torch.linalg.qr(numbers(12, 12)).Q[:k]
    # +-1 along each axis in turn, so that the singular values are exactly equal.
    cloud = torch.cat([basis, -basis]).repeat(20, 1) + 3
    covariances = Covariances(12)
    for some in cloud.split(7):
        covariances.add(some)
    rank, interval = covariances.rank()
    assert rank == pytest.approx(k, abs=1e-6)
    assert interval is not None
    assert interval[0] <= rank + 1e-6
    assert interval[1] >= rank - 1e-6


def test_effective_rank_of_known_singular_values_and_of_a_constant() -> None:
    # Shares 1/2, 1/4, 1/4: entropy 1.5 bits.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    constant = Covariances(4)
    constant.add(torch.full((30, 4), 7.3, dtype=torch.float64))
    assert constant.rank() == (1.0, (1.0, 1.0))
    small = Covariances(4)
    small.add(numbers(12, 4))
    assert small.rank()[1] is None


def test_jackknife_interval_equals_that_of_a_loop() -> None:
    cloud = numbers(50, 4) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    covariances = Covariances(4)
    covariances.add(cloud)
    rank, interval = covariances.rank()

    def of(rows: Tensor) -> float:
        return effective_rank(torch.linalg.svdvals(rows - rows.mean(0)))

    groups = torch.arange(50) % 10
    without = [of(cloud[groups != g]) for g in range(10)]
    error = math.sqrt(9 / 10 * sum((w - np.mean(without)) ** 2 for w in without))
    assert rank == pytest.approx(of(cloud))
    assert interval == pytest.approx((rank - 2.2622 * error, rank + 2.2622 * error))


def test_bootstrap_interval_covers_a_known_ratio() -> None:
    hits = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        whole = generator.uniform(1, 3, 80)
        ends = ratio_interval(0.4 * whole + generator.normal(0, 0.3, 80), whole, seed)
        assert ends is not None
        hits += ends[0] <= 0.4 <= ends[1]
    assert 50 <= hits <= 60
    assert ratio_interval(np.ones(9), np.ones(9), 0) is None


def test_random_projection_preserves_distances_and_is_fixed() -> None:
    x = numbers(20, 4096)
    small = reduce_dimensions(x, 1024)
    assert small.shape == (20, 1024)
    ratio = torch.pdist(small) / torch.pdist(x)
    assert 0.85 < float(ratio.min()) <= float(ratio.max()) < 1.15
    assert torch.equal(random_projection(50, 8), random_projection.__wrapped__(50, 8))
    assert reduce_dimensions(x[:, :5], 8) is not x
    assert torch.equal(reduce_dimensions(x[:, :5], 8), x[:, :5])
