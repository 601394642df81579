"""Macro F1, balanced accuracy and their bootstrap intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import fisher_exact
from sklearn import metrics as reference

from convlens import metrics
from convlens.errors import DataError, UsageError

Pairs = list[tuple[int, int]]


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_they_equal_scikit_learn_also_for_absent_classes(pairs: Pairs) -> None:
    labels, preds = np.array(pairs).T
    found = metrics.class_means(metrics.confusion_matrix(labels, preds, 6))
    expected = reference.f1_score(labels, preds, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(expected)
    assert found.balanced_accuracy == pytest.approx(
        reference.balanced_accuracy_score(labels, preds)
    )


def test_absent_classes_by_hand() -> None:
    # Classes 0 and 1 have images, 2 was only predicted, 3 does not occur.
    # F1: 2 / (2 + 1) = 2/3, 2 / (1 + 1) = 1, 0. Recall: 1/2 and 1.
    found = metrics.class_means(metrics.confusion_matrix([0, 0, 1], [0, 2, 1], 4))
    assert found == pytest.approx((5 / 9, 3 / 4))
    assert found._fields == ("macro_f1", "balanced_accuracy")
    with pytest.raises(DataError, match="no images"):
        metrics.class_means(np.zeros((3, 3)))


def test_the_summary_has_both() -> None:
    logits = np.eye(3)[[0, 1, 1, 2]]
    summary = metrics.summarize(logits, [0, 0, 1, 2], ["a", "b", "c"])
    assert summary["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert summary["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


# Bootstrap


def test_the_bootstrap_has_the_exact_distribution() -> None:
    """All 4 x 27 resamples of two and three images, against 20,000 draws."""
    labels, preds = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    exact = []
    choices = itertools.product(*[[0, 1]] * 2, *[[2, 3, 4]] * 3)
    for index in choices:
        chosen = list(index)
        table = metrics.confusion_matrix(labels[chosen], preds[chosen], 2)
        exact.append(metrics.class_means(table))
    (drawn,) = metrics.bootstrap_class_means(labels, preds, classes=2, draws=20_000)
    for values, expected in zip(drawn, np.array(exact).T, strict=True):
        shares = {v: np.mean(np.isclose(expected, v)) for v in np.unique(expected.round(9))}
        for value, share in shares.items():
            error = 4 * math.sqrt(share * (1 - share) / 20_000)
            assert np.mean(np.isclose(values, value)) == pytest.approx(share, abs=error + 1e-9)


def test_the_bootstrap_depends_on_its_seed_only_and_keeps_every_class() -> None:
    labels = np.array([0] * 40 + [1] * 2)
    preds = np.where(np.arange(42) % 3 == 0, 1 - labels, labels)
    first = metrics.bootstrap_class_means(labels, preds, classes=2)
    assert first.shape == (1, 2, metrics.BOOTSTRAP_DRAWS)
    np.random.default_rng(5).random()
    np.testing.assert_array_equal(first, metrics.bootstrap_class_means(labels, preds, classes=2))
    other = metrics.bootstrap_class_means(labels, preds, classes=2, seed=1)
    assert not np.array_equal(first, other)
    order = np.random.default_rng(0).permutation(42)  # the order of the images does not matter
    shuffled = metrics.bootstrap_class_means(labels[order], preds[order], classes=2)
    np.testing.assert_array_equal(first, shuffled)
    # Both classes always count: 40 recalls of 1/40 for class 0, and 0, 1/2 or 1 for class 1.
    np.testing.assert_allclose((80 * first[0, 1]).round(), 80 * first[0, 1])


def test_intervals_have_about_the_stated_coverage() -> None:
    """400 samples of a model with recalls 0.9, 0.7 and 0.5 on 60, 30 and 30 images."""
    random, recalls, sizes = np.random.default_rng(1), [0.9, 0.7, 0.5], [60, 30, 30]
    labels = np.repeat(np.arange(3), sizes)
    covered = 0
    for _ in range(400):
        correct = random.random(120) < np.repeat(recalls, sizes)
        preds = np.where(correct, labels, (labels + random.integers(1, 3, 120)) % 3)
        (draws,) = metrics.bootstrap_class_means(labels, preds, classes=3, draws=300)
        low, high = metrics.percentile_interval(draws[1])
        covered += low <= np.mean(recalls) <= high
    assert 0.90 < covered / 400 < 0.98


def test_paired_differences_have_narrower_intervals_than_independent_ones() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 600)
    before = np.where(random.random(600) < 0.7, labels, (labels + 1) % 3)
    after = np.where(random.random(600) < 0.1, labels, before)  # corrects some mistakes
    found = metrics.class_means_difference(labels, before, after, 3)
    tables = [metrics.confusion_matrix(labels, preds, 3) for preds in (before, after)]
    first, second = map(metrics.class_means, tables)
    for name, each in found.items():
        assert each.value == pytest.approx(getattr(second, name) - getattr(first, name))
        assert each.interval95 is not None
        low, high = each.interval95
        assert 0 < low < each.value < high
        assert high - low < 0.05  # of one model alone: about 0.07
    same = metrics.class_means_difference(labels, before, before, 3)
    assert same["macro_f1"] == (0, (0, 0), None)


def test_predictions_of_different_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="the lengths must be equal"):
        metrics.bootstrap_class_means([0, 1, 1], [0, 1], classes=2)
    with pytest.raises(DataError, match="no images"):
        metrics.bootstrap_class_means([], [], classes=2)


def test_the_test_of_two_proportions_is_that_of_fisher() -> None:
    assert metrics.two_proportions_p(1, 10, 9, 12) == fisher_exact([[1, 9], [9, 3]]).pvalue
    assert metrics.two_proportions_p(3, 3, 4, 4) == 1
