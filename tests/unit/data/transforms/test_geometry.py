"""Augmentations against torchvision's operation on one image at a time, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from convlens.data.transforms import color, geometry


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 12, channels: int = 3, height: int = 17, width: int = 22) -> Tensor:
    """Smooth shapes plus noise, with pure black, white and grey parts (hue is undefined there)."""
    images = torch.rand(n, channels, height, width, generator=seeded(1))
    images[:, :, :4, :5] = 0.0
    images[:, :, 4:7, :5] = 1.0
    images[:, :, 7:9, :5] = 0.4
    if channels == 3:
        images[:, :2, 9:11, :5] = 0.7  # two channels share the maximum
    return images


def compare(batched: Tensor, images: Tensor, slow: Callable[[Tensor, int], Tensor]) -> None:
    """Each image of `batched` equals the slow operation on that image alone."""
    expected = torch.stack([slow(image, i) for i, image in enumerate(images)])
    torch.testing.assert_close(batched, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_flips(channels: int) -> None:
    images, chosen = pictures(6, channels), torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    for dim, slow in ((-1, reference.horizontal_flip), (-2, reference.vertical_flip)):
        expected = torch.stack([slow(x) if c else x for x, c in zip(images, chosen, strict=True)])
        assert torch.equal(geometry.flip(images, chosen, dim), expected)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("padding", [3, [2, 5], [1, 2, 3, 4], [2]])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop(mode: str, padding: Any, channels: int) -> None:
    images = pictures(12, channels)
    tops, lefts = geometry.draw_crop(images, seeded(), padding=padding)
    result = geometry.crop(images, tops, lefts, padding=padding, padding_mode=mode, fill=0.25)

    def slow(image: Tensor, i: int) -> Tensor:
        padded = reference.pad(image, padding, fill=0.25, padding_mode=mode)
        return reference.crop(padded, int(tops[i]), int(lefts[i]), *image.shape[-2:])

    compare(result, images, slow)


def test_crop_fills_each_channel() -> None:
    images = pictures(3)
    zero = torch.zeros(3, dtype=torch.int64)
    result = geometry.crop(images, zero, zero, padding=2, fill=[0.1, 0.2, 0.3])
    torch.testing.assert_close(result[:, :, 0, 0], torch.tensor([[0.1, 0.2, 0.3]] * 3))
    torch.testing.assert_close(result[:, :, 2:, 2:], images[:, :, :-2, :-2])


MAPS: list[dict[str, Any]] = [
    {"degrees": 30},
    {"degrees": 0, "translate": [0.3, 0.2]},
    {"degrees": 0, "scale": [0.5, 1.8]},
    {"degrees": 0, "shear": 25},
    {"degrees": [-90, 90], "translate": [0.2, 0.3], "scale": [0.6, 1.6], "shear": [-9, 9, 0, 20]},
]


def per_image(maps: geometry.Affine, i: int) -> dict[str, Any]:
    angle, x, y, scale, slant_x, slant_y = (float(v[i]) for v in maps)
    return {"angle": angle, "translate": [x, y], "scale": scale, "shear": [slant_x, slant_y]}


@pytest.mark.parametrize("settings", MAPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_affine(settings: dict[str, Any], channels: int) -> None:
    images = pictures(24, channels)
    maps = geometry.draw_affine(images, seeded(), **settings)

    def slow(image: Tensor, i: int) -> Tensor:
        return reference.affine(image, **per_image(maps, i), interpolation="bilinear", fill=None)

    compare(geometry.affine(images, maps), images, slow)


def test_affine_fill_blends_once() -> None:
    """With a colour outside: the picture minus that colour, moved, plus that colour."""
    images, fill = pictures(16), torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    maps = geometry.draw_affine(images, seeded(), **MAPS[-1])

    def slow(image: Tensor, i: int) -> Tensor:
        moved = reference.affine(
            image - fill, **per_image(maps, i), interpolation="bilinear", fill=None
        )
        return moved + fill

    compare(geometry.affine(images, maps, fill=[0.2, 0.5, 0.9]), images, slow)


def test_affine_nearest() -> None:
    images = pictures(24)
    maps = geometry.draw_affine(images, seeded(), **MAPS[-1])
    result = geometry.affine(images, maps, interpolation="nearest", fill=0.3)
    expected = torch.stack(
        [
            reference.affine(x, **per_image(maps, i), interpolation="nearest", fill=0.3)
            for i, x in enumerate(images)
        ]
    )
    # A pixel centre that falls on the border of two pixels may go either way.
    assert ((result - expected).abs() < 1e-5).float().mean() > 0.999


def test_affine_moves_a_known_pixel() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 7] = 1.0  # right of the centre
    zero, one = torch.zeros(1), torch.ones(1)
    turned = geometry.affine(image, geometry.Affine(zero + 90, zero, zero, one, zero, zero))
    torch.testing.assert_close(turned[0, 0, 7, 4], torch.tensor(1.0))  # clockwise: now below
    shifted = geometry.affine(image, geometry.Affine(zero, zero - 3, zero + 2, one, zero, zero))
    torch.testing.assert_close(shifted[0, 0, 6, 4], torch.tensor(1.0))


def test_rotation_turns_counter_clockwise_as_torchvision_does() -> None:
    images = pictures(2, 3, 16, 16)
    for degrees in (90.0, 33.0):
        result = geometry.random_rotation(images, seeded(), degrees=[degrees, degrees])
        compare(
            result,
            images,
            lambda x, _: reference.rotate(x, degrees, "bilinear", fill=None),  # noqa: B023
        )


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_random_rotation_turns_each_image_by_its_own_angle(mode: str) -> None:
    images = pictures(24)
    turned = geometry.random_rotation(images, seeded(3), degrees=[-70, 50], interpolation=mode)
    angles = geometry.draw_affine(images, seeded(3), degrees=[-70, 50]).angle
    slow = [
        reference.rotate(x, float(angle), mode, fill=None)
        for x, angle in zip(images, angles, strict=True)
    ]
    assert ((turned - torch.stack(slow)).abs() < 2e-5).float().mean() > 0.999
    assert (angles.max() - angles.min()) > 60


@pytest.mark.parametrize("size", [1, 2, 5, 8, 17])
def test_cutout(size: int) -> None:
    """DeVries & Taylor's mask: a square around any pixel, cut off at the border."""
    images = pictures(40)
    boxes = color.draw_cutout(images, seeded(2), size=size, p=0.7)
    result = color.cutout(images, seeded(2), size=size, p=0.7, value=[0.1, 0.5, 0.9])
    fill, whole = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1), 0
    for image, mine, top, left, height in zip(images, result, *boxes[:3], strict=True):
        expected = image.clone()
        if height:
            y, x = int(top) + size // 2, int(left) + size // 2  # the pixel in the middle
            assert 0 <= y < 17
            assert 0 <= x < 22
            top_left = max(0, y - size // 2), max(0, x - size // 2)
            below, right = y - size // 2 + size, x - size // 2 + size
            expected[:, top_left[0] : below, top_left[1] : right] = fill
            whole += int((expected != image).any(0).sum() == size * size)
        assert torch.equal(mine, expected)
    touched = int((boxes.height > 0).sum())
    assert 20 <= touched <= 36
    assert whole == touched if size == 1 else whole < touched


def test_cutout_centres_are_uniform() -> None:
    images = torch.zeros(12_000, 1, 5, 6)
    boxes = color.draw_cutout(images, seeded(), size=3, p=1)
    place = ((boxes.top + 1) * 6 + boxes.left + 1).long()
    counts = torch.bincount(place, minlength=30)
    assert len(counts) == 30
    assert (counts - 400).abs().max() < 90


@pytest.mark.parametrize("channels", [1, 3])
def test_erase(channels: int) -> None:
    images = pictures(64, channels)
    boxes = color.draw_erasing(images, seeded(), p=0.7, scale=(0.02, 0.4), ratio=(0.3, 3.3))
    assert 0 < int((boxes.height == 0).sum()) < 40

    def slow(image: Tensor, i: int) -> Tensor:
        top, left, height, width = (int(v[i]) for v in boxes)
        return reference.erase(image, top, left, height, width, torch.tensor(0.5))

    compare(color.erase(images, boxes, torch.tensor(0.5)), images, slow)


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crop(channels: int) -> None:
    images = pictures(32, channels)
    boxes = geometry.draw_resized_crop(images, seeded(), scale=(0.05, 1.0), ratio=(0.5, 2.0))

    def slow(image: Tensor, i: int) -> Tensor:
        box = [int(v[i]) for v in boxes]
        return reference.resized_crop(image, *box, size=list(image.shape[-2:]), antialias=True)

    compare(geometry.resized_crop(images, boxes), images, slow)


def test_hue() -> None:
    images = pictures(21)
    turns = torch.linspace(-0.5, 0.5, 21)
    compare(
        color.shift_hue(images, turns),
        images,
        lambda x, i: reference.adjust_hue(x, float(turns[i])),
    )


def test_hue_of_known_colours() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(3, 1, 1, 1)
    turned = color.shift_hue(red, torch.tensor([0.0, 1 / 3, -1 / 3]))[:, :, 0, 0]
    torch.testing.assert_close(turned, torch.eye(3), atol=1e-6, rtol=0)


JITTERS: list[dict[str, Any]] = [
    {"brightness": 0.5},
    {"contrast": [0.2, 2.0]},
    {"saturation": 0.9},
    {"hue": 0.5},
    {"brightness": 0.4, "contrast": 0.4},
    {"brightness": 0.6, "contrast": 0.6, "saturation": 0.6, "hue": [-0.1, 0.4]},
]
CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": reference.adjust_brightness,
    "contrast": reference.adjust_contrast,
    "saturation": reference.adjust_saturation,
    "hue": reference.adjust_hue,
}


