"""Scores for images unlike the training images: higher means less like them.

- Distance to the k-th nearest of some training images in the feature space of the penultimate
  layer, after L2 normalization: Sun, Ming, Zhu, Li 2022, Out-of-Distribution Detection with Deep
  Nearest Neighbors.
- Energy of the logits, where only these are available: Liu, Wang, Owens, Li 2020, Energy-based
  Out-of-Distribution Detection.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from convlens import metrics

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MAX_VECTORS = 2000
MAX_BYTES = 1 << 24  # of all vectors as float16: a network may have 25,000 features
MAX_NEIGHBORS = 10
ORDINARY_SHARE = 0.95  # of the validation images, which are not marked


def choose_reference(labels: npt.ArrayLike, count: int, seed: int) -> Ints:
    """Return the sorted indices of `count` images, equally many of each class as far as they go.

    The choice is a function of labels and seed. Classes with fewer images give all of them.
    """
    targets = np.asarray(labels)
    random = np.random.default_rng([seed, 0])
    order = random.permutation(len(targets))
    # The rank of each image within its class, in random order: first those of rank 0, and so on.
    rank = np.empty(len(targets), np.int64)
    for label in np.unique(targets):
        members = order[targets[order] == label]
        rank[members] = np.arange(len(members))
    chosen = order[np.argsort(rank[order], kind="stable")][:count]
    return np.sort(chosen).astype(np.int64)


def max_vectors(features: int) -> int:
    """Return how many vectors of this many features are stored."""
    return max(1, min(MAX_VECTORS, MAX_BYTES // (2 * features)))


def num_neighbors(vectors: int, classes: int) -> int:
    """Return k: at most 10, and at most half of the vectors of a class."""
    return max(1, min(MAX_NEIGHBORS, vectors // (2 * classes)))


def l2_normalize(features: npt.ArrayLike) -> Float32s:
    """Return the vectors `[N, D]` divided by their lengths; vectors of length 0 stay 0."""
    vectors = np.asarray(features, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: Float32s = vectors / np.maximum(lengths, np.float32(1e-12))
    return normalized


def unit_reference(features: npt.ArrayLike) -> Float32s:
    """Return vectors `[M, D]` of length 1, to which others are compared.

    They are stored by column: the product with a single image takes 13 instead of 22 us.
    """
    return np.asfortranarray(l2_normalize(features))


def neighbor_distances(features: npt.ArrayLike, reference: npt.ArrayLike, k: int) -> Floats:
    """Return the distance of each vector `[N, D]` to its k-th nearest in `reference` `[M, D]`.

    The squared distance of vectors of length 1 is 2 - 2 cos.

    Args:
        features: of any length; they are normalized first.
        reference: from `unit_reference`.
    """
    cosines = l2_normalize(features) @ np.asarray(reference, dtype=np.float32).T
    # (`np.partition` takes more than twice as long.)
    nearest = torch.from_numpy(cosines).topk(k, dim=1).values[:, -1].numpy().astype(np.float64)
    return np.asarray(np.sqrt(np.maximum(2 - 2 * nearest, 0)))


def energy(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return -log sum exp(logits / temperature) of each row of `[N, K]`."""
    matrix = np.asarray(logits)
    energies = np.empty(len(matrix))
    for rows in metrics.row_chunks(matrix):
        scaled = matrix[rows].astype(np.float64) / temperature
        largest = scaled.max(axis=1)
        energies[rows] = -largest - np.log(np.exp(scaled - largest[:, None]).sum(axis=1))
    return energies


def outlier_threshold(scores: npt.ArrayLike, share: float = ORDINARY_SHARE) -> float | None:
    """Return the score that at most a share of 1 - `share` of ordinary images exceed, on average.

    It is the ceil((n + 1) * share)-th smallest; None for fewer scores than that.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = math.ceil(round((len(ordered) + 1) * share, 9))
    return None if rank > len(ordered) else float(ordered[rank - 1])
