"""Training batches: order, gathering, augmentation and normalisation, on the device.

A set within the memory budget lives on the device as uint8 and is indexed there. A larger one
is read from its store, one batch ahead in a background thread, so that memory stays bounded by
a few batches whatever the size of the set.
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

# (images float32 0..1, labels int64 [B], place, generator) -> images, and labels or probabilities
Augment = Callable[[Tensor, Tensor, SampleInfo, torch.Generator], tuple[Tensor, Tensor]]
# From what the rows hold to the network's input: `Normalize` for images.
Prepare = Callable[[Tensor, Plan], Tensor]


# Bytes of images that are gathered and normalised at once: of small batches most of the time is the
# asking, and fetching code and pixels anew after each step (4% of a 7 ms step on a CPU; this 2%).
BLOCK = 4 << 20


class RowReader(Protocol):
    """Images by number: in memory, in a store on disk, or decoded when asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def gather(self, index: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` on the CPU for int64 `[B]`."""
        ...

    def in_memory_tensor(self) -> Tensor | None:
        """All images as one uint8 tensor if they are in memory, else None."""
        ...


class Labelled(Protocol):
    """A split: images and their class indices."""

    @property
    def rows(self) -> RowReader: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Normalize:
    """Channel means and deviations of the training images, in units of 0..1."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Tensor, plan: Plan) -> Tensor:
        """uint8 images, or float32 ones in 0..1, to normalised ones in the plan's memory format.

        One multiplication and one addition a pixel: at 28 px the passes over a batch count.
        """
        raw = images.dtype == torch.uint8
        unit = 255.0 if raw else 1.0
        scale, shift = _affine(tuple(self.mean), tuple(self.std), unit, str(images.device))
        # The product is float32 by promotion. A GPU moves bytes first, which are the cheapest.
        if images.device.type != "cpu":
            return images.contiguous(memory_format=plan.torch_memory_format).mul(scale).add_(shift)
        # On a CPU colours must not be neighbours yet: rows of three numbers take three times as
        # long. And bytes become floats first, to be changed in place: a product is one more copy.
        product = images.float().mul_(scale) if raw else images.mul(scale)
        return product.add_(shift).contiguous(memory_format=plan.torch_memory_format)


@functools.lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], unit: float, device: str
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for training, too, whoever asks first
        return scale_and_shift(mean, std, unit, device)


def scale_and_shift(
    mean: Sequence[float], std: Sequence[float], unit: float, device: str
) -> tuple[Tensor, Tensor]:
    """`x * scale + shift` is `(x / unit - mean) / std`, per channel."""
    middle, spread = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    scale, shift = 1 / (unit * spread), -middle / spread
    return scale.float().to(device), shift.float().to(device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 0..1."""
    return images.to(torch.float32).div_(255)


class Batches:
    """One split as batches of normalised images and labels, shuffled anew each epoch.

    The order is a function of `(seed, epoch)` and each batch's augmentation one of
    `(seed, epoch, step)`: nothing is carried from step to step, so a run can be taken up
    anywhere and ends the same. The last batch is smaller; a single left-over image joins the
    batch before it, since batch norm can't train on one.

    Args:
        split: images and labels; labels int64 `[N]`.
        batch_size: images per step.
        normalize: applied after augmentation.
        plan: device and memory format.
        seed: of order and augmentation.
        augment: `(images float32 0..1, labels, sample_info, generator) -> (images, labels)`, or None.
        mixes: whether it needs the whole batch, because it mixes images.
        world: the processes that share each batch; this one yields its own rows only, augmented
            as in the whole batch.
        shards: where the images lie, where the order goes by it (`order.epoch_order`).
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
        world: ProcessGroup = SINGLE_PROCESS,
        shards: ShardOrder | None = None,
    ) -> None:
        self.rows, self.count = split.rows, int(split.labels.numel())
        self.plan, self.seed, self.shards = plan, seed, shards
        self.augment, self.normalize, self._mixes = augment, normalize, mixes
        self.world = world
        self.labels = split.labels.to(plan.device)
        self.sizes = _batch_sizes(self.count, batch_size)
        whole = split.rows.in_memory_tensor()
        self._images = whole.to(plan.device) if whole is not None else None

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from number `start` on.

        Each is float32 `[B, C, H, W]` and int64 `[B]`, both on the device; labels are float32
        `[B, K]`, probabilities, where augmentation mixes images.
        """
        order = epoch_order(self.count, self.seed, epoch, self.shards)
        parts = self._read(order)[start:]
        indices = self._read(to_device_async(order, self.plan.device))[start:]
        if self.augment is None:
            plain = self._normalized(parts, indices)
            for index, images in zip(indices, plain, strict=True):
                yield images, self.labels.index_select(0, index)
            return
        # One generator, seeded anew each step: making one costs more than seeding it.
        generator = _batch_generator(self.plan.device, self.seed, epoch)
        gathered = zip(indices, self._gathered(parts, indices), strict=True)
        for step, (index, raw) in enumerate(gathered, start):
            generator.manual_seed(derive_seed(self.seed, epoch, step))
            generator.share = self.world.share(self.sizes[step])
            sample_info = SampleInfo(index, epoch, self.seed)
            labels = self.labels.index_select(0, index)
            images, labels = self.augment(to_unit(raw), labels, sample_info, generator)
            if self._mixes:
                images, labels = images[generator.share.rows], labels[generator.share.rows]
            yield self.normalize(images, self.plan), labels

    def sample_indices(self, epoch: int, step: int) -> list[int]:
        """Which images of the split batch number `step` of an epoch holds, in all processes."""
        order = epoch_order(self.count, self.seed, epoch, self.shards)
        return [int(number) for number in order.split(self.sizes)[step]]

    def _read(self, order: Tensor) -> Sequence[Tensor]:
        """The image numbers that are read for each batch: this process's, or all to be mixed."""
        parts: Sequence[Tensor] = order.split(self.sizes)
        if self._mixes or self.world.size == 1:
            return parts
        return [part[self.world.share(len(part)).rows] for part in parts]

    def _normalized(self, parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of `parts` as the network takes them, many batches at once if they are small.

        A pixel's value doesn't depend on what else is normalised with it.
        """
        if self._images is None:
            yield from (self.normalize(raw, self.plan) for raw in self._gathered(parts, indices))
            return
        each = 4 * self._images[0].numel() * self.sizes[0]
        together = max(1, BLOCK // each)
        for first in range(0, len(indices), together):
            block = indices[first : first + together]
            raw = self._images.index_select(0, torch.cat(list(block)))
            yield from self.normalize(raw, self.plan).split([len(index) for index in block])

    def _gathered(self, parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The raw images of `parts`; `indices` are the same numbers on the device."""
        if self._images is not None:
            for index in indices:
                # Ten times as fast as indexing with a tensor, on the CPU.
                yield self._images.index_select(0, index)
            return
        if not parts:  # taken up after the epoch's last step
            return
        # Half a window ahead: the next one is on its way before the first of it is needed.
        ahead = max(1, WINDOW_IMAGES // 2 // self.sizes[0])
        if self.shards:
            self.shards.coming(parts[:ahead])
        with ThreadPoolExecutor(max_workers=1) as reader:
            # With this thread's context: what is quiet here is quiet there.
            coming = reader.submit(copy_context().run, self.rows.gather, parts[0])
            for number, following in enumerate([*parts[1:], None], ahead):
                if self.shards:
                    self.shards.coming(parts[number : number + 1])
                images = coming.result()
                if following is not None:
                    coming = reader.submit(copy_context().run, self.rows.gather, following)
                yield to_device_async(images, self.plan.device)


def _batch_sizes(count: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (count // batch_size)
    rest = count % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def _batch_generator(device: str, *parts: int) -> SharedGenerator:
    generator = SharedGenerator(device)
    generator.manual_seed(derive_seed(*parts))
    return generator


# ---- order ----------------------------------------
# The order of an epoch: a function of (seed, epoch) and of where the images lie.

# Images that are shuffled together where they are read from shards: as many shards, drawn at
# random, as hold about this many. Photographs of 110 KB come to 1.8 GB of the system's file cache.
WINDOW_IMAGES = 16_384


@dataclass(frozen=True)
class ShardOrder:
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


def epoch_order(count: int, seed: int, epoch: int, shards: ShardOrder | None = None) -> Tensor:
    """All numbers below `count` once, int64 `[count]` on the CPU, the same on every device.

    With `shards` these come in a random order, and those of a window are shuffled into each
    other, so that only a few are read at a time. A set of one window is shuffled as if it weren't
    in shards.
    """
    # Always drawn on the CPU, so that every device sees the same order.
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, epoch))
    order = torch.randperm(count, generator=generator)
    if shards is None or count <= WINDOW_IMAGES:
        return order
    sizes = torch.bincount(shards.of)
    shuffled = torch.randperm(len(sizes), generator=generator)
    before = sizes[shuffled].cumsum(0) - sizes[shuffled]
    window = torch.empty_like(shuffled)
    window[shuffled] = before // WINDOW_IMAGES
    # A stable sort by window leaves the images of each in their random order.
    return order[torch.argsort(window[shards.of[order]], stable=True)]