def order_of(drawn: color.Jitter, i: int) -> list[str]:
    """The changes image `i` meets, first to last."""
    order = [drawn.kinds[int(k)] for k in drawn.order[:, i]]
    if len(drawn.hue):
        order.insert(int((drawn.hue_at == i).nonzero()[0, 0]), "hue")
    return order


@pytest.mark.parametrize("settings", JITTERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 13])
def test_jitter(settings: dict[str, Any], channels: int, n: int) -> None:
    images = pictures(n, channels)
    drawn = color.draw_jitter(images, seeded(2), **settings)

    def slow(image: Tensor, i: int) -> Tensor:
        for change in order_of(drawn, i):
            strength = drawn.hue if change == "hue" else drawn.factors[drawn.kinds.index(change)]
            image = CHANGES[change](image, float(strength[i]))
        return image

    compare(color.apply_jitter(images, drawn), images, slow)


def test_jitter_leaves_grey_images_grey() -> None:
    grey = pictures(8, 1)
    strong = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.9, "hue": 0.5}
    as_rgb = color.color_jitter(grey.repeat(1, 3, 1, 1), seeded(), **strong)
    assert float((as_rgb.amax(1) - as_rgb.amin(1)).max()) < 1e-5
    only_colour = color.color_jitter(grey, seeded(), saturation=0.9, hue=0.5)
    assert torch.equal(only_colour, grey)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height", [2, 3, 17])
