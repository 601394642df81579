"""How two accuracies differ, with intervals and p values: on the same images, and over seeds.

Pure functions of counts and numbers. Differences are the second less the first, as shares.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from convlens.errors import UsageError
from convlens.metrics import wilson_interval


class Gain(NamedTuple):
    """A difference with its interval and two-sided p; None where nothing can be said of them."""

    value: float
    interval95: tuple[float, float] | None
    p: float | None


def on_images(both: int, first: int, second: int, neither: int) -> Gain:
    """The difference of two accuracies on the same images: Newcombe's interval, McNemar's p.

    Args:
        both, neither: images that both have right, that none has.
        first, second: images that only the first, only the second has right.

    The p is exact: a binomial test on the images on which they differ. McNemar 1947,
    Psychometrika 12 (2), 153-157.
    """
    from scipy.stats import binomtest

    n, changed = both + first + second + neither, first + second
    p = float(binomtest(second, changed).pvalue) if changed else 1.0
    return Gain((second - first) / n, newcombe(both, first, second, neither), p)


def newcombe(
    both: int, first: int, second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The interval of a difference between paired shares, by Newcombe's method 10.

    Wilson's intervals of the two shares are put together by squaring and adding, less twice
    their correlation, whose numerator has a continuity correction. It stays inside [-1, 1] and
    holds for few images and shares near 1. Newcombe 1998, Statistics in Medicine 17 (22),
    2635-2650.
    """
    n = both + first + second + neither
    if n == 0:
        raise UsageError("there are no images to compare on")
    before, after = (both + first) / n, (both + second) / n
    low1, high1 = wilson_interval(both + first, n, confidence)
    low2, high2 = wilson_interval(both + second, n, confidence)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    agreement = float(both * neither - first * second)
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(product) if product else 0.0

    def span(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    gain = after - before
    return gain - span(after - low2, high1 - before), gain + span(high2 - after, before - low1)


def paired_by_seed(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Mean difference of paired values, one pair per seed, by Student's paired t-test."""
    from scipy.stats import ttest_rel

    if len(first) != len(second) or len(first) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values are no pairs to test")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(gains)
    if _is_constant(gains):
        return Gain(mean, None, None)
    return _gain(mean, ttest_rel(second, first))


def welch(first: Sequence[float], second: Sequence[float]) -> Gain:
    """Difference of the means of two groups of at least two values, of unequal variance.

    Welch 1947, Biometrika 34 (1-2), 28-35; degrees of freedom by Satterthwaite.
    """
    from scipy.stats import ttest_ind

    if min(len(first), len(second)) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values: at least two each are needed")
    gain = statistics.fmean(second) - statistics.fmean(first)
    if _is_constant(first) and _is_constant(second):
        return Gain(gain, None, None)
    with warnings.catch_warnings():
        # scipy warns of "catastrophic cancellation" if all values of one group are equal. Runs
        # that all reach 100% are an ordinary case here, and the test is exact for them.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return _gain(gain, ttest_ind(second, first, equal_var=False))


def _gain(value: float, test: Any) -> Gain:
    low, high = test.confidence_interval(0.95)
    return Gain(value, (float(low), float(high)), float(test.pvalue))


def _is_constant(values: Sequence[float]) -> bool:
    """Return whether values are equal up to rounding: without spread there is nothing to test."""
    return max(values) - min(values) < 1e-12


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for how many there are, in their order; None is no test.

    The k-th smallest of m is multiplied by m - k + 1, and none falls below one before it.
    Holm 1979, Scandinavian Journal of Statistics 6 (2), 65-70.
    """
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        corrected[place] = least
    return corrected
