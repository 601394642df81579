"""Augmentations: what holds for all of them, and what they draw."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from convlens.data.transforms import color, geometry
from convlens.data.transforms.pipeline import AUGMENTS, MIXES, RuleContext, build_pipeline
from convlens.data.transforms.random import SampleInfo
from convlens.errors import UsageError
from helpers.augmentations import STRONG

UNKNOWN_TO_TORCHVISION = {"AlternatingFlip", "Cutout"}
# Settings under which an operation must leave every image as it is, where there are any.
ALWAYS_CHANGING = {"AlternatingFlip", "TrivialAugmentWide", "RandAugment"}
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
    "Cutout": {"size": 8, "p": 0},
}
names = pytest.mark.parametrize("name", list(AUGMENTS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(name: str, images: Tensor, seed: int = 0, **arguments: Any) -> Tensor:
    """One operation; nothing that it draws or goes by depends on anything but `seed`."""
    place = SampleInfo(torch.arange(len(images), device=images.device), epoch=1, seed=seed)
    return AUGMENTS[name](images, seeded(seed), place, **arguments)


def run(pipeline: Any, images: Tensor, seed: int = 0) -> Tensor:
    """The images of a pipeline that leaves the labels alone."""
    labels = torch.arange(len(images))
    result, same = pipeline(images, labels, SampleInfo(labels, epoch=1, seed=seed), seeded(seed))
    assert torch.equal(same, labels)
    return result


def pictures(n: int = 12, channels: int = 3, height: int = 17, width: int = 22) -> Tensor:
    """Smooth shapes plus noise, with pure black, white and grey parts (hue is undefined there)."""
    images = torch.rand(n, channels, height, width, generator=seeded(1))
    images[:, :, :4, :5] = 0.0
    images[:, :, 4:7, :5] = 1.0
    images[:, :, 7:9, :5] = 0.4
    if channels == 3:
        images[:, :2, 9:11, :5] = 0.7  # two channels share the maximum
    return images


# Every operation of the table


@names
@pytest.mark.parametrize(("n", "channels", "size"), [(1, 1, 8), (1, 3, 8), (7, 1, 28), (7, 3, 32)])
def test_shape_type_and_range_stay(name: str, n: int, channels: int, size: int) -> None:
    images = pictures(n, channels, size, size)
    before = images.clone()
    strong = {**STRONG[name], **({"value": 0.5} if "value" in STRONG[name] else {})}
    result = apply(name, images, **strong)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before), "the input was changed"


@names
def test_same_generator_state_same_result(name: str) -> None:
    images = pictures(32, 3, 16, 16)
    first = apply(name, images, 3, **STRONG[name])
    assert torch.equal(first, apply(name, images, 3, **STRONG[name]))
    assert not torch.equal(first, apply(name, images, 4, **STRONG[name]))


@names
def test_memory_layout_does_not_matter(name: str) -> None:
    images = pictures(8, 3, 16, 16)
    expected = apply(name, images, **STRONG[name])
    turned = images.to(memory_format=torch.channels_last)
    result = apply(name, turned, **STRONG[name])
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(set(AUGMENTS) - ALWAYS_CHANGING))
def test_identity_settings_change_nothing(name: str) -> None:
    images = pictures(9, 3, 16, 16)
    result = apply(name, images, **IDENTITY[name])
    torch.testing.assert_close(result, images, atol=1e-6, rtol=0)


@names
def test_images_get_numbers_of_their_own(name: str) -> None:
    images = pictures(1, 3, 16, 16).expand(40, -1, -1, -1)
    result = apply(name, images, **STRONG[name])
    assert len(result.flatten(1).unique(dim=0)) > 1


@names
def test_nothing_is_read_from_the_device(name: str) -> None:
    """A tensor without values can't be waited for: where a number is read off it, torch refuses."""
    images = torch.empty(20, 3, 16, 16, device="meta")
    result = apply(name, images, **STRONG[name])
    assert result.shape == images.shape
    assert result.device == images.device


@pytest.mark.parametrize("name", [*AUGMENTS, *MIXES])
def test_rules_cover_exactly_the_arguments(name: str) -> None:
    entry = {**AUGMENTS, **MIXES}[name]
    parameters = inspect.signature(entry.apply).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in keywords] == list(entry.rules)
    for p in keywords:
        assert p.default is p.empty or not entry.rules[p.name](p.default, RuleContext())


