"""Temperature scaling: divide the logits by one number so that confidence agrees with accuracy.

Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks, section 4.2. The
predicted class never changes, because the order of the logits does not.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from convlens import metrics

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MIN_IMAGES = 20  # with fewer, the fitted temperature is mostly noise
# 95% quantile of chi-squared with one degree of freedom: twice the gain of log-likelihood by which
# a temperature must beat 1 (likelihood-ratio test; Wilks 1938).
MIN_LIKELIHOOD_RATIO = 3.841
BISECTIONS = 40  # of a range of 400:1, so that the temperature has 11 digits


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Return the temperature that minimizes the negative log-likelihood (NLL) of the labels.

    The NLL is a convex function of 1 / T, so its slope is 0 at a single point, which is found by
    bisection (importing SciPy would take longer than some trainings). There is none between the
    bounds if all images are classified correctly (the NLL falls until T = 0) or if the logits say
    nothing about the labels (it falls until T is infinite).

    Args:
        logits: floats `[N, K]`.
        labels: integers `[N]`.

    Returns:
        None if a temperature has no meaning: fewer than 20 images, no mistake among them, a
        minimum at a bound, or one that does not differ significantly from 1.
    """
    matrix, targets = np.asarray(logits), np.asarray(labels)
    has_mistakes = bool((matrix.argmax(axis=1) != targets).any()) if len(targets) else False
    if len(targets) < MIN_IMAGES or not has_mistakes:
        return None
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if _slope(matrix, targets, low) >= 0 or _slope(matrix, targets, high) <= 0:
        return None
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if _slope(matrix, targets, middle) > 0:
            high = middle
        else:
            low = middle
    temperature = 1 / math.sqrt(low * high)
    gain = metrics.cross_entropy(matrix, targets) - metrics.cross_entropy(
        matrix, targets, temperature
    )
    return temperature if 2 * len(targets) * gain > MIN_LIKELIHOOD_RATIO else None


def _slope(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], scale: float) -> float:
    """Return the derivative of the NLL of `scale * logits`, which increases with the scale.

    It is the mean logit under the model's probabilities minus the logit of the true class.
    """
    total = 0.0
    for rows in metrics.row_chunks(logits):
        matrix, targets = logits[rows].astype(np.float64), labels[rows]
        total += float((metrics.softmax(matrix, 1 / scale) * matrix).sum())
        total -= float(matrix[np.arange(len(targets)), targets].sum())
    return total / len(labels)
