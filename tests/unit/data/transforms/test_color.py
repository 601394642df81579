"""Color, sharpness and erasing against torchvision's operation on one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from convlens.data.transforms import color
from helpers.augmentations import compare, pictures, seeded

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


def test_hue_equals_torchvisions() -> None:
    images = pictures(21)
    turns = torch.linspace(-0.5, 0.5, 21)
    compare(
        color.shift_hue(images, turns),
        images,
        lambda x, i: reference.adjust_hue(x, float(turns[i])),
    )


def test_hue_of_known_colors() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(3, 1, 1, 1)
    turned = color.shift_hue(red, torch.tensor([0.0, 1 / 3, -1 / 3]))[:, :, 0, 0]
    torch.testing.assert_close(turned, torch.eye(3), atol=1e-6, rtol=0)


def test_grayscale_equals_torchvisions() -> None:
    images = pictures(8)
    result = color.random_grayscale(images, seeded(), p=1)
    compare(result, images, lambda x, _: reference.rgb_to_grayscale(x, 3))
    result_of_half = color.random_grayscale(images, seeded(), p=0.5)
    changed = [
        not torch.equal(transformed, x)
        for transformed, x in zip(result_of_half, images, strict=True)
    ]
    assert 0 < sum(changed) < 8
    compare(
        result_of_half, images, lambda x, i: reference.rgb_to_grayscale(x, 3) if changed[i] else x
    )


def order_of(drawn: color.Jitter, i: int) -> list[str]:
    """Return the changes of image `i` in their order."""
    order = [drawn.kinds[int(k)] for k in drawn.order[:, i]]
    if len(drawn.hue):
        order.insert(int((drawn.hue_at == i).nonzero()[0, 0]), "hue")
    return order


@pytest.mark.parametrize("settings", JITTERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 13])
def test_jitter_equals_torchvisions(settings: dict[str, Any], channels: int, n: int) -> None:
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
    only_color = color.color_jitter(grey, seeded(), saturation=0.9, hue=0.5)
    assert torch.equal(only_color, grey)


def test_jitter_orders_are_equally_likely() -> None:
    images = torch.zeros(4800, 3, 1, 1)
    drawn = color.draw_jitter(
        images, seeded(), brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1
    )
    hue_position = torch.empty(4800, dtype=torch.int64)
    hue_position[drawn.hue_at.flatten()] = torch.arange(4).repeat_interleave(1200)
    number = hue_position * 27 + drawn.order[0] * 9 + drawn.order[1] * 3 + drawn.order[2]
    counts = number.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert (counts - 200).abs().max() < 60


def test_jitter_of_single_images_draws_every_order() -> None:
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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height", [2, 3, 17])
def test_sharpness_equals_torchvisions(channels: int, height: int) -> None:
    images, factors = pictures(6, channels, 17)[:, :, :height], torch.arange(6.0) / 2
    compare(
        color.adjust_sharpness(images, factors),
        images,
        lambda x, i: reference.adjust_sharpness(x, float(factors[i])),
    )


def test_random_sharpness_changes_chosen_images_only() -> None:
    images = pictures(16)
    result_of_half = color.random_adjust_sharpness(images, seeded(), sharpness_factor=2.5, p=0.5)
    changed = [
        not torch.equal(transformed, x)
        for transformed, x in zip(result_of_half, images, strict=True)
    ]
    assert 0 < sum(changed) < 16
    compare(
        result_of_half, images, lambda x, i: reference.adjust_sharpness(x, 2.5) if changed[i] else x
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_erase_equals_torchvisions(channels: int) -> None:
    images = pictures(64, channels)
    boxes = color.draw_erasing(images, seeded(), p=0.7, scale=(0.02, 0.4), ratio=(0.3, 3.3))
    assert 0 < int((boxes.height == 0).sum()) < 40

    def slow(image: Tensor, i: int) -> Tensor:
        top, left, height, width = (int(v[i]) for v in boxes)
        return reference.erase(image, top, left, height, width, torch.tensor(0.5))

    compare(color.erase(images, boxes, torch.tensor(0.5)), images, slow)


def test_erased_areas_and_ratios() -> None:
    images = torch.zeros(3000, 1, 100, 100)
    boxes = color.draw_erasing(images, seeded(), p=1, scale=(0.1, 0.2), ratio=(0.5, 2.0))
    area, ratio = boxes.height * boxes.width / 10_000, boxes.height / boxes.width
    assert area.min() > 0.09
    assert area.max() < 0.21
    assert abs(area.mean() - 0.15) < 0.003
    assert ratio.min() > 0.48
    assert ratio.max() < 2.1
    assert abs((ratio > 1).float().mean() - 0.5) < 0.05  # uniform in the logarithm
    assert (boxes.top + boxes.height).max() == 100
    assert boxes.top.min() == 0


def test_erasing_with_noise_fills_the_range() -> None:
    images = torch.full((200, 1, 16, 16), 2.0)  # a value that no noise can have
    noisy = color.random_erasing(images, seeded(), p=1, value="random")
    drawn = noisy[noisy < 2]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02


@pytest.mark.parametrize("size", [1, 2, 5, 8, 17])
def test_cutout_equals_the_mask_of_the_paper(size: int) -> None:
    """DeVries & Taylor: a square around any pixel, cut off at the border."""
    images = pictures(40)
    boxes = color.draw_cutout(images, seeded(2), size=size, p=0.7)
    result = color.cutout(images, seeded(2), size=size, p=0.7, value=[0.1, 0.5, 0.9])
    fill, uncut = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1), 0
    for image, transformed, top, left, height in zip(images, result, *boxes[:3], strict=True):
        expected = image.clone()
        if height:
            y, x = int(top) + size // 2, int(left) + size // 2  # the pixel in the middle
            assert 0 <= y < 17
            assert 0 <= x < 22
            top_left = max(0, y - size // 2), max(0, x - size // 2)
            below, right = y - size // 2 + size, x - size // 2 + size
            expected[:, top_left[0] : below, top_left[1] : right] = fill
            uncut += int((expected != image).any(0).sum() == size * size)
        assert torch.equal(transformed, expected)
    touched = int((boxes.height > 0).sum())
    assert 20 <= touched <= 36
    assert uncut == touched if size == 1 else uncut < touched


def test_cutout_centers_are_uniform() -> None:
    images = torch.zeros(12_000, 1, 5, 6)
    boxes = color.draw_cutout(images, seeded(), size=3, p=1)
    cell = ((boxes.top + 1) * 6 + boxes.left + 1).long()
    counts = torch.bincount(cell, minlength=30)
    assert len(counts) == 30
    assert (counts - 400).abs().max() < 90


def test_posterize_keeps_upper_bits() -> None:
    image = torch.tensor([0, 1, 100, 200, 255]).view(1, 1, 1, 5) / 255
    kept = {8: [0, 1, 100, 200, 255], 4: [0, 0, 96, 192, 240], 1: [0, 0, 0, 128, 128]}
    for bits, expected in kept.items():
        found = color.posterize(image, torch.tensor([float(bits)])) * 255
        torch.testing.assert_close(found.flatten(), torch.tensor(expected).float())


def test_equalize_of_two_values_and_of_one() -> None:
    image = torch.full((1, 2, 32, 32), 10 / 255)
    image[:, 0, :, 16:] = 20 / 255
    found = (color.equalize(image) * 255).round()
    # Half of 1024 pixels are below 20: (512 + 1) // 2 = 256, clamped to 255; none is below 10.
    assert found[0, 0].unique().tolist() == [0, 255]
    assert (found[0, 1] == 10).all()


def test_equalize_equals_torchvisions() -> None:
    images = torch.rand(9, 3, 32, 32, generator=seeded()) ** 3
    torch.testing.assert_close(color.equalize(images), reference.equalize(images))


def test_autocontrast_stretches_each_channel() -> None:
    image = torch.tensor([[0.25, 0.5, 0.75], [0.3, 0.3, 0.3]]).view(1, 2, 1, 3)
    found = color.autocontrast(image)[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.3, 0.3]]))


def test_solarize_inverts_from_the_threshold_on() -> None:
    image = torch.tensor([0.2, 0.6, 0.8]).view(1, 1, 1, 3).repeat(2, 1, 1, 1)
    found = color.solarize(image, torch.tensor([0.6, 1.0]))[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.4, 0.2], [0.2, 0.6, 0.8]]))
