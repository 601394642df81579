"""The order of an epoch: a function of (seed, epoch) and of where the images lie."""

from __future__ import annotations

import torch
from torch import Tensor

from convlens.device import seed_of

# Images that are shuffled together where they are read from shards: as many shards, drawn at
# random, as hold about this many. Photographs of 110 KB come to 1.8 GB of the system's file cache.
WINDOW = 16_384


def epoch_order(count: int, seed: int, epoch: int, blocks: Tensor | None = None) -> Tensor:
    """All numbers below `count` once, int64 `[count]` on the CPU, the same on every device.

    With `blocks` (int64 `[count]`, the shard of each image) shards come in a random order, and
    those of a window are shuffled into each other: a slow disk then reads a window from front to
    back. A set of one window is shuffled as if it weren't in shards.
    """
    # Always drawn on the CPU, so that every device sees the same order.
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, epoch))
    order = torch.randperm(count, generator=generator)
    if blocks is None or count <= WINDOW:
        return order
    sizes = torch.bincount(blocks)
    shards = torch.randperm(len(sizes), generator=generator)
    before = sizes[shards].cumsum(0) - sizes[shards]
    window = torch.empty_like(shards)
    window[shards] = before // WINDOW
    # A stable sort by window leaves the images of each in their random order.
    return order[torch.argsort(window[blocks[order]], stable=True)]
