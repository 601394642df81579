"""Classification metrics, calibration, intervals and significance tests, on numpy arrays.

`logits` are finite floats [N, K], `probs` are floats [N, K] whose rows sum to one, `labels` and
`predictions` are integers [N] from 0 to K - 1. Undefined values (the recall of a class without
images, the standard deviation of one seed) are `None`; a mean over nothing is an error. Differences
are the second value minus the first.
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
CALIBRATION_BINS = 15
BOOTSTRAP_DRAWS = 2000
# Two logits that are closer than this are a near tie. Results of float32 on another device, or in
# batches of another size, differ by less.
NEAR_TIE = 1e-4
_CHUNK_LOGITS = 1 << 21  # logits that are converted to float64 at once


class ClassScores(TypedDict):
    """Scores of one class; `n` is its number of images."""

    n: int
    precision: float | None
    recall: float | None
    f1: float | None


class ClassMeans(NamedTuple):
    """Two metrics that count rare classes as much as common ones."""

    macro_f1: float
    balanced_accuracy: float


class AccuracyDifference(NamedTuple):
    """A difference with its 95% interval and two-sided p value; None where they are undefined."""

    value: float
    interval95: tuple[float, float] | None
    p: float | None


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return probabilities [N, K] in float64; logits may have any finite size.

    Args:
        temperature: the logits are divided by it first (`uncertainty.temperature`).
    """
    shifted = _shift_to_zero(_check_logits(logits), temperature)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def softmax_row(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the row of `softmax` for one image, with the same bits.

    For a few classes numbers are faster than arrays. All logits have to be finite.
    """
    largest = max(logits)
    shifted = [logit - largest for logit in logits]
    if temperature != 1:
        shifted = [value / temperature for value in shifted]
    exponentials: Floats = np.exp(shifted)  # not `math.exp`, whose last bit may differ
    total = float(np.add.reduce(exponentials))
    return [value / total for value in exponentials.tolist()]


def accuracy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Return the fraction of correct predictions."""
    targets, preds = _check_indices(labels), _check_indices(predictions)
    _check_same_length(targets, preds)
    return float(np.mean(targets == preds))


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, (low, high); (0, 1) if n is 0.

    Unlike the normal approximation, it stays inside [0, 1] and keeps its coverage near 0 and 1,
    where the accuracy of good classifiers lies. Wilson 1927, J. Am. Stat. Assoc. 22 (158), 209-212.
    """
    if not 0 <= correct <= n:
        raise UsageError(f"{correct} correct of {n} is not a proportion")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must be between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    proportion = correct / n
    center = proportion + z * z / (2 * n)
    half_width = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # These two ends are exact; rounding would give 0.9999999999999999.
    low = 0.0 if correct == 0 else (center - half_width) / scale
    high = 1.0 if correct == n else (center + half_width) / scale
    return low, high


def cross_entropy(logits: npt.ArrayLike, labels: npt.ArrayLike, temperature: float = 1.0) -> float:
    """Return the mean of -log p(label), in nats."""
    matrix, targets = _check_outputs(logits, labels)
    return float(np.mean(_losses_and_confidences(matrix, targets, temperature)[0]))


def _losses_and_confidences(
    logits: npt.NDArray[Any], targets: Ints, temperature: float = 1.0
) -> tuple[Floats, Floats]:
    """Return -log p(label), in nats, and the highest probability of each image."""
    losses, confidences = np.empty(len(targets)), np.empty(len(targets))
    for rows in row_chunks(logits):
        shifted = _shift_to_zero(logits[rows], temperature)
        target_logits = shifted[np.arange(len(shifted)), targets[rows]]
        sums = np.exp(shifted, out=shifted).sum(axis=1)
        losses[rows] = np.log(sums) - target_logits
        confidences[rows] = 1 / sums  # the largest term is exp(0)
    return losses, confidences


def top_k(logits: npt.ArrayLike, labels: npt.ArrayLike, k: int) -> float:
    """Return the fraction of images whose label is among the k highest logits.

    Ties go to the lower class index, as in `argmax`: k = 1 gives the accuracy, and a model with
    equal logits for all classes gains nothing from ties.
    """
    matrix, targets = _check_outputs(logits, labels)
    if not 1 <= k <= matrix.shape[1]:
        raise UsageError(f"k must be between 1 and {matrix.shape[1]} classes, got {k}")
    is_hit = np.empty(len(targets), np.bool_)
    for rows in row_chunks(matrix):
        chunk, classes = matrix[rows], targets[rows][:, None]
        target_logits = np.take_along_axis(chunk, classes, axis=1)
        is_tied_before = (chunk == target_logits) & (np.arange(matrix.shape[1]) < classes)
        is_hit[rows] = ((chunk > target_logits) | is_tied_before).sum(axis=1) < k
    return float(np.mean(is_hit))


def near_ties(logits: npt.ArrayLike, within: float = NEAR_TIE) -> int:
    """Return the number of images whose two highest logits differ by less than `within`.

    Only for these can the prediction change with the last digits.
    """
    matrix = _check_logits(logits)
    if matrix.shape[1] < 2:
        return 0
    count = 0
    for rows in row_chunks(matrix):
        second, first = np.partition(matrix[rows], -2, axis=1)[:, -2:].T.astype(np.float64)
        count += int(np.sum(first - second < within))
    return count


def confusion_matrix(labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: int) -> Ints:
    """Return counts [K, K]: rows are true classes, columns are predicted ones."""
    targets, preds = _check_indices(labels, classes), _check_indices(predictions, classes)
    _check_same_length(targets, preds, allow_empty=True)
    counts = np.bincount(targets * classes + preds, minlength=classes * classes)
    return counts.astype(np.int64).reshape(classes, classes)


def per_class(matrix: npt.ArrayLike) -> list[ClassScores]:
    """Return precision, recall and F1 of every class of a confusion matrix.

    A class without images has no scores; one that was never predicted has no precision.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    support, predicted, correct = counts.sum(axis=1), counts.sum(axis=0), counts.diagonal()
    scores: list[ClassScores] = []
    for n, num_preds, hits in zip(
        support.tolist(), predicted.tolist(), correct.tolist(), strict=True
    ):
        scores.append(
            {
                "n": n,
                "precision": hits / num_preds if n and num_preds else None,
                "recall": hits / n if n else None,
                "f1": 2 * hits / (n + num_preds) if n else None,
            }
        )
    return scores


def class_means(matrix: npt.ArrayLike) -> ClassMeans:
    """Return macro F1 and balanced accuracy of a confusion matrix, as scikit-learn defines them.

    Balanced accuracy is the mean recall of the classes with images. Macro F1 is the mean F1 of the
    classes with images or predictions: a class without images that was predicted has an F1 of 0.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    if not counts.sum():
        raise _no_images()
    f1, recall = _class_means(counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1))
    return ClassMeans(float(f1), float(recall))


def _class_means(
    correct: npt.NDArray[Any], predicted: npt.NDArray[Any], support: npt.NDArray[Any]
) -> tuple[Floats, Floats]:
    """Return macro F1 and balanced accuracy for counts of each class, `[..., K]`."""
    total = predicted + support
    f1 = 2 * correct / np.maximum(total, 1)
    recall = correct / np.maximum(support, 1)
    return f1.sum(-1) / (total > 0).sum(-1), recall.sum(-1) / (support > 0).sum(-1)


def bootstrap_class_means(
    labels: npt.ArrayLike,
    *predictions: npt.ArrayLike,
    classes: int,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> Floats:
    """Return macro F1 and balanced accuracy of resampled images, `[models, 2, draws]`.

    The bootstrap is stratified: the images of each class are drawn with replacement from this
    class, so that none disappears. Different predictions are resampled together, which makes their
    differences paired. Instead of images, the counts of equal combinations of label and
    predictions are drawn, from a multinomial distribution. A class whose images are all classified
    in the same way has no spread, so intervals from few images are too narrow. Efron and
    Tibshirani 1993, An Introduction to the Bootstrap.

    Args:
        predictions: of one or several models for the same images.
    """
    targets = _check_indices(labels, classes)
    preds = np.stack([_check_indices(each, classes) for each in predictions], axis=1)
    _check_same_length(targets, preds)
    random = np.random.default_rng(seed)
    support = np.bincount(targets, minlength=classes)
    correct = np.zeros((len(predictions), draws, classes), np.int32)
    predicted = np.zeros_like(correct)
    for label in np.flatnonzero(support):
        pairs, counts = np.unique(preds[targets == label], axis=0, return_counts=True)
        drawn = random.multinomial(support[label], counts / support[label], size=draws)
        for model, column in enumerate(pairs.T):
            for pred in np.unique(column):
                number = drawn[:, column == pred].sum(axis=1)
                predicted[model, :, pred] += number
                if pred == label:
                    correct[model, :, label] = number
    # One model after the other: with 1,000 classes, each of the arrays has 8 MB.
    by_model = zip(correct, predicted, strict=True)
    return np.array([_class_means(*counts_of_model, support) for counts_of_model in by_model])


def percentile_interval(values: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval between two percentiles of bootstrap values, (low, high)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(values), [tail, 1 - tail])
    return float(low), float(high)


def class_means_difference(
    labels: npt.ArrayLike, before: npt.ArrayLike, after: npt.ArrayLike, classes: int
) -> dict[str, AccuracyDifference]:
    """Return the differences of macro F1 and balanced accuracy on the same images.

    The intervals are percentiles of paired bootstrap draws (`bootstrap_class_means`); there are no
    p values.
    """
    values = [class_means(confusion_matrix(labels, each, classes)) for each in (before, after)]
    first, second = bootstrap_class_means(labels, before, after, classes=classes)
    return {
        name: AccuracyDifference(
            getattr(values[1], name) - getattr(values[0], name), percentile_interval(draws), None
        )
        for name, draws in zip(ClassMeans._fields, second - first, strict=True)
    }


def reliability_bins(
    probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = CALIBRATION_BINS
) -> tuple[Floats, Floats, Ints]:
    """Return mean confidence, accuracy and count in `bins` equal intervals of confidence.

    Confidence is the highest probability; bin m is ((m - 1) / bins, m / bins], as in Guo et al.
    2017. Empty bins have NaN for confidence and accuracy.
    """
    matrix, targets = _check_outputs(probs, labels)
    if bins < 1:
        raise UsageError(f"bins must be at least 1, got {bins}")
    if matrix.min() < 0 or np.abs(matrix.sum(axis=1) - 1).max() > 1e-2:
        raise UsageError("these are not probabilities", fix="pass softmax(logits)")
    return _bin_confidences(matrix.max(axis=1), matrix.argmax(axis=1) == targets, bins)


def _bin_confidences(
    confidences: npt.NDArray[Any], correct: npt.NDArray[np.bool_], bins: int
) -> tuple[Floats, Floats, Ints]:
    index = _bin_index(confidences, bins)
    count = np.bincount(index, minlength=bins).astype(np.int64)
    divisor = np.where(count > 0, count, np.nan)
    mean_confidence = np.bincount(index, weights=confidences, minlength=bins) / divisor
    return mean_confidence, np.bincount(index, weights=correct, minlength=bins) / divisor, count


def _bin_index(confidences: npt.NDArray[Any], bins: int) -> Ints:
    index: Ints = np.digitize(confidences, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    return index


def ece(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| of bins, by count.

    Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    return _calibration_error(*reliability_bins(probs, labels, bins))


def _calibration_error(confidence: Floats, bin_accuracy: Floats, count: Ints) -> float:
    return float(np.nansum(np.abs(bin_accuracy - confidence) * count) / count.sum())


def ece_by_chance(
    probs: npt.ArrayLike, bins: int = CALIBRATION_BINS, *, draws: int = 200, seed: int = 0
) -> float:
    """Return the 95th percentile of the calibration error of a perfectly calibrated model.

    On a finite set this error is not 0, even if each prediction is correct with exactly its stated
    probability. It is simulated by consistency resampling: whether a prediction is correct is drawn
    from its confidence, `draws` times (Broecker and Smith 2007, Weather and Forecasting 22).
    """
    matrix = np.asarray(probs)
    if matrix.ndim != 2 or not len(matrix):
        raise _no_images()
    confidences = matrix.max(axis=1)
    index = _bin_index(confidences, bins)
    expected = np.bincount(index, weights=confidences, minlength=bins)
    random = np.random.default_rng(seed)
    errors = []
    for _ in range(draws):
        correct = random.random(len(confidences)) < confidences
        drawn = np.bincount(index, weights=correct, minlength=bins)
        errors.append(float(np.abs(drawn - expected).sum() / len(confidences)))
    return float(np.quantile(errors, 0.95))


class Calibration(NamedTuple):
    """Agreement of confidence and accuracy.

    Attributes:
        error: expected calibration error (ECE).
        chance: the error that chance alone explains.
        surplus: mean confidence minus accuracy.
    """

    error: float
    chance: float
    surplus: float

    @property
    def is_good(self) -> bool:
        return self.error <= self.chance

    @property
    def label(self) -> str:
        """A short verdict, e.g. `overconfident`."""
        if self.is_good:
            return "within chance"
        # Overconfident in some bins and underconfident in others: the mean says little.
        if abs(self.surplus) < self.error / 2:
            return "badly calibrated"
        return "overconfident" if self.surplus > 0 else "underconfident"

    def in_words(self) -> str:
        """Return the verdict as a sentence with the difference in percentage points."""
        if self.is_good:
            return "confidence agrees with accuracy, as far as this many images can show"
        if self.label == "badly calibrated":
            return "confidence is too high for some images and too low for others"
        direction = "high" if self.surplus > 0 else "low"
        return f"confidence is {100 * abs(self.surplus):.1f} points too {direction}"


def class_means_intervals(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, classes: int
) -> dict[str, list[float]]:
    """Return 95% bootstrap intervals as `macro_f1_interval95`, `balanced_accuracy_interval95`."""
    (draws,) = bootstrap_class_means(labels, predictions, classes=classes)
    return {
        f"{name}_interval95": list(percentile_interval(values))
        for name, values in zip(ClassMeans._fields, draws, strict=True)
    }


def summarize(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Return all metrics of an evaluation of a labeled split, ready for JSON.

    The loss is that of the network, without the temperature, so that it can be compared with the
    losses of its training. `ece` is that of the probabilities with it, `ece_uncalibrated` without.
    """
    matrix, targets = _check_outputs(logits, labels)
    count = len(classes)
    if matrix.shape[1] != count:
        raise UsageError(f"{matrix.shape[1]} outputs for {count} classes")
    preds = matrix.argmax(axis=1)
    table = confusion_matrix(targets, preds, count)
    losses, confidences = _losses_and_confidences(matrix, targets)
    n, correct = len(targets), int(table.trace())
    summary: dict[str, Any] = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "interval95": list(wilson_interval(correct, n)),
        **class_means(table)._asdict(),
        "near_ties": near_ties(matrix),
        "loss": float(np.mean(losses)),
    }
    if count > 5:
        summary["top5"] = top_k(matrix, targets, 5)
    binned = _bin_confidences(confidences, preds == targets, CALIBRATION_BINS)
    summary["ece"] = summary["ece_uncalibrated"] = _calibration_error(*binned)
    if temperature != 1:
        confidences = _losses_and_confidences(matrix, targets, temperature)[1]
        binned = _bin_confidences(confidences, preds == targets, CALIBRATION_BINS)
        summary["ece"] = _calibration_error(*binned)
    summary["per_class"] = dict(zip(classes, per_class(table), strict=True))
    summary["confusion"] = table.tolist()
    return summary


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (n - 1), None for a single value."""
    if not values:
        raise DataError("there are no values to average")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def variance_components(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return two standard deviations, (between groups, within groups).

    One-way analysis of variance for at least two groups of the same number of values, at least
    two: within^2 is the mean of the groups' variances. between^2 is the variance of their means
    minus within^2 / n, the part caused by variation within the groups, and 0 if that is larger.
    Searle, Casella, McCulloch 1992, Variance Components, chapter 3.
    """
    n = len(groups[0]) if groups else 0
    if len(groups) < 2 or n < 2 or any(len(group) != n for group in groups):
        raise UsageError(
            f"groups of {[len(group) for group in groups]} values: at least two groups of equal "
            "size, at least two, are needed"
        )
    within = statistics.fmean(statistics.variance(group) for group in groups)
    means = [statistics.fmean(group) for group in groups]
    return math.sqrt(max(statistics.variance(means) - within / n, 0.0)), math.sqrt(within)


