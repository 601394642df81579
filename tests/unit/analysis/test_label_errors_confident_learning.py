"""Confident learning with known results: by hand, and by the formula of the paper."""

from __future__ import annotations

import numpy as np
import pytest

from convlens.analysis import label_errors

# Two certain images of class 0, one labelled 0 that looks like 1, three certain ones of class 1.
LABELS = np.array([0, 0, 0, 1, 1, 1])
PROBS = np.array([[0.9, 0.1], [0.8, 0.2], [0.05, 0.95], [0.15, 0.85], [0.1, 0.9], [0.3, 0.7]])


def confident_joint(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return the confident joint as the paper defines it (equations 1 and 2)."""
    classes = probs.shape[1]
    thresholds = [probs[labels == c, c].mean() for c in range(classes)]
    joint = np.zeros((classes, classes))
    for label, row in zip(labels, probs, strict=True):
        over = [c for c in range(classes) if row[c] >= thresholds[c]]
        if over:
            joint[label, max(over, key=lambda c: row[c])] += 1
    return joint


def noisy(rate: float, sharpness: float, n: int = 1500) -> tuple[np.ndarray, ...]:
    """Return true labels, given labels with errors, and probabilities of a good model."""
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, n)
    wrong = random.random(n) < rate
    labels = np.where(wrong, (targets + random.integers(1, 3, n)) % 3, targets)
    logits = random.normal(size=(n, 3)) + sharpness * np.eye(3)[targets]
    probs = np.exp(logits)
    return targets, labels, probs / probs.sum(1, keepdims=True)


def test_issues_computed_by_hand() -> None:
    issues = label_errors.find_issues(LABELS, PROBS)
    assert issues.suspected.tolist() == [False, False, True, False, False, False]
    assert issues.suggested.tolist() == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(issues.scores, PROBS[np.arange(6), LABELS])
    # Thresholds 0.5833 and 0.8167: of label 0 two are confidently 0 and one 1; of label 1 two are
    # 1 and none is 0, scaled to its three images.
    np.testing.assert_allclose(confident_joint(LABELS, PROBS), [[2, 1], [0, 2]])
    np.testing.assert_allclose(issues.joint, [[2, 1], [0, 3]])


def test_the_joint_is_that_of_the_paper_scaled_to_the_label_counts() -> None:
    _, labels, probs = noisy(0.1, 4)
    issues = label_errors.find_issues(labels, probs)
    raw = confident_joint(labels, probs)
    expected = raw / raw.sum(1, keepdims=True) * np.bincount(labels)[:, None]
    np.testing.assert_allclose(issues.joint, expected, atol=1.5)  # cleanlab's are integers
    np.testing.assert_array_equal(issues.joint.sum(1), np.bincount(labels))


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_planted_errors_are_found_and_their_share_is_estimated(rate: float) -> None:
    targets, labels, probs = noisy(rate, 6)
    issues = label_errors.find_issues(labels, probs)
    planted = targets != labels
    hits = planted & issues.suspected
    assert hits.sum() / planted.sum() > 0.9
    assert hits.sum() / issues.suspected.sum() > 0.9
    assert 1 - np.trace(issues.joint) / 1500 == pytest.approx(planted.mean(), abs=0.02)
    assert (issues.suggested[hits] == targets[hits]).mean() > 0.97
    # The score alone ranks nearly all of them first.
    worst = np.argsort(issues.scores)[: planted.sum()]
    assert planted[worst].mean() > 0.9


def test_correct_labels_are_not_suspected() -> None:
    _, labels, probs = noisy(0, 6)
    issues = label_errors.find_issues(labels, probs)
    assert issues.suspected.mean() < 0.01
    assert np.trace(issues.joint) > 0.99 * len(labels)


def test_a_class_without_images_and_probabilities_of_one_are_accepted() -> None:
    probs = np.eye(4)[[0, 0, 0, 1, 1, 3, 3, 3]].astype(float)
    issues = label_errors.find_issues(np.array([0, 0, 1, 1, 1, 3, 3, 3]), probs)
    assert issues.suspected.tolist() == [i == 2 for i in range(8)]
    assert issues.joint.shape == (4, 4)
    assert np.isfinite(issues.joint).all()
