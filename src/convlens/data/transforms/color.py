"""Augmentations of pixel values: color, sharpness, erased boxes, and those of automatic policies.

As in `geometry.py`, `draw_x` draws one set of numbers per image, `x` or `apply_x` applies given
numbers, and `random_x` (or torchvision's name) does both. Images are float32 `[N, C, H, W]` in
[0, 1] and are never changed in place. Tests compare every operation with torchvision's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convlens.data.transforms.random import (
    MAX_TRIES,
    ColorValue,
    CropBoxes,
    NumberRange,
    constant,
    first_fit,
    integer_below,
    random_color,
    symmetric_range,
    uniform_between,
    uniform_numbers,
    uniform_pixels,
)

BLENDS = ("brightness", "contrast", "saturation")

# Color


def to_grayscale(images: Tensor) -> Tensor:
    """Return the luma `[N, 1, H, W]`, with torchvision's ITU-R 601 weights.

    Images of one channel are returned unchanged.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def random_grayscale(images: Tensor, generator: torch.Generator, *, p: float = 0.1) -> Tensor:
    """Convert each image to grey with probability `p`; the number of channels stays."""
    chosen = uniform_numbers(images, generator, 1)[0] < p
    return torch.where(chosen.view(-1, 1, 1, 1), to_grayscale(images), images)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB images by `turns` (float32 `[N]`, in full circles).

    Uses minima and maxima instead of a selection by channel, six times faster on a CPU: sorting
    the channels by two swaps gives the hue up to a constant that depends only on the swaps.
    """
    red, green, blue = images.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    blue_above_green = (green < blue).to(images.dtype)
    red_is_highest = (red >= high).to(images.dtype)
    middle = torch.minimum(red, high)
    chroma = torch.maximum(red, high) - torch.minimum(middle, low)
    # A grey has no hue: its difference is 0 and so is this quotient. A full circle is 6.
    hue = (middle - low).div_(chroma.clamp_min(1e-12))
    hue += torch.lerp(6 * blue_above_green - 2, -6 * blue_above_green, red_is_highest)
    hue = hue.abs_().add_(turns.view(-1, 1, 1), alpha=6)
    hue -= (hue / 6).floor_().mul_(6)
    # Red is full up to a distance of 1 from hue 0, zero from 2 on; green is at 2, blue at 4.
    # The distance of red is measured from the opposite hue, to avoid the wrap-around at 0.
    table = constant((3.0, 2.0, 4.0, 1.0, -1.0, -1.0, -1.0, 2.0, 2.0), images.device)
    opposite, sign, offset = table.view(3, 1, 3, 1, 1)
    share = (hue.unsqueeze(1) - opposite).abs_().mul_(sign).add_(offset).clamp_(0, 1)
    darkest = torch.minimum(middle, low).unsqueeze(1)
    return torch.addcmul(darkest, share, chroma.unsqueeze(1))


class Jitter(NamedTuple):
    """Random numbers of `ColorJitter` for N images, with K of the `BLENDS`."""

    kinds: tuple[str, ...]  # the K blends
    factors: Tensor  # float32 [K, N]
    order: Tensor  # int64 [K, N], the blend that is applied first, second, ... to each image
    hue: Tensor  # float32 [N or more], in circles; empty without hue
    # int64 [K + 1, ceil(N / (K + 1))], the images whose hue is changed before their first blend,
    # before their second, ... after their last. Numbers >= N are padding.
    hue_at: Tensor


def draw_jitter(
    images: Tensor,
    generator: torch.Generator,
    *,
    brightness: float | NumberRange | None = None,
    contrast: float | NumberRange | None = None,
    saturation: float | NumberRange | None = None,
    hue: float | NumberRange | None = None,
) -> Jitter:
    """Draw factors and, for every image, the order of the four changes; all are equally likely.

    The images are divided at random into equal shares (with padding if N is not a multiple) over
    the K + 1 possible positions of the hue, so that all shapes are known without synchronization.
    """
    n, is_rgb = len(images), images.shape[1] == 3
    ranges = dict(zip(BLENDS, (brightness, contrast, saturation if is_rgb else None), strict=True))
    limits = {
        name: symmetric_range(value, 1.0) for name, value in ranges.items() if value is not None
    }
    k = len(limits)
    share = -(-n // (k + 1))
    u = uniform_numbers(images, generator, 2 * k + 2, count=share * (k + 1))
    factors = [
        uniform_between(u[i, :n], (max(low, 0.0), high))
        for i, (low, high) in enumerate(limits.values())
    ]
    return Jitter(
        tuple(limits),
        torch.stack(factors) if factors else u[:0, :n],
        u[k : 2 * k, :n].argsort(0),
        uniform_between(u[2 * k], symmetric_range(hue)) if is_rgb and hue is not None else u[0, :0],
        u[2 * k + 1].argsort().view(k + 1, share),
    )


def apply_jitter(images: Tensor, drawn: Jitter) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image in its own order."""
    n = len(images)
    has_hue = len(drawn.hue) > 0
    padded = images.new_zeros((drawn.hue_at.numel() if has_hue else n, *images.shape[1:]))
    result = padded[:n]
    result.copy_(images)
    for position in range(len(drawn.kinds) + 1):
        if has_hue:
            index = drawn.hue_at[position]
            shifted = shift_hue(padded.index_select(0, index), drawn.hue[index])
            padded.index_copy_(0, index, shifted)
        if position < len(drawn.kinds):
            _blend_in_place(result, drawn, drawn.order[position])
    return result


