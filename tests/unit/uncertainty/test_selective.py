"""Abstaining: bounds by brute force, and promises in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from convlens.uncertainty.selective import (
    AnswerThreshold,
    binomial_upper_bound,
    find_threshold,
    min_images_for_accuracy,
    risk_coverage_curve,
)


def tail(errors: int, n: int, b: float) -> float:
    """Return P(Binomial(n, b) <= errors), term by term."""
    return sum(math.comb(n, j) * b**j * (1 - b) ** (n - j) for j in range(errors + 1))


@pytest.mark.parametrize(("errors", "n"), [(0, 1), (0, 59), (3, 59), (7, 20), (50, 200)])
@pytest.mark.parametrize("delta", [0.05, 0.001])
def test_bound_solves_the_binomial_tail(errors: int, n: int, delta: float) -> None:
    bound = binomial_upper_bound(errors, n, delta)
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: the tail falls with b
        middle = (low + high) / 2
        low, high = (middle, high) if tail(errors, n, middle) > delta else (low, middle)
    assert bound == pytest.approx(low, abs=1e-9)


def test_bounds_known_by_hand() -> None:
    assert binomial_upper_bound(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1)
    assert binomial_upper_bound(10, 10, 0.05) == 1
    assert binomial_upper_bound(0, 0, 0.05) == 1


@pytest.mark.parametrize(
    ("max_risk", "delta", "candidates", "n"),
    # log(0.05) / log(0.95) = 58.4; with a tenth of delta 103.3.
    [(0.05, 0.05, 1, 59), (0.05, 0.05, 10, 104), (0.5, 0.5, 1, 1), (0.1, 0.05, 1, 29)],
)
def test_fewest_images(max_risk: float, delta: float, candidates: int, n: int) -> None:
    options = {"max_risk": max_risk, "delta": delta, "candidates": candidates}
    assert min_images_for_accuracy(**options) == n  # type: ignore[arg-type]

    def answered(images: int) -> AnswerThreshold | None:
        confidences, correct = np.linspace(0.5, 1, images), np.ones(images, bool)
        return find_threshold(confidences, correct, **options)  # type: ignore[arg-type]

    found = answered(n)
    assert found is not None
    assert (found.answered, found.errors) == (n, 0)
    assert found.bound <= max_risk
    assert n == 1 or answered(n - 1) is None


def test_threshold_answers_the_confident_images_and_ties_together() -> None:
    confidences = np.repeat([0.4, 0.9], [200, 300])
    correct = np.concatenate([np.arange(200) % 2 == 0, np.arange(300) > 2])
    found = find_threshold(confidences, correct, max_risk=0.05, delta=0.05)
    assert found is not None
    assert (found.threshold, found.answered, found.errors) == (0.9, 300, 3)
    assert find_threshold(confidences, correct, max_risk=0.005, delta=0.05) is None
    assert find_threshold([], [], max_risk=0.05, delta=0.05) is None


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 300), st.floats(0.01, 0.6), st.floats(0.001, 0.3), st.integers(0, 99))
def test_every_threshold_is_supported_by_its_own_counts(
    n: int, max_risk: float, delta: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    confidences = random.integers(0, 20, n) / 20  # with ties
    correct = random.random(n) < confidences
    found = find_threshold(confidences, correct, max_risk=max_risk, delta=delta)
    if n < min_images_for_accuracy(max_risk=max_risk, delta=delta):
        assert found is None
    if found is not None:
        chosen = confidences >= found.threshold
        assert found.answered == chosen.sum()
        assert found.errors == (chosen & ~correct).sum()
        assert found.bound <= max_risk
        # At least as strict as the bound without a union.
        assert found.bound >= binomial_upper_bound(found.errors, found.answered, delta) - 1e-12


@pytest.mark.parametrize("n", [100, 400])
def test_the_promise_holds_in_at_least_95_percent_of_draws(n: int) -> None:
    """The confidence c is uniform on 0..1 and the answer correct with probability c.

    So the risk of answering from t on is (1 - t) / 2, which is below 0.3 from t = 0.4 on.
    """
    random, broken, draws = np.random.default_rng(n), 0, 2000
    answered = 0
    for _ in range(draws):
        confidences = random.random(n)
        correct = random.random(n) < confidences
        found = find_threshold(confidences, correct, max_risk=0.3, delta=0.05)
        if found is not None:
            answered += 1
            broken += (1 - found.threshold) / 2 > 0.3
    assert answered > 0.2 * draws  # it does answer
    assert broken / draws <= 0.05


def test_a_choice_among_models_by_the_same_images_needs_candidates() -> None:
    """Equal models with a risk of 0.105, of which the one with the fewest mistakes is chosen."""
    random, models, n, draws = np.random.default_rng(1), 40, 100, 600
    broken = dict.fromkeys((1, models), 0)
    for _ in range(draws):
        errors = random.binomial(n, 0.105, models).min()
        correct = np.arange(n) >= errors
        for candidates in broken:
            found = find_threshold(
                np.ones(n), correct, max_risk=0.1, delta=0.05, candidates=candidates
            )
            broken[candidates] += found is not None
    assert broken[1] / draws > 0.05  # the plain bound breaks its promise
    assert broken[models] / draws <= 0.05


def test_risk_coverage_curve_by_hand() -> None:
    coverage, risk = risk_coverage_curve([0.2, 0.9, 0.5, 0.7], [False, True, True, False])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == [0, 0.5, pytest.approx(1 / 3), 0.5]
