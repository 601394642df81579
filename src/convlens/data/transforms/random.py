"""What the augmentations draw with: one number or box per image, from one generator.

Images are float32 `[N, C, H, W]`; everything drawn is `[N]` on the images' device.
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
TRIES = 10  # torchvision gives up on a box that does not fit after as many


def uniform_numbers(
    images: Tensor, generator: torch.Generator, rows: int, count: int = 0
) -> Tensor:
    """Uniform numbers in [0, 1), float32 `[rows, N]` (or `[rows, count]`), on the images' device.

    They are drawn on the generator's device, so that a CPU generator also serves images elsewhere.
    For rows of a batch (`SharedGenerator`) they are drawn for all of it.
    """
    whole = _whole_batch_shape(images, generator)
    assert not (count and whole), "what is dealt over the batch has `needs_full_batch` in the table"
    size = (rows, count or len(images)) if whole is None else (rows, whole.total)
    drawn = torch.rand(size, generator=generator, device=generator.device)
    return (drawn if whole is None else drawn[:, whole.rows]).to(images.device)


def normal_numbers(images: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) for each value of `images`, drawn as in `numbers`."""
    whole = _whole_batch_shape(images, generator)
    size = images.shape if whole is None else (whole.total, *images.shape[1:])
    drawn = torch.rand(size, generator=generator, device=generator.device)
    return (drawn if whole is None else drawn[whole.rows]).to(images.device)


class SharedGenerator(torch.Generator):
    """A generator for rows of a batch that several processes share: `share` says which.

    What is drawn from it for images that are just those rows is drawn for the whole batch, and
    its rows are kept: so an image's numbers don't depend on how many processes there are. Images
    that are the whole batch get all the numbers, as from any other generator.
    """

    share: Share | None = None


def _whole_batch_shape(images: Tensor, generator: torch.Generator) -> Share | None:
    """The batch of which `images` are some rows only; None where they are all there is."""
    share = generator.share if isinstance(generator, SharedGenerator) else None
    return share if share is not None and len(images) != share.total else None


def for_whole_batch(
    images: Tensor, generator: torch.Generator, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `change` makes of `images` if they are all, or rows of a batch: then of all of it.

    For operations that deal a batch out. Other processes' rows are blank; they are not needed to
    know what becomes of the own ones, only computed in vain.
    """
    whole = _whole_batch_shape(images, generator)
    if whole is None:
        return change(images)
    padded = images.new_zeros((whole.total, *images.shape[1:]))
    padded[whole.rows] = images
    return change(padded)[whole.rows]


def uniform_between(uniform: Tensor, limits: NumberRange) -> Tensor:
    """Numbers from [0, 1) stretched to `limits`."""
    low, high = limits
    return uniform * (high - low) + low


def integer_below(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Numbers from [0, 1) as whole numbers 0 ... count - 1, still floats."""
    return (uniform * count).floor()


def symmetric_range(value: float | NumberRange, centre: float = 0.0) -> tuple[float, ...]:
    """A single number `v` as the range `centre - v ... centre + v`; a sequence as it is."""
    if isinstance(value, int | float):
        return (centre - value, centre + value)
    return tuple(float(v) for v in value)


def random_color(value: ColorValue, images: Tensor) -> Tensor:
    """One number, or one per channel, as `[1, C or 1, 1, 1]`.

    Raises:
        UsageError: the number of values fits neither one nor the channels; broadcasting would
            otherwise quietly turn grey images into images of three channels.
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
    """The values on the device, sent there once: a GPU is waited for whenever numbers are sent."""
    with torch.inference_mode(False):  # kept for training, too, whoever asks first
        return torch.tensor(values, device=device)


class SampleInfo(NamedTuple):
    """Which images a batch holds, and when: for operations that go by more than chance."""

    numbers: Tensor  # int64 [N]: of each image in its split, on the images' device
    epoch: int  # from 1
    seed: int


def random_coins(sample_info: SampleInfo) -> Tensor:
    """A fair coin for each image, bool `[N]`: a function of its number and the seed alone.

    The 32-bit finaliser of MurmurHash3 (Appleby), in 64-bit numbers because torch has no
    unsigned product; what overflows is masked away.
    """
    mask = 0xFFFFFFFF
    bits = (sample_info.numbers ^ (derive_seed(sample_info.seed) & mask)) & mask
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return ((bits ^ (bits >> 16)) & 1).bool()


class CropBoxes(NamedTuple):
    """One rectangle per image in whole pixels, float32 `[N]` each; height 0 means none."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def first_fit(
    u: Tensor, scale: NumberRange, ratio: NumberRange, area: int, least: int, most: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `TRIES` random boxes per image the first that fits: its two sides, and whether one did.

    `ratio` is first side over second; areas are uniform, ratios uniform in the logarithm.
    """
    areas = uniform_between(u[:TRIES], scale) * area
    ratios = uniform_between(u[TRIES:], (math.log(ratio[0]), math.log(ratio[1]))).exp()
    first, second = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (first >= least) & (first <= most[0]) & (second >= least) & (second <= most[1])
    turn = fits.byte().argmax(0, keepdim=True)  # the first of equals
    return first.gather(0, turn)[0], second.gather(0, turn)[0], fits.any(0)
