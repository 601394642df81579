"""The order of an epoch: a function of (seed, epoch) and of where the images lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convlens.device import seed_of

# Images that are shuffled together where they are read from shards: as many shards, drawn at
# random, as hold about this many. Photographs of 110 KB come to 1.8 GB of the system's file cache.
WINDOW = 16_384


@dataclass(frozen=True)
class Shards:
    """Where the images of a split lie: `of` int64 `[N]` is the shard of each.

    `expect` is told of the shards that will be read soon, so that a slow disk reads them from
    front to back; it returns at once.
    """

    of: Tensor
    expect: Callable[[Sequence[int]], None] = lambda shards: None

    def coming(self, parts: Sequence[Tensor]) -> None:
        """Tells of the shards that hold the images of `parts`."""
        if parts:
            self.expect(self.of[torch.cat(list(parts))].unique().tolist())


def epoch_order(count: int, seed: int, epoch: int, shards: Shards | None = None) -> Tensor:
    """All numbers below `count` once, int64 `[count]` on the CPU, the same on every device.

    With `shards` these come in a random order, and those of a window are shuffled into each
    other, so that only a few are read at a time. A set of one window is shuffled as if it weren't
    in shards.
    """
    # Always drawn on the CPU, so that every device sees the same order.
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, epoch))
    order = torch.randperm(count, generator=generator)
    if shards is None or count <= WINDOW:
        return order
    sizes = torch.bincount(shards.of)
    shuffled = torch.randperm(len(sizes), generator=generator)
    before = sizes[shuffled].cumsum(0) - sizes[shuffled]
    window = torch.empty_like(shuffled)
    window[shuffled] = before // WINDOW
    # A stable sort by window leaves the images of each in their random order.
    return order[torch.argsort(window[shards.of[order]], stable=True)]
