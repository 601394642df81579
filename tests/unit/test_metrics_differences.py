"""Differences of accuracies: published examples, values computed by hand, tests of scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from convlens.errors import UsageError
from convlens.metrics import (
    difference_on_images,
    holm_adjust,
    newcombe_independent_interval,
    newcombe_interval,
    paired_counts,
    paired_difference,
    welch_difference,
)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table II: e = 20, f = 12, g = 2, h = 16
        ((20, 2, 12, 16), 0.0562, 0.3292),
        # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33: airways before and after
        ((1, 7, 1, 12), -0.507, -0.026),
    ],
)
def test_newcombe_intervals_equal_published_ones(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    assert newcombe_interval(*counts) == pytest.approx((low, high), abs=5e-4)


def test_newcombe_interval_by_hand() -> None:
    # 10 images; the first is correct on 6, the second on 8, both on 5.
    z = 1.959963984540054

    def wilson(p: float) -> tuple[float, float]:
        half = z * math.sqrt(p * (1 - p) / 10 + z * z / 400)
        return (p + z * z / 20 - half) / (1 + z * z / 10), (p + z * z / 20 + half) / (
            1 + z * z / 10
        )

    (low1, high1), (low2, high2) = wilson(0.6), wilson(0.8)
    phi = (5 * 1 - 1 * 3 - 5) / math.sqrt(
        6 * 4 * 8 * 2
    )  # negative after the correction, so 0 is used
    assert phi < 0
    low = 0.2 - math.sqrt((0.8 - low2) ** 2 + (high1 - 0.6) ** 2)
    high = 0.2 + math.sqrt((high2 - 0.8) ** 2 + (0.6 - low1) ** 2)
    assert newcombe_interval(5, 1, 3, 1) == pytest.approx((low, high))


def test_exchanging_the_models_negates_the_interval() -> None:
    low, high = newcombe_interval(700, 20, 50, 230)
    assert newcombe_interval(700, 50, 20, 230) == pytest.approx((-high, -low))
    assert 0 < low < 0.03 < high
    # For the same accuracies, but independent errors, the interval is wider.
    independent_low, independent_high = newcombe_interval(540, 180, 210, 70)
    assert independent_low < low
    assert independent_high > high


@pytest.mark.parametrize("counts", [(10, 0, 0, 0), (0, 0, 0, 10), (0, 10, 0, 0), (5, 0, 0, 5)])
def test_intervals_stay_in_range_at_the_edges(counts: tuple[int, int, int, int]) -> None:
    low, high = newcombe_interval(*counts)
    gain = (counts[2] - counts[1]) / 10
    assert -1 <= low <= gain <= high <= 1


def test_an_interval_needs_images() -> None:
    with pytest.raises(UsageError, match="no images"):
        newcombe_interval(0, 0, 0, 0)


def test_mcnemars_test_by_hand() -> None:
    # 1 against 5: p = 2 * (1 + 6) / 2^6
    gain = difference_on_images(90, 1, 5, 4)
    assert (gain.value, gain.p) == (pytest.approx(0.04), pytest.approx(14 / 64))
    assert gain.interval95 == newcombe_interval(90, 1, 5, 4)
    assert difference_on_images(7, 0, 0, 3).p == 1.0


def test_paired_counts_by_hand() -> None:
    targets = [0, 0, 0, 0, 1, 1, 1, 1]
    before = [0, 1, 1, 1, 1, 1, 0, 2]
    after = [0, 0, 0, 0, 0, 1, 2, 1]
    # Four gained, one lost; 0 -> 2 is wrong in both. Twice P(at most 1 of 5): 2 * 6 / 32.
    assert paired_counts(targets, before, after) == (4, 1, pytest.approx(12 / 32))
    assert paired_counts(targets, after, before) == (1, 4, pytest.approx(12 / 32))
    assert paired_counts(targets, before, before) == (0, 0, 1.0)
    with pytest.raises(UsageError, match="8 and 7 values: the lengths must be equal"):
        paired_counts(targets, before, after[:-1])


FIRST, SECOND = [0.81, 0.80, 0.83, 0.79], [0.82, 0.84, 0.85, 0.81]


def test_paired_difference_by_hand() -> None:
    gain = paired_difference(FIRST, SECOND)
    # Differences 1, 4, 2, 2 points: mean 2.25, sd sqrt(4.75 / 3), t with 3 degrees of freedom
    half = 3.182446305284263 * math.sqrt(4.75 / 3) / 2
    assert gain.value == pytest.approx(0.0225)
    assert gain.interval95 == pytest.approx(((2.25 - half) / 100, (2.25 + half) / 100), abs=1e-9)
    t = 2.25 / (math.sqrt(4.75 / 3) / 2)
    assert gain.p == pytest.approx(2 * float(stats.t.sf(t, 3)), abs=1e-9)


def test_welch_difference_by_hand() -> None:
    gain = welch_difference(FIRST, [*SECOND, 0.9])
    # Variances 0.000875 / 3 of 4 values and 0.00492 / 4 of 5; the difference is 0.844 - 0.8075.
    first, second = 0.000875 / 3 / 4, 0.00492 / 4 / 5
    freedom = (first + second) ** 2 / (first**2 / 3 + second**2 / 4)
    error = math.sqrt(first + second)
    half = float(stats.t.ppf(0.975, freedom)) * error
    assert gain.value == pytest.approx(0.0365, abs=1e-9)
    assert gain.interval95 == pytest.approx((0.0365 - half, 0.0365 + half), abs=1e-9)
    assert gain.p == pytest.approx(2 * float(stats.t.sf(0.0365 / error, freedom)), abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_one_constant_group_is_tested_without_a_warning() -> None:
    gain = welch_difference([0.6, 0.6, 0.6], [0.50, 0.52, 0.54])
    # Only the second group varies: standard error sqrt(0.0004 / 3), 2 degrees of freedom.
    half = 4.302652729911275 * math.sqrt(0.0004 / 3)
    assert gain.interval95 == pytest.approx((-0.08 - half, -0.08 + half), abs=1e-9)


def test_constant_values_have_no_interval_and_no_p_value() -> None:
    assert paired_difference([0.5, 0.6], [0.6, 0.7])[1:] == (None, None)
    assert welch_difference([0.5, 0.5], [0.6, 0.6])[1:] == (None, None)
    for values in ([0.5], [0.5, 0.6, 0.7]):
        with pytest.raises(UsageError):
            paired_difference(values, [0.6] if len(values) == 1 else [0.6, 0.7])
    with pytest.raises(UsageError):
        welch_difference([0.5], [0.6, 0.7])


def test_holm_adjustment_by_hand() -> None:
    assert holm_adjust([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm_adjust([0.6, 0.5]) == [1.0, 1.0]
    assert holm_adjust([None, 0.02, 0.01]) == [None, 0.02, 0.02]
    assert holm_adjust([]) == []


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
        ((48, 80, 56, 70), 0.0524, 0.3339),
        ((3, 10, 9, 10), 0.1705, 0.8090),
    ],
)
def test_independent_newcombe_intervals_equal_published_ones(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    assert newcombe_independent_interval(*counts) == pytest.approx((low, high), abs=5e-5)
    first, first_n, second, second_n = counts
    turned = newcombe_independent_interval(second, second_n, first, first_n)
    assert turned == pytest.approx((-high, -low), abs=5e-5)
