"""Augmentations that change what pixels show where they are: colour, sharpness, erased boxes.

The same pairs as in `geometry.py`: `draw_*` makes one set of numbers per image, the plain
function applies given numbers, `random_*` (or the torchvision name) joins the two. Images are
float32 `[N, C, H, W]` in [0, 1] and never changed in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convlens.data.transforms.random import (
    TRIES,
    ColorValue,
    CropBoxes,
    NumberRange,
    constant,
    first_fit,
    integer_below,
    normal_numbers,
    random_color,
    symmetric_range,
    uniform_between,
    uniform_numbers,
)

# Colour


def to_grayscale(images: Tensor) -> Tensor:
    """Luma `[N, 1, H, W]` with torchvision's ITU-R 601 weights; one channel is returned as is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def random_grayscale(images: Tensor, generator: torch.Generator, *, p: float = 0.1) -> Tensor:
    """Turns each image grey with probability `p`; the number of channels stays."""
    chosen = uniform_numbers(images, generator, 1)[0] < p
    return torch.where(chosen.view(-1, 1, 1, 1), to_grayscale(images), images)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of RGB images by `turns` (float32 `[N]`, in whole circles).

    Minima and maxima instead of a choice by channel (six times faster on a CPU): sorting the
    channels by two swaps gives the hue up to a constant that depends on the swaps alone.
    """
    red, green, blue = images.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    blue_led = (green < blue).to(images.dtype)
    red_led = (red >= high).to(images.dtype)
    middle = torch.minimum(red, high)
    chroma = torch.maximum(red, high) - torch.minimum(middle, low)
    # A grey has no hue: its difference is 0 and so is this quotient. A circle counts 6.
    hue = (middle - low).div_(chroma.clamp_min(1e-12))
    hue += torch.lerp(6 * blue_led - 2, -6 * blue_led, red_led)
    hue = hue.abs_().add_(turns.view(-1, 1, 1), alpha=6)
    hue -= (hue / 6).floor_().mul_(6)
    # Red is full up to a distance of 1 from hue 0 and gone at 2; green around 2, blue around 4.
    # The distance of red is measured from the opposite side, where the circle does not close.
    table = constant((3.0, 2.0, 4.0, 1.0, -1.0, -1.0, -1.0, 2.0, 2.0), images.device)
    opposite, sign, offset = table.view(3, 1, 3, 1, 1)
    share = (hue.unsqueeze(1) - opposite).abs_().mul_(sign).add_(offset).clamp_(0, 1)
    darkest = torch.minimum(middle, low).unsqueeze(1)
    return torch.addcmul(darkest, share, chroma.unsqueeze(1))


BLENDS = ("brightness", "contrast", "saturation")


class Jitter(NamedTuple):
    """Numbers of `ColorJitter` for N images, of which K kinds of `BLENDS` take part."""

    kinds: tuple[str, ...]  # the K kinds
    factors: Tensor  # float32 [K, N]
    order: Tensor  # int64 [K, N]: which kind an image meets first, second, ...
    hue: Tensor  # float32 [N or more], in circles; empty without hue
    # int64 [K + 1, ceil(N / (K + 1))]: the images whose hue turns before their first blend,
    # before their second, ... after their last. Numbers >= N stand for nobody.
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
    """Factors, and for every image its own order of the four changes, all orders equally likely.

    The images are shuffled over the K + 1 possible places of the hue in equal shares (with blank
    places where N does not divide), so that all shapes are known without asking the device.
    """
    n, is_rgb = len(images), images.shape[1] == 3
    asked = dict(zip(BLENDS, (brightness, contrast, saturation if is_rgb else None), strict=True))
    limits = {
        name: symmetric_range(value, 1.0) for name, value in asked.items() if value is not None
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
    """Applies drawn changes of brightness, contrast, saturation and hue to each image in turn."""
    n = len(images)
    has_hue = len(drawn.hue) > 0
    work = images.new_zeros((drawn.hue_at.numel() if has_hue else n, *images.shape[1:]))
    result = work[:n]
    result.copy_(images)
    for turn in range(len(drawn.kinds) + 1):
        if has_hue:
            mine = drawn.hue_at[turn]
            turned = shift_hue(work.index_select(0, mine), drawn.hue[mine])
            work.index_copy_(0, mine, turned)
        if turn < len(drawn.kinds):
            _blend_in_place(result, drawn, drawn.order[turn])
    return result


def _blend_in_place(images: Tensor, drawn: Jitter, kind: Tensor) -> None:
    """One blend per image: towards black, its mean grey or its own grey, by `kind` `[N]`."""
    factor = drawn.factors.gather(0, kind[None])[0].view(-1, 1, 1, 1)
    kind = kind.view(-1, 1, 1, 1)
    target = images.new_zeros(1)
    if "contrast" in drawn.kinds or "saturation" in drawn.kinds:
        plain = to_grayscale(images)
        if "saturation" in drawn.kinds:
            target = torch.where(kind == drawn.kinds.index("saturation"), plain, target)
        if "contrast" in drawn.kinds:
            mean = plain.mean((1, 2, 3), keepdim=True)
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
    """Changes brightness, contrast, saturation and hue in a random order per image.

    A number `v` means a factor of 1 - v ... 1 + v (for the hue, -v ... v of the circle), a pair
    the range itself. On grey images saturation and hue do nothing.
    """
    drawn = draw_jitter(
        images, generator, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
    )
    return apply_jitter(images, drawn)


# Sharpness


def adjust_sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """0 blurs, 1 leaves alone, 2 sharpens; `factors` float32 `[N]`.

    Torchvision's (and Pillow's) kernel: ones around a five, over 13; the outermost pixels stay.
    """
    result = images.clone()
    if min(images.shape[-2:]) <= 2:
        return result
    # Sums of shifted slices: a depthwise convolution is 5 to 20 times slower on a CPU.
    rows = images[:, :, :-2] + images[:, :, 1:-1]
    rows += images[:, :, 2:]
    blurred = rows[..., :-2] + rows[..., 1:-1]
    blurred += rows[..., 2:]
    centre = result[..., 1:-1, 1:-1]
    blurred.add_(centre, alpha=4).div_(13)
    centre.lerp_(blurred, 1 - factors.view(-1, 1, 1, 1))
    return result.clamp_(0, 1)


def random_adjust_sharpness(
    images: Tensor,
    generator: torch.Generator,
    *,
    sharpness_factor: float,
    p: float = 0.5,
) -> Tensor:
    """Sharpens (or below 1 blurs) each image with probability `p`."""
    chosen = uniform_numbers(images, generator, 1)[0] < p
    return adjust_sharpness(images, torch.where(chosen, float(sharpness_factor), 1.0))


# Erasing


def draw_erasing(
    images: Tensor, generator: torch.Generator, *, p: float, scale: NumberRange, ratio: NumberRange
) -> CropBoxes:
    """The box to erase in each image; of height 0 in those left alone."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 2 * TRIES + 3)
    most = (height - 1, width - 1)
    h, w, fits = first_fit(u[3:], scale, ratio, height * width, 0, most)
    h = h * (fits & (u[0] < p))
    return CropBoxes(integer_below(u[1], height - h + 1), integer_below(u[2], width - w + 1), h, w)


