"""Augmentations that change what pixels show where they are: colour, sharpness, erased boxes.

The same pairs as in `geometry.py`: `draw_*` makes one set of numbers per image, the plain
function applies given numbers, `random_*` (or the torchvision name) joins the two. Images are
float32 `[N, C, H, W]` in [0, 1] and never changed in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convlens.data.draws import (
    TRIES,
    Boxes,
    Colour,
    Range,
    between,
    colour,
    constant,
    first_fit,
    integer_below,
    noise,
    numbers,
    span,
)

# Colour


def grey(images: Tensor) -> Tensor:
    """Luma `[N, 1, H, W]` with torchvision's ITU-R 601 weights; one channel is returned as is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def random_grayscale(images: Tensor, generator: torch.Generator, *, p: float = 0.1) -> Tensor:
    """Turns each image grey with probability `p`; the number of channels stays."""
    chosen = numbers(images, generator, 1)[0] < p
    return torch.where(chosen.view(-1, 1, 1, 1), grey(images), images)


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
    brightness: float | Range | None = None,
    contrast: float | Range | None = None,
    saturation: float | Range | None = None,
    hue: float | Range | None = None,
) -> Jitter:
    """Factors, and for every image its own order of the four changes, all orders equally likely.

    The images are shuffled over the K + 1 possible places of the hue in equal shares (with blank
    places where N does not divide), so that all shapes are known without asking the device.
    """
    n, is_rgb = len(images), images.shape[1] == 3
    asked = dict(zip(BLENDS, (brightness, contrast, saturation if is_rgb else None), strict=True))
    limits = {name: span(value, 1.0) for name, value in asked.items() if value is not None}
    k = len(limits)
    share = -(-n // (k + 1))
    u = numbers(images, generator, 2 * k + 2, count=share * (k + 1))
    factors = [between(u[i, :n], (max(low, 0.0), high)) for i, (low, high) in
               enumerate(limits.values())]  # fmt: skip
    return Jitter(
        tuple(limits),
        torch.stack(factors) if factors else u[:0, :n],
        u[k : 2 * k, :n].argsort(0),
        between(u[2 * k], span(hue)) if is_rgb and hue is not None else u[0, :0],
        u[2 * k + 1].argsort().view(k + 1, share),
    )


def jitter(images: Tensor, drawn: Jitter) -> Tensor:
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
        plain = grey(images)
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
    brightness: float | Range | None = None,
    contrast: float | Range | None = None,
    saturation: float | Range | None = None,
    hue: float | Range | None = None,
) -> Tensor:
    """Changes brightness, contrast, saturation and hue in a random order per image.

    A number `v` means a factor of 1 - v ... 1 + v (for the hue, -v ... v of the circle), a pair
    the range itself. On grey images saturation and hue do nothing.
    """
    drawn = draw_jitter(images, generator, brightness=brightness, contrast=contrast,
                        saturation=saturation, hue=hue)  # fmt: skip
    return jitter(images, drawn)


# Sharpness


def sharpen(images: Tensor, factors: Tensor) -> Tensor:
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
    chosen = numbers(images, generator, 1)[0] < p
    return sharpen(images, torch.where(chosen, float(sharpness_factor), 1.0))


# Erasing


def draw_erasing(
    images: Tensor, generator: torch.Generator, *, p: float, scale: Range, ratio: Range
) -> Boxes:
    """The box to erase in each image; of height 0 in those left alone."""
    height, width = images.shape[-2:]
    u = numbers(images, generator, 2 * TRIES + 3)
    most = (height - 1, width - 1)
    h, w, fits = first_fit(u[3:], scale, ratio, height * width, 0, most)
    h = h * (fits & (u[0] < p))
    return Boxes(integer_below(u[1], height - h + 1), integer_below(u[2], width - w + 1), h, w)


def erase(images: Tensor, boxes: Boxes, value: Tensor) -> Tensor:
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
    scale: Range = (0.02, 0.33),
    ratio: Range = (0.3, 3.3),
    value: Colour | str = 0.0,
) -> Tensor:
    """Covers a random box, of `scale` of the area, with `value` (arXiv:1708.04896).

    `value: random` draws every pixel uniformly from [0, 1]; torchvision's normal noise would
    leave that range, since there it comes after standardising.
    """
    boxes = draw_erasing(images, generator, p=p, scale=scale, ratio=ratio)
    if isinstance(value, str):
        return erase(images, boxes, noise(images, generator))
    return erase(images, boxes, colour(value, images))


def draw_cutout(images: Tensor, generator: torch.Generator, *, size: int, p: float) -> Boxes:
    """A square around a random pixel of each image, which may reach over the border."""
    u = numbers(images, generator, 3)
    height, width = images.shape[-2:]
    top, left = integer_below(u[0], height) - size // 2, integer_below(u[1], width) - size // 2
    return Boxes(top, left, size * (u[2] < p).float(), torch.full_like(top, size))


def cutout(
    images: Tensor,
    generator: torch.Generator,
    *,
    size: int,
    p: float = 1.0,
    value: Colour = 0.0,
) -> Tensor:
    """Covers a square of `size` pixels around a random pixel with `value` (arXiv:1708.04552)."""
    boxes = draw_cutout(images, generator, size=size, p=p)
    return erase(images, boxes, colour(value, images))
