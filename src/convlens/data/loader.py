"""Training batches: order, gathering, augmentation and normalization.

A set within the memory budget is kept on the device as uint8 and is indexed there. A larger set
is read one batch ahead in a background thread, so that memory is bounded by a few batches whatever
the size of the set.

The order of an epoch depends on the seed, the epoch and, for shards, on where the images are
stored (`epoch_order`). With `ClassBalance` it contains images of rare classes several times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from convlens.data.transforms.random import SampleInfo, SharedGenerator
from convlens.device import Plan, derive_seed, to_device_async
from convlens.distributed import SINGLE_PROCESS, ProcessGroup
from convlens.recipe import Balance

# (images float32 0..1, labels int64 [B], sample info, generator) -> images, and labels or
# class probabilities
Augment = Callable[[Tensor, Tensor, SampleInfo, torch.Generator], tuple[Tensor, Tensor]]
# From the data of the rows to the input of the network: `Normalize` for images.
Prepare = Callable[[Tensor, Plan], Tensor]

# Bytes of images that are gathered and normalized at once. For small batches most of the time is
# call overhead and cold caches: one batch at a time takes 4% of a 7 ms step on a CPU, this 2%.
NORMALIZE_BLOCK_BYTES = 4 << 20
# Images that are shuffled together if they are read from shards: as many randomly chosen shards as
# hold about this many. Photographs of 110 KB come to 1.8 GB of the system's file cache.
WINDOW_IMAGES = 16_384


class RowReader(Protocol):
    """Images by number: in memory, in a store on disk, or decoded for each request."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, C, H, W)`."""
        ...

    def gather(self, index: Tensor) -> Tensor:
        """Return the images `index` (int64 `[B]`) as uint8 `[B, C, H, W]` on the CPU."""
        ...

    def in_memory_tensor(self) -> Tensor | None:
        """Return all images as one uint8 tensor if they are in memory, else None."""
        ...


class Labelled(Protocol):
    """Images and their class indices, int64 `[N]`."""

    @property
    def rows(self) -> RowReader: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Normalize:
    """Standardize images by the channel means and deviations of the training images.

    Args:
        mean: Mean of each channel, in units of 0..1.
        std: Standard deviation of each channel, in the same units.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor, plan: Plan) -> Tensor:
        """Normalize uint8 images, or float32 images in 0..1; the result has the plan's format.

        One multiplication and one addition per pixel: for small images the number of passes over
        a batch matters.
        """
        is_uint8 = images.dtype == torch.uint8
        unit = 255.0 if is_uint8 else 1.0
        scale, shift = _affine(tuple(self.mean), tuple(self.std), unit, str(images.device))
        # The product is float32 by type promotion. On a GPU the memory format is changed first,
        # while a pixel is one byte.
        if images.device.type != "cpu":
            return images.contiguous(memory_format=plan.torch_memory_format).mul(scale).add_(shift)
        # On a CPU the memory format is changed last: an inner loop over three channels takes three
        # times as long. Bytes are converted first and changed in place, which saves a copy.
        product = images.float().mul_(scale) if is_uint8 else images.mul(scale)
        return product.add_(shift).contiguous(memory_format=plan.torch_memory_format)


@functools.lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], unit: float, device: str
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors are used in training as well
        return scale_and_shift(mean, std, unit, device)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], unit: float, device: str
) -> tuple[Tensor, Tensor]:
    """Return float32 `[1, C, 1, 1]` with `x * scale + shift == (x / unit - mean) / std`."""
    means, stds = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    scale, shift = 1 / (unit * stds), -means / stds
    return scale.float().to(device), shift.float().to(device)


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 0..1."""
    return images.to(torch.float32).div_(255)


@dataclass(frozen=True)
class ShardOrder:
    """The shards in which the images of a split are stored.

    Args:
        shard_ids: The shard of each image, int64 `[N]`.
        prefetch: Called with the shards that will be read soon, so that a slow disk can read them
            sequentially. It must return at once.
    """

    shard_ids: Tensor
    prefetch: Callable[[Sequence[int]], None] = lambda shards: None

    def prefetch_images(self, parts: Sequence[Tensor]) -> None:
        """Prefetch the shards that hold the images of `parts`."""
        if parts:
            self.prefetch(self.shard_ids[torch.cat(list(parts))].unique().tolist())


# Exponent of the number of images of a class, to which its frequency in an epoch is proportional.
BALANCE_EXPONENTS: dict[Balance, float] = {"none": 1.0, "sqrt": 0.5, "full": 0.0}


