"""Duplicate images: exact ones as groups by digest, near ones as pairs by perceptual hash.

The hash is the DCT hash (pHash, phash.org): one bit for each of the 63 lowest frequencies of a
32 x 32 grey thumbnail, set if it is above the median. Scaling, compression and brightness hardly
change it. Small drawings on an empty background can share a hash without being similar, so each
pair is verified by the correlation of its thumbnails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convlens.data.decode import Pixels, fit_arrays

Thumbs = npt.NDArray[np.uint8]  # [N, HASH_SIDE, HASH_SIDE], grey
Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]  # [P, 2], the smaller index first
Indices = npt.NDArray[np.int64]  # [N]

HASH_SIDE = 32  # pixels of a thumbnail
MAX_HASH_DISTANCE = 4  # bits of 63 that may differ
MIN_CORRELATION = 0.985  # of the thumbnails of near duplicates
MIN_STD = 2.0  # grey levels; a thumbnail of a smaller deviation counts as plain
MAX_PAIRS = 1_000_000  # candidates; frames of a video give more pairs than a person can read
MAX_LISTED_GROUPS = 100  # shown one by one; all are counted
# Widths in bits. There is one more band than bits may differ, so at least one band is equal.
_BANDS = (13, 13, 13, 12, 12)
_LOW_FREQUENCIES = 8  # rows and columns of the DCT that are used
_CHUNK = 4096  # thumbnails converted to floats at a time


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are equal or look the same, with the split and the class of each."""

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def across_splits(self) -> bool:
        """Whether a model would be tested (or selected) on an image that it was trained on."""
        return len(set(self.splits)) > 1

    @property
    def two_labels(self) -> bool:
        """Whether the labels differ, so that at least one of them is wrong."""
        return len(set(self.labels)) > 1


@dataclass(frozen=True)
class Duplicates:
    """All duplicates of one kind."""

    groups: int  # number of groups
    across_splits: int  # number of groups in several splits
    two_labels: int  # number of groups with several labels
    listed: tuple[DuplicateGroup, ...]  # up to `MAX_LISTED_GROUPS`, the worst first
    complete: bool = True  # whether the search found all of them

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[int]],
        ids: Sequence[str],
        splits: Sequence[str],
        labels: Sequence[str],
        *,
        complete: bool = True,
    ) -> Duplicates:
        """Summarize groups of indices into `ids`, `splits` and `labels`."""
        columns = (ids, splits, labels)
        all_groups = [
            DuplicateGroup(*(tuple(column[i] for i in group) for column in columns))
            for group in groups
        ]
        worst_first = sorted(all_groups, key=lambda g: (not g.across_splits, not g.two_labels))
        return cls(
            groups=len(all_groups),
            across_splits=sum(group.across_splits for group in all_groups),
            two_labels=sum(group.two_labels for group in all_groups),
            listed=tuple(worst_first[:MAX_LISTED_GROUPS]),
            complete=complete,
        )


