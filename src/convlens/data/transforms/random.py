"""Random numbers of the augmentations: one number, color or box per image.

Images are float32 `[N, C, H, W]`; random values are `[N]` on the images' device. All come from
one generator, except `random_coins`, a function of image number and seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convlens.device import derive_seed
from convlens.distributed import Share
from convlens.errors import UsageError

NumberRange = Sequence[float]
ColorValue = float | Sequence[float]
MAX_TRIES = 10  # random boxes per image until one fits; as in torchvision


class SharedGenerator(torch.Generator):
    """A generator for the rows of a batch that one process of several computes.

    `share` says which rows these are. Numbers for images that are exactly these rows are drawn for
    the full batch, and their rows are kept, so that the numbers of an image do not depend on the
    number of processes. For a full batch it is an ordinary generator.
    """

    share: Share | None = None


def _partial_share(images: Tensor, generator: torch.Generator) -> Share | None:
    """Return the share that `images` are; None if they are a full batch."""
    share = generator.share if isinstance(generator, SharedGenerator) else None
    return share if share is not None and len(images) != share.total else None


def uniform_numbers(
    images: Tensor, generator: torch.Generator, rows: int, count: int = 0
) -> Tensor:
    """Draw uniform numbers in [0, 1) for each image.

    They are drawn on the generator's device, so that a CPU generator can be used for images on
    another device. For some rows of a batch (`SharedGenerator`) they are drawn for all its images.

    Args:
        images: `[N, C, H, W]`.
        generator: The random generator.
        rows: Numbers per image.
        count: Draw this many columns instead of N; needs a full batch.

    Returns:
        float32 `[rows, N]` (or `[rows, count]`) on the images' device.
    """
    share = _partial_share(images, generator)
    assert not (count and share), "the operation must be marked with `needs_full_batch`"
    size = (rows, count or len(images)) if share is None else (rows, share.total)
    drawn = torch.rand(size, generator=generator, device=generator.device)
    return (drawn if share is None else drawn[:, share.rows]).to(images.device)


def uniform_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a uniform number in [0, 1) for each value of `images`, as `uniform_numbers` does."""
    share = _partial_share(images, generator)
    size = images.shape if share is None else (share.total, *images.shape[1:])
    drawn = torch.rand(size, generator=generator, device=generator.device)
    return (drawn if share is None else drawn[share.rows]).to(images.device)


def for_whole_batch(
    images: Tensor, generator: torch.Generator, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a transform that needs a full batch, even if `images` are only some of its rows.

    The rows of other processes are zeros: the results of this process's rows do not depend on
    their pixels, only on their number.
    """
    share = _partial_share(images, generator)
    if share is None:
        return transform(images)
    padded = images.new_zeros((share.total, *images.shape[1:]))
    padded[share.rows] = images
    return transform(padded)[share.rows]


def uniform_between(uniform: Tensor, limits: NumberRange) -> Tensor:
    """Scale uniform numbers in [0, 1) to the range `limits`."""
    low, high = limits
    return uniform * (high - low) + low


def integer_below(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Turn uniform numbers in [0, 1) into integers 0 ... count - 1, as floats."""
    return (uniform * count).floor()


def symmetric_range(value: float | NumberRange, center: float = 0.0) -> tuple[float, ...]:
    """Return a number `v` as the range `center - v ... center + v`; a sequence unchanged."""
    if isinstance(value, int | float):
        return (center - value, center + value)
    return tuple(float(v) for v in value)


def random_color(value: ColorValue, images: Tensor) -> Tensor:
    """Return one number, or one per channel, as a tensor `[1, C or 1, 1, 1]`.

    Raises:
        UsageError: There are neither one nor as many values as channels. Broadcasting would
            silently turn grey images into images of three channels.
    """
    values = (float(value),) if isinstance(value, int | float) else tuple(map(float, value))
    if len(values) not in (1, images.shape[1]):
        raise UsageError(
            f"{len(values)} values for images of {images.shape[1]} channel(s)",
            fix="give one number, or one for each channel",
        )
    return constant(values, images.device).view(1, -1, 1, 1)


@functools.lru_cache(maxsize=64)
def constant(values: Sequence[float], device: torch.device) -> Tensor:
    """Return the values as a tensor, cached: each copy to a GPU would synchronize with it."""
    with torch.inference_mode(False):  # the cached tensors are used in training as well
        return torch.tensor(values, device=device)


class SampleInfo(NamedTuple):
    """The images of a batch and the epoch, for augmentations that depend on them."""

    numbers: Tensor  # int64 [N], number of each image in its split, on the images' device
    epoch: int  # counts from 1
    seed: int


def random_coins(sample_info: SampleInfo) -> Tensor:
    """Toss a fair coin for each image, bool `[N]`, depending only on its number and the seed.

    The 32-bit finalizer of MurmurHash3 (Appleby), computed with 64-bit integers because torch has
    no unsigned product; overflow is masked.
    """
    mask = 0xFFFFFFFF
    bits = (sample_info.numbers ^ (derive_seed(sample_info.seed) & mask)) & mask
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return ((bits ^ (bits >> 16)) & 1).bool()


class CropBoxes(NamedTuple):
    """One box per image in whole pixels, float32 `[N]` each; height 0 means no box."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def first_fit(
    u: Tensor,
    scale: NumberRange,
    ratio: NumberRange,
    *,
    area: int,
    min_side: int,
    max_sides: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the first of `MAX_TRIES` random boxes per image that fits.

    Args:
        u: Uniform numbers, `[2 * MAX_TRIES, N]`.
        scale: Range of the box's area as a share of `area`, drawn uniformly.
        ratio: Range of first over second side, drawn uniformly in the logarithm.
        area: Area of the image in pixels.
        min_side: Smallest side that fits.
        max_sides: Largest first and second side that fit.

    Returns:
        First side, second side, and whether a box fitted, `[N]` each.
    """
    areas = uniform_between(u[:MAX_TRIES], scale) * area
    ratios = uniform_between(u[MAX_TRIES:], (math.log(ratio[0]), math.log(ratio[1]))).exp()
    first, second = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (first >= min_side) & (first <= max_sides[0])
    fits &= (second >= min_side) & (second <= max_sides[1])
    chosen = fits.byte().argmax(0, keepdim=True)  # the first of equal values
    return first.gather(0, chosen)[0], second.gather(0, chosen)[0], fits.any(0)
