"""Augmentations against torchvision's per-image operations, their randomness, and bad recipes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from convlens.data import appearance, augment, geometry
from convlens.data.augment import AUGMENTS, build
from convlens.data.draws import Boxes
from convlens.errors import UsageError

# A strong setting of every operation; each name of the table must be here.
STRONG: dict[str, dict[str, Any]] = {
    "RandomHorizontalFlip": {"p": 0.5},
    "RandomVerticalFlip": {"p": 0.5},
    "RandomCrop": {"padding": 4, "padding_mode": "reflect"},
    "RandomResizedCrop": {"scale": [0.2, 1.0]},
    "RandomAffine": {"degrees": 40, "translate": [0.2, 0.1], "scale": [0.7, 1.3], "shear": 20},
    "RandomRotation": {"degrees": 45},
    "RandomErasing": {"p": 0.8, "value": 0.5},
    "ColorJitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2},
    "RandomAdjustSharpness": {"sharpness_factor": 3.0},
    "RandomGrayscale": {"p": 0.5},
}
# Settings under which an operation must leave every image as it is.
IDENTITY: dict[str, dict[str, Any]] = {
    "RandomHorizontalFlip": {"p": 0},
    "RandomVerticalFlip": {"p": 0.0},
    "RandomCrop": {"padding": 0},
    "RandomResizedCrop": {"scale": [1, 1], "ratio": [1, 1]},
    "RandomAffine": {"degrees": 0},
    "RandomRotation": {"degrees": [0, 0]},
    "RandomErasing": {"p": 0},
    "ColorJitter": {},
    "RandomAdjustSharpness": {"sharpness_factor": 5, "p": 0},
    "RandomGrayscale": {"p": 0},
}
names = pytest.mark.parametrize("name", list(AUGMENTS))


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


# Every operation of the table


@names
@pytest.mark.parametrize(("n", "channels", "size"), [(1, 1, 8), (1, 3, 8), (7, 1, 28), (7, 3, 32)])
def test_shape_type_and_range_stay(name: str, n: int, channels: int, size: int) -> None:
    images = pictures(n, channels, size, size)
    before = images.clone()
    result = AUGMENTS[name](images, seeded(), **STRONG[name])
    assert result.shape == images.shape and result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1
    assert torch.equal(images, before), "the input was changed"


@names
def test_same_generator_state_same_result(name: str) -> None:
    images = pictures(32, 3, 16, 16)
    first = AUGMENTS[name](images, seeded(3), **STRONG[name])
    assert torch.equal(first, AUGMENTS[name](images, seeded(3), **STRONG[name]))
    assert not torch.equal(first, AUGMENTS[name](images, seeded(4), **STRONG[name]))


@names
def test_identity_settings_change_nothing(name: str) -> None:
    images = pictures(9, 3, 16, 16)
    result = AUGMENTS[name](images, seeded(), **IDENTITY[name])
    torch.testing.assert_close(result, images, atol=1e-6, rtol=0)


@names
def test_images_get_numbers_of_their_own(name: str) -> None:
    images = pictures(1, 3, 16, 16).expand(40, -1, -1, -1)
    result = AUGMENTS[name](images, seeded(), **STRONG[name])
    assert len(result.flatten(1).unique(dim=0)) > 1


@names
def test_rules_cover_exactly_the_arguments(name: str) -> None:
    entry = AUGMENTS[name]
    entry.apply.__kwdefaults__  # noqa: B018  (keyword-only arguments exist or this is None)
    code = entry.apply.__code__
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    assert set(keywords) == set(entry.rules)
    for argument, default in (entry.apply.__kwdefaults__ or {}).items():
        assert entry.rules[argument](default, augment.Context()) == "", argument


@names
def test_names_and_arguments_are_torchvisions(name: str) -> None:
    import inspect

    theirs = inspect.signature(getattr(v2, name)).parameters
    assert set(AUGMENTS[name].rules) <= set(theirs)


# Against the slow reference


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
    expected = torch.stack([
        reference.affine(x, **per_image(maps, i), interpolation="nearest", fill=0.3)
        for i, x in enumerate(images)
    ])  # fmt: skip
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


@pytest.mark.parametrize("channels", [1, 3])
def test_erase(channels: int) -> None:
    images = pictures(64, channels)
    boxes = appearance.draw_erasing(images, seeded(), p=0.7, scale=(0.02, 0.4), ratio=(0.3, 3.3))
    assert 0 < int((boxes.height == 0).sum()) < 40

    def slow(image: Tensor, i: int) -> Tensor:
        top, left, height, width = (int(v[i]) for v in boxes)
        return reference.erase(image, top, left, height, width, torch.tensor(0.5))

    compare(appearance.erase(images, boxes, torch.tensor(0.5)), images, slow)


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
        appearance.shift_hue(images, turns),
        images,
        lambda x, i: reference.adjust_hue(x, float(turns[i])),
    )


def test_hue_of_known_colours() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).repeat(3, 1, 1, 1)
    turned = appearance.shift_hue(red, torch.tensor([0.0, 1 / 3, -1 / 3]))[:, :, 0, 0]
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


def order_of(drawn: appearance.Jitter, i: int) -> list[str]:
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
    drawn = appearance.draw_jitter(images, seeded(2), **settings)

    def slow(image: Tensor, i: int) -> Tensor:
        for change in order_of(drawn, i):
            strength = drawn.hue if change == "hue" else drawn.factors[drawn.kinds.index(change)]
            image = CHANGES[change](image, float(strength[i]))
        return image

    compare(appearance.jitter(images, drawn), images, slow)


def test_jitter_leaves_grey_images_grey() -> None:
    grey = pictures(8, 1)
    strong = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.9, "hue": 0.5}
    as_rgb = appearance.color_jitter(grey.repeat(1, 3, 1, 1), seeded(), **strong)
    assert float((as_rgb.amax(1) - as_rgb.amin(1)).max()) < 1e-5
    only_colour = appearance.color_jitter(grey, seeded(), saturation=0.9, hue=0.5)
    assert torch.equal(only_colour, grey)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height", [2, 3, 17])
def test_sharpness(channels: int, height: int) -> None:
    images, factors = pictures(6, channels, 17)[:, :, :height], torch.arange(6.0) / 2
    compare(
        appearance.sharpen(images, factors),
        images,
        lambda x, i: reference.adjust_sharpness(x, float(factors[i])),
    )


def test_grayscale() -> None:
    images = pictures(8)
    result = appearance.random_grayscale(images, seeded(), p=1)
    compare(result, images, lambda x, _: reference.rgb_to_grayscale(x, 3))


# What is drawn


def test_probabilities() -> None:
    """Share of images touched: never at 0, always at 1, about 30% at 0.3 (4 standard errors)."""
    images = pictures(2000, 3, 6, 6)
    for name, extra in (
        ("RandomHorizontalFlip", {}),
        ("RandomVerticalFlip", {}),
        ("RandomGrayscale", {}),
        ("RandomAdjustSharpness", {"sharpness_factor": 0.0}),
        ("RandomErasing", {"scale": [0.2, 0.3], "ratio": [1, 1], "value": 0.123}),
    ):
        for p in (0, 0.3, 1):
            result = AUGMENTS[name](images, seeded(), p=p, **extra)
            touched = (result != images).flatten(1).any(1).float().mean().item()
            assert abs(touched - p) <= 4 * math.sqrt(p * (1 - p) / 2000), (name, p, touched)


def test_affine_ranges() -> None:
    images = torch.zeros(4000, 1, 10, 20)
    maps = geometry.draw_affine(
        images, seeded(), degrees=[-10, 30], translate=[0.25, 0.3], scale=[0.8, 1.2], shear=15
    )
    for drawn, low, high in (
        (maps.angle, -10, 30), (maps.scale, 0.8, 1.2), (maps.shear_x, -15, 15),
    ):  # fmt: skip
        assert low <= drawn.min() < low + 0.01 * (high - low)
        assert high >= drawn.max() > high - 0.01 * (high - low)
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert set(maps.translate_x.tolist()) == set(range(-5, 6))  # a quarter of the width of 20
    assert set(maps.translate_y.tolist()) == set(range(-3, 4))
    assert not maps.shear_y.any()
    drawn = torch.corrcoef(torch.stack(maps[:5]))
    assert (drawn - torch.eye(5)).abs().max() < 0.07, "the numbers hang together"


def test_crop_corners_are_uniform() -> None:
    images = torch.zeros(9000, 1, 8, 8)
    for corner, count in zip(
        geometry.draw_crop(images, seeded(), padding=[1, 2, 3, 2]), (5, 5), strict=True
    ):
        seen = torch.bincount(corner, minlength=count)
        assert len(seen) == count
        assert (seen / 9000 - 1 / count).abs().max() < 0.02


def test_erased_areas_and_ratios() -> None:
    images = torch.zeros(3000, 1, 100, 100)
    boxes = appearance.draw_erasing(images, seeded(), p=1, scale=(0.1, 0.2), ratio=(0.5, 2.0))
    area, ratio = boxes.height * boxes.width / 10_000, boxes.height / boxes.width
    assert area.min() > 0.09 and area.max() < 0.21 and abs(area.mean() - 0.15) < 0.003
    assert ratio.min() > 0.48 and ratio.max() < 2.1
    assert abs((ratio > 1).float().mean() - 0.5) < 0.05  # uniform in the logarithm
    assert (boxes.top + boxes.height).max() == 100 and boxes.top.min() == 0


def test_erasing_that_never_fits_is_left_out() -> None:
    images = pictures(5)
    assert torch.equal(
        AUGMENTS["RandomErasing"](images, seeded(), p=1, scale=[1, 1], value=0.5), images
    )


def test_erasing_with_noise_fills_the_range() -> None:
    images = torch.full((200, 1, 16, 16), 2.0)  # a value that no noise can have
    noisy = appearance.random_erasing(images, seeded(), p=1, value="random")
    drawn = noisy[noisy < 2]
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.02


def test_resized_crop_ranges_and_fallback() -> None:
    images = torch.zeros(2000, 1, 100, 100)
    boxes = geometry.draw_resized_crop(images, seeded(), scale=(0.3, 0.6), ratio=(0.75, 4 / 3))
    area = boxes.height * boxes.width / 10_000
    assert area.min() > 0.29 and area.max() < 0.61 and abs(area.mean() - 0.45) < 0.01
    never = geometry.draw_resized_crop(images, seeded(), scale=(1, 1), ratio=(2, 2))
    assert [int(v[0]) for v in never] == [25, 0, 50, 100]  # the largest central one of ratio 2


def test_jitter_orders_are_equally_likely() -> None:
    images = torch.zeros(4800, 3, 1, 1)
    drawn = appearance.draw_jitter(
        images, seeded(), brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1
    )
    place = torch.empty(4800, dtype=torch.int64)
    place[drawn.hue_at.flatten()] = torch.arange(4).repeat_interleave(1200)
    number = place * 27 + drawn.order[0] * 9 + drawn.order[1] * 3 + drawn.order[2]
    counts = number.unique(return_counts=True)[1]
    assert len(counts) == 24 and (counts - 200).abs().max() < 60


def test_jitter_of_one_image_meets_every_order() -> None:
    images = torch.zeros(1, 3, 1, 1)
    g = seeded()
    seen = {
        tuple(order_of(appearance.draw_jitter(images, g, brightness=1, contrast=1, hue=0.1), 0))
        for _ in range(200)
    }
    assert len(seen) == 6


def test_brightness_is_never_negative() -> None:
    drawn = appearance.draw_jitter(torch.zeros(500, 1, 2, 2), seeded(), brightness=3.0)
    assert drawn.factors.min() >= 0 and drawn.factors.max() > 3.9


# Pipelines


def test_build_applies_in_order() -> None:
    images = pictures(4, 3, 16, 16)
    ops: list[tuple[str, dict[str, Any]]] = [
        ("RandomAffine", STRONG["RandomAffine"]), ("RandomHorizontalFlip", {}),
    ]  # fmt: skip
    result = build(ops, image_size=16, channels=3)(images, seeded(5))
    g = seeded(5)
    expected = AUGMENTS["RandomAffine"](images, g, **STRONG["RandomAffine"])
    assert torch.equal(result, AUGMENTS["RandomHorizontalFlip"](expected, g))


def test_an_empty_pipeline_is_the_identity() -> None:
    images = pictures(2)
    assert torch.equal(build([])(images, seeded()), images)


def test_every_strong_and_identity_setting_builds() -> None:
    build(list(STRONG.items()), image_size=32, channels=3)
    build(list(IDENTITY.items()), image_size=32, channels=1)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("RandomHorizontalFlip", {"p": 1.2}, "p=1.2 should be a number from 0 to 1"),
        ("RandomHorizontalFlip", {"p": True}, "p=True should be"),
        ("RandomHorizontalFlip", {"p": "0.5"}, "p='0.5' should be"),
        ("RandomHorizontalFlip", {"p": math.nan}, "p=nan should be"),
        ("RandomHorizontalFlip", {"probability": 1}, "unknown argument 'probability'"),
        ("RandomCrop", {}, "padding is missing"),
        ("RandomCrop", {"padding": -1}, "padding=-1 should be a whole number"),
        ("RandomCrop", {"padding": 1.5}, "padding=1.5 should be a whole number"),
        ("RandomCrop", {"padding": [1, 2, 3]}, "should be a whole number"),
        ("RandomCrop", {"padding": 28}, "less than the image size 28"),
        ("RandomCrop", {"padding": 2, "padding_mode": "mirror"}, "constant or reflect or edge"),
        ("RandomCrop", {"padding": 2, "fill": 255}, "from 0 (black) to 1 (white)"),
        ("RandomAffine", {}, "degrees is missing"),
        ("RandomAffine", {"degrees": -5}, "degrees=-5 should be"),
        ("RandomAffine", {"degrees": [5, -5]}, "degrees=[5, -5] should be"),
        ("RandomAffine", {"degrees": 5, "translate": [0.1, 1.5]}, "two numbers [x, y] from 0 to 1"),
        ("RandomAffine", {"degrees": 5, "translate": 0.1}, "two numbers [x, y] from 0 to 1"),
        ("RandomAffine", {"degrees": 5, "scale": [1.2, 0.8]}, "scale=[1.2, 0.8] should be"),
        ("RandomAffine", {"degrees": 5, "scale": [0, 1]}, "above 0"),
        ("RandomAffine", {"degrees": 5, "shear": 90}, "from 0 to 89"),
        ("RandomAffine", {"degrees": 5, "interpolation": "cubic"}, "bilinear or nearest"),
        ("RandomErasing", {"scale": [0.5, 1.5]}, "scale=[0.5, 1.5] should be"),
        ("RandomErasing", {"ratio": [0, 1]}, "ratio=[0, 1] should be"),
        ("RandomErasing", {"value": "noise"}, "or random"),
        ("RandomErasing", {"value": [0, 0, 0]}, "one for each channel"),
        ("RandomResizedCrop", {"scale": [0.9, 0.1]}, "scale=[0.9, 0.1] should be"),
        ("ColorJitter", {"hue": 0.6}, "a number from 0 to 0.5"),
        ("ColorJitter", {"brightness": -1}, "a number >= 0"),
        ("ColorJitter", {"contrast": [2, 1]}, "two numbers [low, high] from 0"),
        ("RandomAdjustSharpness", {"sharpness_factor": -1}, "a number >= 0"),
        ("RandomAdjustSharpness", {}, "sharpness_factor is missing"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build([(name, arguments)], image_size=28, channels=1)
    assert says in caught.value.what and caught.value.what.startswith(name)
    assert caught.value.fix == f"{name} takes {', '.join(AUGMENTS[name].rules)}"


def test_all_problems_at_once_in_few_lines() -> None:
    ops: list[tuple[str, dict[str, Any]]] = [
        ("RandomHorizontalFlop", {}),
        ("RandomCrop", {"padding": -1, "fil": 0}),
        ("RandomErasing", {"p": 2, "scale": [1, 0], "ratio": 3, "value": 7}),
    ]
    with pytest.raises(UsageError) as caught:
        build(ops)
    text = str(caught.value)
    assert "did you mean RandomHorizontalFlip" in text and "did you mean fill?" in text
    assert "padding=-1" in text and "and 2 more" in text
    assert "RandomErasing takes p, scale, ratio, value" in text
    assert len(text.splitlines()) <= 5


def test_colours_of_three_channels_on_grey_images_are_refused() -> None:
    with pytest.raises(UsageError, match="3 values for images of 1 channel"):
        geometry.random_crop(pictures(2, 1), seeded(), padding=1, fill=[0.1, 0.2, 0.3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@names
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_cuda_with_either_generator(name: str, where: str) -> None:
    images = pictures(16, 3, 32, 32)
    generator = torch.Generator(where).manual_seed(0)
    result = AUGMENTS[name](images.cuda(), generator, **STRONG[name])
    assert result.is_cuda and result.shape == images.shape
    if where == "cpu":
        expected = AUGMENTS[name](images, seeded(0), **STRONG[name])
        torch.testing.assert_close(result.cpu(), expected, atol=1e-4, rtol=0)
