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
# A minimum this close to a bound (as a ratio) is the bound, not a minimum.
BOUND_TOLERANCE = 1.01


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Return the temperature that minimizes the negative log-likelihood (NLL) of the labels.

    The NLL is a convex function of 1 / T, so there is a single minimum. There is none between the
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
    from scipy.optimize import minimize_scalar

    def nll(log_t: float) -> float:
        return metrics.cross_entropy(matrix, targets, math.exp(log_t))

    result = minimize_scalar(
        nll,
        bounds=(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = math.exp(result.x)
    low, high = MIN_TEMPERATURE * BOUND_TOLERANCE, MAX_TEMPERATURE / BOUND_TOLERANCE
    differs = 2 * len(targets) * (nll(0.0) - result.fun) > MIN_LIKELIHOOD_RATIO
    return temperature if differs and low < temperature < high else None
