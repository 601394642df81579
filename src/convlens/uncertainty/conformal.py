"""Conformal prediction: sets of classes that contain the true one with a stated probability.

Split conformal prediction (Vovk et al. 2005) with the score 1 - p(class) of the least ambiguous
set-valued classifiers (LAC): Sadinle, Lei, Wasserman 2019, Least Ambiguous Set-Valued Classifiers
with Bounded Error Levels, JASA 114 (525). Of all sets with this coverage, these have the smallest
mean size. The coverage is marginal: an average over all images, not for each class or each size.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


def conformal_rank(n: int, coverage: float) -> int:
    """Return ceil((n + 1) * coverage): which of `n` sorted scores is the threshold."""
    return math.ceil(round((n + 1) * coverage, 9))  # 0.55 * 100 is 55.00000000000001


def min_images_for_coverage(coverage: float) -> int:
    """Return the fewest calibration images for a coverage below 1."""
    n = max(1, math.floor(coverage / (1 - coverage)) - 1)
    while conformal_rank(n, coverage) > n:
        n += 1
    return n


def conformal_threshold(label_probs: npt.ArrayLike, coverage: float) -> float | None:
    """Return the lowest probability of a class in a prediction set.

    Args:
        label_probs: probabilities of the true classes `[n]` of images that neither training nor
            calibration used.
        coverage: the share of sets that are to contain the true class, between 0 and 1.

    Returns:
        None if there are too few images for this coverage.
    """
    scores = np.sort(1 - np.asarray(label_probs, dtype=np.float64))
    rank = conformal_rank(len(scores), coverage)
    return None if rank > len(scores) else float(1 - scores[rank - 1])


def prediction_sets(probs: npt.ArrayLike, threshold: float) -> Bools:
    """Return which classes are in the set of each image, `[N, K]`.

    The most probable class is always in it: no set is empty, and the coverage can only rise.
    """
    matrix = np.asarray(probs, dtype=np.float64)
    # The same rounding as in `conformal_threshold`.
    inside: Bools = (1 - matrix) <= (1 - threshold)
    inside[np.arange(len(matrix)), matrix.argmax(axis=1)] = True
    return inside