def _as_items(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")[:, 0]


def exact_duplicates(digests: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Return the groups of equal rows of `[N, bytes]`, as sorted lists of their indices."""
    _, group, counts = np.unique(_as_items(digests), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(counts)
    return sorted(order[ends[g] - counts[g] : ends[g]].tolist() for g in np.flatnonzero(counts > 1))


def copies_to_drop(
    digests: npt.NDArray[np.uint8], labels: Indices
) -> tuple[list[list[int]], list[list[int]]]:
    """Find the images that a set without copies does without.

    Returns:
        The groups of equal images with one label, of which all but the first are dropped, and the
        groups under several labels, of which all are dropped: at least one label is wrong, and
        which one is unknown.
    """
    same_label, conflicting = list[list[int]](), list[list[int]]()
    for group in exact_duplicates(digests):
        is_conflict = len(np.unique(labels[group])) > 1
        (conflicting if is_conflict else same_label).append(group)
    return same_label, conflicting


def groups_with_copies(
    digests: npt.NDArray[np.uint8], groups: Sequence[str] | None
) -> tuple[list[str] | None, int]:
    """Join groups of images that hold copies of each other.

    Args:
        digests: Digest of each image, uint8 `[N, bytes]`.
        groups: Group of each image; None if every image is on its own.

    Returns:
        The group of each image and the number of groups of copies. Without copies the groups are
        returned as they are.
    """
    copies = exact_duplicates(digests)
    if not copies:
        return None if groups is None else list(groups), 0
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    group = np.arange(len(digests))
    if groups is not None:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
    first = np.array([group[each[0]] for each in copies for _ in each[1:]])
    others = np.array([group[number] for each in copies for number in each[1:]])
    edges = coo_matrix((np.ones(len(first), np.bool_), (first, others)), shape=(len(group),) * 2)
    _, joined = connected_components(edges, directed=False)
    return [str(number) for number in joined[group].tolist()], len(copies)


def is_plain(thumbs: Thumbs) -> npt.NDArray[np.bool_]:
    """Return which thumbnails have (nearly) a single color, bool `[N]`."""
    plain = np.zeros(len(thumbs), np.bool_)
    for start in range(0, len(thumbs), _CHUNK):
        pixels = thumbs[start : start + _CHUNK].reshape(-1, HASH_SIDE * HASH_SIDE)
        plain[start : start + _CHUNK] = pixels.std(axis=1) < MIN_STD
    return plain


def perceptual_hashes(thumbs: Thumbs) -> Hashes:
    """Return the DCT hash of each thumbnail, uint64 `[N]`; its last bit is always 0."""
    hashes = np.zeros(len(thumbs), np.uint64)
    k = np.arange(HASH_SIDE)
    n_low = _LOW_FREQUENCIES
    cosines = np.cos(np.pi * (2 * k + 1) * k[:n_low, None] / (2 * HASH_SIDE)).astype(np.float32)
    for start in range(0, len(thumbs), _CHUNK):
        pixels = thumbs[start : start + _CHUNK].astype(np.float32)
        # Two matrix products over all images, rows then columns: far faster than one per image.
        rows = pixels.reshape(-1, HASH_SIDE) @ cosines.T
        columns = rows.reshape(-1, HASH_SIDE, n_low).swapaxes(1, 2).reshape(-1, HASH_SIDE)
        coefficients = (columns @ cosines.T).reshape(-1, n_low * n_low)
        # Without the first one, the mean: a brighter copy is still a copy.
        low = coefficients[:, 1:]
        bits = np.zeros((len(pixels), 64), np.bool_)
        bits[:, :63] = low > np.partition(low, 31, axis=1)[:, 31:32]
        hashes[start : start + _CHUNK] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return hashes


def close_pairs(hashes: Hashes, *, max_pairs: int = MAX_PAIRS) -> tuple[Pairs, bool]:
    """Find all pairs of hashes that differ in at most `MAX_HASH_DISTANCE` bits.

    Hashes that differ in 4 bits agree in one of 5 bands. Only hashes that agree in a band are
    compared, after sorting by it, so the N^2 pairs are never formed.

    Returns:
        The pairs of indices, int64 `[P, 2]`, and whether these are all pairs. The search stops at
        `max_pairs`.
    """
    found: list[Pairs] = []
    total, earlier_masks = 0, list[np.uint64]()
    start = 0
    for width in _BANDS:
        mask = np.uint64(((1 << width) - 1) << start)
        start += width
        band = hashes & mask
        order = np.argsort(band, kind="stable")
        ordered, sorted_band = hashes[order], band[order]
        # Compare each hash with the next one of equal band, then with the one after it, and so on.
        first = np.arange(len(hashes) - 1)
        shift = 1
        while len(first):
            first = first[first < len(hashes) - shift]
            first = first[sorted_band[first] == sorted_band[first + shift]]
            difference = ordered[first] ^ ordered[first + shift]
            near = np.bitwise_count(difference) <= MAX_HASH_DISTANCE
            for earlier_mask in earlier_masks:  # pairs that were found there already
                near &= (difference & earlier_mask) != 0
            hits = first[near]
            found.append(np.sort(np.stack([order[hits], order[hits + shift]], axis=1), axis=1))
            total += len(hits)
            if total > max_pairs:
                return np.concatenate(found)[:max_pairs].astype(np.int64), False
            shift += 1
        earlier_masks.append(mask)
    pairs = np.concatenate(found).astype(np.int64) if found else np.empty((0, 2), np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], True


def correlation(thumbs: Thumbs, pairs: Pairs) -> npt.NDArray[np.float32]:
    """Return the correlation of the thumbnails of each pair, float32 `[P]`, from -1 to 1.

    It does not depend on brightness and contrast.
    """
    out = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _CHUNK):
        pixels = thumbs[pairs[start : start + _CHUNK]].reshape(-1, 2, HASH_SIDE * HASH_SIDE)
        centered = pixels.astype(np.float32)
        centered -= centered.mean(axis=2, keepdims=True)
        centered /= np.maximum(np.linalg.norm(centered, axis=2, keepdims=True), 1e-6)
        out[start : start + _CHUNK] = (centered[:, 0] * centered[:, 1]).sum(axis=1)
    return out


def grey_thumbnails(images: Pixels) -> Thumbs:
    """Return grey thumbnails of uint8 images `[N, C, H, W]`."""
    return fit_arrays(images, size=HASH_SIDE, channels=1, fit="stretch")[:, 0]


def near_duplicates(thumbs: Thumbs, digests: npt.NDArray[np.uint8]) -> tuple[Pairs, bool]:
    """Find pairs of images that look the same but are not equal.

    Only one of several images with equal digests is used; plain images are left out.

    Args:
        thumbs: Grey thumbnails, uint8 `[N, HASH_SIDE, HASH_SIDE]`.
        digests: Digest of each image, uint8 `[N, bytes]`.

    Returns:
        The pairs of indices, int64 `[P, 2]`, and whether the search was complete.
    """
    _, first_of_equals = np.unique(_as_items(digests), return_index=True)
    chosen = np.sort(first_of_equals)
    chosen = chosen[~is_plain(thumbs[chosen])]
    candidates = thumbs[chosen]
    pairs, complete = close_pairs(perceptual_hashes(candidates))
    return chosen[pairs[correlation(candidates, pairs) >= MIN_CORRELATION]], complete
