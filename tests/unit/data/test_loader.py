"""Batches: order and augmentation are functions of seed, epoch and step only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convlens.data.cache import ArrayRows, StoredRows, image_checksums
from convlens.data.loader import Augment, Batches, Normalize, to_unit
from convlens.data.transforms.pipeline import build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.device import Plan, derive_seed
from helpers.support import PLAN, Memory, Split, Streamed, pictures

PLAIN = Normalize([0.0], [1.0])


def batches(
    count: int = 50,
    batch_size: int = 8,
    *,
    rows: object = None,
    seed: int = 3,
    augment: Augment | None = None,
    plan: Plan = PLAN,
    normalize: Normalize = PLAIN,
) -> Batches:
    images = pictures(count)
    split = Split(rows or Memory(images), torch.arange(count))
    return Batches(
        split, batch_size=batch_size, normalize=normalize, plan=plan, seed=seed, augment=augment
    )


def numbers(made: Batches, epoch: int, start: int = 0) -> list[list[int]]:
    """Return the image numbers of each batch, from their first pixels; labels must agree."""
    found = []
    for images, labels in made.epoch(epoch, start):
        assert [round(v * 255) for v in images[:, 0, 0, 0].tolist()] == labels.tolist()
        found.append(labels.tolist())
    return found


def noisy(
    images: Tensor, labels: Tensor, sample_info: SampleInfo, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    return images + torch.rand(images.shape, generator=generator), labels


# Order


def test_sample_indices_are_those_of_the_batches() -> None:
    made = batches()
    expected = numbers(made, 2)
    assert [made.sample_indices(2, step) for step in range(len(made))] == expected


def test_each_image_comes_exactly_once_in_an_epoch() -> None:
    for epoch in (1, 2, 9):
        flat = [n for batch in numbers(batches(), epoch) for n in batch]
        assert sorted(flat) == list(range(50))
        assert flat != sorted(flat)


def test_order_depends_on_seed_and_epoch_only() -> None:
    assert numbers(batches(), 4) == numbers(batches(), 4)
    made = batches()
    first = numbers(made, 1)
    assert numbers(made, 2) != first
    torch.manual_seed(99)
    assert numbers(made, 1) == first
    assert numbers(batches(seed=4), 1) != first
    expected = torch.randperm(50, generator=torch.Generator().manual_seed(derive_seed(3, 1)))
    assert [n for batch in first for n in batch] == expected.tolist()


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (16, 8, [8, 8]),
        (18, 8, [8, 8, 2]),
        (17, 8, [8, 9]),  # one remaining image joins the batch before it
        (9, 8, [9]),
        (8, 8, [8]),
        (3, 8, [3]),
        (2, 1, [1, 1]),
        (3, 2, [3]),
        (5, 10**9, [5]),
    ],
)
def test_single_remaining_image_joins_the_previous_batch(
    count: int, size: int, sizes: list[int]
) -> None:
    made = batches(count, size)
    assert [len(batch) for batch in numbers(made, 1)] == sizes
    assert len(made) == len(sizes)


# Values


def test_normalized_values_of_small_example() -> None:
    images = torch.tensor([[[[0, 51]]], [[[102, 255]]]], dtype=torch.uint8)
    split = Split(Memory(images), torch.tensor([4, 2]))
    normalize = Normalize([0.2], [0.4])
    made = Batches(split, batch_size=2, normalize=normalize, plan=PLAN, seed=0)
    values, labels = next(made.epoch(1))
    assert values.dtype == torch.float32
    expected = {4: [-0.5, 0.0], 2: [0.5, 2.0]}
    for value, label in zip(values, labels.tolist(), strict=True):
        assert value.flatten().tolist() == pytest.approx(expected[label], abs=1e-6)
    assert images.flatten().tolist() == [0, 51, 102, 255]


def test_each_channel_has_its_own_normalization() -> None:
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    normalize = Normalize([0.0, 0.5, 1.0], [1.0, 0.25, 0.5])
    out = normalize(to_unit(images), Plan("cpu", "fp32", "channels_last"))
    assert out.mean((0, 2, 3)).tolist() == [1.0, 2.0, 0.0]
    assert out.is_contiguous(memory_format=torch.channels_last)


# Augmentation


def test_augmentation_depends_on_seed_epoch_and_step_only() -> None:
    made = batches(augment=noisy)
    all_batches = list(made.epoch(2))
    for start in range(len(made) + 1):
        torch.manual_seed(start)  # must not matter
        rest = list(made.epoch(2, start))
        assert len(rest) == len(all_batches) - start
        for batch, expected in zip(rest, all_batches[start:], strict=True):
            assert torch.equal(batch[0], expected[0])
            assert torch.equal(batch[1], expected[1])


def test_each_step_is_augmented_with_its_own_generator() -> None:
    plain, changed = batches(), batches(augment=noisy)
    for epoch in (1, 2):
        pairs = zip(plain.epoch(epoch), changed.epoch(epoch), strict=True)
        for step, ((before, labels), (after, _)) in enumerate(pairs):
            generator = torch.Generator().manual_seed(derive_seed(3, epoch, step))
            expected, _ = noisy(before, labels, SampleInfo(labels, epoch, 3), generator)
            assert torch.allclose(after, expected, atol=1e-6)


def test_augmentation_gets_image_numbers_and_epoch() -> None:
    seen: list[SampleInfo] = []

    def watch(images: Tensor, labels: Tensor, info: SampleInfo, _: Any) -> tuple[Tensor, Tensor]:
        seen.append(info)
        assert torch.equal(info.numbers, labels)
        return images, labels

    made = batches(augment=watch)
    for epoch in (1, 2):
        list(made.epoch(epoch))
    assert {(info.epoch, info.seed) for info in seen} == {(1, 3), (2, 3)}
    assert len(seen) == 14


@pytest.mark.parametrize("start", [0, 4])
def test_alternating_flip_alternates_between_epochs(start: int) -> None:
    made = batches(augment=build_pipeline([("AlternatingFlip", {})]))
    plain = {
        n: image
        for images, labels in batches(augment=build_pipeline([])).epoch(1)
        for image, n in zip(images, labels.tolist(), strict=True)
    }
    for epoch in (1, 2, 3):
        sides = {}
        for images, labels in made.epoch(epoch, start if epoch == 3 else 0):
            for image, n in zip(images, labels.tolist(), strict=True):
                sides[n] = torch.equal(image, plain[n].flip(-1))
                assert sides[n] or torch.equal(image, plain[n])
        if epoch == 1:
            first = sides
            assert 15 < sum(first.values()) < 35
        else:
            assert {n: first[n] ^ (epoch == 2) for n in sides} == sides


def test_labels_of_mixed_images_are_probabilities() -> None:
    pipeline = build_pipeline([("MixUp", {"p": 0.5})], classes=50)
    for images, labels in batches(augment=pipeline).epoch(1):
        assert labels.dtype == torch.float32
        assert labels.shape == (len(images), 50)
        torch.testing.assert_close(labels.sum(1), torch.ones(len(images)))
        # The first pixel of image n is n / 255, so it is mixed as the labels are.
        expected = labels @ torch.arange(50.0) / 255
        torch.testing.assert_close(images[:, 0, 0, 0], expected, atol=1e-6, rtol=0)


def test_stored_images_are_never_changed() -> None:
    images = pictures(20)

    def painted(batch: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return batch.zero_(), labels

    split = Split(Memory(images), torch.zeros(20, dtype=torch.int64))
    made = Batches(split, batch_size=6, normalize=PLAIN, plan=PLAN, seed=0, augment=painted)
    assert all(float(batch.abs().sum()) == 0 for batch, _ in made.epoch(1))
    assert torch.equal(images, pictures(20))


# Streaming


def stored(images: Tensor) -> StoredRows:
    Path("pixels").write_bytes(images.numpy().tobytes())
    source: Any = None  # only used for damaged rows
    return StoredRows(Path("pixels"), tuple(images.shape), image_checksums(images.numpy()), source)


@pytest.mark.parametrize("kind", ["streamed", "stored", "taken", "array"])
@pytest.mark.parametrize("start", [0, 3, 6, 7])
def test_streamed_rows_give_the_same_batches_as_rows_in_memory(kind: str, start: int) -> None:
    images = pictures(50)
    rows = {
        "streamed": lambda: Streamed(images),
        "stored": lambda: stored(images),
        "taken": lambda: stored(torch.cat([images, images])).subset(torch.arange(50)),
        "array": lambda: ArrayRows(images),
    }[kind]()
    assert (rows.in_memory_tensor() is None) == (kind != "array")
    streamed = list(batches(rows=rows, augment=noisy).epoch(5, start))
    in_memory = list(batches(augment=noisy).epoch(5, start))
    assert len(streamed) == 7 - start
    for batch, expected in zip(streamed, in_memory, strict=True):
        assert torch.equal(batch[0], expected[0])
        assert torch.equal(batch[1], expected[1])


def test_streaming_reads_one_batch_ahead_and_no_image_twice() -> None:
    rows = Streamed(pictures(50))
    stream = batches(rows=rows).epoch(1)
    next(stream)
    next(stream)
    assert len(rows.reads) <= 3
    assert len(list(stream)) == 5
    assert sorted(n for batch in rows.reads for n in batch) == list(range(50))


def test_errors_of_the_reader_thread_are_raised() -> None:
    class Broken(Streamed):
        def gather(self, index: Tensor) -> Tensor:
            if len(self.reads) == 2:
                raise OSError("gone")
            return super().gather(index)

    with pytest.raises(OSError, match="gone"):
        list(batches(rows=Broken(pictures(50))).epoch(1))
