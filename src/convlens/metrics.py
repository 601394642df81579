"""From a model's outputs to numbers: pure functions of numpy arrays, with honest edge cases.

`logits` are finite floats [N, K], `probs` rows of them that sum to one, `labels` and
`predictions` integers [N] from 0 to K - 1. What can't be known (the recall of a class without
images, the spread of one seed) is `None`; a mean over nothing is an error, never 0/0.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from convlens.errors import DataError, ModelFileError, UsageError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BINS = 15  # of confidence
# Of two logits: float32 on another device or in batches of another size differs by less.
NEAR_TIE = 1e-4
_AT_ONCE = 1 << 21  # logits that are turned into float64 together


class ClassScores(TypedDict):
    """How one class fares; `n` is its number of images."""

    n: int
    precision: float | None
    recall: float | None
    f1: float | None


def softmax(logits: npt.ArrayLike) -> Floats:
    """Probabilities [N, K] in float64; logits of any finite size are safe."""
    shifted = _shifted(_matrix(logits))
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def accuracy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """The share of predictions that are right, from 0 to 1."""
    truth, said = _indices(labels), _indices(predictions)
    _same_length(truth, said)
    return float(np.mean(truth == said))


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share, (low, high); (0, 1) when n is 0.

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage near 0 and 1,
    where good classifiers live. Wilson 1927, J. Am. Stat. Assoc. 22 (158), 209-212.
    """
    if not 0 <= correct <= n:
        raise UsageError(f"{correct} correct of {n} is not a share")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact in theory; rounding would leave 0.9999999999999999.
    low = 0.0 if correct == 0 else (centre - half) / scale
    high = 1.0 if correct == n else (centre + half) / scale
    return low, high