def class_frequencies(counts: Tensor, balance: Balance) -> Tensor:
    """Return the expected share of each class in an epoch, float64 `[K]`.

    Args:
        counts: number of training images of each class, int64 `[K]`.
    """
    # 0 to the power of 0 is 1: a class without images cannot be drawn.
    scaled = torch.where(counts > 0, counts.double() ** BALANCE_EXPONENTS[balance], 0.0)
    return scaled / scaled.sum()


class ClassBalance:
    """Draw the images of an epoch so that classes have other frequencies than in the data set.

    Both the number of images of each class and the number of times that an image of a class is
    drawn differ from their expectation by less than 1 (systematic sampling), where independent
    draws would repeat some images of a class and miss others.

    Args:
        labels: class indices of the images, int64 `[N]`.
    """

    def __init__(self, labels: Tensor, balance: Balance) -> None:
        self.labels = labels.cpu()
        self.counts = torch.bincount(self.labels)
        self.frequencies = class_frequencies(self.counts, balance)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the numbers of N images in a random order, int64 `[N]`."""
        n = len(self.labels)
        # Boundaries of the classes on [0, N], rounded with one random offset for all of them.
        bounds = self.frequencies.cumsum(0) * n
        bounds[-1] = n
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        bounds = (bounds + offset).floor().long()
        times = bounds.diff(prepend=bounds.new_zeros(1))
        # The images of each class in a random order, class by class.
        shuffled = torch.randperm(n, generator=generator)
        by_class = shuffled[torch.argsort(self.labels[shuffled], stable=True)]
        # They are taken in this order, from the beginning again after the last one.
        starts, drawn_class = self.counts.cumsum(0) - self.counts, torch.arange(len(times))
        drawn_class = drawn_class.repeat_interleave(times)
        position = torch.arange(n) - (bounds - times)[drawn_class]
        drawn = by_class[starts[drawn_class] + position % self.counts[drawn_class]]
        return drawn[torch.randperm(n, generator=generator)]


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    shards: ShardOrder | None = None,
    balance: ClassBalance | None = None,
) -> Tensor:
    """Return the images of an epoch in order, int64 `[count]` on the CPU.

    This is a permutation of `range(count)`, or the images that `balance` draws.

    With `shards`, the shards come in a random order, and only the images of as many shards as hold
    `WINDOW_IMAGES` images are shuffled together, so that few shards are read at a time. A set that
    fits into one window is shuffled as if it were not stored in shards.
    """
    # Always drawn on the CPU, so that every device sees the same order.
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, epoch))
    if balance is None:
        order = torch.randperm(count, generator=generator)
    else:
        order = balance.draw(generator)
    if shards is None or count <= WINDOW_IMAGES:
        return order
    sizes = torch.bincount(shards.shard_ids)
    shuffled = torch.randperm(len(sizes), generator=generator)
    images_before = sizes[shuffled].cumsum(0) - sizes[shuffled]
    window = torch.empty_like(shuffled)
    window[shuffled] = images_before // WINDOW_IMAGES
    # A stable sort by window leaves the images of each in their random order.
    return order[torch.argsort(window[shards.shard_ids[order]], stable=True)]


class Batches:
    """One split as batches of normalized images and labels, shuffled again in each epoch.

    The order is a function of `(seed, epoch)`, and the augmentation of a batch a function of
    `(seed, epoch, step)`. There is no state between steps, so a run that resumes at any step gets
    the same batches. The last batch may be smaller; a single remaining image joins the batch
    before it, since batch norm can't train on one image.

    Args:
        split: Images and labels.
        batch_size: Images per step, over all processes.
        normalize: Applied after augmentation.
        plan: Device and memory format.
        seed: Seed of order and augmentation.
        augment: `(images float32 0..1, labels, sample_info, generator) -> (images, labels)`.
        mixes: Whether `augment` mixes images, so that it needs the whole batch.
        process_group: The processes that share each batch. This process yields its own rows only,
            augmented as they are in the whole batch.
        shards: The shards of the images, if the order depends on them (`epoch_order`).
        balance: How often an epoch draws the images of each class (`DataConfig`).
    """

    def __init__(
        self,
        split: Labelled,
        *,
        batch_size: int,
        normalize: Prepare,
        plan: Plan,
        seed: int,
        augment: Augment | None = None,
        mixes: bool = False,
        process_group: ProcessGroup = SINGLE_PROCESS,
        shards: ShardOrder | None = None,
        balance: Balance = "none",
    ) -> None:
        self.rows, self.count = split.rows, int(split.labels.numel())
        self.plan, self.seed, self.shards = plan, seed, shards
        self.augment, self.normalize, self._mixes = augment, normalize, mixes
        self.process_group = process_group
        self.balance = None if balance == "none" else ClassBalance(split.labels, balance)
        self.labels = split.labels.to(plan.device)
        self.sizes = _batch_sizes(self.count, batch_size)
        images = split.rows.in_memory_tensor()
        self._images = images.to(plan.device) if images is not None else None

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from number `start` on.

        Images are float32 `[B, C, H, W]` and labels int64 `[B]`, both on the device. If the
        augmentation mixes images, labels are class probabilities, float32 `[B, K]`.
        """
        order = self._epoch_order(epoch)
        parts = self._split_order(order)[start:]
        indices = self._split_order(to_device_async(order, self.plan.device))[start:]
        if self.augment is None:
            normalized = self._normalized(parts, indices)
            for index, images in zip(indices, normalized, strict=True):
                yield images, self.labels.index_select(0, index)
            return
        # One generator that is seeded for each step: creating one costs more than seeding it.
        generator = _batch_generator(self.plan.device, self.seed, epoch)
        gathered = zip(indices, self._gathered(parts, indices), strict=True)
        for step, (index, raw) in enumerate(gathered, start):
            generator.manual_seed(derive_seed(self.seed, epoch, step))
            generator.share = self.process_group.share(self.sizes[step])
            sample_info = SampleInfo(index, epoch, self.seed)
            labels = self.labels.index_select(0, index)
            images, labels = self.augment(to_unit(raw), labels, sample_info, generator)
            if self._mixes:
                images, labels = images[generator.share.rows], labels[generator.share.rows]
            yield self.normalize(images, self.plan), labels

    def sample_indices(self, epoch: int, step: int) -> list[int]:
        """Return the numbers of the images in batch `step` of an epoch, over all processes."""
        order = self._epoch_order(epoch)
        return [int(number) for number in order.split(self.sizes)[step]]

    def _epoch_order(self, epoch: int) -> Tensor:
        return epoch_order(self.count, self.seed, epoch, self.shards, self.balance)

    def _split_order(self, order: Tensor) -> Sequence[Tensor]:
        """Split an order into the image numbers to read for each batch.

        These are the rows of this process, or all rows if images are mixed.
        """
        parts: Sequence[Tensor] = order.split(self.sizes)
        if self._mixes or self.process_group.size == 1:
            return parts
        return [part[self.process_group.share(len(part)).rows] for part in parts]

    def _normalized(self, parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the normalized images of each part; small batches are normalized together.

        The value of a pixel does not depend on the other images that are normalized with it.
        """
        if self._images is None:
            yield from (self.normalize(raw, self.plan) for raw in self._gathered(parts, indices))
            return
        batch_bytes = 4 * self._images[0].numel() * self.sizes[0]
        batches_per_block = max(1, NORMALIZE_BLOCK_BYTES // batch_bytes)
        for first in range(0, len(indices), batches_per_block):
            block = indices[first : first + batches_per_block]
            raw = self._images.index_select(0, torch.cat(list(block)))
            yield from self.normalize(raw, self.plan).split([len(index) for index in block])

    def _gathered(self, parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the uint8 images of each part on the device.

        Args:
            parts: Image numbers of each batch, on the CPU.
            indices: The same numbers on the device.
        """
        if self._images is not None:
            for index in indices:
                # Ten times as fast as indexing with a tensor on the CPU.
                yield self._images.index_select(0, index)
            return
        if not parts:  # resumed after the last step of the epoch
            return
        # Prefetch half a window ahead, so that the next window is read before it is needed.
        ahead = max(1, WINDOW_IMAGES // 2 // self.sizes[0])
        if self.shards:
            self.shards.prefetch_images(parts[:ahead])
        with ThreadPoolExecutor(max_workers=1) as reader:
            # Run with a copy of this thread's context, which says whether messages are printed.
            pending = reader.submit(copy_context().run, self.rows.gather, parts[0])
            for number, next_part in enumerate([*parts[1:], None], ahead):
                if self.shards:
                    self.shards.prefetch_images(parts[number : number + 1])
                images = pending.result()
                if next_part is not None:
                    pending = reader.submit(copy_context().run, self.rows.gather, next_part)
                yield to_device_async(images, self.plan.device)


def _batch_sizes(count: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (count // batch_size)
    remainder = count % batch_size
    if remainder == 1 and sizes:
        sizes[-1] += 1
    elif remainder:
        sizes.append(remainder)
    return sizes


def _batch_generator(device: str, *parts: int) -> SharedGenerator:
    generator = SharedGenerator(device)
    generator.manual_seed(derive_seed(*parts))
    return generator