def paired_counts(
    labels: npt.ArrayLike, before: npt.ArrayLike, after: npt.ArrayLike
) -> tuple[int, int, float]:
    """Compare two predictions for the same images.

    Returns:
        Images that only `after` classifies correctly, images that only `before` does, and the
        exact two-sided p value of McNemar's test (1 without changes), for the null hypothesis that
        a change goes in either direction equally often. McNemar 1947, Psychometrika 12 (2).
    """
    targets = _check_indices(labels)
    first, second = _check_indices(before), _check_indices(after)
    _check_same_length(targets, first)
    _check_same_length(targets, second)
    gained = int(np.sum((second == targets) & (first != targets)))
    lost = int(np.sum((first == targets) & (second != targets)))
    return gained, lost, _mcnemar(lost, gained)


def _mcnemar(first: int, second: int) -> float:
    """Return the exact p value: a binomial test on the images on which two models differ."""
    from scipy.stats import binomtest

    changed = first + second
    return float(binomtest(second, changed).pvalue) if changed else 1.0


def difference_on_images(both: int, first: int, second: int, neither: int) -> AccuracyDifference:
    """Return the difference of two accuracies on the same images.

    The interval is Newcombe's, the p value that of McNemar's exact test. McNemar 1947,
    Psychometrika 12 (2), 153-157.

    Args:
        both, neither: images that both models classify correctly, that neither does.
        first, second: images that only the first, only the second model classifies correctly.
    """
    value = (second - first) / (both + first + second + neither)
    interval = newcombe_interval(both, first, second, neither)
    return AccuracyDifference(value, interval, _mcnemar(first, second))


