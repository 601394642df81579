"""Balanced sampling: exact counts of classes and images, the order, resuming and sharing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from convlens.data.loader import (
    Batches,
    ClassBalance,
    Normalize,
    ShardOrder,
    class_frequencies,
    epoch_order,
)
from convlens.distributed import ProcessGroup
from convlens.recipe import Balance
from helpers.support import PLAN, Memory, Split, Streamed, pictures

PLAIN = Normalize([0.0], [1.0])
COUNTS = [30, 3, 12]
LABELS = torch.tensor([0] * 30 + [1] * 3 + [2] * 12)


def test_class_frequencies_by_hand() -> None:
    counts = torch.tensor([16, 4, 0, 1])
    assert class_frequencies(counts, "none").tolist() == pytest.approx([16 / 21, 4 / 21, 0, 1 / 21])
    assert class_frequencies(counts, "sqrt").tolist() == pytest.approx([4 / 7, 2 / 7, 0, 1 / 7])
    assert class_frequencies(counts, "full").tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    balance=st.sampled_from(["sqrt", "full"]),
    epoch=st.integers(1, 1000),
)
def test_counts_differ_from_their_expectation_by_less_than_one(
    counts: list[int], balance: Balance, epoch: int
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))]
    order = epoch_order(len(labels), 7, epoch, balance=ClassBalance(labels, balance))
    assert order.shape == labels.shape  # the number of images per epoch does not change
    exponent = 0.5 if balance == "sqrt" else 0.0
    scaled = [n**exponent if n else 0.0 for n in counts]
    drawn = torch.bincount(labels[order], minlength=len(counts)).tolist()
    per_image = torch.bincount(order, minlength=len(labels))
    for name, (n, times) in enumerate(zip(counts, drawn, strict=True)):
        expected = len(labels) * scaled[name] / sum(scaled)
        assert abs(times - expected) < 1 + 1e-9
        if n:  # the images of a class are drawn equally often, up to one
            images = per_image[labels == name]
            assert images.min() == times // n
            assert images.max() == -(-times // n)


def test_over_many_epochs_the_mean_is_the_expectation() -> None:
    """Fractions are rounded at random: 45 / 3 = 15, and 45 * sqrt(n) / 10.67 for `sqrt`."""
    counts = np.array(COUNTS)
    for balance, scaled in (("full", np.ones(3)), ("sqrt", np.sqrt(counts))):
        sampler = ClassBalance(LABELS, balance)  # type: ignore[arg-type]
        orders = [epoch_order(45, 1, epoch, balance=sampler) for epoch in range(400)]
        by_class = np.mean([np.bincount(LABELS[order], minlength=3) for order in orders], axis=0)
        np.testing.assert_allclose(by_class, 45 * scaled / scaled.sum(), atol=0.12)
        per_image = np.mean([np.bincount(order, minlength=45) for order in orders], axis=0)
        np.testing.assert_allclose(per_image, (by_class / counts)[LABELS], atol=0.12)


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order(45, seed, epoch, balance=ClassBalance(LABELS, "sqrt")).tolist()

    torch.manual_seed(5)
    first = order(1, 1)
    torch.manual_seed(6)
    assert order(1, 1) == first
    assert order(1, 2) != first
    assert order(2, 1) != first
    neighbors = LABELS[torch.tensor(first)].diff().count_nonzero()
    assert neighbors > 10  # the classes are mixed


def test_balance_none_is_the_order_without_balance() -> None:
    made = batches("none")
    assert made.balance is None
    expected = epoch_order(45, 3, 2).tolist()
    assert [n for batch in indices(made, 2) for n in batch] == expected


def test_windows_of_shards_keep_the_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 9)
    shards = ShardOrder(torch.arange(45) % 5)
    sampler = ClassBalance(LABELS, "full")
    order = epoch_order(45, 3, 2, shards, sampler)
    assert torch.bincount(LABELS[order]).tolist() == [15, 15, 15]
    visited = shards.shard_ids[order].unique_consecutive()
    assert len(visited) == 5  # a window is one shard, and each is read once
    monkeypatch.setattr("convlens.data.loader.WINDOW_IMAGES", 45)
    assert torch.equal(epoch_order(45, 3, 2, shards, sampler), epoch_order(45, 3, 2, None, sampler))


# Batches


def batches(
    balance: Balance, group: ProcessGroup | None = None, rows: Memory | None = None
) -> Batches:
    return Batches(
        Split(rows or Memory(pictures(45)), LABELS),
        batch_size=8,
        normalize=PLAIN,
        plan=PLAN,
        seed=3,
        process_group=group or ProcessGroup(0, 1),
        balance=balance,
    )


def indices(made: Batches, epoch: int, start: int = 0) -> list[list[int]]:
    """Return the image numbers of each batch, from their first pixels."""
    found = []
    for images, labels in made.epoch(epoch, start):
        numbers = first_pixels(images)
        assert LABELS[numbers].tolist() == labels.tolist()
        found.append(numbers)
    return found


def first_pixels(images: Tensor) -> list[int]:
    return [round(255 * value) for value in images[:, 0, 0, 0].tolist()]


def test_batches_have_the_drawn_images_and_resume_at_any_step() -> None:
    made = batches("full")
    found = indices(made, 4)
    assert [len(batch) for batch in found] == [8, 8, 8, 8, 8, 5]
    assert [made.sample_indices(4, step) for step in range(6)] == found
    drawn = LABELS[torch.tensor([n for batch in found for n in batch])]
    assert torch.bincount(drawn).tolist() == [15, 15, 15]
    for start in range(7):
        assert indices(batches("full"), 4, start) == found[start:]


def test_images_read_one_batch_ahead_are_the_same() -> None:
    """Also an image that occurs several times in one batch."""
    streamed = batches("full", rows=Streamed(pictures(45)))
    assert indices(streamed, 4) == indices(batches("full"), 4)
    assert any(len(set(batch)) < len(batch) for batch in indices(streamed, 4))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_drawn_batches(size: int) -> None:
    together = indices(batches("sqrt"), 2)
    groups = [ProcessGroup(rank, size) for rank in range(size)]
    found = [indices(batches("sqrt", group), 2) for group in groups]
    for step, batch in enumerate(together):
        # Of three processes, one has no rows of the last batch and computes others with weight 0.
        shares = [
            share[step]
            for group, share in zip(groups, found, strict=True)
            if group.share(len(batch)).weight
        ]
        assert [n for share in shares for n in share] == batch


def test_tiny_sets_can_be_drawn() -> None:
    for counts in ([1, 1], [2], [1, 5], [3, 0, 1]):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        for balance in ("sqrt", "full"):
            sampler = ClassBalance(labels, balance)  # type: ignore[arg-type]
            order = epoch_order(len(labels), 0, 1, balance=sampler)
            assert len(order) == sum(counts)
            assert int(order.max()) < sum(counts)
