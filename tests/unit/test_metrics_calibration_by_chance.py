"""The calibration error of a calibrated model, estimated by resampling."""

from __future__ import annotations

import numpy as np
import pytest

from convlens import metrics
from convlens.errors import DataError


@pytest.mark.parametrize(
    ("error", "chance", "surplus", "words"),
    [
        (0.045, 0.02, 0.041, "confidence is 4.1 points too high"),
        (0.187, 0.02, -0.187, "confidence is 18.7 points too low"),
        (0.02, 0.02, 0.02, "confidence agrees with accuracy, as far as this many images can show"),
        (0.1, 0.02, 0.01, "confidence is too high for some images and too low for others"),
    ],
)
def test_calibration_is_described_in_words(
    error: float, chance: float, surplus: float, words: str
) -> None:
    assert metrics.Calibration(error, chance, surplus).in_words() == words


def test_certain_predictions_have_no_error_by_chance() -> None:
    assert metrics.ece_by_chance(np.eye(3)[[0, 1, 2, 0]]) == 0


def test_a_single_bin_has_the_error_of_a_binomial_distribution() -> None:
    """|k/n - 1/2| of fair coins: 95% lie below 1.96 standard errors."""
    error = metrics.ece_by_chance(np.full((2500, 2), 0.5), draws=4000)
    assert error == pytest.approx(1.96 * 0.5 / 50, rel=0.05)


def test_a_calibrated_model_stays_below_the_error_by_chance() -> None:
    below = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        confidence = random.uniform(0.5, 1, 400)
        labels = (random.random(400) >= confidence).astype(
            np.int64
        )  # class 0 with probability `confidence`
        probs = np.stack([confidence, 1 - confidence], axis=1)
        below += metrics.ece(probs, labels) <= metrics.ece_by_chance(probs)
    assert 34 <= below <= 40  # 38 of 40 are expected


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        metrics.ece_by_chance(np.zeros((0, 2)))
