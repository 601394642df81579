"""Selective classification: answer only where a promised accuracy holds, else abstain.

Geifman and El-Yaniv 2017, Selective Classification for Deep Neural Networks, algorithm 1 (SGR,
"selection with guaranteed risk"). Risk is the share of mistakes among the answered images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class AnswerThreshold(NamedTuple):
    """The lowest confidence that is answered, and its evidence on held-out images.

    Attributes:
        threshold: images of at least this confidence are answered.
        answered, errors: held-out images that are answered, and the mistakes among them.
        bound: upper bound of the risk.
    """

    threshold: float
    answered: int
    errors: int
    bound: float


def binomial_upper_bound(errors: int, n: int, delta: float) -> float:
    """Return the one-sided upper bound of a risk, which fails with probability `delta` at most.

    The largest probability b with P(Binomial(n, b) <= errors) >= delta (Clopper and Pearson 1934,
    Biometrika 26 (4); lemma 1 of Geifman and El-Yaniv).
    """
    from scipy.special import betaincinv

    return 1.0 if errors >= n else float(betaincinv(errors + 1, n - errors, 1 - delta))


def min_images_for_accuracy(*, max_risk: float, delta: float, candidates: int = 1) -> int:
    """Return the fewest images with which `find_threshold` can keep a promise, all of them correct.

    With n images and no mistake the bound is 1 - delta^(1 / n).
    """
    return max(1, math.ceil(math.log(delta / candidates) / math.log1p(-max_risk)))


def find_threshold(
    confidences: npt.ArrayLike,
    correct: npt.ArrayLike,
    *,
    max_risk: float,
    delta: float,
    candidates: int = 1,
) -> AnswerThreshold | None:
    """Return the threshold with the most answers whose risk is at most `max_risk`.

    The promise fails with probability `delta` at most over the draw of the images. A binary search
    tries thresholds, and each gets an equal share of `delta` (union bound). Unlike algorithm 1 it
    does not try thresholds with fewer answers than even a model without mistakes would need. Their
    number does not depend on the outcomes, so fewer tests share `delta`.

    Args:
        confidences: floats `[n]`, of images that the model was not trained on.
        correct: whether each is classified correctly, `[n]`.
        max_risk: between 0 and 1.
        delta: between 0 and 1.
        candidates: `delta` is divided by it. With the number of models among which these images,
            too, have chosen this one, the promise holds whichever of them was chosen.

    Returns:
        None if no tried threshold keeps the promise.
    """
    order = np.argsort(np.asarray(confidences, dtype=np.float64), kind="stable")
    scores: Floats = np.asarray(confidences, dtype=np.float64)[order]
    wrong = ~np.asarray(correct, dtype=np.bool_)[order]
    n = len(scores)
    errors_from = np.cumsum(wrong[::-1])[::-1]  # mistakes at this position and above
    tests, positions = _plan_search(n, max_risk, delta / candidates)
    best = None
    low, high = 0, positions  # the lowest position that passes; `positions` if none does
    while low < high:
        middle = (low + high) // 2
        # Images of equal confidence are answered together.
        first = int(np.searchsorted(scores, scores[middle], side="left"))
        answered, errors = n - first, int(errors_from[first])
        bound = binomial_upper_bound(errors, answered, delta / (tests * candidates))
        if bound <= max_risk:
            best = AnswerThreshold(float(scores[first]), answered, errors, bound)
            high = middle
        else:
            low = middle + 1
    return best


def _plan_search(n: int, max_risk: float, delta: float) -> tuple[int, int]:
    """Return the number of tests, and of positions (in rising confidence) worth trying.

    A binary search over p positions takes ceil(log2(p + 1)) tests, and more tests leave each a
    smaller share of `delta`, so that fewer positions are worth trying.
    """
    for tests in range(1, max(2, n.bit_length() + 1)):
        positions = max(0, n - min_images_for_accuracy(max_risk=max_risk, delta=delta / tests) + 1)
        if math.ceil(math.log2(positions + 1)) <= tests:
            return tests, positions
    raise AssertionError("n.bit_length() tests are enough for n positions")


def risk_coverage_curve(
    confidences: npt.ArrayLike, correct: npt.ArrayLike
) -> tuple[Floats, Floats]:
    """Return coverage and risk if the most confident images are answered, from one to all.

    El-Yaniv and Wiener 2010, JMLR 11. Both are `[n]`; coverage rises from 1 / n to 1.
    """
    order = np.argsort(-np.asarray(confidences, dtype=np.float64), kind="stable")
    wrong = ~np.asarray(correct, dtype=np.bool_)[order]
    answered = np.arange(1, len(wrong) + 1)
    return answered / max(1, len(wrong)), np.cumsum(wrong) / answered