def erase(images: Tensor, boxes: CropBoxes, value: Tensor) -> Tensor:
    """Covers each image's box with `value` (anything that broadcasts to the images)."""
    inside = []
    for start, length, size in (
        (boxes.top, boxes.height, images.shape[-2]),
        (boxes.left, boxes.width, images.shape[-1]),
    ):
        at = torch.arange(size, device=images.device)
        inside.append((at >= start[:, None]) & (at < (start + length)[:, None]))
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
    """Covers a random box, of `scale` of the area, with `value` (arXiv:1708.04896).

    `value: random` draws every pixel uniformly from [0, 1]; torchvision's normal noise would
    leave that range, since there it comes after standardising.
    """
    boxes = draw_erasing(images, generator, p=p, scale=scale, ratio=ratio)
    if isinstance(value, str):
        return erase(images, boxes, normal_numbers(images, generator))
    return erase(images, boxes, random_color(value, images))


def draw_cutout(images: Tensor, generator: torch.Generator, *, size: int, p: float) -> CropBoxes:
    """A square around a random pixel of each image, which may reach over the border."""
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
    """Covers a square of `size` pixels around a random pixel with `value` (arXiv:1708.04552)."""
    boxes = draw_cutout(images, generator, size=size, p=p)
    return erase(images, boxes, random_color(value, images))


# ---- tones ----------------------------------------
# Changes of single pixels' values as automatic policies use them: blends, posterise, equalise.
#
# Each takes float32 images `[N, C, H, W]` in [0, 1] and, where it has a strength, one per image
# (float32 `[N]`), and returns new images. All are held against torchvision's operation on one image.


def blend(images: Tensor, target: Tensor | float, factors: Tensor) -> Tensor:
    """Factor 0 gives `target`, 1 the image, more goes beyond it; cut to [0, 1]."""
    moved = (images - target).mul_(factors.view(-1, 1, 1, 1))
    return moved.add_(target).clamp_(0, 1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with black."""
    return blend(images, 0.0, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with each image's own grey picture; grey images have no colour to change."""
    return images.clone() if images.shape[1] == 1 else blend(images, to_grayscale(images), factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with each image's mean grey."""
    return blend(images, to_grayscale(images).mean((1, 2, 3), keepdim=True), factors)


def levels(images: Tensor) -> Tensor:
    """Values 0..1 as whole numbers 0..255, still floats; torchvision's rounding."""
    return (images * 255.999).floor_()


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the upper `bits` (0 to 8) of each byte, as for uint8 images.

    Torchvision's float version divides the range instead, so that 8 bits darken white a little.
    """
    steps = torch.exp2(8 - bits).view(-1, 1, 1, 1)
    return (levels(images) / steps).floor_().mul_(steps).div_(255)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Inverts the pixels at or above each image's threshold."""
    return torch.where(images >= thresholds.view(-1, 1, 1, 1), 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretches each channel to the full range; a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = (high == low).to(images.dtype)
    scale = torch.lerp(high - low, torch.ones_like(low), flat)
    return (images - low * (1 - flat)).div_(scale).clamp_(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's histogram of 256 levels evenly, by Pillow's rule.

    With `step` a 255th of the pixels that are not the brightest, a level becomes the number of
    pixels below it divided by `step`, rounded. Channels of too few values stay as they are.
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
