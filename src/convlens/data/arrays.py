"""Images that are arrays already (the scikit-learn estimator's way in)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from convlens.data import Data, Split
from convlens.data.rows import ArrayRows, as_index
from convlens.data.splits import hold_out
from convlens.errors import UsageError


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
    fit: str = "crop",
) -> Data:
    """A set in memory: validation held out, stratified; there is no test split in it.

    Args:
        images: uint8 `[N, C, S, S]`.
        labels: positions in `classes`, int64 `[N]`.
        fit: how `images` became square; what is predicted later is made so in the same way.
    """
    keep, held = hold_out(labels, val_fraction, seed, names=classes)
    pixels = torch.from_numpy(images)

    def part(index: np.ndarray) -> Split:
        ids = [f"array/{i}" for i in index.tolist()]
        return Split(ArrayRows(pixels[as_index(index)]), as_index(labels[index]), ids)

    def no_test() -> Split:
        raise UsageError("an estimator fitted on arrays has no test split", fix="call score(X, y)")

    digest = hashlib.sha256(repr((tuple(classes), images.shape)).encode())
    digest.update(images.data)
    digest.update(labels.tobytes())
    total = len(labels)
    return Data(
        name="arrays",
        classes=tuple(classes),
        image_size=images.shape[2],
        channels=images.shape[1],
        fit=fit,
        train=part(keep),
        val=part(held),
        fingerprint=digest.hexdigest(),
        how={
            "train": f"{len(keep):,} of {total:,} images given to fit",
            "val": f"{len(held):,} of {total:,} images held out (stratified, seed {seed})",
        },
        held_out={"val": [f"array/{i}" for i in held.tolist()]},
        skipped={},
        notes=(),
        listing=None,
        _test=no_test,
    )