def _blend_in_place(images: Tensor, drawn: Jitter, kind: Tensor) -> None:
    """Apply one blend per image, `kind` `[N]`: with black, its mean grey or its grey image."""
    factor = drawn.factors.gather(0, kind[None])[0].view(-1, 1, 1, 1)
    kind = kind.view(-1, 1, 1, 1)
    target = images.new_zeros(1)
    if "contrast" in drawn.kinds or "saturation" in drawn.kinds:
        grey = to_grayscale(images)
        if "saturation" in drawn.kinds:
            target = torch.where(kind == drawn.kinds.index("saturation"), grey, target)
        if "contrast" in drawn.kinds:
            mean = grey.mean((1, 2, 3), keepdim=True)
            target = torch.where(kind == drawn.kinds.index("contrast"), mean, target)
    images.sub_(target).mul_(factor).add_(target).clamp_(0, 1)


def color_jitter(
    images: Tensor,
    generator: torch.Generator,
    *,
    brightness: float | NumberRange | None = None,
    contrast: float | NumberRange | None = None,
    saturation: float | NumberRange | None = None,
    hue: float | NumberRange | None = None,
) -> Tensor:
    """Change brightness, contrast, saturation and hue in a random order per image.

    A number `v` means a factor of 1 - v ... 1 + v (for the hue, -v ... v of the circle), a pair
    the range itself. Grey images keep saturation and hue.
    """
    drawn = draw_jitter(
        images, generator, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
    )
    return apply_jitter(images, drawn)


# Sharpness


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Change the sharpness by `factors` (float32 `[N]`): 0 blurs, 1 changes nothing, 2 sharpens.

    The kernel is torchvision's and Pillow's: ones around a five, over 13. The outermost pixels
    stay.
    """
    result = images.clone()
    if min(images.shape[-2:]) <= 2:
        return result
    # Sums of shifted slices: a depthwise convolution is 5 to 20 times slower on a CPU.
    rows = images[:, :, :-2] + images[:, :, 1:-1]
    rows += images[:, :, 2:]
    blurred = rows[..., :-2] + rows[..., 1:-1]
    blurred += rows[..., 2:]
    interior = result[..., 1:-1, 1:-1]
    blurred.add_(interior, alpha=4).div_(13)
    interior.lerp_(blurred, 1 - factors.view(-1, 1, 1, 1))
    return result.clamp_(0, 1)


def random_adjust_sharpness(
    images: Tensor,
    generator: torch.Generator,
    *,
    sharpness_factor: float,
    p: float = 0.5,
) -> Tensor:
    """Sharpen each image (blur it if the factor is below 1) with probability `p`."""
    chosen = uniform_numbers(images, generator, 1)[0] < p
    return adjust_sharpness(images, torch.where(chosen, float(sharpness_factor), 1.0))


# Erasing


def draw_erasing(
    images: Tensor, generator: torch.Generator, *, p: float, scale: NumberRange, ratio: NumberRange
) -> CropBoxes:
    """Draw the box to erase in each image; its height is 0 if nothing is erased."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 2 * MAX_TRIES + 3)
    max_sides = (height - 1, width - 1)
    h, w, fits = first_fit(
        u[3:], scale, ratio, area=height * width, min_side=0, max_sides=max_sides
    )
    h = h * (fits & (u[0] < p))
    return CropBoxes(integer_below(u[1], height - h + 1), integer_below(u[2], width - w + 1), h, w)


