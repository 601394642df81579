"""Confidence intervals of medians."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a distribution-free confidence interval for the median of the population of `values`.

    The median lies between the k-th smallest and the k-th largest value with probability
    `1 - 2 P(Binomial(n, 1/2) < k)`; k is the largest that keeps the confidence (David & Nagaraja
    2003, 7.1). With fewer than six values even the range has less than 95%; then it is the range.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0  # tail: probability of fewer than k values below the median
    while k < n // 2 and 2 * (tail + comb(n, k) / 2**n) <= 1 - confidence:
        tail += comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[-k]
