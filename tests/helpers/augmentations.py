"""Settings, images and comparisons for the tests of augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A strong setting of every operation in `pipeline.AUGMENTS`.
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
    "AlternatingFlip": {},
    "Cutout": {"size": 6, "p": 0.8, "value": [0.2, 0.4, 0.6]},
    "TrivialAugmentWide": {},
    "RandAugment": {"num_ops": 3, "magnitude": 20, "interpolation": "bilinear"},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 12, channels: int = 3, height: int = 17, width: int = 22) -> Tensor:
    """Noise with pure black, white and grey areas (where the hue is undefined)."""
    images = torch.rand(n, channels, height, width, generator=seeded(1))
    images[:, :, :4, :5] = 0.0
    images[:, :, 4:7, :5] = 1.0
    images[:, :, 7:9, :5] = 0.4
    if channels == 3:
        images[:, :2, 9:11, :5] = 0.7  # two channels share the maximum
    return images


def compare(batched: Tensor, images: Tensor, slow: Callable[[Tensor, int], Tensor]) -> None:
    """Assert that each image of `batched` equals the slow operation on that image alone."""
    expected = torch.stack([slow(image, i) for i, image in enumerate(images)])
    torch.testing.assert_close(batched, expected, atol=2e-5, rtol=0)
