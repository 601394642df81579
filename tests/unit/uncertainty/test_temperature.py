"""Temperature scaling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from convlens import metrics
from convlens.uncertainty.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, fit_temperature


def calibrated(n: int, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return logits, and labels drawn from exactly their softmax."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(n, classes))
    drawn = random.random((n, 1)) < np.cumsum(metrics.softmax(logits), axis=1)
    return logits, drawn.argmax(axis=1)


@pytest.mark.parametrize("true", [0.3, 0.8, 2.5, 6.0])
def test_a_known_temperature_is_found(true: float) -> None:
    logits, labels = calibrated(20_000)
    assert fit_temperature(true * logits, labels) == pytest.approx(true, rel=0.03)


def test_the_minimum_is_that_of_a_fine_grid_and_ece_falls() -> None:
    logits, labels = calibrated(500, seed=3)
    logits *= 3
    fitted = fit_temperature(logits, labels)
    assert fitted is not None
    grid = np.exp(np.linspace(math.log(1.5), math.log(6), 4001))
    losses = [metrics.cross_entropy(logits, labels, temperature) for temperature in grid]
    assert fitted == pytest.approx(grid[int(np.argmin(losses))], rel=1e-3)
    before, after = (metrics.ece(metrics.softmax(logits, t), labels) for t in (1.0, fitted))
    assert after < before / 3


def test_there_is_no_temperature_where_it_has_no_meaning() -> None:
    logits, labels = calibrated(1000)
    assert fit_temperature(5 * np.eye(4)[labels], labels) is None  # without a mistake
    assert fit_temperature(3 * logits[:19], labels[:19]) is None  # too few images
    assert fit_temperature(logits, labels) is None  # does not differ from 1
    random = np.random.default_rng(0).integers(0, 4, 1000)
    assert fit_temperature(50 * logits, random) is None  # at the upper bound: no information
    assert fit_temperature(np.empty((0, 4)), np.empty(0, np.int64)) is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(2, 6),
    st.floats(0.01, 1e4),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_any_logits_give_none_or_a_temperature_inside_the_bounds_that_lowers_the_loss(
    n: int, classes: int, scale: float, noise: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(n, classes))).astype(np.float32)
    is_random = random.random(n) < noise
    labels = np.where(is_random, random.integers(0, classes, n), logits.argmax(axis=1))
    temperature = fit_temperature(logits, labels)
    if temperature is not None:
        assert MIN_TEMPERATURE < temperature < MAX_TEMPERATURE
        loss = metrics.cross_entropy(logits, labels, temperature)
        assert loss < metrics.cross_entropy(logits, labels)