def test_sharpness(channels: int, height: int) -> None:
    images, factors = pictures(6, channels, 17)[:, :, :height], torch.arange(6.0) / 2
    compare(
        color.adjust_sharpness(images, factors),
        images,
        lambda x, i: reference.adjust_sharpness(x, float(factors[i])),
    )


def test_grayscale() -> None:
    images = pictures(8)
    result = color.random_grayscale(images, seeded(), p=1)
    compare(result, images, lambda x, _: reference.rgb_to_grayscale(x, 3))
    some = color.random_grayscale(images, seeded(), p=0.5)
    changed = [not torch.equal(mine, x) for mine, x in zip(some, images, strict=True)]
    assert 0 < sum(changed) < 8
    compare(some, images, lambda x, i: reference.rgb_to_grayscale(x, 3) if changed[i] else x)


def test_random_sharpness_changes_the_chosen_ones_only() -> None:
    images = pictures(16)
    some = color.random_adjust_sharpness(images, seeded(), sharpness_factor=2.5, p=0.5)
    changed = [not torch.equal(mine, x) for mine, x in zip(some, images, strict=True)]
    assert 0 < sum(changed) < 16
    compare(some, images, lambda x, i: reference.adjust_sharpness(x, 2.5) if changed[i] else x)


def test_jitter_orders_are_equally_likely() -> None:
    images = torch.zeros(4800, 3, 1, 1)
    drawn = color.draw_jitter(
        images, seeded(), brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1
    )
    place = torch.empty(4800, dtype=torch.int64)
    place[drawn.hue_at.flatten()] = torch.arange(4).repeat_interleave(1200)
    number = place * 27 + drawn.order[0] * 9 + drawn.order[1] * 3 + drawn.order[2]
    counts = number.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert (counts - 200).abs().max() < 60


def test_jitter_of_one_image_meets_every_order() -> None:
    images = torch.zeros(1, 3, 1, 1)
    g = seeded()
    seen = {
        tuple(order_of(color.draw_jitter(images, g, brightness=1, contrast=1, hue=0.1), 0))
        for _ in range(200)
    }
    assert len(seen) == 6


def test_brightness_is_never_negative() -> None:
    drawn = color.draw_jitter(torch.zeros(500, 1, 2, 2), seeded(), brightness=3.0)
    assert drawn.factors.min() >= 0
    assert drawn.factors.max() > 3.9
