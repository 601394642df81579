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

from convlens.data.transforms import auto_augment, color
from convlens.data.transforms.auto_augment import (
    NARROW,
    OPERATIONS,
    N_SIGNED,
    WIDE,
    OpAssignment,
    PolicySpace,
)

SPACES = [(WIDE, v2.TrivialAugmentWide), (NARROW, v2.RandAugment)]
KINDS = len(OPERATIONS)
SHEARS_AND_TURNS = ("ShearX", "ShearY", "Rotate")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 28, channels: int = 3, height: int = 18, width: int = 22) -> Tensor:
    """Bytes as 0..1: flat parts, noise, an image of one value, a channel of one value."""
    images = torch.randint(0, 256, (n, channels, height, width), generator=seeded(1)).float()
    images[:, :, :4, :5] = 0.0
    images[:, :, 4:7, :5] = 255.0
    images[::2] = images[::2] * 0.3 + 40  # a narrow range, for stretching
    images[1] = 77.0
    images[2, 0] = 200.0
    return images.round() / 255


def moved(image: Tensor, mode: str, **how: Any) -> Tensor:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return reference.affine(image, **{**still, **how}, interpolation=mode, fill=None)


def in_bytes(change: Callable[..., Tensor], image: Tensor, *how: Any) -> Tensor:
    return change((image * 255).round().to(torch.uint8), *how).float() / 255


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


def dealt(drawn: OpAssignment, count: int) -> list[tuple[str, float]]:
    """The operation and the magnitude of each image."""
    share = drawn.magnitudes.shape[1]
    seats = {int(image): seat for seat, image in enumerate(drawn.order.tolist())}
    flat = drawn.magnitudes.flatten()
    return [(OPERATIONS[seats[i] // share], float(flat[seats[i]])) for i in range(count)]


# Strengths


@pytest.mark.parametrize(("space", "theirs"), SPACES)
@pytest.mark.parametrize("bins", [2, 5, 10, 31, 33])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 224)])
def test_operations_and_strengths_are_torchvisions(
    space: PolicySpace, theirs: Any, bins: int, height: int, width: int
) -> None:
    table = auto_augment.magnitudes(space, bins, height, width, torch.device("cpu"))
    listed = theirs._AUGMENTATION_SPACE
    assert set(listed) == set(OPERATIONS) == set(SLOW)
    for number, (name, mine) in enumerate(zip(OPERATIONS, table, strict=True)):
        strengths, signed = listed[name]
        assert signed == (number < N_SIGNED), name
        expected = strengths(bins, height, width)
        assert torch.equal(mine, torch.zeros(bins) if expected is None else expected.float()), name


@pytest.mark.parametrize("space", [WIDE, NARROW])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_each_image_gets_what_torchvision_makes_of_it(
    space: PolicySpace, channels: int, mode: str
) -> None:
    images = pictures(140, channels)
    (drawn,) = auto_augment.assign_operations(images, seeded(3), space=space, bins=31)
    result = auto_augment.apply_assignment(images, drawn, interpolation=mode, fill=0.0)
    expected = torch.stack(
        [
            SLOW[name](image, magnitude, mode)
            for image, (name, magnitude) in zip(images, dealt(drawn, 140), strict=True)
        ]
    )
    for i, (name, magnitude) in enumerate(dealt(drawn, 140)):
        close = (result[i] - expected[i]).abs() < 2e-5
        # A pixel centre that falls on the border of two pixels may go either way.
        fine = 0.97 if mode == "nearest" and name in SHEARS_AND_TURNS else 1.0
        assert close.float().mean() >= fine, (name, magnitude)


def test_the_colour_outside() -> None:
    images = pictures(70, 3, 16, 16)
    (drawn,) = auto_augment.assign_operations(images, seeded(3), space=WIDE, bins=31)
    fill = [0.25, 0.5, 0.75]
    result = auto_augment.apply_assignment(images, drawn, interpolation="nearest", fill=fill)
    shifts = [(i, int(m)) for i, (name, m) in enumerate(dealt(drawn, 70)) if name == "TranslateX"]
    assert len(shifts) == 5
    for i, shift in shifts:
        slow = reference.affine(images[i], 0.0, [shift, 0], 1.0, [0.0, 0.0], fill=fill)
        torch.testing.assert_close(result[i], slow)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_is_its_deals_in_a_row(magnitude: int) -> None:
    images = pictures(30)
    how: dict[str, Any] = {"space": NARROW, "bins": 31, "count": 3, "magnitude": magnitude}
    expected = images
    for drawn in auto_augment.assign_operations(images, seeded(5), **how):
        expected = auto_augment.apply_assignment(
            expected, drawn, interpolation="bilinear", fill=0.1
        )
        strengths = auto_augment.magnitudes(NARROW, 31, 18, 22, torch.device("cpu"))[:, magnitude]
        assert torch.equal(drawn.magnitudes.abs(), strengths[:, None].expand(-1, 3))
    result = auto_augment.rand_augment(
        images, seeded(5), num_ops=3, magnitude=magnitude, interpolation="bilinear", fill=0.1
    )
    assert torch.equal(result, expected)


# What is dealt


def test_operations_are_dealt_in_equal_shares_and_strengths_uniformly() -> None:
    images = torch.zeros(KINDS * 300, 1, 1, 32)
    (drawn,) = auto_augment.assign_operations(images, seeded(), space=WIDE, bins=11)
    names = [name for name, _ in dealt(drawn, len(images))]
    assert {names.count(name) for name in OPERATIONS} == {300}
    assert names[:KINDS] != sorted(names[:KINDS], key=OPERATIONS.index)
    shifts = drawn.magnitudes[OPERATIONS.index("TranslateX")]
    assert abs(float((shifts < 0).float().mean()) - 10 / 22) < 0.1
    seen = torch.bincount((shifts.abs() / 3.2).round().long(), minlength=11)
    assert (seen - 300 / 11).abs().max() < 22
    assert drawn.magnitudes[N_SIGNED:].min() >= 0


def test_one_image_meets_every_operation_alike() -> None:
    images, g = torch.zeros(1, 3, 4, 4), seeded()
    seen = [
        dealt(auto_augment.assign_operations(images, g, space=WIDE, bins=31)[0], 1)[0][0]
        for _ in range(1400)
    ]
    counts = [seen.count(name) for name in OPERATIONS]
    assert max(abs(count - 100) for count in counts) < 45


@pytest.mark.parametrize("n", [1, 2, 13, 14, 15, 29])
def test_any_number_of_images(n: int) -> None:
    images = pictures(30)[:n]
    for apply in (auto_augment.trivial_augment_wide, auto_augment.rand_augment):
        assert apply(images, seeded()).shape == images.shape


# Tones, by hand


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
    # Half of 1024 pixels lie below 20: (512 + 1) // 2 = 256, cut to 255; none lies below 10.
    assert found[0, 0].unique().tolist() == [0, 255]
    assert (found[0, 1] == 10).all()


def test_equalize_of_values_between_bytes() -> None:
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
