"""Scores for images unlike the training images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import logsumexp

from convlens.uncertainty import outliers


@pytest.mark.parametrize("k", [1, 3, 20])
def test_neighbor_distances_equal_brute_force(k: int) -> None:
    random = np.random.default_rng(k)
    features, reference = random.normal(size=(30, 7)), random.normal(size=(20, 7))
    stored = outliers.l2_normalize(outliers.l2_normalize(reference).astype(np.float16))
    expected = []
    for row in features / np.linalg.norm(features, axis=1, keepdims=True):
        unit = stored / np.linalg.norm(stored.astype(np.float64), axis=1, keepdims=True)
        expected.append(sorted(float(np.linalg.norm(row - other)) for other in unit)[k - 1])
    found = outliers.neighbor_distances(features, stored, k)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_length_of_features_does_not_matter_and_zeros_are_no_neighbor() -> None:
    reference = np.eye(3)
    assert outliers.neighbor_distances([[5.0, 0, 0]], reference, 1) == pytest.approx(0)
    assert outliers.neighbor_distances([[0.0, 0, 0]], reference, 1) == pytest.approx(np.sqrt(2))


def test_energy_equals_scipy_and_survives_large_logits() -> None:
    logits = np.array([[1.0, 2, 3], [1000, -1000, 0], [0, 0, 0]])
    np.testing.assert_allclose(outliers.energy(logits), -logsumexp(logits, axis=1))
    np.testing.assert_allclose(outliers.energy(logits, 2.5), -logsumexp(logits / 2.5, axis=1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(1, 60), st.integers(0, 9))
def test_reference_images_are_stratified_and_seeded(
    labels: list[int], count: int, seed: int
) -> None:
    chosen = outliers.choose_reference(labels, count, seed)
    assert chosen.tolist() == outliers.choose_reference(labels, count, seed).tolist()
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(labels))
    targets = np.array(labels)
    have, taken = np.bincount(targets, minlength=6), np.bincount(targets[chosen], minlength=6)
    # A class that gives fewer than another gives all of its images, up to one.
    assert all(taken[c] == have[c] or taken[c] >= taken.max() - 1 for c in range(6))


def test_number_of_vectors_and_neighbors() -> None:
    assert outliers.max_vectors(512) == 2000
    assert outliers.max_vectors(1 << 20) == 8  # 16 MiB of float16
    assert outliers.max_vectors(1 << 25) == 1
    assert [outliers.num_neighbors(n, 10) for n in (2000, 80, 5)] == [10, 4, 1]


def test_threshold_is_the_quantile_with_its_correction() -> None:
    assert outliers.outlier_threshold(np.arange(19.0)) == 18
    assert outliers.outlier_threshold(np.arange(18.0)) is None
    assert outliers.outlier_threshold(np.random.default_rng(0).permutation(199)) == 189
