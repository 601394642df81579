"""Images that are the same or look the same: groups by digest, pairs by perceptual hash.

The hash is the DCT hash (pHash, phash.org): the 63 lowest frequencies of a 32 x 32 grey
thumbnail, each one bit: above the median or not. Scaling, compression and brightness hardly
change it. Small drawings on an empty ground can share a hash without being alike, so whatever
the hash finds is confirmed on the thumbnails themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Thumbs = npt.NDArray[np.uint8]  # [N, SIDE, SIDE]
Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]  # [P, 2], the smaller index first

HASH_SIDE = 32
DISTANCE = 4  # bits of 63 that may differ
MIN_CORRELATION = 0.985  # least correlation of two thumbnails
MIN_STD = 2.0  # grey levels: below this deviation a thumbnail shows nothing that could be compared
MAX_PAIRS = 1_000_000  # candidates; a film has more pairs of similar frames than anybody can read
_BANDS = (13, 13, 13, 12, 12)  # bits: one more band than bits may differ, so one must be equal
_LOW = 8
_CHUNK = 4096  # thumbnails turned into floats at a time
LISTED = 100  # groups shown one by one; all are counted


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are the same or look the same, with the split and the class of each."""

    ids: tuple[str, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def across_splits(self) -> bool:
        """The model would be tested (or chosen) by what it was trained on."""
        return len(set(self.splits)) > 1

    @property
    def two_labels(self) -> bool:
        """At least one of the labels is wrong."""
        return len(set(self.labels)) > 1


@dataclass(frozen=True)
class Duplicates:
    """All of one kind: how many groups, how many of them do harm, and the worst `LISTED`."""

    groups: int
    across_splits: int
    two_labels: int
    listed: tuple[DuplicateGroup, ...]
    complete: bool = True  # False: there are more than were searched for

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
        """From groups of indices into `ids`, `splits` and `labels`."""
        columns = (ids, splits, labels)
        found = [DuplicateGroup(*(tuple(c[i] for i in group) for c in columns)) for group in groups]
        worst = sorted(found, key=lambda r: (not r.across_splits, not r.two_labels))
        across, two = (sum(r.across_splits for r in found), sum(r.two_labels for r in found))
        return cls(len(found), across, two, tuple(worst[:LISTED]), complete)


def _as_items(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")[:, 0]


def exact_duplicates(digests: npt.NDArray[np.uint8]) -> list[list[int]]:
    """Indices of rows of `[N, bytes]` that occur more than once, as groups, each sorted."""
    _, group, counts = np.unique(_as_items(digests), return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(counts)
    return sorted(order[ends[g] - counts[g] : ends[g]].tolist() for g in np.flatnonzero(counts > 1))


def is_plain(thumbs: Thumbs) -> npt.NDArray[np.bool_]:
    """Which thumbnails are of one colour, as good as."""
    plain = np.zeros(len(thumbs), np.bool_)
    for start in range(0, len(thumbs), _CHUNK):
        some = thumbs[start : start + _CHUNK].reshape(-1, HASH_SIDE * HASH_SIDE)
        plain[start : start + _CHUNK] = some.std(axis=1) < MIN_STD
    return plain


def perceptual_hashes(thumbs: Thumbs) -> Hashes:
    """One 64-bit number for each thumbnail (its last bit is always 0)."""
    hashes = np.zeros(len(thumbs), np.uint64)
    k = np.arange(HASH_SIDE)
    cosines = np.cos(np.pi * (2 * k + 1) * k[:_LOW, None] / (2 * HASH_SIDE)).astype(np.float32)
    for start in range(0, len(thumbs), _CHUNK):
        some = thumbs[start : start + _CHUNK].astype(np.float32)
        # Two plain matrix products, rows then columns: far faster than one product per image.
        across = (
            (some.reshape(-1, HASH_SIDE) @ cosines.T).reshape(-1, HASH_SIDE, _LOW).swapaxes(1, 2)
        )
        down = (across.reshape(-1, HASH_SIDE) @ cosines.T).reshape(-1, _LOW * _LOW)
        # Without the first, the mean: a brighter copy is still a copy.
        low = down[:, 1:]
        bits = np.zeros((len(some), 64), np.bool_)
        bits[:, :63] = low > np.partition(low, 31, axis=1)[:, 31:32]
        hashes[start : start + _CHUNK] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return hashes


def close_pairs(hashes: Hashes, *, most: int = MAX_PAIRS) -> tuple[Pairs, bool]:
    """All pairs at most `DISTANCE` bits apart, and whether these are all (not more than `most`).

    Hashes that differ in 4 bits agree in one of 5 bands: only hashes of equal bands are
    compared, by sorting, without ever forming all N^2 pairs.
    """
    found: list[Pairs] = []
    total, earlier = 0, list[np.uint64]()
    start = 0
    for width in _BANDS:
        mask = np.uint64(((1 << width) - 1) << start)
        start += width
        band = hashes & mask
        order = np.argsort(band, kind="stable")
        ordered, sorted_band = hashes[order], band[order]
        # Every hash against the next of its band, then the one after that, and so on.
        first = np.arange(len(hashes) - 1)
        shift = 1
        while len(first):
            first = first[first < len(hashes) - shift]
            first = first[sorted_band[first] == sorted_band[first + shift]]
            difference = ordered[first] ^ ordered[first + shift]
            near = np.bitwise_count(difference) <= DISTANCE
            for other in earlier:  # found there already
                near &= (difference & other) != 0
            hits = first[near]
            found.append(np.sort(np.stack([order[hits], order[hits + shift]], axis=1), axis=1))
            total += len(hits)
            if total > most:
                return np.concatenate(found)[:most].astype(np.int64), False
            shift += 1
        earlier.append(mask)
    pairs = np.concatenate(found).astype(np.int64) if found else np.empty((0, 2), np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], True


def correlation(thumbs: Thumbs, pairs: Pairs) -> npt.NDArray[np.float32]:
    """How alike the thumbnails of each pair are, up to brightness and contrast: -1 ... 1."""
    out = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), _CHUNK):
        two = (
            thumbs[pairs[start : start + _CHUNK]]
            .reshape(-1, 2, HASH_SIDE * HASH_SIDE)
            .astype(np.float32)
        )
        two -= two.mean(axis=2, keepdims=True)
        two /= np.maximum(np.linalg.norm(two, axis=2, keepdims=True), 1e-6)
        out[start : start + _CHUNK] = (two[:, 0] * two[:, 1]).sum(axis=1)
    return out


def near_duplicates(thumbs: Thumbs, digests: npt.NDArray[np.uint8]) -> tuple[Pairs, bool]:
    """Pairs that look the same but are not, and whether the search was complete.

    Of images with equal digests one takes part; plain images are left out.
    """
    _, one_of_each = np.unique(_as_items(digests), return_index=True)
    chosen = np.sort(one_of_each)
    chosen = chosen[~is_plain(thumbs[chosen])]
    few = thumbs[chosen]
    pairs, complete = close_pairs(perceptual_hashes(few))
    return chosen[pairs[correlation(few, pairs) >= MIN_CORRELATION]], complete