def cross_entropy(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The mean of -log p(label), in nats."""
    return float(np.mean(_losses(*_checked(logits, labels))[0]))


def _losses(matrix: npt.NDArray[Any], truth: Ints) -> tuple[Floats, Floats]:
    """Of each image -log p(label), in nats, and its highest probability."""
    losses, highest = np.empty(len(truth)), np.empty(len(truth))
    for rows in _pieces(matrix):
        shifted = _shifted(matrix[rows])
        own = shifted[np.arange(len(shifted)), truth[rows]]
        sums = np.exp(shifted, out=shifted).sum(axis=1)
        losses[rows], highest[rows] = np.log(sums) - own, 1 / sums  # the likeliest has exp(0)
    return losses, highest


def top_k(logits: npt.ArrayLike, labels: npt.ArrayLike, k: int) -> float:
    """The share of images whose label is among the k highest logits.

    Ties go to the lower class index, as in `argmax`, so that k = 1 is the accuracy and a model
    that says the same for every class earns nothing by it.
    """
    matrix, truth = _checked(logits, labels)
    if not 1 <= k <= matrix.shape[1]:
        raise UsageError(f"k must lie between 1 and {matrix.shape[1]} classes, got {k}")
    among = np.empty(len(truth), np.bool_)
    for rows in _pieces(matrix):
        some, its = matrix[rows], truth[rows][:, None]
        own = np.take_along_axis(some, its, axis=1)
        ahead = (some > own) | ((some == own) & (np.arange(matrix.shape[1]) < its))
        among[rows] = ahead.sum(axis=1) < k
    return float(np.mean(among))


def near_ties(logits: npt.ArrayLike, within: float = NEAR_TIE) -> int:
    """Images whose two highest logits are less than `within` apart, equal ones among them.

    Only these may be answered otherwise where the last digits are others.
    """
    matrix = _matrix(logits)
    if matrix.shape[1] < 2:
        return 0
    found = 0
    for rows in _pieces(matrix):
        second, first = np.partition(matrix[rows], -2, axis=1)[:, -2:].T.astype(np.float64)
        found += int(np.sum(first - second < within))
    return found


def confusion_matrix(labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: int) -> Ints:
    """Counts [K, K]: rows are the truth, columns what was predicted."""
    truth, said = _indices(labels, classes), _indices(predictions, classes)
    _same_length(truth, said, empty=True)
    counts = np.bincount(truth * classes + said, minlength=classes * classes)
    return counts.astype(np.int64).reshape(classes, classes)


def per_class(matrix: npt.ArrayLike) -> list[ClassScores]:
    """Precision, recall and F1 of every class of a confusion matrix.

    A class without images has no scores at all; one that was never predicted has no precision.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    support, predicted, hits = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    scores: list[ClassScores] = []
    for n, said, hit in zip(support.tolist(), predicted.tolist(), hits.tolist(), strict=True):
        scores.append(
            {
                "n": n,
                "precision": hit / said if n and said else None,
                "recall": hit / n if n else None,
                "f1": 2 * hit / (n + said) if n else None,
            }
        )
    return scores


def reliability_bins(
    probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = BINS
) -> tuple[Floats, Floats, Ints]:
    """Mean confidence, accuracy and count in each of `bins` equal steps of confidence.

    Confidence is the highest probability; bin m holds ((m - 1) / bins, m / bins], as in Guo et
    al. 2017. Empty bins have NaN for confidence and accuracy.
    """
    matrix, truth = _checked(probs, labels)
    if bins < 1:
        raise UsageError(f"bins must be at least 1, got {bins}")
    if matrix.min() < 0 or np.abs(matrix.sum(axis=1) - 1).max() > 1e-2:
        raise UsageError("these are not probabilities", fix="pass softmax(logits)")
    return _binned(matrix.max(axis=1), matrix.argmax(axis=1) == truth, bins)


def _binned(
    highest: npt.NDArray[Any], right: npt.NDArray[np.bool_], bins: int
) -> tuple[Floats, Floats, Ints]:
    place = np.digitize(highest, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(place, minlength=bins).astype(np.int64)
    divisor = np.where(count > 0, count, np.nan)
    confidence = np.bincount(place, weights=highest, minlength=bins) / divisor
    return confidence, np.bincount(place, weights=right, minlength=bins) / divisor, count


def ece(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = BINS) -> float:
    """The expected calibration error: mean |accuracy - confidence| over bins, by their counts.

    Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    return _calibration_error(*reliability_bins(probs, labels, bins))


def _calibration_error(confidence: Floats, right: Floats, count: Ints) -> float:
    return float(np.nansum(np.abs(right - confidence) * count) / count.sum())


def ece_by_chance(
    probs: npt.ArrayLike, bins: int = BINS, *, draws: int = 200, seed: int = 0
) -> float:
    """The calibration error that a perfectly calibrated model would stay under, 95 times of 100.

    Even where each answer is right with just the probability it states, the error of a finite
    set isn't 0. So the answers' truth is drawn from their confidence, `draws` times, and the
    error computed: consistency resampling (Broecker and Smith 2007, Weather and Forecasting 22).
    """
    matrix = np.asarray(probs)
    if matrix.ndim != 2 or not len(matrix):
        raise DataError("there are no images to judge", fix="give a split with images in it")
    highest = matrix.max(axis=1)
    place = np.digitize(highest, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    stated = np.bincount(place, weights=highest, minlength=bins)
    random = np.random.default_rng(seed)
    errors = []
    for _ in range(draws):
        right = random.random(len(highest)) < highest
        drawn = np.bincount(place, weights=right, minlength=bins)
        errors.append(float(np.abs(drawn - stated).sum() / len(highest)))
    return float(np.quantile(errors, 0.95))


def paired_counts(
    labels: npt.ArrayLike, before: npt.ArrayLike, after: npt.ArrayLike
) -> tuple[int, int, float]:
    """Images that only `after` has right, those that only `before` has, and McNemar's exact p.

    Both are predictions for the same images; p is two-sided, for the null hypothesis that a
    change goes either way as often. Without changes it is 1. McNemar 1947, Psychometrika 12 (2).
    """
    from scipy.stats import binomtest

    truth, first, second = _indices(labels), _indices(before), _indices(after)
    _same_length(truth, first)
    _same_length(truth, second)
    gained = int(np.sum((second == truth) & (first != truth)))
    lost = int(np.sum((first == truth) & (second != truth)))
    changed = gained + lost
    return gained, lost, float(binomtest(gained, changed).pvalue) if changed else 1.0


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); one value has no deviation."""
    if not values:
        raise DataError("there are no values to take the mean of")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def variance_components(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What differs between groups and within them: two standard deviations, (between, within).

    The one-way analysis of variance for at least two groups of equally many values, at least two:
    within^2 is the mean of the groups' variances, between^2 the variance of their means less
    within^2 / n, which is the part that chance within the groups alone would give (0 where it
    gives more). Searle, Casella, McCulloch 1992, Variance Components, chapter 3.
    """
    n = len(groups[0]) if groups else 0
    if len(groups) < 2 or n < 2 or any(len(group) != n for group in groups):
        raise UsageError(f"groups of {[len(group) for group in groups]} values can't be compared")
    within = statistics.fmean(statistics.variance(group) for group in groups)
    means = [statistics.fmean(group) for group in groups]
    return math.sqrt(max(statistics.variance(means) - within / n, 0.0)), math.sqrt(within)


def summarize(
    logits: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str]
) -> dict[str, Any]:
    """Everything that one look at a labelled split says, as plain numbers ready for JSON."""
    matrix, truth = _checked(logits, labels)
    count = len(classes)
    if matrix.shape[1] != count:
        raise UsageError(f"{matrix.shape[1]} outputs for {count} classes")
    said = matrix.argmax(axis=1)
    table = confusion_matrix(truth, said, count)
    losses, highest = _losses(matrix, truth)
    n, correct = len(truth), int(table.trace())
    summary: dict[str, Any] = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval95": list(wilson_interval(correct, n)),
        "near_ties": near_ties(matrix),
        "loss": float(np.mean(losses)),
    }
    if count > 5:
        summary["top5"] = top_k(matrix, truth, 5)
    summary["ece"] = _calibration_error(*_binned(highest, said == truth, BINS))
    summary["per_class"] = dict(zip(classes, per_class(table), strict=True))
    summary["confusion"] = table.tolist()
    return summary


def _pieces(matrix: npt.NDArray[Any]) -> Iterator[slice]:
    """Rows of a matrix, some at a time: 50,000 images of 1,000 classes are 400 MB in float64."""
    step = max(1, _AT_ONCE // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _shifted(matrix: npt.NDArray[Any]) -> Floats:
    """A float64 copy whose rows have the maximum 0, so that `exp` can't overflow."""
    wide = matrix.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide


def _matrix(logits: npt.ArrayLike) -> npt.NDArray[Any]:
    matrix = np.asarray(logits)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise UsageError(f"outputs must have the shape [images, classes], got {matrix.shape}")
    bad = ~np.isfinite(matrix).all(axis=1)
    if bad.any():
        # Pixels are uint8, so only the weights (or half precision) can bring these in.
        raise ModelFileError(
            f"the model's outputs are not finite for {int(bad.sum())} of {len(bad)} images",
            where=f"first at index {int(bad.argmax())}",
            fix="use float32, or a checkpoint from before the training diverged",
        )
    return matrix


def _indices(values: npt.ArrayLike, classes: int | None = None) -> Ints:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"labels must be a list of whole numbers, got {array.dtype} {list(array.shape)}"
        )
    wrong = (array < 0) if classes is None else (array < 0) | (array >= classes)
    if wrong.any():
        limit = "" if classes is None else f" of {classes} classes"
        raise UsageError(
            f"class index {array[wrong][0]} is not one{limit}",
            where=f"first at index {int(wrong.argmax())}",
        )
    return array.astype(np.int64)


def _same_length(first: npt.NDArray[Any], second: npt.NDArray[Any], *, empty: bool = False) -> None:
    if len(first) != len(second):
        raise UsageError(f"{len(first)} and {len(second)} values don't belong together")
    if len(first) == 0 and not empty:
        raise DataError("there are no images to judge", fix="give a split with images in it")


def _checked(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[npt.NDArray[Any], Ints]:
    matrix = _matrix(logits)
    truth = _indices(labels, matrix.shape[1])
    _same_length(matrix, truth)
    return matrix, truth


# ---- differences ----------------------------------------
# How two accuracies differ, with intervals and p values: on the same images, and over seeds.
#
# Pure functions of counts and numbers. Differences are the second less the first, as shares.


class AccuracyDifference(NamedTuple):
    """A difference with its interval and two-sided p; None where nothing can be said of them."""

    value: float
    interval95: tuple[float, float] | None
    p: float | None


def difference_on_images(both: int, first: int, second: int, neither: int) -> AccuracyDifference:
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
    return AccuracyDifference(
        (second - first) / n, newcombe_interval(both, first, second, neither), p
    )


def newcombe_interval(
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


def paired_difference(first: Sequence[float], second: Sequence[float]) -> AccuracyDifference:
    """Mean difference of paired values, one pair per seed, by Student's paired t-test."""
    from scipy.stats import ttest_rel

    if len(first) != len(second) or len(first) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values are no pairs to test")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(gains)
    if _is_constant(gains):
        return AccuracyDifference(mean, None, None)
    return _gain(mean, ttest_rel(second, first))


def welch_difference(first: Sequence[float], second: Sequence[float]) -> AccuracyDifference:
    """Difference of the means of two groups of at least two values, of unequal variance.

    Welch 1947, Biometrika 34 (1-2), 28-35; degrees of freedom by Satterthwaite.
    """
    from scipy.stats import ttest_ind

    if min(len(first), len(second)) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values: at least two each are needed")
    gain = statistics.fmean(second) - statistics.fmean(first)
    if _is_constant(first) and _is_constant(second):
        return AccuracyDifference(gain, None, None)
    with warnings.catch_warnings():
        # scipy warns of "catastrophic cancellation" if all values of one group are equal. Runs
        # that all reach 100% are an ordinary case here, and the test is exact for them.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return _gain(gain, ttest_ind(second, first, equal_var=False))


def _gain(value: float, test: Any) -> AccuracyDifference:
    low, high = test.confidence_interval(0.95)
    return AccuracyDifference(value, (float(low), float(high)), float(test.pvalue))


def _is_constant(values: Sequence[float]) -> bool:
    """Return whether values are equal up to rounding: without spread there is nothing to test."""
    return max(values) - min(values) < 1e-12


def holm_adjust(values: Sequence[float | None]) -> list[float | None]:
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
