"""Prediction sets: ranks by hand, and coverage in simulations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from convlens import metrics
from convlens.uncertainty.conformal import (
    conformal_rank,
    conformal_threshold,
    min_images_for_coverage,
    prediction_sets,
)


@pytest.mark.parametrize(
    ("n", "coverage", "rank"), [(9, 0.9, 9), (8, 0.9, 9), (19, 0.95, 19), (99, 0.55, 55)]
)
def test_rank_has_the_correction_for_finite_samples(n: int, coverage: float, rank: int) -> None:
    assert conformal_rank(n, coverage) == rank


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 999))
def test_rank_is_exact(n: int, thousandths: int) -> None:
    exact = math.ceil((n + 1) * Fraction(thousandths, 1000))
    assert conformal_rank(n, thousandths / 1000) == exact


@pytest.mark.parametrize(("coverage", "n"), [(0.9, 9), (0.95, 19), (0.5, 1), (0.995, 199)])
def test_fewest_images(coverage: float, n: int) -> None:
    assert min_images_for_coverage(coverage) == n
    probs = np.linspace(0.1, 0.9, n)
    assert conformal_threshold(probs, coverage) == pytest.approx(probs[0])
    assert conformal_threshold(probs[:-1], coverage) is None


def test_sets_by_hand() -> None:
    probs = [[0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.2, 0.19, 0.61]]
    expected = [[True, True, False], [True, True, True], [False, False, True]]
    assert prediction_sets(probs, 0.3).tolist() == expected
    # The most probable class even where none reaches the threshold.
    assert prediction_sets(probs, 0.9).sum(axis=1).tolist() == [1, 1, 1]


def test_the_calibration_image_at_the_threshold_is_in_its_set() -> None:
    label_probs = np.random.default_rng(0).random(99)
    threshold = conformal_threshold(label_probs, 0.9)
    assert threshold is not None
    probs = np.stack([label_probs, 1 - label_probs], axis=1)
    assert int((label_probs >= threshold).sum()) == 90
    assert prediction_sets(probs, threshold)[:, 0].sum() >= 90


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_marginal_coverage_in_simulations(coverage: float) -> None:
    """Without the class that is always added, the mean over draws is rank / (n + 1)."""
    random, n, draws = np.random.default_rng(0), 50, 1500
    covered = at_threshold = 0
    for _ in range(draws):
        logits = 2 * random.normal(size=(n + 1, 5))
        probs = metrics.softmax(logits, 0.7)  # not calibrated: coverage does not need that
        shares = np.cumsum(metrics.softmax(logits), axis=1)
        labels = (random.random((n + 1, 1)) < shares).argmax(axis=1)
        label_probs = probs[np.arange(n + 1), labels]
        threshold = conformal_threshold(label_probs[:n], coverage)
        assert threshold is not None
        covered += prediction_sets(probs[n:], threshold)[0, labels[n]]
        at_threshold += label_probs[n] >= threshold
    expected = conformal_rank(n, coverage) / (n + 1)
    sd = math.sqrt(expected * (1 - expected) / draws)
    assert at_threshold / draws == pytest.approx(expected, abs=4 * sd)
    assert covered / draws >= coverage - 3 * sd
