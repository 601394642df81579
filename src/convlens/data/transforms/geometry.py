"""Geometric augmentations: flips, shifted crops, affine maps, resized crops.

Each operation has three functions. `draw_x` draws one set of numbers per image, in a single call
of `torch.rand`; `x` applies given numbers, and tests compare it with torchvision's operation on
one image; `random_x` does both and is listed in `pipeline.AUGMENTS`. There are no loops over
images.

Images are float32 `[N, C, H, W]` in [0, 1] and are never changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlens.data.transforms.random import (
    MAX_TRIES,
    ColorValue,
    CropBoxes,
    NumberRange,
    SampleInfo,
    first_fit,
    integer_below,
    random_coins,
    random_color,
    symmetric_range,
    uniform_between,
    uniform_numbers,
)

# Flips


def flip(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Mirror the `chosen` images (bool `[N]`) along `dim` (-1 left-right, -2 up-down)."""
    # With weights of exactly 0 and 1, lerp selects bit for bit, in half the time of torch.where.
    kept = (~chosen).to(images.dtype).view(-1, 1, 1, 1)
    return images.flip(dim).lerp_(images, kept)


def random_horizontal_flip(images: Tensor, generator: torch.Generator, *, p: float = 0.5) -> Tensor:
    """Mirror each image left-right with probability `p`."""
    return flip(images, uniform_numbers(images, generator, 1)[0] < p, -1)


def random_vertical_flip(images: Tensor, generator: torch.Generator, *, p: float = 0.5) -> Tensor:
    """Mirror each image upside down with probability `p`."""
    return flip(images, uniform_numbers(images, generator, 1)[0] < p, -2)


def alternating_flip(images: Tensor, generator: torch.Generator, sample_info: SampleInfo) -> Tensor:
    """Mirror each image left-right in every other epoch; half of the images in the first one.

    In any two consecutive epochs each image is seen in both orientations, which repeats less than
    independent coins do (arXiv:2404.00498). The generator is not used.
    """
    first = random_coins(sample_info)
    return flip(images, first if sample_info.epoch % 2 else ~first, -1)


# Crops of the padded image, which shift it by a few pixels


