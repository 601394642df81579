"""Metrics, against values computed by hand and against scikit-learn on random data."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import binomtest
from sklearn import metrics as reference

from convlens import metrics
from convlens.errors import DataError, ModelFileError, UsageError


def random_outputs(classes: int, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(classes)
    labels = generator.integers(0, classes, n)
    logits = generator.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    return logits, labels


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=70),
    st.sampled_from([1.0, 0.3, 2.5]),
)
def test_the_row_of_one_image_has_the_bits_of_the_matrix(
    logits: list[float], temperature: float
) -> None:
    matrix = np.array([logits], np.float32)
    assert (
        metrics.softmax_row(logits, temperature) == metrics.softmax(matrix, temperature)[0].tolist()
    )


@pytest.mark.parametrize("classes", [2, 5, 10, 200])
def test_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    logits, labels = random_outputs(classes)
    probs, preds, names = metrics.softmax(logits), logits.argmax(axis=1), list(range(classes))
    assert metrics.accuracy(labels, preds) == reference.accuracy_score(labels, preds)
    loss = reference.log_loss(labels, probs, labels=names)
    assert metrics.cross_entropy(logits, labels) == pytest.approx(loss, rel=1e-9)
    table = metrics.confusion_matrix(labels, preds, classes)
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, reference.confusion_matrix(labels, preds, labels=names))
    for k in {1, 2, min(5, classes)}:
        if k < classes and classes > 2:  # scikit-learn expects one column for two classes
            expected = reference.top_k_accuracy_score(labels, logits, k=k, labels=names)
            assert metrics.top_k(logits, labels, k) == pytest.approx(expected)
    assert metrics.top_k(logits, labels, classes) == 1
    expected = reference.precision_recall_fscore_support(
        labels, preds, labels=names, zero_division=np.nan
    )
    for scores, precision, recall, f1, n in zip(metrics.per_class(table), *expected, strict=True):
        assert scores["n"] == n
        if n:
            assert scores["recall"] == pytest.approx(recall)
            assert scores["f1"] == pytest.approx(f1)
            if math.isnan(precision):
                assert scores["precision"] is None
            else:
                assert scores["precision"] == pytest.approx(precision)


def test_wilson_interval_by_hand() -> None:
    # z = 2 makes the formula whole numbers: (8 + 2 +- 2 sqrt(8 * 2 / 10 + 1)) / (10 + 4).
    two_sigma = math.erf(math.sqrt(2))
    expected = [(10 + sign * 2 * math.sqrt(2.6)) / 14 for sign in (-1, 1)]
    assert metrics.wilson_interval(8, 10, two_sigma) == pytest.approx(expected)
    low, high = metrics.wilson_interval(10, 10)
    assert (low, high) == (pytest.approx(10 / (10 + 1.959964**2), abs=1e-6), 1.0)
    assert metrics.wilson_interval(0, 10) == (0.0, pytest.approx(1 - low))
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    narrow, wide = metrics.wilson_interval(8, 10, 0.5), metrics.wilson_interval(8, 10, 0.99)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


def test_wilson_interval_equals_scipy() -> None:
    for correct, n in [(0, 7), (1, 1), (8, 10), (97, 100), (9823, 10_000), (5, 1_000_000)]:
        ours = metrics.wilson_interval(correct, n)
        theirs = binomtest(correct, n).proportion_ci(method="wilson")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_has_the_stated_coverage() -> None:
    generator = np.random.default_rng(0)
    hits = generator.binomial(100, 0.95, size=4000)
    covered = [low <= 0.95 <= high for low, high in map(_interval_of_100, hits.tolist())]
    assert 0.93 < np.mean(covered) < 0.98


def _interval_of_100(correct: int) -> tuple[float, float]:
    return metrics.wilson_interval(correct, 100)


def test_cross_entropy_by_hand_and_for_huge_logits() -> None:
    assert metrics.cross_entropy([[0.0, 0.0]], [1]) == pytest.approx(math.log(2))
    assert metrics.cross_entropy([[math.log(3), 0.0]], [0]) == pytest.approx(math.log(4 / 3))
    huge = np.array([[1e30, -1e30, 0.0], [3e38, 3e38, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(metrics.softmax(huge), [[1, 0, 0], [0.5, 0.5, 0]])
    assert metrics.cross_entropy(huge, [0, 1]) == pytest.approx(math.log(2) / 2)
    assert metrics.cross_entropy([[1000.0, 0.0]], [1]) == pytest.approx(1000)
    half = np.array([[60000, -60000]], dtype=np.float16)
    assert metrics.cross_entropy(half, [1]) == pytest.approx(120000, rel=1e-3)


def test_ties_go_to_the_first_class() -> None:
    tied = np.zeros((4, 4))
    labels = np.arange(4)
    assert metrics.top_k(tied, labels, 1) == metrics.accuracy(labels, tied.argmax(axis=1)) == 0.25
    assert metrics.top_k(tied, labels, 3) == 0.75


def test_calibration_error_by_hand() -> None:
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.0, 1.0]])
    confidence, accuracy, count = metrics.reliability_bins(probs, [0, 1, 1, 1], bins=5)
    # (0.4, 0.6] has one image, predicted correctly, (0.8, 1.0] has three, two of them correct.
    np.testing.assert_array_equal(count, [0, 0, 1, 0, 3])
    np.testing.assert_allclose(confidence, [np.nan, np.nan, 0.6, np.nan, 2.8 / 3])
    np.testing.assert_allclose(accuracy, [np.nan, np.nan, 1, np.nan, 2 / 3])
    assert metrics.ece(probs, [0, 1, 1, 1], bins=5) == pytest.approx((0.4 + 0.8) / 4)


def test_calibration_error_equals_a_plain_loop() -> None:
    logits, labels = random_outputs(10)
    probs = metrics.softmax(logits)
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == labels
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.ece(probs, labels) == pytest.approx(expected / len(labels))


def test_undefined_values_are_none() -> None:
    # Class 1 was never predicted, class 2 has no images.
    table = metrics.confusion_matrix([0, 0, 1], [0, 2, 0], 3)
    first, never, absent = metrics.per_class(table)
    assert first == {"n": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert never == {"n": 1, "precision": None, "recall": 0.0, "f1": 0.0}
    assert absent == {"n": 0, "precision": None, "recall": None, "f1": None}
    assert metrics.mean_sd([0.5]) == (0.5, None)
    assert metrics.mean_sd([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 3)))


def test_a_summary_is_complete_and_ready_for_json() -> None:
    logits, labels = random_outputs(10)
    names = [f"class {index}" for index in range(10)]
    summary = metrics.summarize(logits, labels, names)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["n"] == 400
    assert summary["accuracy"] == summary["correct"] / 400
    low, high = summary["interval95"]
    assert low < summary["accuracy"] < high
    assert summary["accuracy"] < summary["top5"] < 1
    assert list(summary["per_class"]) == names
    assert np.sum(summary["confusion"]) == 400
    assert summary["ece"] == metrics.ece(metrics.softmax(logits), labels)
    small = metrics.summarize(np.eye(3) * 9, [0, 1, 2], ["a", "b", "c"])
    assert "top5" not in small
    assert (small["accuracy"], small["interval95"][1]) == (1, 1)


def test_metrics_of_no_images_are_errors() -> None:
    none = np.zeros((0, 3))
    assert metrics.softmax(none).shape == (0, 3)
    assert metrics.confusion_matrix([], [], 3).sum() == 0
    for call in (
        lambda: metrics.accuracy([], []),
        lambda: metrics.cross_entropy(none, []),
        lambda: metrics.top_k(none, [], 1),
        lambda: metrics.ece(none, []),
        lambda: metrics.summarize(none, [], ["a", "b", "c"]),
        lambda: metrics.mean_sd([]),
    ):
        with pytest.raises(DataError):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_are_errors(bad: float) -> None:
    logits, labels = random_outputs(4, 10)
    logits[3, 1] = logits[7, 0] = bad
    for call in (
        lambda: metrics.softmax(logits),
        lambda: metrics.cross_entropy(logits, labels),
        lambda: metrics.summarize(logits, labels, list("abcd")),
    ):
        with pytest.raises(ModelFileError, match="2 of 10") as caught:
            call()
        assert "index 3" in caught.value.where


def test_invalid_arguments_are_usage_errors() -> None:
    logits, labels = random_outputs(4, 10)
    for call in (
        lambda: metrics.cross_entropy(logits, labels[:9]),
        lambda: metrics.cross_entropy(logits, labels + 4),
        lambda: metrics.cross_entropy(logits, labels - 9),
        lambda: metrics.cross_entropy(logits, labels.astype(float)),
        lambda: metrics.cross_entropy(logits[0], labels),
        lambda: metrics.top_k(logits, labels, 5),
        lambda: metrics.top_k(logits, labels, 0),
        lambda: metrics.ece(logits, labels),
        lambda: metrics.ece(metrics.softmax(logits), labels, bins=0),
        lambda: metrics.summarize(logits, labels, ["a", "b"]),
        lambda: metrics.wilson_interval(3, 2),
        lambda: metrics.wilson_interval(1, 2, 1.0),
        lambda: metrics.confusion_matrix([0, 1], [0, 7], 2),
    ):
        with pytest.raises(UsageError):
            call()


def test_variance_components_by_hand() -> None:
    # Variances 2 and 2 within groups. The means 2 and 6 have variance 8, of which 2 / 2 comes
    # from variation within groups.
    assert metrics.variance_components([[1, 3], [5, 7]]) == pytest.approx(
        (math.sqrt(7), math.sqrt(2))
    )
    assert metrics.variance_components([[1, 3], [1, 3]]) == pytest.approx((0, math.sqrt(2)))
    assert metrics.variance_components([[4, 4, 4], [6, 6, 6]]) == pytest.approx((math.sqrt(2), 0))
    for groups in ([], [[1, 2]], [[1], [2]], [[1, 2], [1, 2, 3]]):
        with pytest.raises(UsageError):
            metrics.variance_components(groups)
