"""Geometric augmentations against torchvision's operation on one image at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from convlens.data.transforms import geometry
from convlens.data.transforms.random import SampleInfo, random_coins
from convlens.errors import UsageError
from helpers.augmentations import compare, pictures, seeded


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_equal_torchvisions(channels: int) -> None:
    images, chosen = pictures(6, channels), torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    for dim, slow in ((-1, reference.horizontal_flip), (-2, reference.vertical_flip)):
        expected = torch.stack([slow(x) if c else x for x, c in zip(images, chosen, strict=True)])
        assert torch.equal(geometry.flip(images, chosen, dim), expected)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("padding", [3, [2, 5], [1, 2, 3, 4], [2]])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_equals_torchvisions(mode: str, padding: Any, channels: int) -> None:
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
    angle, x, y, scale, shear_x, shear_y = (float(v[i]) for v in maps)
    return {"angle": angle, "translate": [x, y], "scale": scale, "shear": [shear_x, shear_y]}


@pytest.mark.parametrize("settings", MAPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_affine_equals_torchvisions(settings: dict[str, Any], channels: int) -> None:
    images = pictures(24, channels)
    maps = geometry.draw_affine(images, seeded(), **settings)

    def slow(image: Tensor, i: int) -> Tensor:
        return reference.affine(image, **per_image(maps, i), interpolation="bilinear", fill=None)

    compare(geometry.affine(images, maps), images, slow)


def test_affine_fill_blends_once() -> None:
    """With a color outside: the image minus this color, transformed, plus this color."""
    images, fill = pictures(16), torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    maps = geometry.draw_affine(images, seeded(), **MAPS[-1])

    def slow(image: Tensor, i: int) -> Tensor:
        moved = reference.affine(
            image - fill, **per_image(maps, i), interpolation="bilinear", fill=None
        )
        return moved + fill

    compare(geometry.affine(images, maps, fill=[0.2, 0.5, 0.9]), images, slow)


def test_affine_with_nearest_interpolation() -> None:
    images = pictures(24)
    maps = geometry.draw_affine(images, seeded(), **MAPS[-1])
    result = geometry.affine(images, maps, interpolation="nearest", fill=0.3)
    expected = torch.stack(
        [
            reference.affine(x, **per_image(maps, i), interpolation="nearest", fill=0.3)
            for i, x in enumerate(images)
        ]
    )
    # A pixel center on the border of two pixels may be rounded either way.
    assert ((result - expected).abs() < 1e-5).float().mean() > 0.999


def test_affine_moves_a_known_pixel() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 7] = 1.0  # right of the center
    zero, one = torch.zeros(1), torch.ones(1)
    turned = geometry.affine(image, geometry.Affine(zero + 90, zero, zero, one, zero, zero))
    torch.testing.assert_close(turned[0, 0, 7, 4], torch.tensor(1.0))  # clockwise: now below
    shifted = geometry.affine(image, geometry.Affine(zero, zero - 3, zero + 2, one, zero, zero))
    torch.testing.assert_close(shifted[0, 0, 6, 4], torch.tensor(1.0))


def test_rotation_is_counterclockwise_as_in_torchvision() -> None:
    images = pictures(2, 3, 16, 16)
    for degrees in (90.0, 33.0):
        result = geometry.random_rotation(images, seeded(), degrees=[degrees, degrees])
        compare(
            result,
            images,
            lambda x, _: reference.rotate(x, degrees, "bilinear", fill=None),  # noqa: B023
        )


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_random_rotation_draws_an_angle_for_each_image(mode: str) -> None:
    images = pictures(24)
    turned = geometry.random_rotation(images, seeded(3), degrees=[-70, 50], interpolation=mode)
    angles = geometry.draw_affine(images, seeded(3), degrees=[-70, 50]).angle
    slow = [
        reference.rotate(x, float(angle), mode, fill=None)
        for x, angle in zip(images, angles, strict=True)
    ]
    assert ((turned - torch.stack(slow)).abs() < 2e-5).float().mean() > 0.999
    assert (angles.max() - angles.min()) > 60


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crop_equals_torchvisions(channels: int) -> None:
    images = pictures(32, channels)
    boxes = geometry.draw_resized_crop(images, seeded(), scale=(0.05, 1.0), ratio=(0.5, 2.0))

    def slow(image: Tensor, i: int) -> Tensor:
        box = [int(v[i]) for v in boxes]
        return reference.resized_crop(image, *box, size=list(image.shape[-2:]), antialias=True)

    compare(geometry.resized_crop(images, boxes), images, slow)


def test_affine_ranges() -> None:
    images = torch.zeros(4000, 1, 10, 20)
    maps = geometry.draw_affine(
        images, seeded(), degrees=[-10, 30], translate=[0.25, 0.3], scale=[0.8, 1.2], shear=15
    )
    for drawn, low, high in (
        (maps.angle, -10, 30),
        (maps.scale, 0.8, 1.2),
        (maps.shear_x, -15, 15),
    ):
        assert low <= drawn.min() < low + 0.01 * (high - low)
        assert high >= drawn.max() > high - 0.01 * (high - low)
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert set(maps.translate_x.tolist()) == set(range(-5, 6))  # a quarter of the width of 20
    assert set(maps.translate_y.tolist()) == set(range(-3, 4))
    assert not maps.shear_y.any()
    drawn = torch.corrcoef(torch.stack(maps[:5]))
    assert (drawn - torch.eye(5)).abs().max() < 0.07, "the numbers are correlated"


def test_crop_corners_are_uniform() -> None:
    images = torch.zeros(9000, 1, 8, 8)
    for corner, count in zip(
        geometry.draw_crop(images, seeded(), padding=[1, 2, 3, 2]), (5, 5), strict=True
    ):
        seen = torch.bincount(corner, minlength=count)
        assert len(seen) == count
        assert (seen / 9000 - 1 / count).abs().max() < 0.02


def test_resized_crop_ranges_and_fallback() -> None:
    images = torch.zeros(2000, 1, 100, 100)
    boxes = geometry.draw_resized_crop(images, seeded(), scale=(0.3, 0.6), ratio=(0.75, 4 / 3))
    area = boxes.height * boxes.width / 10_000
    assert area.min() > 0.29
    assert area.max() < 0.61
    assert abs(area.mean() - 0.45) < 0.01
    never = geometry.draw_resized_crop(images, seeded(), scale=(1, 1), ratio=(2, 2))
    assert [int(v[0]) for v in never] == [25, 0, 50, 100]  # the largest central one of ratio 2


def test_three_color_values_for_grey_images_are_refused() -> None:
    with pytest.raises(UsageError, match="3 values for images of 1 channel"):
        geometry.random_crop(pictures(2, 1), seeded(), padding=1, fill=[0.1, 0.2, 0.3])


def test_alternating_flip_depends_on_number_seed_and_epoch_only() -> None:
    generator = torch.Generator().manual_seed(0)
    images, numbers = torch.rand(200, 3, 4, 5, generator=generator), torch.arange(200)
    sample_info = SampleInfo(numbers, epoch=1, seed=4)
    first = random_coins(sample_info)
    for epoch, chosen in ((1, first), (2, ~first), (3, first), (10, ~first)):
        result = geometry.alternating_flip(images, generator, sample_info._replace(epoch=epoch))
        slow = [
            reference.horizontal_flip(x) if c else x for x, c in zip(images, chosen, strict=True)
        ]
        assert torch.equal(result, torch.stack(slow))
    order = torch.randperm(200, generator=generator)  # the coin does not depend on the batch
    assert torch.equal(random_coins(sample_info._replace(numbers=order)), first[order])


def test_a_resized_crop_of_half_the_size_averages_pixels() -> None:
    """The whole image at half its size: each pixel lies between four of the image."""
    images = torch.rand(3, 2, 8, 8)
    whole = geometry.CropBoxes(*(torch.full((3,), float(v)) for v in (0, 0, 8, 8)))
    halved = geometry.resized_crop(images, whole, 4)
    torch.testing.assert_close(halved, torch.nn.functional.avg_pool2d(images, 2))
    assert torch.equal(
        geometry.resized_crop(images, whole, 8), geometry.resized_crop(images, whole)
    )
    drawn = geometry.random_resized_crop(images, torch.Generator().manual_seed(0), size=5)
    assert drawn.shape == (3, 2, 5, 5)
