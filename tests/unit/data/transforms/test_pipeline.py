"""Properties of all augmentations, and pipelines of several."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from convlens.data.transforms import geometry
from convlens.data.transforms.pipeline import AUGMENTS, MIXES, RuleContext, build_pipeline
from convlens.data.transforms.random import SampleInfo
from helpers.augmentations import STRONG, pictures, seeded

UNKNOWN_TO_TORCHVISION = {"AlternatingFlip", "Cutout"}
# Settings with which an operation must not change any image.
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


def apply(name: str, images: Tensor, seed: int = 0, **arguments: Any) -> Tensor:
    """Apply one operation; all random numbers depend on `seed` only."""
    sample_info = SampleInfo(torch.arange(len(images), device=images.device), epoch=1, seed=seed)
    return AUGMENTS[name](images, seeded(seed), sample_info, **arguments)


def run(pipeline: Any, images: Tensor, seed: int = 0) -> Tensor:
    """Apply a pipeline that keeps the labels."""
    labels = torch.arange(len(images))
    result, same = pipeline(images, labels, SampleInfo(labels, epoch=1, seed=seed), seeded(seed))
    assert torch.equal(same, labels)
    return result


# Every operation of the table


@names
@pytest.mark.parametrize(("n", "channels", "size"), [(1, 1, 8), (1, 3, 8), (7, 1, 28), (7, 3, 32)])
def test_shape_dtype_and_range_are_kept(name: str, n: int, channels: int, size: int) -> None:
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
def test_each_image_gets_its_own_random_numbers(name: str) -> None:
    images = pictures(1, 3, 16, 16).expand(40, -1, -1, -1)
    result = apply(name, images, **STRONG[name])
    assert len(result.flatten(1).unique(dim=0)) > 1


@names
def test_no_value_is_read_from_the_device(name: str) -> None:
    """Reading a value of a meta tensor raises an error."""
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
def test_names_and_arguments_equal_torchvisions(name: str) -> None:
    if name in UNKNOWN_TO_TORCHVISION:
        assert not hasattr(v2, name)
        return
    torchvision_arguments = set(inspect.signature(getattr(v2, name)).parameters)
    added = {"p"} if name in MIXES else set()
    assert set({**AUGMENTS, **MIXES}[name].rules) <= torchvision_arguments | added


# Probabilities


def test_probabilities() -> None:
    """Share of changed images: none at 0, all at 1, about 30% at 0.3 (4 standard errors)."""
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


def test_box_that_never_fits_is_not_erased() -> None:
    images = pictures(5)
    assert torch.equal(apply("RandomErasing", images, p=1, scale=[1, 1], value=0.5), images)


# Pipelines


def test_pipeline_applies_operations_in_order() -> None:
    images = pictures(4, 3, 16, 16)
    ops: list[tuple[str, dict[str, Any]]] = [
        ("RandomAffine", STRONG["RandomAffine"]),
        ("RandomHorizontalFlip", {}),
    ]
    result = run(build_pipeline(ops, image_size=16, channels=3), images, seed=5)
    g = seeded(5)
    expected = geometry.random_affine(images, g, **STRONG["RandomAffine"])
    assert torch.equal(result, geometry.random_horizontal_flip(expected, g))


def test_empty_pipeline_is_the_identity() -> None:
    images = pictures(2)
    assert torch.equal(run(build_pipeline([]), images), images)


def test_every_strong_and_identity_setting_builds() -> None:
    assert set(STRONG) == set(AUGMENTS) == set(IDENTITY) | ALWAYS_CHANGING
    build_pipeline(list(STRONG.items()), image_size=32, channels=3)
    build_pipeline(list(IDENTITY.items()), image_size=32, channels=1)


@pytest.mark.gpu
@names
@pytest.mark.parametrize("generator_device", ["cpu", "cuda"])
def test_on_cuda_with_either_generator(name: str, generator_device: str) -> None:
    images = pictures(16, 3, 32, 32)
    sample_info = SampleInfo(torch.arange(16, device="cuda"), epoch=1, seed=0)
    generator = torch.Generator(generator_device).manual_seed(0)
    result = AUGMENTS[name](images.cuda(), generator, sample_info, **STRONG[name])
    assert result.is_cuda
    assert result.shape == images.shape
    if (
        generator_device == "cpu" and "Augment" not in name
    ):  # these round, possibly to the other side
        torch.testing.assert_close(
            result.cpu(), apply(name, images, **STRONG[name]), atol=1e-4, rtol=0
        )


@pytest.mark.gpu
def test_pipeline_never_synchronizes_with_the_device() -> None:
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
