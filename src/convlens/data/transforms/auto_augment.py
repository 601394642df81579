"""TrivialAugment and RandAugment: a random operation per image, at one of several strengths.

Operations and strengths are torchvision's. A shuffled batch is divided into equal shares, one for
each operation. So each operation is applied to its own images only, all shapes are known without
synchronizing with the device, and the five geometric operations are a single affine map. Each
image still gets every operation with the same probability.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from convlens.data.transforms import color
from convlens.data.transforms.color import adjust_sharpness
from convlens.data.transforms.geometry import Affine, affine
from convlens.data.transforms.random import ColorValue, integer_below, uniform_numbers

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
# The other operations, in the order of their shares: (images, magnitudes [share]) -> images.
COLOR_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": lambda images, m: color.brightness(images, 1 + m),
    "Color": lambda images, m: color.saturation(images, 1 + m),
    "Contrast": lambda images, m: color.contrast(images, 1 + m),
    "Sharpness": lambda images, m: adjust_sharpness(images, 1 + m),
    "Posterize": color.posterize,
    "Solarize": color.solarize,
    "AutoContrast": lambda images, _: color.autocontrast(images),
    "Equalize": lambda images, _: color.equalize(images),
    "Identity": lambda images, _: images,
}
OPERATIONS = (*GEOMETRIC, *COLOR_OPERATIONS)
N_SIGNED = 9  # number of operations, the first ones, whose strength has a random sign


class PolicySpace(NamedTuple):
    """The largest magnitude of each kind of operation. The smallest one changes nothing."""

    shear: float  # pixels per pixel
    translate: float  # fraction of the size if `relative`, else pixels
    relative: bool
    rotate: float  # degrees
    blend: float  # difference of the factor from 1
    bits: int  # removed by Posterize


WIDE = PolicySpace(shear=0.99, translate=32, relative=False, rotate=135, blend=0.99, bits=6)
NARROW = PolicySpace(shear=0.3, translate=150 / 331, relative=True, rotate=30, blend=0.9, bits=4)


@functools.lru_cache(maxsize=16)
def magnitudes(
    space: PolicySpace, bins: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Return the strengths of each operation, without sign, float32 `[K, bins]`.

    They are equal to torchvision's.
    """
    across = space.translate * (width if space.relative else 1)
    down = space.translate * (height if space.relative else 1)
    largest = (space.shear, space.shear, across, down, space.rotate, *(space.blend,) * 4)
    rows = [torch.linspace(0, magnitude, bins) for magnitude in largest]
    rows.append((8 - torch.arange(bins) / ((bins - 1) / space.bits)).round())
    rows.append(torch.linspace(1, 0, bins))
    rows += [torch.zeros(bins)] * (len(OPERATIONS) - len(rows))
    return torch.stack(rows).to(device)


class OpAssignment(NamedTuple):
    """One operation for each of N images: K operations with shares of S images each."""

    order: Tensor  # int64 [K * S], the images of the shares in a row; numbers >= N are padding
    magnitudes: Tensor  # float32 [K, S]


def assign_operations(
    images: Tensor,
    generator: torch.Generator,
    *,
    space: PolicySpace,
    bins: int,
    count: int = 1,
    magnitude: int | None = None,
) -> list[OpAssignment]:
    """Draw `count` successive assignments.

    The strength has the number `magnitude`, or a random one for each image if it is None.
    """
    height, width = images.shape[-2:]
    kinds = len(OPERATIONS)
    share = -(-len(images) // kinds)
    table = magnitudes(space, bins, height, width, images.device)
    u = uniform_numbers(images, generator, 3 * count, count=kinds * share).view(
        count, 3, kinds, share
    )
    assignments = []
    for order, strength, sign in u.unbind(0) if count else ():
        if magnitude is None:
            chosen = table.gather(1, integer_below(strength, bins).long())
        else:
            chosen = table[:, magnitude, None].repeat(1, share)
        chosen[:N_SIGNED] *= 1 - 2 * (sign[:N_SIGNED] <= 0.5).float()
        assignments.append(OpAssignment(order.flatten().argsort(), chosen))
    return assignments


def affine_maps(magnitudes: Tensor, height: int, width: int) -> Affine:
    """Convert the magnitudes of the geometric operations, `[5, S]`, to affine maps of 5 * S images.

    A shear keeps the upper left corner, so about the center it also shifts by half of the size.
    """
    shear_x, shear_y, across, down, angle = magnitudes
    zero = torch.zeros_like(angle)
    shear_degrees = torch.rad2deg(torch.atan(magnitudes[:2]))
    return Affine(
        angle=torch.cat([zero, zero, zero, zero, -angle]),
        translate_x=torch.cat([-shear_x * (height / 2), zero, across.trunc(), zero, zero]),
        translate_y=torch.cat([zero, -shear_y * (width / 2), zero, down.trunc(), zero]),
        scale=torch.ones(magnitudes.numel(), device=magnitudes.device),
        shear_x=torch.cat([shear_degrees[0], zero, zero, zero, zero]),
        shear_y=torch.cat([zero, shear_degrees[1], zero, zero, zero]),
    )


def apply_assignment(
    images: Tensor, drawn: OpAssignment, *, interpolation: str, fill: ColorValue
) -> Tensor:
    """Apply to each image the operation that it was assigned."""
    n, _, height, width = images.shape
    share = drawn.magnitudes.shape[1]
    # Padding (less than one image per operation) uses the last image; its result is dropped.
    ordered = images.index_select(0, drawn.order.clamp_max(n - 1))
    geometric, *parts = ordered.split([len(GEOMETRIC) * share, *(share,) * len(COLOR_OPERATIONS)])
    maps = affine_maps(drawn.magnitudes[: len(GEOMETRIC)], height, width)
    results = [affine(geometric, maps, interpolation=interpolation, fill=fill)]
    magnitudes_of_colors = drawn.magnitudes[len(GEOMETRIC) :]
    for operation, part, strength in zip(
        COLOR_OPERATIONS.values(), parts, magnitudes_of_colors, strict=True
    ):
        results.append(operation(part, strength))
    return torch.cat(results).index_select(0, drawn.order.argsort()[:n])


def trivial_augment_wide(
    images: Tensor,
    generator: torch.Generator,
    *,
    num_magnitude_bins: int = 31,
    interpolation: str = "nearest",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Apply one random operation per image, at a random strength (arXiv:2103.10158)."""
    (drawn,) = assign_operations(images, generator, space=WIDE, bins=num_magnitude_bins)
    return apply_assignment(images, drawn, interpolation=interpolation, fill=fill)


def rand_augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
    interpolation: str = "nearest",
    fill: ColorValue = 0.0,
) -> Tensor:
    """Apply `num_ops` random operations per image, all at one strength (arXiv:1909.13719)."""
    for drawn in assign_operations(
        images, generator, space=NARROW, bins=num_magnitude_bins, count=num_ops, magnitude=magnitude
    ):
        images = apply_assignment(images, drawn, interpolation=interpolation, fill=fill)
    return images
