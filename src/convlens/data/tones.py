"""Changes of single pixels' values as automatic policies use them: blends, posterise, equalise.

Each takes float32 images `[N, C, H, W]` in [0, 1] and, where it has a strength, one per image
(float32 `[N]`), and returns new images. All are held against torchvision's operation on one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convlens.data.appearance import grey


def blend(images: Tensor, target: Tensor | float, factors: Tensor) -> Tensor:
    """Factor 0 gives `target`, 1 the image, more goes beyond it; cut to [0, 1]."""
    moved = (images - target).mul_(factors.view(-1, 1, 1, 1))
    return moved.add_(target).clamp_(0, 1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with black."""
    return blend(images, 0.0, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with each image's own grey picture; grey images have no colour to change."""
    return images.clone() if images.shape[1] == 1 else blend(images, grey(images), factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blends with each image's mean grey."""
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factors)


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