def newcombe_interval(
    both: int, first: int, second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the interval of a difference between paired proportions, by Newcombe's method 10.

    Wilson's intervals of the two proportions are combined by squaring and adding, minus twice
    their correlation, whose numerator has a continuity correction. It stays inside [-1, 1] and is
    valid for few images and proportions near 1. Newcombe 1998, Statistics in Medicine 17 (22),
    2635-2650. Arguments as in `difference_on_images`.
    """
    n = both + first + second + neither
    if n == 0:
        raise UsageError("there are no images to compare")
    before, after = (both + first) / n, (both + second) / n
    low1, high1 = wilson_interval(both + first, n, confidence)
    low2, high2 = wilson_interval(both + second, n, confidence)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    covariance = float(both * neither - first * second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(product) if product else 0.0

    def combine(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    gain = after - before
    return gain - combine(after - low2, high1 - before), gain + combine(
        high2 - after, before - low1
    )


def newcombe_independent_interval(
    first_correct: int, first_n: int, second_correct: int, second_n: int
) -> tuple[float, float]:
    """Return the interval of the difference of two proportions of different images.

    Newcombe's method 10 for independent samples, second minus first, from the Wilson intervals of
    both. Newcombe 1998, Statistics in Medicine 17 (8), 873-890.
    """
    first, second = first_correct / first_n, second_correct / second_n
    first_low, first_high = wilson_interval(first_correct, first_n)
    second_low, second_high = wilson_interval(second_correct, second_n)
    value = second - first
    return (
        value - math.hypot(second - second_low, first_high - first),
        value + math.hypot(second_high - second, first - first_low),
    )


def two_proportions_p(first: int, first_n: int, second: int, second_n: int) -> float:
    """Return the two-sided p value of Fisher's exact test for two independent proportions.

    Args:
        first, second: successes of `first_n` and `second_n`.
    """
    from scipy.stats import fisher_exact

    table = [[first, first_n - first], [second, second_n - second]]
    return float(fisher_exact(table).pvalue)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> AccuracyDifference:
    """Return the mean difference of pairs of values, one pair per seed, by a paired t-test."""
    from scipy.stats import ttest_rel

    if len(first) != len(second) or len(first) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values: at least two pairs are needed")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if _is_constant(differences):
        return AccuracyDifference(mean, None, None)
    return _from_test(mean, ttest_rel(second, first))


def welch_difference(first: Sequence[float], second: Sequence[float]) -> AccuracyDifference:
    """Return the difference of the means of two groups of unequal variance, by Welch's t-test.

    Each group has at least two values. Welch 1947, Biometrika 34 (1-2), 28-35; degrees of freedom
    by Satterthwaite.
    """
    from scipy.stats import ttest_ind

    if min(len(first), len(second)) < 2:
        raise UsageError(f"{len(first)} and {len(second)} values: at least two each are needed")
    difference = statistics.fmean(second) - statistics.fmean(first)
    if _is_constant(first) and _is_constant(second):
        return AccuracyDifference(difference, None, None)
    with warnings.catch_warnings():
        # scipy warns of "catastrophic cancellation" if all values of one group are equal. Runs
        # that all reach 100% are common here, and the test is exact for them.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        return _from_test(difference, ttest_ind(second, first, equal_var=False))


def _from_test(value: float, test: Any) -> AccuracyDifference:
    low, high = test.confidence_interval(0.95)
    return AccuracyDifference(value, (float(low), float(high)), float(test.pvalue))


def _is_constant(values: Sequence[float]) -> bool:
    """Return whether values are equal up to rounding: without spread there is nothing to test."""
    return max(values) - min(values) < 1e-12


def holm_adjust(values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for multiple testing, in the same order; None stays None.

    The k-th smallest of m is multiplied by m - k + 1, and is at least the one before it. Holm 1979,
    Scandinavian Journal of Statistics 6 (2), 65-70.
    """
    ranked = sorted((p, index) for index, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    previous = 0.0
    for rank, (p, index) in enumerate(ranked):
        previous = max(previous, min(1.0, p * (len(ranked) - rank)))
        corrected[index] = previous
    return corrected


def row_chunks(matrix: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield slices of rows: in float64, 50,000 images of 1,000 classes would take 400 MB."""
    step = max(1, _CHUNK_LOGITS // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _shift_to_zero(matrix: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return a float64 copy whose rows have the maximum 0, so that `exp` can't overflow."""
    shifted = matrix.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    if temperature != 1:
        shifted /= temperature
    return shifted


def _check_logits(logits: npt.ArrayLike) -> npt.NDArray[Any]:
    matrix = np.asarray(logits)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise UsageError(f"outputs must have the shape [images, classes], got {matrix.shape}")
    finite = np.isfinite(matrix)
    if not finite.all():
        bad = ~finite.all(axis=1)
        # Pixels are uint8, so only the weights (or half precision) can cause this.
        raise ModelFileError(
            f"the model's outputs are not finite for {int(bad.sum())} of {len(bad)} images",
            where=f"first at index {int(bad.argmax())}",
            fix="use float32, or a checkpoint from before the training diverged",
        )
    return matrix


def _check_indices(values: npt.ArrayLike, classes: int | None = None) -> Ints:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UsageError(
            f"labels must be a list of integers, got {array.dtype} of shape {list(array.shape)}"
        )
    invalid = (array < 0) if classes is None else (array < 0) | (array >= classes)
    if invalid.any():
        valid = "at least 0" if classes is None else f"between 0 and {classes - 1}"
        raise UsageError(
            f"class index {array[invalid][0]} is not {valid}",
            where=f"first at index {int(invalid.argmax())}",
        )
    return array.astype(np.int64)


def _check_same_length(
    first: npt.NDArray[Any], second: npt.NDArray[Any], *, allow_empty: bool = False
) -> None:
    if len(first) != len(second):
        raise UsageError(f"{len(first)} and {len(second)} values: the lengths must be equal")
    if len(first) == 0 and not allow_empty:
        raise _no_images()


def _no_images() -> DataError:
    return DataError("there are no images to evaluate", fix="use a split that contains images")


def _check_outputs(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[npt.NDArray[Any], Ints]:
    matrix = _check_logits(logits)
    targets = _check_indices(labels, matrix.shape[1])
    _check_same_length(matrix, targets)
    return matrix, targets
