"""How alike two stages are, of one network or of two: linear CKA over a stream of batches."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

LEAST = 4  # images in a batch: below, the unbiased estimator doesn't exist
NOTHING = 1e-6  # of the length: what is left of a constant after rounding in float32


def gram(maps: Tensor) -> Tensor:
    """Inner products float64 `[B, B]` of activations `[B, ...]`, less their mean over the batch.

    The estimator doesn't mind the mean, but float32 does. Exactly 0 for a constant, at any scale.
    """
    whole = maps.flatten(1)
    flat = whole - whole.mean(0)
    if float(flat.norm()) <= NOTHING * float(whole.norm()):
        return flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    return (flat @ flat.T).double() / flat.shape[1]


def hsic(grams: Tensor) -> Tensor:
    """Unbiased HSIC `[M, M]` between all pairs of inner products `[M, B, B]`.

    Song et al. 2012, Feature selection via dependence maximization, equation 5.
    """
    n = grams.shape[1]
    inner = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    flat, rows = inner.flatten(1), inner.sum(2)
    totals = rows.sum(1)
    traces = flat @ flat.T
    both = torch.outer(totals, totals) / ((n - 1) * (n - 2))
    found: Tensor = (traces + both - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))
    return found


class Similarity:
    """Linear CKA between all of some representations of the same images, batch by batch.

    The unbiased HSICs of the batches are averaged before the ratio is taken, which makes the
    result independent of the batch size, but for noise: Nguyen, Raghu, Kornblith 2021, Do wide
    and deep networks learn the same things?, equation 3. Linear CKA: Kornblith et al. 2019.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Hashable, Hashable], float] = {}

    def add(self, grams: Mapping[Hashable, Tensor]) -> None:
        """Takes in a batch: `gram` of each representation; fewer than four images are skipped."""
        names = list(grams)
        stacked = torch.stack([grams[name].cpu() for name in names])
        n = stacked.shape[1]
        if n < LEAST:
            return
        for name, row in zip(names, (n * hsic(stacked)).tolist(), strict=True):
            for other, value in zip(names, row, strict=True):
                self._sums[name, other] = self._sums.get((name, other), 0.0) + value

    def matrix(self, names: Sequence[Hashable]) -> list[list[float | None]]:
        """CKA `[M, M]` in the order of `names`; noise may bring it a little outside 0 to 1.

        None for a representation that is constant, or before any image.
        """
        own = {name: self._sums.get((name, name), 0.0) for name in names}
        return [
            [
                self._sums[one, other] / math.sqrt(own[one] * own[other])
                if min(own[one], own[other]) > 0
                else None
                for other in names
            ]
            for one in names
        ]
