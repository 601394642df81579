"""Augmentation policies: a random operation per image from one list, at one of some strengths.

The lists and strengths are torchvision's. The operations are dealt like cards: a shuffled batch
is cut into equal shares, one for each operation, so that an operation sees only its own images,
all shapes are known without asking the device, and the five geometric ones are a single affine
pass. Each image still gets every operation with the same probability.
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
# The others, in the order of their shares: images and magnitudes [share] to images.
TONE_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
OPERATIONS = (*GEOMETRIC, *TONE_OPERATIONS)
SIGNED = 9  # so many of them, the first ones, are turned round for half of the images


class PolicySpace(NamedTuple):
    """The greatest magnitude of each kind of operation; the smallest changes nothing."""

    shear: float  # pixels a pixel
    translate: float  # of the size where `relative`, else pixels
    relative: bool
    rotate: float  # degrees
    blend: float  # added to or taken from a factor of 1
    bits: int  # taken off by Posterize


WIDE = PolicySpace(shear=0.99, translate=32, relative=False, rotate=135, blend=0.99, bits=6)
NARROW = PolicySpace(shear=0.3, translate=150 / 331, relative=True, rotate=30, blend=0.9, bits=4)


@functools.lru_cache(maxsize=16)
def magnitudes(
    space: PolicySpace, bins: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Each operation's strengths without sign, float32 `[K, bins]`, as torchvision makes them."""
    across = space.translate * (width if space.relative else 1)
    down = space.translate * (height if space.relative else 1)
    tops = (space.shear, space.shear, across, down, space.rotate, *(space.blend,) * 4)
    rows = [torch.linspace(0, top, bins) for top in tops]
    rows.append((8 - torch.arange(bins) / ((bins - 1) / space.bits)).round())
    rows.append(torch.linspace(1, 0, bins))
    rows += [torch.zeros(bins)] * (len(OPERATIONS) - len(rows))
    return torch.stack(rows).to(device)


class OpAssignment(NamedTuple):
    """One operation for each of N images, of K operations with S seats each."""

    order: Tensor  # int64 [K * S]: which image sits there; numbers >= N are nobody
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
    """`count` deals in a row, all at strength number `magnitude` or each at a random one."""
    height, width = images.shape[-2:]
    kinds = len(OPERATIONS)
    share = -(-len(images) // kinds)
    table = magnitudes(space, bins, height, width, images.device)
    u = uniform_numbers(images, generator, 3 * count, count=kinds * share).view(
        count, 3, kinds, share
    )
    needs_full_batch = []
    for order, strength, sign in u.unbind(0) if count else ():
        if magnitude is None:
            chosen = table.gather(1, integer_below(strength, bins).long())
        else:
            chosen = table[:, magnitude, None].repeat(1, share)
        chosen[:SIGNED] *= 1 - 2 * (sign[:SIGNED] <= 0.5).float()
        needs_full_batch.append(OpAssignment(order.flatten().argsort(), chosen))
    return needs_full_batch


def color_maps(drawn: Tensor, height: int, width: int) -> Affine:
    """Magnitudes `[5, S]` of the geometric operations as affine maps of 5 * S images.

    A shear keeps the upper left corner, so about the centre it also shifts by half of the size.
    """
    shear_x, shear_y, across, down, turn = drawn
    zero = torch.zeros_like(turn)
    slants = torch.rad2deg(torch.atan(drawn[:2]))
    return Affine(
        angle=torch.cat([zero, zero, zero, zero, -turn]),
        translate_x=torch.cat([-shear_x * (height / 2), zero, across.trunc(), zero, zero]),
        translate_y=torch.cat([zero, -shear_y * (width / 2), zero, down.trunc(), zero]),
        scale=torch.ones(drawn.numel(), device=drawn.device),
        shear_x=torch.cat([slants[0], zero, zero, zero, zero]),
        shear_y=torch.cat([zero, slants[1], zero, zero, zero]),
    )


def apply_assignment(
    images: Tensor, drawn: OpAssignment, *, interpolation: str, fill: ColorValue
) -> Tensor:
    """Each image under the operation that it was dealt."""
    n, _, height, width = images.shape
    share = drawn.magnitudes.shape[1]
    # Empty seats (fewer than there are operations) take the last image, for nobody.
    seated = images.index_select(0, drawn.order.clamp_max(n - 1))
    moving, *rest = seated.split([len(GEOMETRIC) * share, *(share,) * len(TONE_OPERATIONS)])
    plan = color_maps(drawn.magnitudes[: len(GEOMETRIC)], height, width)
    parts = [affine(moving, plan, interpolation=interpolation, fill=fill)]
    strengths = drawn.magnitudes[len(GEOMETRIC) :]
    for tone, part, strength in zip(TONE_OPERATIONS.values(), rest, strengths, strict=True):
        parts.append(tone(part, strength))
    return torch.cat(parts).index_select(0, drawn.order.argsort()[:n])


def trivial_augment_wide(
    images: Tensor,
    generator: torch.Generator,
    *,
    num_magnitude_bins: int = 31,
    interpolation: str = "nearest",
    fill: ColorValue = 0.0,
) -> Tensor:
    """One random operation per image, at a random strength (arXiv:2103.10158)."""
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
    """`num_ops` random operations in a row per image, all at one strength (arXiv:1909.13719)."""
    for drawn in assign_operations(
        images, generator, space=NARROW, bins=num_magnitude_bins, count=num_ops, magnitude=magnitude
    ):
        images = apply_assignment(images, drawn, interpolation=interpolation, fill=fill)
    return images
