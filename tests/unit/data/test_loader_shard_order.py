"""The order of images that are read from shards: shuffled within windows of shards."""

from __future__ import annotations

import torch

from convlens.data.loader import ShardOrder, epoch_order
from convlens.device import derive_seed


def test_a_set_of_one_window_is_shuffled_like_any_other() -> None:
    shards = ShardOrder(torch.arange(1000) // 100)
    assert torch.equal(epoch_order(1000, 3, 2, shards), epoch_order(1000, 3, 2))
    generator = torch.Generator().manual_seed(derive_seed(3, 2))
    assert torch.equal(epoch_order(1000, 3, 2), torch.randperm(1000, generator=generator))


def test_shards_are_shuffled_within_disjoint_windows() -> None:
    # Of 100 shards of 500 images, those that begin within 16,384 images are shuffled together.
    blocks = torch.arange(50_000) // 500
    shards = ShardOrder(blocks)
    order = epoch_order(50_000, 0, 1, shards)
    assert torch.equal(order.sort().values, torch.arange(50_000))
    assert torch.equal(order, epoch_order(50_000, 0, 1, shards))
    assert not torch.equal(order, epoch_order(50_000, 0, 2, shards))
    assert not torch.equal(order, epoch_order(50_000, 1, 1, shards))
    # 33 shards begin before image 16,384, 33 more before 32,768: windows of 16,500 images.
    windows = [set(blocks[part].tolist()) for part in order.split(16_500)]
    assert [len(window) for window in windows] == [33, 33, 33, 1]
    assert not any(a & b for a in windows for b in windows if a is not b)
    assert windows[0] != set(blocks[epoch_order(50_000, 0, 2, shards)[:16_500]].tolist())
    # Shards are mixed evenly: each fifth of a window has a fifth of each of its shards.
    counts = torch.bincount(blocks[order[:3_300]], minlength=100)
    assert counts[counts > 0].min() > 60
    assert counts.max() < 140