def erase(images: Tensor, boxes: CropBoxes, value: Tensor) -> Tensor:
    """Cover the box of each image with `value` (any shape that broadcasts to the images)."""
    inside = []
    for start, length, size in (
        (boxes.top, boxes.height, images.shape[-2]),
        (boxes.left, boxes.width, images.shape[-1]),
    ):
        pixel = torch.arange(size, device=images.device)
        inside.append((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(mask, value, images)


def random_erasing(
    images: Tensor,
    generator: torch.Generator,
    *,
    p: float = 0.5,
    scale: NumberRange = (0.02, 0.33),
    ratio: NumberRange = (0.3, 3.3),
    value: ColorValue | str = 0.0,
) -> Tensor:
    """Cover a random box, of `scale` of the area, with `value` (arXiv:1708.04896).

    `value: random` draws every pixel uniformly from [0, 1]. Torchvision's normal noise would leave
    this range; there it is applied after standardization.
    """
    boxes = draw_erasing(images, generator, p=p, scale=scale, ratio=ratio)
    if isinstance(value, str):
        return erase(images, boxes, uniform_pixels(images, generator))
    return erase(images, boxes, random_color(value, images))


def draw_cutout(images: Tensor, generator: torch.Generator, *, size: int, p: float) -> CropBoxes:
    """Draw a square around a random pixel of each image; it may extend over the border."""
    u = uniform_numbers(images, generator, 3)
    height, width = images.shape[-2:]
    top, left = integer_below(u[0], height) - size // 2, integer_below(u[1], width) - size // 2
    return CropBoxes(top, left, size * (u[2] < p).float(), torch.full_like(top, size))


def cutout(
    images: Tensor,
    generator: torch.Generator,
    *,
    size: int,
    p: float = 1.0,
    value: ColorValue = 0.0,
) -> Tensor:
    """Cover a square of side `size` around a random pixel with `value` (arXiv:1708.04552)."""
    boxes = draw_cutout(images, generator, size=size, p=p)
    return erase(images, boxes, random_color(value, images))


# Operations of the automatic policies. Strengths are one number per image, float32 `[N]`.
# All return new images.


def blend(images: Tensor, target: Tensor | float, factors: Tensor) -> Tensor:
    """Interpolate from `target` (factor 0) to the image (1) and beyond, clamped to [0, 1]."""
    scaled = (images - target).mul_(factors.view(-1, 1, 1, 1))
    return scaled.add_(target).clamp_(0, 1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with black."""
    return blend(images, 0.0, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey version of each image; grey images stay."""
    return images.clone() if images.shape[1] == 1 else blend(images, to_grayscale(images), factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean grey of each image."""
    return blend(images, to_grayscale(images).mean((1, 2, 3), keepdim=True), factors)


def levels(images: Tensor) -> Tensor:
    """Convert values in 0..1 to integers 0..255, as floats, with torchvision's rounding."""
    return (images * 255.999).floor_()


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` (0 to 8) of each byte, as for uint8 images.

    Torchvision's version for floats divides the range instead, so that 8 bits darken white.
    """
    step = torch.exp2(8 - bits).view(-1, 1, 1, 1)
    return (levels(images) / step).floor_().mul_(step).div_(255)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the pixels at or above the threshold of each image."""
    return torch.where(images >= thresholds.view(-1, 1, 1, 1), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the full range; a channel of a single value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = (high == low).to(images.dtype)
    scale = torch.lerp(high - low, torch.ones_like(low), flat)
    return (images - low * (1 - flat)).div_(scale).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of 256 levels of each channel, as Pillow does.

    A level becomes the number of pixels below it divided by `step`, rounded, where `step` is a
    255th of the pixels that do not have the brightest level. A channel whose `step` is 0 stays.
    """
    level = levels(images).long().flatten(2)
    one = level.new_ones(1).expand_as(level)
    histogram = level.new_zeros((*level.shape[:2], 256)).scatter_add_(2, level, one)
    below = histogram.cumsum(2).sub_(histogram)
    brightest = level.amax(2, keepdim=True)
    step = (level.shape[2] - histogram.gather(2, brightest)).div_(255, rounding_mode="floor")
    divisor = step.clamp(min=1)
    spread = below.add_(step // 2).div_(divisor, rounding_mode="floor").clamp_(0, 255)
    result = torch.where(step == 0, level, spread.gather(2, level))
    return result.to(images.dtype).div_(255).view(images.shape)
