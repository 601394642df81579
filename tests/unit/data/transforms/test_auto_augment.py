"""TrivialAugment and RandAugment against torchvision's operation on one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from convlens.data.transforms import auto_augment
from convlens.data.transforms.auto_augment import (
    N_SIGNED,
    NARROW,
    OPERATIONS,
    WIDE,
    OpAssignment,
    PolicySpace,
)
from helpers.augmentations import seeded

SPACES = [(WIDE, v2.TrivialAugmentWide), (NARROW, v2.RandAugment)]
KINDS = len(OPERATIONS)
SHEARS_AND_TURNS = ("ShearX", "ShearY", "Rotate")


def pictures(n: int = 28, channels: int = 3, height: int = 18, width: int = 22) -> Tensor:
    """Bytes scaled to 0..1: flat areas, noise, an image and a channel of a single value."""
    images = torch.randint(0, 256, (n, channels, height, width), generator=seeded(1)).float()
    images[:, :, :4, :5] = 0.0
    images[:, :, 4:7, :5] = 255.0
    images[::2] = images[::2] * 0.3 + 40  # a narrow range, for stretching
    images[1] = 77.0
    images[2, 0] = 200.0
    return images.round() / 255


def moved(image: Tensor, mode: str, **arguments: Any) -> Tensor:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return reference.affine(image, **{**still, **arguments}, interpolation=mode, fill=None)


def in_bytes(change: Callable[..., Tensor], image: Tensor, *arguments: Any) -> Tensor:
    return change((image * 255).round().to(torch.uint8), *arguments).float() / 255


SLOW: dict[str, Callable[[Tensor, float, str], Tensor]] = {
    "ShearX": lambda x, m, mode: moved(
        x, mode, shear=[math.degrees(math.atan(m)), 0.0], center=[0, 0]
    ),
    "ShearY": lambda x, m, mode: moved(
        x, mode, shear=[0.0, math.degrees(math.atan(m))], center=[0, 0]
    ),
    "TranslateX": lambda x, m, mode: moved(x, mode, translate=[int(m), 0]),
    "TranslateY": lambda x, m, mode: moved(x, mode, translate=[0, int(m)]),
    "Rotate": lambda x, m, mode: reference.rotate(x, m, mode, fill=None),
    "Brightness": lambda x, m, _: reference.adjust_brightness(x, 1 + m),
    "Color": lambda x, m, _: reference.adjust_saturation(x, 1 + m),
    "Contrast": lambda x, m, _: reference.adjust_contrast(x, 1 + m),
    "Sharpness": lambda x, m, _: reference.adjust_sharpness(x, 1 + m),
    "Posterize": lambda x, m, _: in_bytes(reference.posterize, x, int(m)),
    "Solarize": lambda x, m, _: reference.solarize(x, m),
    "AutoContrast": lambda x, m, _: reference.autocontrast(x),
    "Equalize": lambda x, m, _: in_bytes(reference.equalize, x),
    "Identity": lambda x, m, _: x,
}


def assigned(drawn: OpAssignment, count: int) -> list[tuple[str, float]]:
    """Return the operation and the magnitude of each image."""
    share = drawn.magnitudes.shape[1]
    positions = {int(image): position for position, image in enumerate(drawn.order.tolist())}
    flat = drawn.magnitudes.flatten()
    return [(OPERATIONS[positions[i] // share], float(flat[positions[i]])) for i in range(count)]


# Strengths


@pytest.mark.parametrize(("space", "torchvision_class"), SPACES)
@pytest.mark.parametrize("bins", [2, 5, 10, 31, 33])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 224)])
def test_operations_and_strengths_equal_torchvisions(
    space: PolicySpace, torchvision_class: Any, bins: int, height: int, width: int
) -> None:
    table = auto_augment.magnitudes(space, bins, height, width, torch.device("cpu"))
    listed = torchvision_class._AUGMENTATION_SPACE
    assert set(listed) == set(OPERATIONS) == set(SLOW)
    for number, (name, magnitudes) in enumerate(zip(OPERATIONS, table, strict=True)):
        strengths, signed = listed[name]
        assert signed == (number < N_SIGNED), name
        expected = strengths(bins, height, width)
        assert torch.equal(
            magnitudes, torch.zeros(bins) if expected is None else expected.float()
        ), name


@pytest.mark.parametrize("space", [WIDE, NARROW])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_assigned_operations_equal_torchvisions(
    space: PolicySpace, channels: int, mode: str
) -> None:
    images = pictures(140, channels)
    (drawn,) = auto_augment.assign_operations(images, seeded(3), space=space, bins=31)
    result = auto_augment.apply_assignment(images, drawn, interpolation=mode, fill=0.0)
    expected = torch.stack(
        [
            SLOW[name](image, magnitude, mode)
            for image, (name, magnitude) in zip(images, assigned(drawn, 140), strict=True)
        ]
    )
    for i, (name, magnitude) in enumerate(assigned(drawn, 140)):
        close = (result[i] - expected[i]).abs() < 2e-5
        # A pixel center on the border of two pixels may be rounded either way.
        least = 0.97 if mode == "nearest" and name in SHEARS_AND_TURNS else 1.0
        assert close.float().mean() >= least, (name, magnitude)


def test_fill_is_the_color_outside() -> None:
    images = pictures(70, 3, 16, 16)
    (drawn,) = auto_augment.assign_operations(images, seeded(3), space=WIDE, bins=31)
    fill = [0.25, 0.5, 0.75]
    result = auto_augment.apply_assignment(images, drawn, interpolation="nearest", fill=fill)
    shifts = [
        (i, int(m)) for i, (name, m) in enumerate(assigned(drawn, 70)) if name == "TranslateX"
    ]
    assert len(shifts) == 5
    for i, shift in shifts:
        slow = reference.affine(images[i], 0.0, [shift, 0], 1.0, [0.0, 0.0], fill=fill)
        torch.testing.assert_close(result[i], slow)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_applies_its_assignments_in_order(magnitude: int) -> None:
    images = pictures(30)
    arguments: dict[str, Any] = {"space": NARROW, "bins": 31, "count": 3, "magnitude": magnitude}
    expected = images
    for drawn in auto_augment.assign_operations(images, seeded(5), **arguments):
        expected = auto_augment.apply_assignment(
            expected, drawn, interpolation="bilinear", fill=0.1
        )
        strengths = auto_augment.magnitudes(NARROW, 31, 18, 22, torch.device("cpu"))[:, magnitude]
        assert torch.equal(drawn.magnitudes.abs(), strengths[:, None].expand(-1, 3))
    result = auto_augment.rand_augment(
        images, seeded(5), num_ops=3, magnitude=magnitude, interpolation="bilinear", fill=0.1
    )
    assert torch.equal(result, expected)


# Assignment of operations


def test_operations_have_equal_shares_and_uniform_strengths() -> None:
    images = torch.zeros(KINDS * 300, 1, 1, 32)
    (drawn,) = auto_augment.assign_operations(images, seeded(), space=WIDE, bins=11)
    names = [name for name, _ in assigned(drawn, len(images))]
    assert {names.count(name) for name in OPERATIONS} == {300}
    assert names[:KINDS] != sorted(names[:KINDS], key=OPERATIONS.index)
    shifts = drawn.magnitudes[OPERATIONS.index("TranslateX")]
    assert abs(float((shifts < 0).float().mean()) - 10 / 22) < 0.1
    seen = torch.bincount((shifts.abs() / 3.2).round().long(), minlength=11)
    assert (seen - 300 / 11).abs().max() < 22
    assert drawn.magnitudes[N_SIGNED:].min() >= 0


def test_single_image_gets_each_operation_equally_often() -> None:
    images, g = torch.zeros(1, 3, 4, 4), seeded()
    seen = [
        assigned(auto_augment.assign_operations(images, g, space=WIDE, bins=31)[0], 1)[0][0]
        for _ in range(1400)
    ]
    counts = [seen.count(name) for name in OPERATIONS]
    assert max(abs(count - 100) for count in counts) < 45


@pytest.mark.parametrize("n", [1, 2, 13, 14, 15, 29])
def test_any_batch_size_is_augmented(n: int) -> None:
    images = pictures(30)[:n]
    for apply in (auto_augment.trivial_augment_wide, auto_augment.rand_augment):
        assert apply(images, seeded()).shape == images.shape