@pytest.mark.parametrize("name", [*AUGMENTS, *MIXES])
def test_names_and_arguments_are_torchvisions(name: str) -> None:
    if name in UNKNOWN_TO_TORCHVISION:
        assert not hasattr(v2, name)
        return
    theirs = set(inspect.signature(getattr(v2, name)).parameters)
    added = {"p"} if name in MIXES else set()
    assert set({**AUGMENTS, **MIXES}[name].rules) <= theirs | added


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
        ("Cutout", {"size": 2, "value": 0.123}),
    ):
        for p in (0, 0.3, 1):
            result = apply(name, images, p=p, **extra)
            touched = (result != images).flatten(1).any(1).float().mean().item()
            assert abs(touched - p) <= 4 * math.sqrt(p * (1 - p) / 2000), (name, p, touched)


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


def test_erasing_that_never_fits_is_left_out() -> None:
    images = pictures(5)
    assert torch.equal(apply("RandomErasing", images, p=1, scale=[1, 1], value=0.5), images)


def test_erasing_with_noise_fills_the_range() -> None:
    images = torch.full((200, 1, 16, 16), 2.0)  # a value that no noise can have
    noisy = color.random_erasing(images, seeded(), p=1, value="random")
    drawn = noisy[noisy < 2]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02


def test_resized_crop_ranges_and_fallback() -> None:
    images = torch.zeros(2000, 1, 100, 100)
    boxes = geometry.draw_resized_crop(images, seeded(), scale=(0.3, 0.6), ratio=(0.75, 4 / 3))
    area = boxes.height * boxes.width / 10_000
    assert area.min() > 0.29
    assert area.max() < 0.61
    assert abs(area.mean() - 0.45) < 0.01
    never = geometry.draw_resized_crop(images, seeded(), scale=(1, 1), ratio=(2, 2))
    assert [int(v[0]) for v in never] == [25, 0, 50, 100]  # the largest central one of ratio 2


# Pipelines


def test_build_applies_in_order() -> None:
    images = pictures(4, 3, 16, 16)
    ops: list[tuple[str, dict[str, Any]]] = [
        ("RandomAffine", STRONG["RandomAffine"]),
        ("RandomHorizontalFlip", {}),
    ]
    result = run(build_pipeline(ops, image_size=16, channels=3), images, seed=5)
    g = seeded(5)
    expected = geometry.random_affine(images, g, **STRONG["RandomAffine"])
    assert torch.equal(result, geometry.random_horizontal_flip(expected, g))


def test_an_empty_pipeline_is_the_identity() -> None:
    images = pictures(2)
    assert torch.equal(run(build_pipeline([]), images), images)


def test_every_strong_and_identity_setting_builds() -> None:
    assert set(STRONG) == set(AUGMENTS) == set(IDENTITY) | ALWAYS_CHANGING
    build_pipeline(list(STRONG.items()), image_size=32, channels=3)
    build_pipeline(list(IDENTITY.items()), image_size=32, channels=1)


def test_colours_of_three_channels_on_grey_images_are_refused() -> None:
    with pytest.raises(UsageError, match="3 values for images of 1 channel"):
        geometry.random_crop(pictures(2, 1), seeded(), padding=1, fill=[0.1, 0.2, 0.3])


@pytest.mark.gpu
@names
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_cuda_with_either_generator(name: str, where: str) -> None:
    images = pictures(16, 3, 32, 32)
    place = SampleInfo(torch.arange(16, device="cuda"), epoch=1, seed=0)
    generator = torch.Generator(where).manual_seed(0)
    result = AUGMENTS[name](images.cuda(), generator, place, **STRONG[name])
    assert result.is_cuda
    assert result.shape == images.shape
    if where == "cpu" and "Augment" not in name:  # those round, and so may fall on either side
        torch.testing.assert_close(
            result.cpu(), apply(name, images, **STRONG[name]), atol=1e-4, rtol=0
        )


@pytest.mark.gpu
def test_a_pipeline_never_waits_for_the_device() -> None:
    ops = [*STRONG.items(), *((name, {}) for name in MIXES)]
    pipeline = build_pipeline(ops, image_size=32, channels=3, classes=10)
    images = pictures(40, 3, 32, 32).cuda()
    labels = torch.arange(40, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    pipeline(images, labels % 10, SampleInfo(labels, 1, 0), generator)  # constants are sent once
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline(images, labels % 10, SampleInfo(labels, 2, 0), generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