def margins(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Return torchvision's padding as `(left, top, right, bottom)`.

    It may be one number, left/right and top/bottom, or all four.
    """
    if isinstance(padding, int):
        return (padding,) * 4
    left, top, right, bottom = tuple(padding) * (4 // len(padding))
    return left, top, right, bottom


def draw_crop(
    images: Tensor, generator: torch.Generator, *, padding: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Draw the top and left of each crop, int64 `[N]`, in pixels of the padded image."""
    left, top, right, bottom = margins(padding)
    u = uniform_numbers(images, generator, 2)
    tops, lefts = integer_below(u[0], top + bottom + 1), integer_below(u[1], left + right + 1)
    return tops.long(), lefts.long()


def crop(
    images: Tensor,
    tops: Tensor,
    lefts: Tensor,
    *,
    padding: int | Sequence[int],
    padding_mode: str = "constant",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Pad all images and cut a window of the original size out of each."""
    n, channels, height, width = images.shape
    left, top, right, bottom = margins(padding)
    sides = (left, right, top, bottom)
    if padding_mode != "constant":
        padded = F.pad(images, sides, mode={"edge": "replicate"}.get(padding_mode, padding_mode))
    elif isinstance(fill, int | float):
        padded = F.pad(images, sides, value=fill)
    else:
        base = random_color(fill, images)
        padded = F.pad(images - base, sides) + base
    # All runs of `width` floats in the padded batch, as a view that overlaps itself: one
    # index_select copies complete rows, several times faster than gathering pixels.
    padded_height, padded_width = padded.shape[-2:]
    runs = padded.contiguous().view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    planes = torch.arange(n * channels, device=images.device).view(n, channels, 1)
    rows = tops.view(n, 1, 1) + torch.arange(height, device=images.device)
    starts = (planes * padded_height + rows) * padded_width + lefts.view(n, 1, 1)
    return runs.index_select(0, starts.view(-1)).view(images.shape)


def random_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    padding: int | Sequence[int],
    padding_mode: str = "constant",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Pad by `padding` pixels (constant, reflect or edge) and crop back to the original size."""
    tops, lefts = draw_crop(images, generator, padding=padding)
    return crop(images, tops, lefts, padding=padding, padding_mode=padding_mode, fill=fill)


# Affine maps


class Affine(NamedTuple):
    """One affine map per image, float32 `[N]` each, with torchvision's meaning and signs."""

    angle: Tensor  # degrees, clockwise
    translate_x: Tensor  # pixels to the right
    translate_y: Tensor  # pixels down
    scale: Tensor
    shear_x: Tensor  # degrees
    shear_y: Tensor


def draw_affine(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float | NumberRange,
    translate: NumberRange | None = None,
    scale: NumberRange | None = None,
    shear: float | NumberRange | None = None,
) -> Affine:
    """Draw angles, whole-pixel shifts, scales and shears from torchvision's ranges."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 6)
    x, y = (translate[0] * width, translate[1] * height) if translate else (0.0, 0.0)
    shears = (*symmetric_range(shear or 0.0), 0.0, 0.0)[:4]
    return Affine(
        uniform_between(u[0], symmetric_range(degrees)),
        uniform_between(u[1], (-x, x)).round(),
        uniform_between(u[2], (-y, y)).round(),
        uniform_between(u[3], scale or (1.0, 1.0)),
        uniform_between(u[4], shears[:2]),
        uniform_between(u[5], shears[2:]),
    )


def inverse_matrices(maps: Affine) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Return the two rows (of three numbers `[N]`) that map output to input pixels.

    Both are measured from the center. Inverse of translate * rotate * scale * shear_y * shear_x,
    written out as in torchvision's `_get_inverse_affine_matrix` (the determinant of rotation and
    shear is one).
    """
    angle, shear_x, shear_y = (torch.deg2rad(v) for v in (maps.angle, maps.shear_x, maps.shear_y))
    a = torch.cos(angle - shear_y) / torch.cos(shear_y)
    c = torch.sin(angle - shear_y) / torch.cos(shear_y)
    b = -(a * torch.tan(shear_x) + torch.sin(angle))
    d = torch.cos(angle) - c * torch.tan(shear_x)
    rows = []
    for along_x, along_y in ((d, -b), (-c, a)):
        along_x, along_y = along_x / maps.scale, along_y / maps.scale
        shift = -(along_x * maps.translate_x + along_y * maps.translate_y)
        rows.append((along_x, along_y, shift))
    return tuple(rows)


def affine(
    images: Tensor, maps: Affine, *, interpolation: str = "bilinear", fill: ColorValue = 0.0
) -> Tensor:
    """Apply its own map to each image, about its center; `fill` is the color outside.

    At the border, the color outside is blended in once, as if the image continued in that color.
    (Torchvision with a fill of 0 instead of None multiplies by the coverage twice.)
    """
    n, _, height, width = images.shape
    # F.affine_grid uses a matrix product, which is about eight times slower here.
    grid = images.new_empty(n, height, width, 2)
    x = torch.arange(width, device=images.device, dtype=images.dtype) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=images.dtype) - (height - 1) / 2
    for axis, (along_x, along_y, shift) in enumerate(inverse_matrices(maps)):
        half = (width, height)[axis] / 2
        down = (along_y[:, None] * y + shift[:, None]) / half
        across = (along_x[:, None] * x) / half
        torch.add(down[:, :, None], across[:, None, :], out=grid[..., axis])
    base = random_color(fill, images)
    moved = F.grid_sample(images - base, grid, mode=interpolation, align_corners=False)
    return moved.add_(base).clamp_(0, 1)


def random_affine(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float | NumberRange,
    translate: NumberRange | None = None,
    scale: NumberRange | None = None,
    shear: float | NumberRange | None = None,
    interpolation: str = "bilinear",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Rotate, shift (fractions of the size), scale and shear (degrees) about the center.

    Unlike in torchvision, the default interpolation is bilinear.
    """
    maps = draw_affine(
        images, generator, degrees=degrees, translate=translate, scale=scale, shear=shear
    )
    return affine(images, maps, interpolation=interpolation, fill=fill)


def random_rotation(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float | NumberRange,
    interpolation: str = "bilinear",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Rotate about the center; unlike in `random_affine`, positive is counterclockwise."""
    maps = draw_affine(images, generator, degrees=degrees)
    maps = maps._replace(angle=-maps.angle)
    return affine(images, maps, interpolation=interpolation, fill=fill)


# Crops of any size, resized


def draw_resized_crop(
    images: Tensor, generator: torch.Generator, *, scale: NumberRange, ratio: NumberRange
) -> CropBoxes:
    """Draw the box of each image; the largest central box if no random one fitted."""
    height, width = images.shape[-2:]
    u = uniform_numbers(images, generator, 2 * MAX_TRIES + 2)
    w, h, fits = first_fit(
        u[2:], scale, ratio, area=height * width, min_side=1, max_sides=(width, height)
    )
    central_ratio = min(max(width / height, ratio[0]), ratio[1])
    h = torch.where(fits, h, float(round(min(height, width / central_ratio))))
    w = torch.where(fits, w, float(round(min(width, height * central_ratio))))
    top, left = integer_below(u[0], height - h + 1), integer_below(u[1], width - w + 1)
    top = torch.where(fits, top, ((height - h) / 2).floor())
    return CropBoxes(top, torch.where(fits, left, ((width - w) / 2).floor()), h, w)


def resized_crop(images: Tensor, boxes: CropBoxes, size: int | None = None) -> Tensor:
    """Resize the box of each image to squares of `size`, or to the size of the image, bilinearly.

    There is no antialiasing: a box should not be more than twice as large as the result.
    """
    n, _, height, width = images.shape
    out_height, out_width = (size, size) if size else (height, width)
    grid = images.new_empty(n, out_height, out_width, 2)
    for axis, (start, length, size_in, size_out) in enumerate(
        (
            (boxes.left, boxes.width, width, out_width),
            (boxes.top, boxes.height, height, out_height),
        )
    ):
        centers = torch.arange(size_out, device=images.device, dtype=images.dtype) + 0.5
        pixel = centers * (length / size_out)[:, None] - 0.5
        # As if cropped before the resize: pixels outside the box must not blend in at its border.
        pixel = start[:, None] + pixel.clamp_min(0).minimum((length - 1)[:, None])
        position = (pixel * 2 + 1) / size_in - 1
        grid[..., axis] = position[:, None, :] if axis == 0 else position[:, :, None]
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp_(0, 1)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    scale: NumberRange = (0.08, 1.0),
    ratio: NumberRange = (3 / 4, 4 / 3),
    size: int | None = None,
) -> Tensor:
    """Resize a random box, of `scale` of the area and `ratio` width/height, to the same size.

    With `size`, the results are squares of so many pixels. A network without a fixed image size
    that is trained on smaller images than it is tested on costs less and is more accurate, because
    objects look larger in random crops (Touvron et al. 2019, "Fixing the train-test resolution
    discrepancy").
    """
    boxes = draw_resized_crop(images, generator, scale=scale, ratio=ratio)
    return resized_crop(images, boxes, size)
